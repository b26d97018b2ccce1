"""h_hat to logits: the trained token decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldlm_cli.core.layers import LlamaBlock, RMSNorm, init_linear, key_mask, rotary_angles
from ldlm_cli.recipe.schema import TowerRecipe


class TokenDecoder(nn.Module):
    """Bidirectional transformer with an untied, bias-free vocabulary head.

    Source: arXiv 2605.07933 as reconstructed (method.md 2.1: Llama-type blocks fit the paper's 66M).
    """

    def __init__(self, width: int, tower: TowerRecipe, vocab_size: int) -> None:
        super().__init__()
        self.head_size = width // tower.heads
        self.blocks = nn.ModuleList(LlamaBlock(width, tower.heads) for _ in range(tower.layers))
        self.out_norm, self.head = RMSNorm(width), nn.Linear(width, vocab_size, bias=False)
        init_linear(self)

    def forward(self, h_hat: Tensor, token_mask: Tensor) -> Tensor:
        """h_hat [B, N, H], token_mask [B, N] bool; returns logits [B, N, V]."""
        rotary = rotary_angles(torch.arange(h_hat.shape[1], device=h_hat.device), self.head_size)
        mask = key_mask(token_mask)
        for block in self.blocks:
            h_hat = block(h_hat, rotary, mask)
        return self.head(self.out_norm(h_hat))
