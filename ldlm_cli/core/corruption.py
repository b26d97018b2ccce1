"""What the autoencoder's input and latents are spoilt with in training, after COSMOS: masking, noise, dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldlm_cli.core.draws import seed_at
from ldlm_cli.recipe.stage_schema import CorruptionRecipe


@dataclass(frozen=True)
class CorruptionDraws:
    """The random numbers of one training step for the rows of one process.

    masked: [B] bool, texts whose features are masked; the others get noise.
    features: [B, N, H], uniform in [0, 1) for masked texts, standard normal for the others.
    latents: [B, L, D], uniform in [0, 1).
    """

    masked: Tensor
    features: Tensor
    latents: Tensor


def draw_corruption(
    rows: Sequence[int], features: tuple[int, int], latents: tuple[int, int], device: torch.device, *address: int
) -> CorruptionDraws:
    """Draws for the given rows of the global batch, addressed by (*address, row), for shapes [N, H] and [L, D]."""
    masked = torch.zeros(len(rows), dtype=torch.bool)
    of_features = torch.empty(len(rows), *features, device=device)
    of_latents = torch.empty(len(rows), *latents, device=device)
    host, local = torch.Generator(), torch.Generator(device=device)
    for place, row in enumerate(rows):
        seed = seed_at(*address, row, 1)  # one number more than the address of the row's other draws
        masked[place] = torch.rand(1, generator=host.manual_seed(seed)) < 0.5
        draw = torch.rand if masked[place] else torch.randn
        of_features[place] = draw(*features, device=device, generator=local.manual_seed(seed ^ 1))
        of_latents[place] = torch.rand(*latents, device=device, generator=local)
    return CorruptionDraws(masked.to(device), of_features, of_latents)


def corrupt_features(h: Tensor, draws: CorruptionDraws, recipe: CorruptionRecipe) -> Tensor:
    """Hidden states [B, N, H] as the encoder sees them: features set to 0 in half of the texts, noise in the others.

    The noise keeps the variance of standardised states: sqrt(1 - delta^2) h + delta eps. Source: COSMOS, arXiv
    2506.21170, as reconstructed (method.md section 7).
    """
    kept = h * (draws.features >= recipe.masked_share)
    noised = math.sqrt(1 - recipe.noise_std**2) * h + recipe.noise_std * draws.features
    return torch.where(draws.masked[:, None, None], kept, noised)


def drop_latents(z: Tensor, draws: CorruptionDraws, recipe: CorruptionRecipe) -> Tensor:
    """Latents [B, L, D] as the decoder sees them: a share of the entries is 0, the others are scaled up."""
    return z * (draws.latents >= recipe.latent_dropout) / (1 - recipe.latent_dropout)
