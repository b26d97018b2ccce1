"""Training a causal LM on the same tokens: the offline token encoder, the judge, or the autoregressive baseline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldlm_cli.core.draws import seed_at
from ldlm_cli.data.batches import Batch
from ldlm_cli.data.vocabulary import Vocabulary
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.recipe.stage_schema import StageRecipe
from ldlm_cli.runtime import Runtime

LEAST_IMPROVEMENT = 0.002
"""A held-out loss counts as better when it falls by this share."""
INIT_STREAM = 1
EMBEDDING_STD = 1.0


def build_language_model(recipe: Recipe, stage: StageRecipe, vocabulary: Vocabulary) -> nn.Module:
    """A Llama of `transformers` (rotary positions) of the token encoder's or the judge's shape, fresh weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = recipe.judge if stage.role == "judge" else recipe.token_encoder
    config = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=shape.width,
        intermediate_size=-(-shape.width * 8 // 3 // 32) * 32,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=recipe.data.context_tokens + 1,
        bos_token_id=vocabulary.prefix_id,
        eos_token_id=vocabulary.eos_id,
        pad_token_id=vocabulary.pad_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed_at(recipe.seed + stage.seed_offset, INIT_STREAM))
    model = LlamaForCausalLM(config)
    # With the library's small start (0.02) blocks drown the embeddings within minutes and hidden states forget which
    # token they stand for; a frozen encoder must keep that (GPT-2's do). Norms read the residual, so its scale is free.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    return model


def next_token_nats(model: nn.Module, token_ids: Tensor, mask: Tensor, prefix_id: int) -> Tensor:
    """Nats of each token given those before it (the first given the prefix), [B, N] float32; padding gives 0.

    Args:
        token_ids: [B, N] int64, right-padded.
        mask: [B, N] bool, True = real token.
    """
    inputs = F.pad(token_ids[:, :-1], (1, 0), value=prefix_id)
    logits = model(input_ids=inputs, use_cache=False).logits  # right padding cannot reach back through a causal mask
    nats = F.cross_entropy(logits.float().flatten(0, 1), token_ids.flatten(), reduction="none")
    return nats.view_as(mask) * mask


class LanguageModelTask:
    """Next-token prediction with early stopping on held-out loss. See training.loop.Task."""

    def __init__(
        self, model: nn.Module, stage: StageRecipe, vocabulary: Vocabulary, held_out: list[Batch], runtime: Runtime
    ) -> None:
        self.module, self.parts = model, nn.ModuleDict({"language_model": model})
        self.stage, self.vocabulary, self.held_out, self.runtime = stage, vocabulary, held_out, runtime
        self.prefix_id = vocabulary.eos_id if vocabulary.prefix_id is None else vocabulary.prefix_id
        self.best, self.worse_in_a_row = float("inf"), 0
        self.sums = torch.zeros(2, dtype=torch.float64)
        self.last_held_out: float | None = None

    def loss(self, prepared: nn.Module, batch: Batch, rows: list[int], step: int, measure: bool) -> Tensor:
        ids, mask, weight = rows_to_tensors(batch, rows, self.runtime.device)
        nats = next_token_nats(prepared, ids, mask, self.prefix_id) * weight[:, None]
        total = nats.sum()
        self.sums += torch.tensor([float(total.detach()), float((mask * weight[:, None]).sum())], dtype=torch.float64)
        return total / int(batch.mask.sum())

    def after_step(self, step: int) -> bool:
        if (step + 1) % self.stage.eval_every_steps and step + 1 != self.stage.steps:
            return False
        self.last_held_out = self.held_out_nats()
        if self.last_held_out < self.best * (1 - LEAST_IMPROVEMENT):
            self.best, self.worse_in_a_row = self.last_held_out, 0
        else:
            self.worse_in_a_row += 1
        return self.stage.patience is not None and self.worse_in_a_row >= self.stage.patience

    @torch.no_grad()
    def held_out_nats(self) -> float:
        """Mean nats per token over the held-out batches, each process computing all of them (they are few)."""
        self.module.eval()
        nats, count = 0.0, 0
        for batch in self.held_out:
            ids, mask, _ = rows_to_tensors(batch, list(range(len(batch.mask))), self.runtime.device)
            with self.runtime.autocast():
                nats += float(next_token_nats(self.module, ids, mask, self.prefix_id).sum())
            count += int(mask.sum())
        self.module.train()
        return nats / count

    def metrics(self) -> dict[str, Any]:
        nats, count = self.runtime.reduce_sum(self.sums.to(self.runtime.device)).tolist()
        self.sums.zero_()
        found: dict[str, Any] = {"nats_per_token": nats / max(count, 1)}
        if self.last_held_out is not None:
            found["held_out_nats_per_token"] = self.last_held_out
            self.last_held_out = None
        return found

    def state_dict(self) -> dict[str, Any]:
        best = None if self.best == float("inf") else self.best
        return {"best": best, "worse_in_a_row": self.worse_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = float("inf") if state["best"] is None else float(state["best"])
        self.worse_in_a_row = int(state["worse_in_a_row"])


def rows_to_tensors(batch: Batch, rows: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a global batch on a device: ids [B, N] int64, mask [B, N] bool, weight [B] float (0 where row is -1)."""
    index = np.maximum(rows, 0)
    weight = torch.tensor([float(row >= 0) for row in rows])
    ids, mask = torch.from_numpy(batch.token_ids[index]), torch.from_numpy(batch.mask[index])
    return ids.to(device, non_blocking=True), mask.to(device, non_blocking=True), weight.to(device, non_blocking=True)


def save_language_model(folder: Path, model: nn.Module, vocabulary: Vocabulary, facts: dict[str, Any]) -> None:
    """Write a Hugging Face folder with the vocabulary and `language_model.json`; complete once that file is there."""
    model.save_pretrained(folder)  # type: ignore[operator]
    vocabulary.save(folder)
    (folder / "language_model.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
