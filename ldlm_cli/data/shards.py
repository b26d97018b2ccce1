"""Text to token files, once: read, drop duplicates, split by document, tokenise, write a folder with a manifest.

A folder holds manifest.json, tokenizer.json, vocabulary.json, and per split NAME.tokens.npy (ids of all documents, each
closed by EOS) and NAME.offsets.npy (where each begins, and the end). It is written beside its place and renamed when
complete, so nobody ever reads half of it; its name carries the fingerprint of all that decides its content.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import re
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np

from ldlm_cli.data.sources import read_documents, source_identity
from ldlm_cli.data.vocabulary import Vocabulary, encoder_vocabulary, train_vocabulary
from ldlm_cli.errors import DataError, SnapshotError
from ldlm_cli.recipe.schema import DataRecipe, TokenEncoderRecipe

FORMAT_VERSION = 1
SPLITS = ("train", "valid", "test")
TOKENIZER_DOCUMENTS = 20_000
"""The BPE is trained on at most this many documents of the training split, chosen by their digests."""
TOKENIZER_CHARACTERS = 20_000
"""... and on at most this many characters from the start of each."""
_BATCH_CHARACTERS = 1 << 20  # tokenised at once
_DECIDING_FIELDS = (
    "source",
    "tokenizer",
    "vocab_size",
    "valid_share",
    "test_share",
    "deduplicate",
    "max_documents",
    "seed",
)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class TokenSplit:
    """The documents of one split.

    Attributes:
        name: "train", "valid" or "test".
        stream: ids of all documents one after the other, each closed by EOS, uint16 or uint32, memory-mapped.
        offsets: document i is stream[offsets[i] : offsets[i + 1]], int64 [num_documents + 1].
    """

    name: str
    stream: np.ndarray
    offsets: np.ndarray

    @property
    def num_documents(self) -> int:
        """Number of documents, at least 1."""
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, EOS included, int64 [num_documents]."""
        return np.diff(self.offsets)

    def document(self, index: int) -> np.ndarray:
        """Return the ids of a document (0 <= index < num_documents), int64, EOS included."""
        if not 0 <= index < self.num_documents:
            raise DataError(f"The {self.name} split has documents 0..{self.num_documents - 1}, so not {index}.")
        return np.asarray(self.stream[self.offsets[index] : self.offsets[index + 1]], dtype=np.int64)


@dataclass(frozen=True)
class TokenFolder:
    """A complete folder of token shards."""

    path: Path
    manifest: dict[str, Any]
    vocabulary: Vocabulary
    splits: dict[str, TokenSplit] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """The sha256 of all that decides the content of this folder."""
        return str(self.manifest["fingerprint"])

    def split(self, name: str) -> TokenSplit:
        """Return split "train", "valid" or "test"; another name raises DataError."""
        if name not in self.splits:
            raise DataError(f"There is no split '{name}': it is one of {', '.join(SPLITS)}.")
        return self.splits[name]


def prepare_tokens(
    data: DataRecipe, token_encoder: TokenEncoderRecipe, *, on_progress: Progress | None = None
) -> TokenFolder:
    """Return the token shards of a recipe, made first when there is no complete folder with their fingerprint.

    Args:
        data: the recipe's data section.
        token_encoder: its source and revision name the tokenizer when data.tokenizer is "encoder".
        on_progress: called with a line for the user now and then.
    Raises:
        DataError: text missing, unreadable or too little; a folder that is there but damaged.
        UsageError: hub or tokenizer not reachable.
    """
    fingerprint, facts = _fingerprint(data, token_encoder)
    target = Path(data.cache).expanduser() / f"{_slug(data.source)}-{fingerprint[:12]}"
    if target.exists():
        return open_tokens(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".unfinished", dir=target.parent))
    except OSError as error:
        raise DataError(f"The folder data.cache {data.cache} cannot be written ({error.strerror}).") from None
    try:
        _write_tokens(unfinished, data, token_encoder, {"fingerprint": fingerprint, **facts}, on_progress or _silent)
        unfinished.chmod(0o777 & ~_umask())  # mkdtemp makes a private folder
        try:
            os.rename(unfinished, target)
        except OSError:
            if not target.exists():  # else another process was faster, and its folder is as good
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return open_tokens(target)


