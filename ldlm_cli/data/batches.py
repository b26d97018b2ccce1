"""Which texts are trained on in which step: the order is a pure function of (split, settings, seed, step).

Legend: B rows of a batch, N tokens of a row. Every draw has an address of integers, so a resumed run, or a run on
another number of processes, sees the same batches.
"""

from dataclasses import dataclass

import numpy as np

from ldlm_cli.data.shards import TokenSplit
from ldlm_cli.errors import DataError, UsageError

_CLASS_ORDER, _BATCH_ORDER, _CROP, _PHASE, _WINDOW_ORDER = range(5)  # what a random stream is for
_ROW_MULTIPLE = 8


@dataclass(frozen=True)
class Batch:
    """Token ids [B, N] int64 and mask [B, N] bool; True marks a token of the text (EOS included), False padding."""

    token_ids: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class _Plan:
    """One epoch: batch b holds the rows first[b] .. first[b] + rows[b] - 1; row r is `take[r]` ids from `start[r]`."""

    first: np.ndarray
    rows: np.ndarray
    start: np.ndarray
    take: np.ndarray


class BatchOrder:
    """The batches of a split, epoch after epoch.

    Packing "document": a text is a row; one longer than the window is cropped at a place drawn per (seed, epoch,
    document). Rows of similar length share a batch, so B varies: about batch_tokens / N rows. Texts that do not fill a
    batch of their length class join the next longer class; of the longest class the rest sits this epoch out.
    Packing "pack": the stream of texts joined by EOS is cut into full rows, from a place drawn per (seed, epoch); the
    end of the stream is joined to its start, so no token is left out for good.

    Attributes:
        steps_per_epoch: batches of an epoch, the same for every epoch.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        window_tokens: int,
        batch_tokens: int,
        packing: str,
        seed: int,
        pad_id: int,
        first_step: int = 0,
    ) -> None:
        """Lay out the epochs.

        Args:
            split: the documents.
            window_tokens: longest row, tokens, >= 1.
            batch_tokens: tokens of a batch, padding included; a batch has at least one row.
            packing: "document" or "pack".
            seed: >= 0.
            pad_id: id written where the mask is False.
            first_step: steps of this order that an earlier stage has taken; batch 0 is the one after them.
        Raises:
            DataError: the corpus does not fill one batch.
            UsageError: a setting out of range.
        """
        if packing not in ("document", "pack"):
            raise UsageError(f"data.packing is 'document' or 'pack', not '{packing}'.")
        if window_tokens < 1 or batch_tokens < 1 or seed < 0:
            raise UsageError(
                f"Batches need a window and a size of at least 1 token and a seed of at least 0, not {window_tokens}, "
                f"{batch_tokens} and {seed}."
            )
        self._stream, self._offsets, self._lengths = split.stream, split.offsets, split.lengths
        self._window, self._packing, self._seed, self._pad_id = window_tokens, packing, seed, pad_id
        self._first_step = first_step
        self._cached: tuple[int, _Plan] | None = None
        if packing == "pack":
            self._widths = np.array([window_tokens])
            self._class_rows = np.maximum(1, batch_tokens // self._widths)
            self._num_windows = len(split.stream) // window_tokens
            self.steps_per_epoch = int(self._num_windows // self._class_rows[0])
        else:
            self._widths = _class_widths(window_tokens)
            self._class_rows = np.maximum(1, batch_tokens // self._widths)
            classes = np.searchsorted(self._widths, np.minimum(self._lengths, window_tokens))
            self._members = [np.flatnonzero(classes == number) for number in range(len(self._widths))]
            self.steps_per_epoch = len(self._batch_sizes())
        if self.steps_per_epoch == 0:
            size = f"{self._class_rows[-1]} rows of {window_tokens} tokens"
            raise DataError(
                f"The corpus ({split.num_documents} documents, {len(split.stream)} tokens) is shorter than one batch "
                f"({size}): lower stages.<name>.batch_tokens or add text."
            )

    def batch_at(self, step: int) -> Batch:
        """Return the batch of optimizer step `step` (>= 0, counted over all epochs, after `first_step`).

        N is the longest row, rounded up to a multiple of 8 but not beyond the window; padding ends a row.
        """
        epoch, number = divmod(self._first_step + step, self.steps_per_epoch)
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._pack_plan(epoch) if self._packing == "pack" else self._document_plan(epoch))
        plan = self._cached[1]
        rows = slice(int(plan.first[number]), int(plan.first[number] + plan.rows[number]))
        start, take = plan.start[rows], plan.take[rows]
        width = min(-(-int(take.max()) // _ROW_MULTIPLE) * _ROW_MULTIPLE, self._window)
        columns = np.arange(width)
        mask = columns < take[:, None]
        # The modulo joins the end of the stream to its start (pack); where the mask is False any valid place will do.
        places = np.where(mask, (start[:, None] + columns) % len(self._stream), 0)
        token_ids = np.where(mask, self._stream[places].astype(np.int64), self._pad_id)
        return Batch(token_ids, mask)

    def _rng(self, *address: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, *address])))

    def _batch_sizes(self) -> list[int]:
        """Return the rows of each batch, class by class; the same in every epoch as only counts matter."""
        sizes: list[int] = []
        left_over = 0
        for members, rows in zip(self._members, self._class_rows.tolist(), strict=True):
            full, left_over = divmod(len(members) + left_over, rows)
            sizes += [rows] * full
        return sizes

    def _document_plan(self, epoch: int) -> _Plan:
        ordered: list[np.ndarray] = []
        left_over = np.empty(0, dtype=np.int64)
        for number, (members, rows) in enumerate(zip(self._members, self._class_rows.tolist(), strict=True)):
            candidates = np.concatenate([members, left_over])
            candidates = self._rng(epoch, _CLASS_ORDER, number).permutation(candidates)
            used = len(candidates) // rows * rows
            ordered.append(candidates[:used])
            left_over = candidates[used:]
        documents = np.concatenate(ordered)
        sizes = np.array(self._batch_sizes())
        order = self._rng(epoch, _BATCH_ORDER).permutation(len(sizes))
        spare = np.maximum(self._lengths - self._window, 0)
        offsets = np.floor(self._rng(epoch, _CROP).random(len(spare)) * (spare + 1)).astype(np.int64)
        take = np.minimum(self._lengths, self._window)[documents]
        start = (self._offsets[:-1] + offsets)[documents]
        return _Plan((np.cumsum(sizes) - sizes)[order], sizes[order], start, take)

    def _pack_plan(self, epoch: int) -> _Plan:
        phase = int(self._rng(epoch, _PHASE).integers(len(self._stream)))
        order = self._rng(epoch, _WINDOW_ORDER).permutation(self._num_windows)
        rows = np.full(self.steps_per_epoch, int(self._class_rows[0]))
        take = np.full(self._num_windows, self._window)
        return _Plan(np.cumsum(rows) - rows, rows, phase + order * self._window, take)


def held_out_windows(split: TokenSplit, length: int, count: int, pad_id: int) -> tuple[Batch, str]:
    """Return up to `count` windows of exactly `length` tokens for evaluation, spread evenly over the split.

    Returns:
        The batch [B, length], all True (so `pad_id` stands nowhere in it), and its kind: "document" when the rows are
        the beginnings of documents that have at least `length` tokens, "packed" when there are fewer than
        max(4, count / 8) of those and the rows are cut from the documents joined by EOS. Draws no randomness.
    Raises:
        DataError: the whole split has fewer than `length` tokens.
    """
    if length < 1 or count < 1:
        raise UsageError(f"Held-out windows need a length and a count of at least 1, not {length} and {count}.")
    starts, kind = split.offsets[:-1][split.lengths >= length], "document"
    if len(starts) < max(4, count / 8):
        starts, kind = np.arange(len(split.stream) // length) * length, "packed"
    if len(starts) == 0:
        raise DataError(
            f"The {split.name} split has {len(split.stream)} tokens, fewer than one window of {length}: "
            "ask for a shorter length or add text."
        )
    num_rows = min(count, len(starts))
    chosen = starts[np.arange(num_rows) * len(starts) // num_rows]
    token_ids = np.asarray(split.stream[chosen[:, None] + np.arange(length)], dtype=np.int64)
    return Batch(token_ids, np.ones_like(token_ids, dtype=bool)), kind


def first_texts(split: TokenSplit, count: int, window_tokens: int, pad_id: int) -> Batch:
    """Return the first `count` documents of a split (or all it has), cut at the window; draws no randomness."""
    lengths = np.minimum(split.lengths[:count], window_tokens)
    columns = np.arange(int(lengths.max()))
    mask = columns < lengths[:, None]
    places = np.where(mask, split.offsets[:-1][:count, None] + columns, 0)
    return Batch(np.where(mask, split.stream[places].astype(np.int64), pad_id), mask)


def length_histogram(split: TokenSplit, window_tokens: int, packing: str) -> np.ndarray:
    """Return how many documents have each length, int64 [window_tokens + 1], for drawing the length of new texts.

    Only documents that fit whole (EOS included) count. With packing "pack", or when none fits, all mass is at
    `window_tokens`: full rows are all that training saw.
    """
    counts = np.bincount(split.lengths[split.lengths <= window_tokens], minlength=window_tokens + 1).astype(np.int64)
    if packing == "pack" or counts.sum() == 0:
        counts = np.zeros(window_tokens + 1, dtype=np.int64)
        counts[window_tokens] = split.num_documents
    return counts


def _class_widths(window_tokens: int) -> np.ndarray:
    """Return the padded widths of the length classes: multiples of 16 below 64, then powers of two, then the window."""
    widths = [width for width in (16, 32, 48) if width < window_tokens]
    width = 64
    while width < window_tokens:
        widths.append(width)
        width *= 2
    return np.array([*widths, window_tokens])
