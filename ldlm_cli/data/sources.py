"""Where documents come from: the built-in corpus, local text files, or a data set of the Hugging Face hub."""

import glob
import gzip
import hashlib
import importlib.util
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from ldlm_cli.data.hub import demand_hub, first_line
from ldlm_cli.data.stories import stories
from ldlm_cli.errors import DataError, LdlmError, UsageError
from ldlm_cli.recipe.schema import DataRecipe

Progress = Callable[[str], None]

ENDINGS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
BUILTIN = ("builtin:stories",)
_KINDS = "builtin:stories, a .txt or .jsonl file (also .gz), a folder, a glob, or hub:owner/name"
_PROGRESS_EVERY = 20_000  # documents
_HASHED_BYTES = 1 << 30  # larger corpora are told apart by size and time of change


def read_documents(data: DataRecipe, on_progress: Progress | None = None) -> Iterator[str]:
    """Yield the documents of `data.source` in a fixed order, white space trimmed at both ends, blank ones skipped.

    Args:
        data: source, and text_unit (.txt), text_field (.jsonl, hub), max_documents (local, hub), seed, num_documents
            and long_share (built-in).
        on_progress: called with a line for the user now and then.
    Raises:
        DataError: missing path, unknown ending or built-in name, text that is not UTF-8, bad JSON, no text at all.
        UsageError: a hub source that cannot be reached.
    """
    if data.source.startswith("hub:"):
        found, limit = _hub_documents(data), data.max_documents
    elif data.source.startswith("builtin:"):
        _check_builtin(data.source)
        found, limit = stories(data.seed, data.num_documents, data.long_share), None
    else:
        found, limit = _local_documents(data), data.max_documents
    count = 0
    for text in islice((stripped for document in found if (stripped := document.strip())), limit):
        count += 1
        if on_progress is not None and count % _PROGRESS_EVERY == 0:
            on_progress(f"read {count:,} documents of {data.source}")
        yield text
    if count == 0:
        raise DataError(f"{data.source} has no text: every document is blank, so set data.source to one with text.")


def source_identity(data: DataRecipe) -> dict[str, Any]:
    """Return what tells the text of this source from any other text, for the fingerprint of the token shards.

    Built-in: a digest of its first documents, so a changed generator shows; local: digests of the files' content (of
    their sizes and times beyond 1 GiB); hub: the name, as the hub's data sets have no cheap digest.
    """
    if data.source.startswith("hub:"):
        return {"kind": "hub", "name": data.source.removeprefix("hub:"), "field": data.text_field}
    if data.source.startswith("builtin:"):
        _check_builtin(data.source)
        digest = hashlib.sha256()
        for text in (*stories(data.seed, 200, 0.0), *stories(data.seed, 2, 1.0)):
            digest.update(text.encode() + b"\n")
        drawn = {"seed": data.seed, "num_documents": data.num_documents, "long_share": data.long_share}
        return {"kind": data.source, "digest": digest.hexdigest(), **drawn}
    files = local_files(data.source)
    is_small = sum(path.stat().st_size for path in files) <= _HASHED_BYTES
    units = {"unit": data.text_unit} if any(".txt" in path.name for path in files) else {}
    fields = {"field": data.text_field} if any(".jsonl" in path.name for path in files) else {}
    return {"kind": "local", "files": [_file_identity(path, is_small) for path in files], **units, **fields}


