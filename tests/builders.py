"""Tiny recipes, models and inputs that several test files build on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldlm_cli.core.draws import Draws, draw_rows
from ldlm_cli.core.model import LDLM, build_parts
from ldlm_cli.core.token_encoder import TokenEncoder
from ldlm_cli.recipe.schema import Recipe

VOCAB = 53
CPU = torch.device("cpu")
TOWER = {"layers": 1, "heads": 2}
TOWERS = dict.fromkeys(("latent_encoder", "latent_decoder", "token_decoder", "denoiser"), TOWER)


def model_recipe(width: int = 16, layers: int = 1, **latents: Any) -> Recipe:
    """A recipe of which only the model matters."""
    towers = {name: {"layers": layers, "heads": 2} for name in TOWERS}
    return Recipe.model_validate(
        {
            "token_encoder": {"width": width, "layers": 2, "heads": 2},
            "model": {"latents": {"width": width, **latents}, **towers},
        }
    )


def random_token_encoder(width: int, vocab: int = VOCAB, seed: int = 0) -> TokenEncoder:
    """A frozen causal LM with random weights."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,
    )
    return TokenEncoder(LlamaModel(config), -2, 1, 10.0)


def tiny_model(recipe: Recipe, vocab: int = VOCAB, seed: int = 0) -> LDLM:
    """An LDLM whose every weight is off its initial value: no layer that starts at zero hides a gradient."""
    encoder = random_token_encoder(recipe.token_encoder.width, vocab, seed)
    model = LDLM(build_parts(recipe, vocab), encoder, recipe)
    with torch.no_grad():
        for parameter in model.parts.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_batch(lengths: Sequence[int], width: int, vocab: int = VOCAB, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Token ids [B, width] int64 and mask [B, width] bool of texts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocab, (len(lengths), width), generator=generator)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    return ids * mask, mask


def draws_of(rows: Sequence[int], latents: int, width: int) -> Draws:
    """The numbers drawn for these rows of a step."""
    return draw_rows(rows, latents, width, CPU, 5, 7)


def training_tree(cache: Path) -> dict[str, Any]:
    """A whole recipe whose training takes seconds, as plain values."""
    language_model = {
        "kind": "language_model",
        "steps": 8,
        "batch_tokens": 1024,
        "eval_every_steps": 4,
        "optimizer": {"warmup_steps": 2},
    }
    return {
        "name": "small",
        "data": {
            "num_documents": 300,
            "long_share": 0.0,
            "max_len_tokens": 64,
            "context_tokens": 128,
            "vocab_size": 500,
            "cache": str(cache),
        },
        "token_encoder": {"width": 16, "layers": 2, "heads": 2},
        "model": {"latents": {"width": 16}, **TOWERS},
        "stages": {
            "encoder": language_model,
            "joint": {
                "steps": 20,
                "batch_tokens": 512,
                "decoder_noise_std": 0.2,
                "gate": {"warmup_steps": 10},
                "times": {"bins": 4, "refresh_steps": 3, "decay": 0.9},
                "optimizer": {"warmup_steps": 4},
            },
        },
        "plans": {"joint": ["encoder", "joint"]},
        "training": {
            "precision": "fp32",
            "log_every_steps": 2,
            "sample_every_steps": 0,
            "save_every_steps": 6,
            "tensorboard": False,
        },
    }
