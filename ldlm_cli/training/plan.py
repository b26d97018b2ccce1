"""What a plan would cost, before it is run: parameters by part, memory, tokens, steps, time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ldlm_cli.core.model import parameters_by_part
from ldlm_cli.core.schedule import latent_bits
from ldlm_cli.errors import RecipeError
from ldlm_cli.recipe.resolve import recipe_for_plan
from ldlm_cli.recipe.schema import JudgeRecipe, Recipe, TokenEncoderRecipe
from ldlm_cli.recipe.stage_schema import StageRecipe
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
    recipe = recipe_for_plan(recipe, plan)
    stages = plan_stages(recipe, plan)
    vocab_size = recipe.data.vocab_size if recipe.data.tokenizer == "bpe" else recipe.token_encoder.vocab_size
    if vocab_size is None:
        raise RecipeError("state token_encoder.vocab_size to plan without loading the token encoder")
    parts = parameters_by_part(recipe, vocab_size)
    frozen = language_model_parameters(recipe.token_encoder, vocab_size)
    trained = sum(parts.values())
    rows = [_stage_row(recipe, name, stage, parts, vocab_size) for name, stage in stages]
    noises = [
        stage.decoder_noise_std for _, stage in stages if stage.kind == "latent" and "token_decoder" in stage.trains
    ]
    speed = matmul_flops()
    return {
        "parameters": parts,
        "total": trained,
        "frozen_parameters": frozen,
        "vocab_size": vocab_size,
        # Of each stage that trains a decoder; null where it sees no noise.
        "latent_bits": [latent_bits(recipe.model.latents.width, noise) if noise > 0 else None for noise in noises],
        "schedule_scale": recipe.diffusion.schedule_scale,
        "memory_bytes": _memory(recipe, trained, frozen, stages),
        "stages": rows,
        "tokens": sum(row["tokens"] for row in rows),
        "steps": sum(row["steps"] for row in rows),
        "flops": sum(row["flops"] for row in rows),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "seconds_estimate": sum(row["flops"] for row in rows) / (speed * USUAL_UTILISATION),
    }


def language_model_parameters(shape: TokenEncoderRecipe | JudgeRecipe, vocab_size: int) -> int:
    """About 12 H^2 a block plus the embedding table."""
    return 12 * shape.width**2 * shape.layers + vocab_size * shape.width


class Flops(NamedTuple):
    """FLOPs a token of training: of everything that runs, and of these the denoiser's."""

    total: float
    denoiser: float


def flops_per_token(recipe: Recipe, stage: StageRecipe, parts: dict[str, int], vocab_size: int) -> Flops:
    """6 FLOPs a parameter and token where a part trains, 2 where only its forward pass runs; attention is left out.

    Args:
        parts: parameters by trained part.
        vocab_size: entries of the vocabulary.
    """
    if stage.kind == "language_model":
        shape = recipe.judge if stage.role == "judge" else recipe.token_encoder
        return Flops(6.0 * language_model_parameters(shape, vocab_size), 0.0)
    decodes = stage.losses.get("hidden", 0) > 0 or stage.losses.get("token", 0) > 0
    diffuses = stage.losses.get("diffusion", 0) > 0
    runs = {"latent_encoder": True, "denoiser": diffuses, "latent_decoder": decodes, "token_decoder": decodes}
    costs = {name: (6 if name in stage.trains else 2) * count * runs[name] for name, count in parts.items()}
    # The estimate that a text sees of itself costs one more forward pass.
    denoiser = costs["denoiser"] + 2 * parts["denoiser"] * recipe.diffusion.self_conditioning_share * diffuses
    others = sum(cost for name, cost in costs.items() if name != "denoiser")
    return Flops(others + denoiser + 2 * language_model_parameters(recipe.token_encoder, vocab_size), denoiser)


def _stage_row(recipe: Recipe, name: str, stage: StageRecipe, parts: dict[str, int], vocab_size: int) -> dict[str, Any]:
    tokens = stage.steps * stage.batch_tokens
    flops = flops_per_token(recipe, stage, parts, vocab_size).total * tokens
    return {"name": name, "kind": stage.kind, "steps": stage.steps, "tokens": tokens, "flops": flops}


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
