"""(z_t, t, z_self) to z_0_hat: the denoiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldlm_cli.core.latent_encoder import LatentLayout
from ldlm_cli.core.layers import (
    AdaptiveNormBlock,
    EndPositions,
    TimeEmbedding,
    init_linear,
    key_mask,
    modulate,
    rotary_angles,
)
from ldlm_cli.recipe.schema import LatentRecipe, TowerRecipe


class Denoiser(nn.Module):
    """Adaptive-norm transformer that predicts clean latents, conditioned on its own earlier estimate.

    Source: arXiv 2605.07933 as reconstructed (method.md 2.1, candidate b): DiT blocks (arXiv 2212.09748) over the input
    projection of [z_t ; z_self]; rotary positions and distances to both ends in place of a position table, so that any
    length can be run.
    """

    def __init__(self, latents: LatentRecipe, tower: TowerRecipe, longest: int) -> None:
        super().__init__()
        width = latents.width
        self.layout, self.head_size = LatentLayout(latents), width // tower.heads
        self.project_in = nn.Linear(2 * width, width)
        self.slot_positions = nn.Parameter(torch.empty(latents.slots, width)) if latents.slots else None
        self.ends = None if latents.slots else EndPositions(width, longest)
        self.time = TimeEmbedding(width)
        self.blocks = nn.ModuleList(AdaptiveNormBlock(width, tower.heads, tower.dropout) for _ in range(tower.layers))
        self.out_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.out_modulation, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)
        init_linear(self)
        if self.slot_positions is not None:
            nn.init.normal_(self.slot_positions, std=0.02)
        # Every block starts as the identity, the output as zero.
        modulations = [module.modulation for module in self.blocks if isinstance(module, AdaptiveNormBlock)]
        for layer in (*modulations, self.out_modulation, self.out):
            nn.init.zeros_(layer.weight)

    def forward(self, z_t: Tensor, t: Tensor, z_self: Tensor, latent_mask: Tensor) -> Tensor:
        """Estimate clean latents.

        Args:
            z_t: noised latents, [B, L, D] float.
            t: diffusion time, [B] in [0, 1].
            z_self: an earlier estimate of z_0 (zeros when there is none), shape of z_t.
            latent_mask: real latents, [B, L] bool.
        Returns:
            z_0_hat [B, L, D].
        """
        x = self.project_in(torch.cat([z_t, z_self], dim=-1))
        if self.slot_positions is not None:
            x = x + self.slot_positions.to(x.dtype)
        if self.ends is not None:
            x = x + self.ends(latent_mask).to(x.dtype)
        condition = self.time(t)
        rotary = rotary_angles(self.layout.positions(z_t.shape[1], z_t.device), self.head_size)
        mask = key_mask(latent_mask)
        for block in self.blocks:
            x = block(x, condition, rotary, mask)
        shift, scale = self.out_modulation(nn.functional.silu(condition)).chunk(2, dim=-1)
        return self.out(modulate(self.out_norm(x).to(x.dtype), shift, scale))
