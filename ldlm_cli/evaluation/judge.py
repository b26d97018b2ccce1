"""The judge: a causal language model, never the token encoder, that says how likely a text is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldlm_cli.data.hub import first_line
from ldlm_cli.data.vocabulary import Vocabulary
from ldlm_cli.errors import UsageError
from ldlm_cli.evaluation.judge_source import independent_judge_folder, weights_hash
from ldlm_cli.recipe.schema import Recipe

LANGUAGE_MODEL_FILE = "language_model.json"
# Largest number of logits held at once: 2**26 fp32 values are 256 MB, twice that with the log-softmax.
MAX_LOGITS = 2**26


@dataclass(frozen=True)
class TextScore:
    """Nats of one text under the judge, and the number of judge tokens they are summed over (end token included)."""

    nats: float
    tokens: int


@dataclass(frozen=True)
class _Piece:
    """Part of a text that fits the judge's context; tokens before `first` are read as context and not scored."""

    text: int
    ids: list[int]
    first: int


class Judge:
    """A causal language model with its own tokenizer; build it with `Judge.open`."""

    def __init__(
        self, model: Any, tokenizer: Tokenizer, *, source: str, folder: Path, device: torch.device, precision: str
    ):
        self.source = source
        self.folder = folder
        self.weights_hash = weights_hash(folder)
        self.tokenizer = tokenizer
        self.device = device
        self.precision = precision
        self.context = int(getattr(model.config, "max_position_embeddings", None) or 1024)
        self.model = model.to(device).eval().requires_grad_(False)
        path = folder / LANGUAGE_MODEL_FILE
        self.about: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    @classmethod
    def open(
        cls, source: str, *, run: Path, recipe: Recipe, device: torch.device | str, precision: str = "fp32"
    ) -> Judge:
        """Open a judge and make sure that it is not the token encoder of the run.

        Args:
            source: `trained` (the judge of the run), a folder (a Hugging Face folder or a run of train-lm), or a hub
                id, with `@revision` behind it if it is not the one of the recipe.
            run: the run folder whose texts will be judged.
            recipe: the run's recipe; gives the judge's revision and the token encoder's source.
            device: where the judge computes.
            precision: `fp32`, or `bf16` for autocast; the log-softmax is fp32 in both.
        Raises:
            UsageError: no such judge, hub out of reach, or the judge is the token encoder.
        """
        folder = independent_judge_folder(source, run, recipe)
        from transformers import AutoModelForCausalLM

        try:
            # Safetensors only: a pickle could run code when it is opened.
            model = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise UsageError(
                f"The judge in {folder} cannot be opened as a causal language model ({first_line(error)}); "
                f"name another model with --judge or judge.source."
            ) from error
        return cls(
            model,
            _open_tokenizer(folder),
            source=source,
            folder=folder,
            device=torch.device(device),
            precision=precision,
        )

    @property
    def held_out_nats_per_token(self) -> float | None:
        """What the judge's own training measured on held-out text; None for a judge we did not train."""
        value = self.about.get("held_out_nats_per_token")
        return None if value is None else float(value)

    def identity(self) -> dict[str, Any]:
        """Everything that tells this judge from another one, for the report."""
        name = self.folder.parent.name  # cached hub models lie in .../snapshots/<commit>
        return {
            "source": self.source,
            "revision": self.folder.name if name == "snapshots" else None,
            "weights_sha256": self.weights_hash,
            "tokenizer": self.tokenizer.fingerprint,
            "vocab_size": int(self.model.config.vocab_size),
            "context_tokens": self.context,
            "precision": self.precision,
            "trained_by_ldlm": bool(self.about),
            "role": self.about.get("role"),
            "seed": self.about.get("seed"),
        }

    def score(self, texts: Sequence[str], batch_tokens: int = 8192) -> list[TextScore]:
        """Score texts by themselves, each as start token, its tokens, end token; the start token is not scored.

        A text longer than the judge's context is read in windows that overlap by half a context, every token scored
        once. The empty text scores its end token.

        Args:
            texts: any texts; re-tokenised by the judge.
            batch_tokens: tokens of one batch, padding included; fewer are taken for a large vocabulary.
        Returns:
            One score a text, in the order given.
        """
        pieces = [
            piece
            for index, ids in enumerate(self.tokenizer.encode(texts))
            for piece in _pieces(index, [self.tokenizer.start_id, *ids, self.tokenizer.end_id], self.context)
        ]
        # Neighbours in length share a batch, so that little is computed for padding.
        pieces.sort(key=lambda piece: len(piece.ids), reverse=True)
        budget = min(batch_tokens, MAX_LOGITS // int(self.model.config.vocab_size))
        nats = [0.0] * len(texts)
        tokens = [0] * len(texts)
        start = 0
        while start < len(pieces):
            rows = max(1, budget // len(pieces[start].ids))
            batch = pieces[start : start + rows]
            for piece, value in zip(batch, self._nats(batch), strict=True):
                nats[piece.text] += value
                tokens[piece.text] += len(piece.ids) - piece.first
            start += rows
        return [TextScore(value, count) for value, count in zip(nats, tokens, strict=True)]

    @torch.inference_mode()
    def _nats(self, batch: list[_Piece]) -> list[float]:
        width = max(len(piece.ids) for piece in batch)
        # Padding lies behind the text and attention is causal: it needs no mask, its own positions are not counted.
        ids = torch.full((len(batch), width), self.tokenizer.end_id, dtype=torch.long)  # [B, N]
        scored = torch.zeros(len(batch), width, dtype=torch.bool)
        for row, piece in enumerate(batch):
            ids[row, : len(piece.ids)] = torch.tensor(piece.ids)
            scored[row, piece.first : len(piece.ids)] = True
        ids, scored = ids.to(self.device), scored.to(self.device)
        bf16 = self.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16) if bf16 else nullcontext():
            logits: Tensor = self.model(input_ids=ids[:, :-1], use_cache=False).logits  # [B, N - 1, V]
        losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        losses = losses.view(len(batch), width - 1).double() * scored[:, 1:]
        return [float(value) for value in losses.sum(dim=1).cpu()]


class Tokenizer:
    """What the judge needs of a tokenizer: our own vocabulary or one of `transformers`."""

    def __init__(self, source: Any, *, start_id: int, end_id: int, fingerprint: str):
        self._source = source
        self.start_id = start_id
        self.end_id = end_id
        self.fingerprint = fingerprint

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without start or end token."""
        if not texts:
            return []
        if isinstance(self._source, Vocabulary):
            return self._source.encode(list(texts))
        encoded: list[list[int]] = self._source(list(texts), add_special_tokens=False)["input_ids"]
        return encoded


def _pieces(text: int, ids: list[int], context: int) -> list[_Piece]:
    """Windows of at most `context` tokens with half a window of context; each token but the first is scored once."""
    pieces = [_Piece(text, ids[:context], 1)]
    end = context
    while end < len(ids):
        start = end - context // 2
        pieces.append(_Piece(text, ids[start : start + context], end - start))
        end = start + context
    return pieces


def _open_tokenizer(folder: Path) -> Tokenizer:
    if (folder / "vocabulary.json").is_file():
        vocabulary = Vocabulary.load(folder)
        start = vocabulary.eos_id if vocabulary.prefix_id is None else vocabulary.prefix_id
        return Tokenizer(vocabulary, start_id=start, end_id=vocabulary.eos_id, fingerprint=vocabulary.fingerprint)
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(
            f"The judge in {folder} has no usable tokenizer ({first_line(error)}); name another model with --judge."
        ) from error
    # Long texts are cut into windows here, so the tokenizer's warning about its context would mislead.
    loaded.model_max_length = 10**9
    end = loaded.eos_token_id if loaded.eos_token_id is not None else loaded.sep_token_id
    start = loaded.bos_token_id if loaded.bos_token_id is not None else end
    if end is None or start is None:
        raise UsageError(f"The judge in {folder} has no end-of-text token; name another model with --judge.")
    files = sorted(
        path for path in folder.iterdir() if path.name in ("tokenizer.json", "vocab.json", "tokenizer.model")
    )
    content = b"".join(path.read_bytes() for path in files)
    return Tokenizer(loaded, start_id=int(start), end_id=int(end), fingerprint=hashlib.sha256(content).hexdigest())
