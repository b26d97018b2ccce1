"""AdamW or Muon over the trained parts, the learning rate as a function of the step, clipping part by part."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ldlm_cli.recipe.schema import OptimizerRecipe
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


def build_optimizer(parts: nn.ModuleDict, recipe: OptimizerRecipe) -> Together:
    """AdamW, or Muon for the matrices inside blocks and AdamW for the rest; each group with its rate's share.

    One group per part and kind: matrices decay, norms, biases and query tables do not.
    """
    plain: list[dict[str, Any]] = []
    inner: list[dict[str, Any]] = []
    for name, part in parts.items():
        kinds: dict[str, list[nn.Parameter]] = {"inner": [], "matrix": [], "other": []}
        for key, weight in part.named_parameters():
            if weight.requires_grad:
                kinds[_kind(key, weight, recipe)].append(weight)
        plain.append({"params": kinds["matrix"], "weight_decay": recipe.weight_decay, "part": name, "rate": 1.0})
        plain.append({"params": kinds["other"], "weight_decay": 0.0, "part": name, "rate": 1.0})
        inner.append({"params": kinds["inner"], "weight_decay": recipe.weight_decay, "part": name})
        inner[-1]["rate"] = recipe.matrix_learning_rate / recipe.learning_rate
    plain, inner = [[group for group in groups if group["params"]] for groups in (plain, inner)]
    betas = (recipe.beta1, recipe.beta2)
    adamw = torch.optim.AdamW(plain, lr=recipe.learning_rate, betas=betas, eps=recipe.eps, fused=True)
    return Together([adamw, *([Muon(inner, lr=recipe.matrix_learning_rate)] if inner else [])])


def _kind(key: str, weight: nn.Parameter, recipe: OptimizerRecipe) -> str:
    """Which group a weight belongs to; blocks are called `blocks` here and `layers` in transformers."""
    if recipe.kind == "muon" and weight.ndim == 2 and {"blocks", "layers"} & set(key.split(".")):
        return "inner"
    return "matrix" if weight.ndim >= 2 and "queries" not in key else "other"


def clip_parts(parts: nn.ModuleDict, max_norm: float) -> dict[str, torch.Tensor]:
    """Clip the gradient of each part to `max_norm` on its own; returns the norms before clipping, by part.

    Clipped together, the encoder's gradient would be scaled by the denoiser's (method.md 5).
    """
    return {
        name: torch.nn.utils.clip_grad_norm_(part.parameters(), max_norm, foreach=True) for name, part in parts.items()
    }
