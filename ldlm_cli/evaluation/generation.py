"""What one set of texts is worth: the same numbers for generated texts, held-out texts and naive controls."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldlm_cli.data.batches import held_out_windows
from ldlm_cli.data.shards import TokenSplit
from ldlm_cli.data.story_checker import check_story
from ldlm_cli.data.vocabulary import Vocabulary
from ldlm_cli.evaluation import metrics
from ldlm_cli.evaluation.judge import Judge, TextScore
from ldlm_cli.generate import GeneratedText

MEMORISED_DEFINITION = (
    "share of non-empty texts whose tokens equal a whole training document's, as they are or after white-space "
    "normalisation"
)
NUM_SHOWN = 5
CHUNK_TOKENS = 2**22


@dataclass(frozen=True)
class TextSet:
    """Texts and their native token ids before the first end token; both lists have one entry a text."""

    texts: list[str]
    token_ids: list[list[int]]

    def first(self, count: int) -> TextSet:
        """The first `count` texts."""
        return TextSet(self.texts[:count], self.token_ids[:count])


class TrainingDocuments:
    """Answers which token sequences are whole training documents, reading only documents of the lengths asked for."""

    def __init__(self, split: TokenSplit):
        self._stream = split.stream
        self._starts = np.asarray(split.offsets[:-1])
        self._lengths = np.asarray(split.lengths)

    def contain(self, sequences: Sequence[Sequence[int]]) -> list[bool]:
        """For each sequence (without end token): is it a whole training document? Empty sequences are not."""
        found = [False] * len(sequences)
        by_length: dict[int, dict[bytes, list[int]]] = {}
        for index, ids in enumerate(sequences):
            if len(ids):
                key = np.asarray(ids, dtype=self._stream.dtype).tobytes()
                by_length.setdefault(len(ids), {}).setdefault(key, []).append(index)
        for length, keys in by_length.items():
            starts = self._starts[self._lengths == length + 1]  # + 1: documents end with the end token
            for part in np.array_split(starts, max(1, len(starts) * length // CHUNK_TOKENS)):
                documents = np.ascontiguousarray(self._stream[part[:, None] + np.arange(length)])
                for row in documents:
                    for index in keys.get(row.tobytes(), ()):
                        found[index] = True
        return found


def memorised(texts: TextSet, vocabulary: Vocabulary, training: TrainingDocuments) -> list[bool]:
    """For each text: do its tokens, re-encoded as it is or white-space normalised, equal a training document's?"""
    plain = training.contain(vocabulary.encode(texts.texts))
    normal = training.contain(vocabulary.encode([metrics.normalise_white_space(text) for text in texts.texts]))
    return [a or b for a, b in zip(plain, normal, strict=True)]


def measure_texts(
    texts: TextSet,
    *,
    judge: Judge,
    vocabulary: Vocabulary,
    training: TrainingDocuments,
    stories: bool,
    scores: Sequence[TextScore] | None = None,
) -> dict[str, Any]:
    """All numbers of one set of texts; a number that does not exist for these texts is None.

    Args:
        texts: at least one text.
        judge: gives the perplexities.
        vocabulary: native tokenizer, for the memorised share.
        training: the training documents.
        stories: whether the built-in checker applies; without it the story fields are absent.
        scores: the judge's scores of these texts where they are known; else it is asked.
    """
    scores = judge.score(texts.texts) if scores is None else scores
    nats = [score.nats for score in scores]
    tokens = [score.tokens for score in scores]
    full = [index for index, ids in enumerate(texts.token_ids) if ids]
    copied = memorised(texts, vocabulary, training)
    measured: dict[str, Any] = {
        "num_texts": len(texts.texts),
        "mean_length_tokens": sum(len(ids) for ids in texts.token_ids) / len(texts.token_ids),
        "empty_share": 1 - len(full) / len(texts.token_ids),
        "generative_perplexity": metrics.perplexity(nats, tokens),
        "trimmed_mean_perplexity": metrics.trimmed_mean(metrics.text_perplexities(nats, tokens)),
        "nats_per_judge_token": sum(nats) / sum(tokens),
        "num_judge_tokens": sum(tokens),
        "entropy_nats": metrics.mean_unigram_entropy(texts.token_ids),
        **{f"distinct_{n}": metrics.distinct_n(texts.token_ids, n) for n in (1, 2, 3, 4)},
        "repetition_4": metrics.repetition_n(texts.token_ids, 4),
        "duplicate_share": metrics.duplicate_share(texts.texts),
        "memorised_share": sum(copied[index] for index in full) / len(full) if full else None,
    }
    if stories:
        verdicts = [check_story(text) for text in texts.texts]
        broken = Counter(verdict.broken for verdict in verdicts if verdict.broken is not None)
        measured["valid_stories"] = sum(verdict.valid for verdict in verdicts) / len(verdicts)
        measured["broken_stories"] = dict(sorted(broken.items(), key=lambda item: (-item[1], item[0])))
    return measured