def local_files(source: str) -> list[Path]:
    """Return the text files of a path, folder (searched through, hidden files left out) or glob, sorted.

    Raises DataError when there is none, or when a file named by path or glob has an unknown ending.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        inside = [file for file in path.rglob("*") if _has_known_ending(file) and file.is_file()]
        files = sorted(file for file in inside if not any(p.startswith(".") for p in file.relative_to(path).parts))
        if not files:
            raise DataError(f"The folder {source} has no file that ends in {', '.join(ENDINGS)}.")
        return files
    if path.exists():
        files = [path]
    elif any(mark in source for mark in "*?["):
        files = sorted(file for name in glob.glob(str(path), recursive=True) if (file := Path(name)).is_file())
        if not files:
            raise DataError(f"No file matches data.source {source}.")
    else:
        raise DataError(_missing(source))
    for file in files:
        if not _has_known_ending(file):
            raise DataError(f"{file} has an unknown ending: ldlm reads files that end in {', '.join(ENDINGS)}.")
    return files


def _check_builtin(source: str) -> None:
    if source not in BUILTIN:
        raise DataError(f"There is no built-in corpus {source}: set data.source to {' or '.join(BUILTIN)}.")


def _has_known_ending(path: Path) -> bool:
    return path.name.lower().endswith(ENDINGS)


def _missing(source: str) -> str:
    """Return the message for a source that is not on this machine."""
    looks_like_path = source.startswith((".", "/", "~")) or source.lower().endswith(ENDINGS)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source) and not looks_like_path:
        return f"There is no file or folder {source}: for the data set of that name on the hub, write hub:{source}."
    if re.match(r"\w+:", source):
        return f"data.source {source} has an unknown kind: it may be {_KINDS}."
    return f"There is no file or folder {source} (seen from {Path.cwd()}): correct data.source."


def _file_identity(path: Path, is_small: bool) -> list[Any]:
    if not is_small:
        return [path.name, path.stat().st_size, path.stat().st_mtime_ns]
    try:
        with path.open("rb") as file:
            return [path.name, hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from None


def _local_documents(data: DataRecipe) -> Iterator[str]:
    for path in local_files(data.source):
        try:
            with _open(path) as file:
                if ".jsonl" in "".join(path.suffixes[-2:]).lower():
                    yield from _json_documents(path, file, data.text_field)
                else:
                    yield from _text_documents(path, file, data.text_unit)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path} is not a whole gzip file ({first_line(error)}): make it again.") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror or error}).") from None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end); a byte order mark is dropped, bad UTF-8 raises DataError."""
    offset = 0
    for number, raw in enumerate(file, start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = offset + error.start
            raise DataError(f"{path}:{number} is not UTF-8 (byte {byte} of the file): save it as UTF-8.") from None
        offset += len(raw)
        yield number, line.rstrip("\r\n")


def _text_documents(path: Path, file: IO[bytes], unit: str) -> Iterator[str]:
    kept: list[str] = []
    for _, line in _lines(path, file):
        if unit == "line":
            yield line
        elif unit == "paragraph" and not line.strip():
            yield "\n".join(kept)
            kept = []
        else:
            kept.append(line)
    yield "\n".join(kept)


def _json_documents(path: Path, file: IO[bytes], field: str) -> Iterator[str]:
    for number, line in _lines(path, file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number} is not JSON ({first_line(error)}): write one object a line.") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number} is a JSON {type(row).__name__}, but each line must be an object.")
        yield _text_of(row, field, f"{path}:{number}")


def _text_of(row: dict[str, Any], field: str, where: str) -> str:
    present = ", ".join(map(str, row)) or "none"
    if field not in row:
        raise DataError(f"{where} has no field '{field}' (its fields: {present}): set data.text_field to one of them.")
    text = row[field]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise DataError(f"{where} has a {kind} in '{field}', not a text (its fields: {present}): set data.text_field.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where} has half a surrogate pair in '{field}', which is not Unicode text.") from None
    return text


def _hub_documents(data: DataRecipe) -> Iterator[str]:
    """Yield the texts of the train split of a hub data set; streamed when only some documents are wanted."""
    name, _, config = data.source.removeprefix("hub:").partition(":")
    way_on = "download the text elsewhere and use the file with --set data.source=PATH"
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", name):
        raise DataError(f"data.source {data.source} is not of the form hub:owner/name or hub:owner/name:config.")
    if importlib.util.find_spec("datasets") is None:  # before the slow import and the question to the hub
        raise UsageError(f"Reading {data.source} needs the package datasets (pip install datasets): else, {way_on}.")
    is_cached = _is_cached(name)
    if not is_cached:
        demand_hub(data.source, way_on)
    from datasets import load_dataset

    try:
        is_streamed = data.max_documents is not None and not is_cached
        rows = load_dataset(name, config or None, split="train", streaming=is_streamed)
        for number, row in enumerate(rows):
            yield _text_of(row, data.text_field, f"{data.source} row {number}")
    except LdlmError:
        raise
    except Exception as error:  # `datasets` lets through the exceptions of five libraries
        raise UsageError(
            f"{data.source} cannot be read ({first_line(error)}): correct the name, or {way_on}."
        ) from None


def _is_cached(name: str) -> bool:
    """Say whether `datasets` has this data set on the machine (in the folder that its documentation names)."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or os.path.join(home, "datasets")).expanduser()
    return (cache / name.replace("/", "___")).is_dir()
