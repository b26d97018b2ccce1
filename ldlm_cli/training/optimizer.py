"""AdamW over the trained parts, the learning rate as a function of the step, clipping part by part."""

from __future__ import annotations

import math

import torch
from torch import nn

from ldlm_cli.recipe.schema import OptimizerRecipe


def lr_at(step: int, total_steps: int, recipe: OptimizerRecipe) -> float:
    """Learning rate of step `step` (0-based): linear warmup, then constant or half a cosine to `final_share`."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return recipe.learning_rate
    done = (step - recipe.warmup_steps) / max(1, total_steps - recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return recipe.learning_rate * (recipe.final_share + (1 - recipe.final_share) * cosine)


def build_optimizer(parts: nn.ModuleDict, recipe: OptimizerRecipe) -> torch.optim.AdamW:
    """One group per part and kind: matrices decay, norms, biases and query tables do not."""
    groups = []
    for name, part in parts.items():
        trained = [(key, weight) for key, weight in part.named_parameters() if weight.requires_grad]
        matrices = [weight for key, weight in trained if weight.ndim >= 2 and "queries" not in key]
        others = [weight for key, weight in trained if not (weight.ndim >= 2 and "queries" not in key)]
        groups.append({"params": matrices, "weight_decay": recipe.weight_decay, "part": name})
        groups.append({"params": others, "weight_decay": 0.0, "part": name})
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
        fused=True,
    )


def clip_parts(parts: nn.ModuleDict, max_norm: float) -> dict[str, torch.Tensor]:
    """Clip the gradient of each part to `max_norm` on its own; returns the norms before clipping, by part.

    Clipped together, the encoder's gradient would be scaled by the denoiser's (method.md 5).
    """
    return {
        name: torch.nn.utils.clip_grad_norm_(part.parameters(), max_norm, foreach=True) for name, part in parts.items()
    }
