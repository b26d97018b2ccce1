"""z to h_hat: the trained latent decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldlm_cli.core.latent_encoder import LatentLayout
from ldlm_cli.core.layers import PerceiverBlock, RMSNorm, init_linear, key_mask, rotary_angles
from ldlm_cli.recipe.schema import LatentRecipe, TowerRecipe


class LatentDecoder(nn.Module):
    """Perceiver that reads hidden states h_hat [B, N, H] out of latents z [B, L, D].

    Queries are placed by rotary position and start from their own latent (see LatentEncoder).
    Source: arXiv 2605.07933 as reconstructed (method.md 2.1).
    """

    def __init__(self, latents: LatentRecipe, tower: TowerRecipe, hidden_width: int) -> None:
        super().__init__()
        width = latents.width
        self.layout, self.head_size = LatentLayout(latents), width // tower.heads
        self.aligned = latents.kind == "positional" and latents.aligned
        self.queries = nn.Parameter(torch.empty(1, width))
        self.slot_positions = nn.Parameter(torch.empty(latents.slots, width)) if latents.slots else None
        self.query_norm = None if self.aligned else RMSNorm(width)
        self.blocks = nn.ModuleList(PerceiverBlock(width, tower.heads, tower.dropout) for _ in range(tower.layers))
        self.out_norm, self.out = RMSNorm(width), nn.Linear(width, hidden_width, bias=False)
        init_linear(self)
        for table in (self.queries, self.slot_positions):
            if table is not None:
                nn.init.normal_(table, std=0.02)

    def forward(self, z: Tensor, latent_mask: Tensor, token_mask: Tensor) -> Tensor:
        """z [B, L, D], latent_mask [B, L] bool, token_mask [B, N] bool; returns h_hat [B, N, H]."""
        batch, tokens = token_mask.shape
        if self.slot_positions is not None:
            z = z + self.slot_positions
        if self.query_norm is None:
            x = self.layout.spread(z, tokens) + self.queries.to(z.dtype)
        else:
            x = self.query_norm(self.queries).expand(batch, tokens, -1).to(z.dtype)
        rotary = rotary_angles(torch.arange(tokens, device=z.device), self.head_size)
        context_rotary = rotary_angles(self.layout.positions(z.shape[1], z.device), self.head_size)
        mask = key_mask(torch.cat([token_mask, latent_mask], dim=1))
        for block in self.blocks:
            x = block(x, z, rotary, context_rotary, mask)
        return self.out(self.out_norm(x))
