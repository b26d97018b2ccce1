"""What a plan would cost, before it is run: parameters by part, memory, tokens, steps, time."""

from __future__ import annotations

from typing import Any

import torch

from ldlm_cli.core.model import parameters_by_part
from ldlm_cli.core.schedule import latent_bits
from ldlm_cli.errors import RecipeError
from ldlm_cli.recipe.schema import Recipe, StageRecipe
from ldlm_cli.runtime import matmul_flops

BYTES = 4  # weights, gradients, AdamW's two moments and the average are all float32
ACTIVATIONS_PER_TOKEN_AND_LAYER = 34
"""Floats kept for the backward pass per token, layer and unit of width (attention 11, MLP 19, norms 4)."""
USUAL_UTILISATION = 0.5


def plan_stages(recipe: Recipe, plan: str) -> list[tuple[str, StageRecipe]]:
    """The stages of a plan; RecipeError names the plans there are."""
    if plan not in recipe.plans:
        raise RecipeError(f"recipe '{recipe.name}' has no plan '{plan}'; it has: {', '.join(recipe.plans)}")
    return [(name, recipe.stages[name]) for name in recipe.plans[plan]]


def plan_report(recipe: Recipe, plan: str) -> dict[str, Any]:
    """Parameters, memory, tokens, steps and an estimate of the time; builds on the meta device, opens nothing.

    The vocabulary is the one the recipe states (a trained BPE may come out smaller). The time is model FLOPs over the
    measured matrix speed of this machine at a utilisation of 0.5, a planning figure.

    Raises:
        RecipeError: the vocabulary of a pretrained token encoder is not stated.
    """
    stages = plan_stages(recipe, plan)
    vocab_size = recipe.data.vocab_size if recipe.data.tokenizer == "bpe" else recipe.token_encoder.vocab_size
    if vocab_size is None:
        raise RecipeError("state token_encoder.vocab_size to plan without loading the token encoder")
    parts = parameters_by_part(recipe, vocab_size)
    frozen = _language_model_parameters(recipe, vocab_size)
    trained = sum(parts.values())
    rows = [_stage_row(recipe, name, stage, parts, frozen) for name, stage in stages]
    latent = [stage for _, stage in stages if stage.kind == "latent"]
    speed = matmul_flops()
    return {
        "parameters": parts,
        "total": trained,
        "frozen_parameters": frozen,
        "vocab_size": vocab_size,
        "latent_bits": [latent_bits(recipe.model.latents.width, stage.decoder_noise_std) for stage in latent],
        "schedule_scale": recipe.diffusion.schedule_scale,
        "memory_bytes": _memory(recipe, trained, frozen, stages),
        "stages": rows,
        "tokens": sum(row["tokens"] for row in rows),
        "steps": sum(row["steps"] for row in rows),
        "flops": sum(row["flops"] for row in rows),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "seconds_estimate": sum(row["flops"] for row in rows) / (speed * USUAL_UTILISATION),
    }


def _language_model_parameters(recipe: Recipe, vocab_size: int) -> int:
    """About 12 H^2 a block plus the embedding table."""
    encoder = recipe.token_encoder
    return 12 * encoder.width**2 * encoder.layers + vocab_size * encoder.width


def _stage_row(recipe: Recipe, name: str, stage: StageRecipe, parts: dict[str, int], frozen: int) -> dict[str, Any]:
    """6 FLOPs a parameter and token trained, 2 where only the forward pass runs."""
    if stage.kind == "language_model":
        per_token: float = 6 * frozen
    else:
        self_conditioned = 2 * parts["denoiser"] * recipe.diffusion.self_conditioning_share
        per_token = 6 * sum(parts[part] for part in stage.trains) + 2 * frozen
        per_token += self_conditioned if stage.losses.get("diffusion", 0) > 0 else 0
    tokens = stage.steps * stage.batch_tokens
    return {"name": name, "kind": stage.kind, "steps": stage.steps, "tokens": tokens, "flops": per_token * tokens}


def _memory(recipe: Recipe, trained: int, frozen: int, stages: list[tuple[str, StageRecipe]]) -> dict[str, int]:
    """Bytes by kind in the largest stage on one process."""
    model = recipe.model
    towers = (model.latent_encoder, model.latent_decoder, model.denoiser, model.token_decoder)
    width_layers = sum(tower.layers for tower in towers) * model.latents.width
    tokens = max(stage.batch_tokens // stage.micro_batches for _, stage in stages)
    found = {
        "weights": BYTES * (trained + frozen),
        "gradients": BYTES * trained,
        "optimizer": 2 * BYTES * trained,
        "average": BYTES * trained,
        "activations": BYTES * ACTIVATIONS_PER_TOKEN_AND_LAYER * width_layers * tokens,
    }
    return found | {"total": sum(found.values())}
