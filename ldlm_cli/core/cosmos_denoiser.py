"""The other denoiser of the authors' lineage: Llama-type blocks with long skips, after COSMOS."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldlm_cli.core.latent_encoder import LatentLayout
from ldlm_cli.core.layers import EndPositions, LlamaBlock, RMSNorm, init_linear, key_mask, rotary_angles
from ldlm_cli.recipe.schema import LatentRecipe, TowerRecipe

LONGEST_PERIOD = 10.0


class CosmosTimeEmbedding(nn.Module):
    """Sinusoids of t in [0, 1], longest period 10, through a two-layer map of ratio 2: [B] to [B, D], 4 D^2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.up, self.out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(-math.log(LONGEST_PERIOD) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
        angles = t.float()[:, None] * rates
        return self.out(F.silu(self.up(torch.cat([angles.cos(), angles.sin()], dim=-1))))


class CosmosBlock(nn.Module):
    """A Llama block after adding its own projections of time and of the earlier estimate: 18 D^2 parameters."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.time, self.self_condition = nn.Linear(width, width), nn.Linear(width, width)
        self.block = LlamaBlock(width, heads)

    def forward(self, x: Tensor, condition: Tensor, z_self: Tensor, rotary: Tensor, mask: Tensor) -> Tensor:
        """x and z_self [B, L, D], condition [B, D]; returns [B, L, D]."""
        x = x + self.time(F.silu(condition))[:, None] + self.self_condition(z_self)
        return self.block(x, rotary, mask)


class CosmosDenoiser(nn.Module):
    """Transformer whose second half also receives what the first half made, the deepest block's output first.

    Source: the score network of COSMOS (arXiv 2506.21170) as reconstructed (method.md 2.1, candidate a): 129.8M
    parameters at width 768 and 12 layers, without the maps in and out.
    """

    def __init__(self, latents: LatentRecipe, tower: TowerRecipe, longest: int) -> None:
        super().__init__()
        width = latents.width
        self.layout, self.head_size = LatentLayout(latents), width // tower.heads
        self.project_in = nn.Linear(width, width)
        self.slot_positions = nn.Parameter(torch.empty(latents.slots, width)) if latents.slots else None
        self.ends = None if latents.slots else EndPositions(width, longest)
        self.time = CosmosTimeEmbedding(width)
        self.blocks = nn.ModuleList(CosmosBlock(width, tower.heads) for _ in range(tower.layers))
        self.out_norm, self.out = RMSNorm(width), nn.Linear(width, width)
        init_linear(self)
        if self.slot_positions is not None:
            nn.init.normal_(self.slot_positions, std=0.02)
        nn.init.zeros_(self.out.weight)  # as the other denoiser, the first estimate is zero

    def forward(self, z_t: Tensor, t: Tensor, z_self: Tensor, latent_mask: Tensor) -> Tensor:
        """Estimate clean latents; see core.denoiser.Denoiser.forward."""
        x = self.project_in(z_t)
        if self.slot_positions is not None:
            x = x + self.slot_positions.to(x.dtype)
        if self.ends is not None:
            x = x + self.ends(latent_mask).to(x.dtype)
        condition = self.time(t)
        rotary = rotary_angles(self.layout.positions(z_t.shape[1], z_t.device), self.head_size)
        mask = key_mask(latent_mask)
        half = len(self.blocks) // 2
        skips: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            if number >= len(self.blocks) - half:
                x = x + skips.pop()
            x = block(x, condition, z_self, rotary, mask)
            if number < half:
                skips.append(x)
        return self.out(self.out_norm(x))
