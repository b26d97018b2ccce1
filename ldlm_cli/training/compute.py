"""What a training has spent so far: steps and tokens by stage, seconds, FLOPs by the formula of training/plan.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ldlm_cli.core.model import parameters_by_part
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.recipe.stage_schema import StageRecipe
from ldlm_cli.training.plan import flops_per_token


def stage_compute(
    recipe: Recipe, name: str, stage: StageRecipe, vocab_size: int, steps: int, seconds: float
) -> dict[str, Any]:
    """The compute of the first `steps` optimizer steps of a stage.

    Args:
        vocab_size: entries of the vocabulary in use.
        seconds: wall clock of these steps on all processes together, logging, previews and saving included.
    Returns:
        stage, kind, steps, tokens (steps times batch_tokens, padding included), seconds, flops, and of these the
        denoiser's: denoiser_steps (steps that trained it), denoiser_flops.
    """
    per_token = flops_per_token(recipe, stage, parameters_by_part(recipe, vocab_size), vocab_size)
    tokens = steps * stage.batch_tokens
    trains_denoiser = stage.kind == "latent" and "denoiser" in stage.trains and stage.losses.get("diffusion", 0) > 0
    return {
        "stage": name,
        "kind": stage.kind,
        "steps": steps,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "flops": per_token.total * tokens,
        "denoiser_steps": steps if trains_denoiser else 0,
        "denoiser_flops": per_token.denoiser * tokens,
    }


def total_compute(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The stages with their sums; `latent` holds the sums over latent stages alone.

    Language models, which runs may share, are part of `flops` but not of `latent`, by which plans are compared.
    """
    summed = ("steps", "tokens", "seconds", "flops")
    latent = [row for row in rows if row["kind"] == "latent"]
    return {
        "stages": list(rows),
        **{key: sum(row[key] for row in rows) for key in summed},
        "latent": {key: sum(row[key] for row in latent) for key in (*summed, "denoiser_steps", "denoiser_flops")},
    }