def open_tokens(path: Path) -> TokenFolder:
    """Open a folder that `prepare_tokens` made, and check that its files fit its manifest.

    Raises SnapshotError for another format version, DataError for a missing or damaged file.
    """
    again = f"delete {path} and run again"
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        version, counts, dtype = manifest["format_version"], manifest["splits"], manifest["token_dtype"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path} has no readable manifest.json: {again}.") from None
    if version != FORMAT_VERSION:
        raise SnapshotError(f"{path} has format version {version}, but this ldlm reads {FORMAT_VERSION}: {again}.")
    try:
        vocabulary = Vocabulary.load(path)
        splits = {name: _open_split(path, name, counts[name], np.dtype(dtype)) for name in SPLITS}
    except (OSError, ValueError, KeyError, TypeError, EOFError, SnapshotError) as error:
        raise DataError(f"The token shards in {path} are damaged ({str(error).rstrip('.')}): {again}.") from None
    return TokenFolder(path, manifest, vocabulary, splits)


def _open_split(path: Path, name: str, counts: dict[str, int], dtype: np.dtype[Any]) -> TokenSplit:
    stream = np.load(path / f"{name}.tokens.npy", mmap_mode="r", allow_pickle=False)
    offsets = np.load(path / f"{name}.offsets.npy", mmap_mode="r", allow_pickle=False)
    if stream.dtype != dtype or stream.shape != (counts["tokens"],):
        raise ValueError(f"{name}.tokens.npy is not {counts['tokens']} ids of type {dtype}")
    if offsets.dtype != np.int64 or offsets.shape != (counts["documents"] + 1,):
        raise ValueError(f"{name}.offsets.npy is not {counts['documents'] + 1} offsets of type int64")
    if offsets[0] != 0 or offsets[-1] != len(stream) or (np.diff(offsets) < 1).any():
        raise ValueError(f"{name}.offsets.npy does not rise from 0 to {len(stream)}")
    return TokenSplit(name, stream, offsets)


def _fingerprint(data: DataRecipe, token_encoder: TokenEncoderRecipe) -> tuple[str, dict[str, Any]]:
    """Return the fingerprint and what went into it.

    Packing, window and context lengths are left out: they decide how shards are read, not what they hold.
    """
    recipe = {name: getattr(data, name) for name in _DECIDING_FIELDS}
    tokenizer: dict[str, Any] = {"kind": data.tokenizer}
    if data.tokenizer == "encoder":
        tokenizer |= _encoder_identity(token_encoder)
        del recipe["vocab_size"]
    facts = {"source": source_identity(data), "tokenizer": tokenizer, "data": recipe}
    # The place of the text is not the text: a moved file keeps its fingerprint.
    decides = facts | {"format": FORMAT_VERSION, "data": {key: recipe[key] for key in recipe if key != "source"}}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return digest, {"source": data.source, "source_identity": facts["source"], "tokenizer": tokenizer, "data": recipe}


def _encoder_identity(token_encoder: TokenEncoderRecipe) -> dict[str, Any]:
    """Return what names a pretrained tokenizer: digests of a folder's tokenizer files, or hub id and revision."""
    folder = Path(token_encoder.source)
    if not folder.is_dir():
        return {"source": token_encoder.source, "revision": token_encoder.revision}
    names = re.compile(r"(tokenizer|vocab|merges|special_tokens|added_tokens|spiece|sentencepiece)")
    files = sorted(path for path in folder.iterdir() if path.is_file() and names.match(path.name))
    return {"files": [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]}


