"""AdamW or Muon over the trained parts, the learning rate as a function of the step, clipping part by part."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ldlm_cli.recipe.stage_schema import OptimizerRecipe
from ldlm_cli.training.muon import Muon, Together


def lr_at(step: int, total_steps: int, recipe: OptimizerRecipe) -> float:
    """Learning rate of step `step` (0-based): linear warmup, then constant or half a cosine to `final_share`."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return recipe.learning_rate
    done = (step - recipe.warmup_steps) / max(1, total_steps - recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return recipe.learning_rate * (recipe.final_share + (1 - recipe.final_share) * cosine)


FUSED = {"qkv": 3, "stream_qkv": 3, "context_kv": 2, "gate_up": 2, "modulation": 6}
"""Linear maps of core.layers that hold several maps stacked by rows, and how many."""


def build_optimizer(parts: nn.ModuleDict, recipe: OptimizerRecipe) -> Together:
    """AdamW, or Muon for the matrices inside blocks and AdamW for the rest; each group with its rate's share.

    One group per part and kind: matrices decay, norms, biases and query tables do not.
    """
    plain: list[dict[str, Any]] = []
    inner: list[dict[str, Any]] = []
    for name, part in parts.items():
        kinds: dict[tuple[str, int], list[nn.Parameter]] = {}
        for key, weight in part.named_parameters():
            if weight.requires_grad:
                kinds.setdefault(_kind(key, weight, recipe), []).append(weight)
        for (kind, pieces), weights in kinds.items():
            group = {"params": weights, "part": name, "weight_decay": 0.0 if kind == "other" else recipe.weight_decay}
            if kind == "inner":
                inner.append(group | {"rate": recipe.matrix_learning_rate / recipe.learning_rate, "pieces": pieces})
            else:
                plain.append(group | {"rate": 1.0})
    betas = (recipe.beta1, recipe.beta2)
    adamw = torch.optim.AdamW(plain, lr=recipe.learning_rate, betas=betas, eps=recipe.eps, fused=True)
    return Together([adamw, *([Muon(inner, lr=recipe.matrix_learning_rate)] if inner else [])])


def _kind(key: str, weight: nn.Parameter, recipe: OptimizerRecipe) -> tuple[str, int]:
    """Which group a weight belongs to, and how many maps it stacks; blocks are called `layers` in transformers."""
    names = key.split(".")
    if recipe.kind == "muon" and weight.ndim == 2 and {"blocks", "layers"} & set(names):
        return "inner", FUSED.get(names[-2], 1)
    return "matrix" if weight.ndim >= 2 and "queries" not in key else "other", 1


def clip_parts(parts: nn.ModuleDict, max_norm: float) -> dict[str, torch.Tensor]:
    """Clip the gradient of each part to `max_norm` on its own; returns the norms before clipping, by part.

    Clipped together, the encoder's gradient would be scaled by the denoiser's (method.md 5).
    """
    return {
        name: torch.nn.utils.clip_grad_norm_(part.parameters(), max_norm, foreach=True) for name, part in parts.items()
    }