def as_text_set(generated: Sequence[GeneratedText], eos_id: int) -> TextSet:
    """Generated texts with their ids cut before the first end token."""
    return TextSet([item.text for item in generated], [metrics.cut_at(item.token_ids, eos_id) for item in generated])


def matching_texts(
    split: TokenSplit, vocabulary: Vocabulary, lengths: Sequence[int], *, window_tokens: int, packed: bool, seed: int
) -> tuple[TextSet, str]:
    """Held-out texts of the given lengths, for comparison with generated ones.

    Whole documents that fit the window are taken, for each length the nearest one that is still unused. Packed
    corpora, and those without a fitting document, give windows, cut to the length and before their first end token.
    No text is taken twice, so there are fewer than asked for when the split is small.

    Args:
        split: held-out tokens.
        vocabulary: decodes them.
        lengths: tokens of each text, end token not counted.
        window_tokens: training length, end token included.
        packed: whether the model was trained on packed rows.
        seed: order in which lengths choose.
    Returns:
        At most one text a length, in an order of its own, and "document" or "window".
    """
    eos = vocabulary.eos_id
    fitting = np.flatnonzero(np.asarray(split.lengths) <= window_tokens)
    if packed or not len(fitting):
        batch, _ = held_out_windows(split, window_tokens, len(lengths), vocabulary.pad_id)
        rows = [row[real].tolist() for row, real in zip(batch.token_ids, batch.mask, strict=True)]
        chosen = [metrics.cut_at(row[: max(1, n)], eos) for row, n in zip(rows, lengths, strict=False)]
        return TextSet([vocabulary.decode(ids) for ids in chosen], chosen), "window"
    rng = np.random.default_rng([seed, 1])
    # Among documents of one length a random order decides, so that it is not always the first ones.
    unused = sorted((int(split.lengths[i]) - 1, place, int(i)) for place, i in enumerate(rng.permutation(fitting)))
    picked = []
    for index in rng.permutation(len(lengths))[: len(unused)]:
        wanted = lengths[index]
        place = bisect.bisect_left(unused, (wanted,))  # first document of at least the length wanted
        if place == len(unused) or (place and wanted - unused[place - 1][0] < unused[place][0] - wanted):
            place -= 1
        picked.append(unused.pop(place)[2])
    chosen = [metrics.cut_at(split.document(i).tolist(), eos) for i in picked]
    return TextSet([vocabulary.decode(ids) for ids in chosen], chosen), "document"


def generation_section(
    generated: Sequence[GeneratedText],
    reference: dict[str, Any],
    measure: Callable[[TextSet], dict[str, Any]],
    eos_id: int,
) -> dict[str, Any]:
    """The section `generation`: the numbers of the generated texts, their entropy beside that of real text, and the
    first five texts by index, not picked."""
    measured = measure(as_text_set(generated, eos_id))
    own, real = measured["entropy_nats"], reference["entropy_nats"]
    return {
        **measured,
        "reference_entropy_nats": real,
        "entropy_ratio": own / real if own is not None and real else None,
        "reference_perplexity": reference["generative_perplexity"],
        "samples": [{"index": item.index, "text": item.text} for item in generated[:NUM_SHOWN]],
    }