def _write_tokens(
    folder: Path, data: DataRecipe, token_encoder: TokenEncoderRecipe, facts: dict[str, Any], on_progress: Progress
) -> None:
    # A tokenizer that cannot be had should stop the command before hours of reading.
    vocabulary = (
        encoder_vocabulary(token_encoder.source, token_encoder.revision) if data.tokenizer == "encoder" else None
    )
    spooled, sample, num_duplicates = _spool_documents(folder, data, on_progress)
    counts = {name: len(lengths) for name, lengths in spooled.items()}
    if not all(counts.values()):
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(
            f"The corpus {data.source} is too small: its {sum(counts.values())} documents split into {listed}, and "
            "each split needs at least one (add text, or raise data.valid_share or data.test_share)."
        )
    if vocabulary is None:
        on_progress(f"training a vocabulary of {data.vocab_size:,} entries on {len(sample):,} documents")
        vocabulary = train_vocabulary(sample, data.vocab_size)
    vocabulary.save(folder)
    dtype = np.dtype(np.uint16 if vocabulary.size < 1 << 16 else np.uint32)
    splits = {}
    for name, byte_lengths in spooled.items():
        spool = folder / f"{name}.spool"
        lengths = _write_split(folder, name, _spooled_batches(spool, byte_lengths), vocabulary, dtype)
        spool.unlink()
        splits[name] = {"documents": len(lengths), "tokens": int(lengths.sum()), "longest": int(lengths.max())}
        on_progress(f"tokenised {name}: {len(lengths):,} documents, {splits[name]['tokens']:,} tokens")
    manifest = {
        "format_version": FORMAT_VERSION,
        **facts,
        "token_dtype": dtype.name,
        "splits": splits,
        "duplicates_dropped": num_duplicates,
        "vocab_size": vocabulary.size,
        "tokenizer_fingerprint": vocabulary.fingerprint,
        "tokenizer_documents": len(sample) if data.tokenizer == "bpe" else 0,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _spool_documents(
    folder: Path, data: DataRecipe, on_progress: Progress
) -> tuple[dict[str, array[int]], list[str], int]:
    """Read the source once, into one file of UTF-8 text per split.

    Returns:
        Byte lengths of each split's documents; the texts to train a BPE on; the number of duplicates dropped.
    """
    lengths = {name: array("q") for name in SPLITS}
    seen: set[bytes] = set()
    num_duplicates = 0
    sample: list[tuple[int, int, str]] = []  # the training documents with the smallest digests, largest on top
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.spool").open("wb")) for name in SPLITS}
        for number, text in enumerate(read_documents(data, on_progress)):
            raw = text.encode("utf-8")
            digest = hashlib.sha256(raw).digest()[:16]
            if data.deduplicate:
                if digest in seen:
                    num_duplicates += 1
                    continue
                seen.add(digest)
            name, rank = _split_of(digest, data)
            files[name].write(raw)
            lengths[name].append(len(raw))
            if name == "train" and data.tokenizer == "bpe":
                entry = (-rank, number, text[:TOKENIZER_CHARACTERS])
                (heapq.heappush if len(sample) < TOKENIZER_DOCUMENTS else heapq.heappushpop)(sample, entry)
    return lengths, [text for _, _, text in sorted(sample, key=lambda entry: entry[1])], num_duplicates


def _split_of(digest: bytes, data: DataRecipe) -> tuple[str, int]:
    """Return the split of a document and a random rank; both follow from its text and data.seed, not its place."""
    drawn = hashlib.sha256(digest + str(data.seed).encode()).digest()
    share, rank = int.from_bytes(drawn[:8], "big") / 2**64, int.from_bytes(drawn[8:16], "big")
    if share < data.test_share:
        return "test", rank
    return ("valid" if share < data.test_share + data.valid_share else "train"), rank


def _spooled_batches(path: Path, byte_lengths: array[int]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    with path.open("rb") as file:
        for length in byte_lengths:
            batch.append(file.read(length).decode("utf-8"))
            size += length
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _write_split(
    folder: Path, name: str, batches: Iterator[list[str]], vocabulary: Vocabulary, dtype: np.dtype[Any]
) -> np.ndarray:
    """Tokenise the batches into the two files of a split; return the length of each document."""
    lengths = array("q")
    with (folder / f"{name}.tokens.npy").open("wb") as file:
        _write_header(file, dtype, 0)
        begin = file.tell()
        for texts in batches:
            ids = vocabulary.encode(texts)
            lengths.extend(len(document) + 1 for document in ids)
            closed = chain.from_iterable((*document, vocabulary.eos_id) for document in ids)
            file.write(np.fromiter(closed, dtype=dtype).tobytes())
        file.seek(0)
        # NumPy leaves room in the header for any first dimension, so the true length fits where 0 stood.
        _write_header(file, dtype, sum(lengths))
        assert file.tell() == begin
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    np.save(folder / f"{name}.offsets.npy", offsets, allow_pickle=False)
    return np.diff(offsets)


def _write_header(file: IO[bytes], dtype: np.dtype[Any], num_tokens: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (num_tokens,)}
    np.lib.format.write_array_header_1_0(file, header)


def _slug(source: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", source.lower()).strip("-")[-40:].strip("-") or "text"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _silent(_line: str) -> None:
    return None
