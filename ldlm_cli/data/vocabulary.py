"""Text to token ids and back: a byte-level BPE trained on the corpus, or a pretrained language model's tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ldlm_cli.data.hub import demand_hub, first_line
from ldlm_cli.errors import DataError, SnapshotError, UsageError

FORMAT_VERSION = 1
EOS, PAD = "<|eos|>", "<|pad|>"
_TOKENIZER_FILE, _VOCABULARY_FILE = "tokenizer.json", "vocabulary.json"


class Vocabulary:
    """A tokenizer and the ids that have a meaning of their own.

    `size` is one more than the largest id; `prefix_id` is CLS or BOS where the tokenizer has one, else EOS; `pad_id`
    may equal `eos_id`, so padding is told by the mask and never by the id. `fingerprint` is the sha256 of
    tokenizer.json. Special tokens written out in a text ("<|eos|>") are encoded as plain text: no document ends itself.
    """

    def __init__(self, tokenizer_json: str, *, eos_id: int, pad_id: int, prefix_id: int | None) -> None:
        """Build from the text of a tokenizer.json; raises DataError when `tokenizers` cannot read it."""
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # `tokenizers` raises plain Exception
            raise DataError(f"The tokenizer cannot be read ({first_line(error)}).") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._json = tokenizer_json
        self.eos_id, self.pad_id, self.prefix_id = eos_id, pad_id, prefix_id
        self.size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        added: dict[int, Any] = self._tokenizer.get_added_tokens_decoder()
        named = {index for index in (eos_id, pad_id, prefix_id) if index is not None}
        self.special_ids = frozenset(named | {index for index, token in added.items() if token.special})
        self.fingerprint = hashlib.sha256(tokenizer_json.encode()).hexdigest()
        if not all(0 <= index < self.size for index in self.special_ids):
            raise DataError(f"A special token has an id outside 0..{self.size - 1}: the tokenizer is damaged.")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; neither EOS nor prefix is added."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text up to the first EOS; special tokens are left out, broken UTF-8 becomes U+FFFD."""
        kept: list[int] = []
        for index in ids:
            if int(index) == self.eos_id:
                break
            if int(index) not in self.special_ids:
                kept.append(int(index))
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and vocabulary.json into `folder`, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _TOKENIZER_FILE).write_text(self._json, encoding="utf-8")
        facts = {
            "format_version": FORMAT_VERSION,
            "eos_id": self.eos_id,
            "pad_id": self.pad_id,
            "prefix_id": self.prefix_id,
            "size": self.size,
            "fingerprint": self.fingerprint,
        }
        (folder / _VOCABULARY_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Vocabulary:
        """Read what `save` wrote; raises SnapshotError when it is missing, of another format version or changed."""
        try:
            facts = json.loads((folder / _VOCABULARY_FILE).read_text(encoding="utf-8"))
            tokenizer_json = (folder / _TOKENIZER_FILE).read_bytes().decode("utf-8")
            version = facts["format_version"]
            ids: dict[str, Any] = {name: facts[name] for name in ("eos_id", "pad_id", "prefix_id")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SnapshotError(f"The vocabulary in {folder} is missing or damaged ({first_line(error)}).") from None
        if version != FORMAT_VERSION:
            raise SnapshotError(
                f"The vocabulary in {folder} has format version {version}, but this ldlm reads {FORMAT_VERSION}: "
                "make it again with this version."
            )
        vocabulary = Vocabulary(tokenizer_json, **ids)
        if vocabulary.fingerprint != facts.get("fingerprint"):
            raise SnapshotError(f"{folder / _TOKENIZER_FILE} was changed after it was written: make the folder again.")
        return vocabulary


def train_vocabulary(texts: Iterable[str], vocab_size: int) -> Vocabulary:
    """Train a byte-level BPE of at most `vocab_size` (>= 258) entries; decode(encode(text)) is text for any text."""
    tokenizer = Tokenizer(models.BPE())
    # No normaliser, no prefix space and all 256 bytes in the alphabet: this is what makes the round trip exact.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    eos_id, pad_id = 0, 1  # special tokens come first, in the order given to the trainer
    return Vocabulary(tokenizer.to_str(), eos_id=eos_id, pad_id=pad_id, prefix_id=eos_id)


def encoder_vocabulary(source: str, revision: str | None) -> Vocabulary:
    """Return the vocabulary of a pretrained language model.

    Args:
        source: a folder (of ldlm or of Hugging Face), or a hub id; what is cached of a hub id is used without asking.
        revision: branch, tag or commit of a hub id.
    Raises:
        UsageError: no such model, hub not reachable (within seconds), or a tokenizer without a fast version or EOS.
    """
    if (Path(source) / _VOCABULARY_FILE).is_file():
        return Vocabulary.load(Path(source))
    tokenizer = _pretrained_tokenizer(source, revision)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(f"The tokenizer of {source} has no tokenizer.json form: choose a model with a fast tokenizer.")

    def first_id(*names: str) -> int | None:
        return next((found for name in names if (found := getattr(tokenizer, name, None)) is not None), None)

    eos_id = first_id("eos_token_id", "sep_token_id")
    if eos_id is None:
        raise UsageError(f"The tokenizer of {source} has neither an EOS nor a SEP token: choose another token encoder.")
    pad_id, prefix_id = first_id("pad_token_id"), first_id("cls_token_id", "bos_token_id")
    return Vocabulary(
        backend.to_str(),
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        prefix_id=eos_id if prefix_id is None else prefix_id,
    )


def _pretrained_tokenizer(source: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer  # slow to import, and not needed for a trained BPE

    way_on = "download it once with a network, or set token_encoder.source to a local folder"
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, local_files_only=True)
    except Exception as error:  # transformers raises many kinds; all of them mean: not complete on this machine
        if Path(source).is_dir():
            raise UsageError(f"The folder {source} has no tokenizer that loads ({first_line(error)}).") from None
    demand_hub(f"token_encoder.source {source}", way_on)
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision)
    except Exception as error:
        raise UsageError(f"The tokenizer of {source} cannot be loaded ({first_line(error)}): {way_on}.") from None
