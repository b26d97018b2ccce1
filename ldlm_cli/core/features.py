"""Latents that are the standardised hidden states themselves: an encoder and a decoder without parameters."""

from __future__ import annotations

from torch import Tensor, nn

from ldlm_cli.recipe.schema import LatentRecipe, TowerRecipe


class FeatureEncoder(nn.Module):
    """h as it is: one latent per token. Source: the setting of TEncDM, arXiv 2402.19097 (method.md section 7)."""

    def __init__(self, latents: LatentRecipe, tower: TowerRecipe, hidden_width: int) -> None:
        super().__init__()

    def forward(self, h: Tensor, token_mask: Tensor) -> Tensor:
        """h [B, N, H] to z_0 [B, N, H]."""
        return h.float()


class FeatureDecoder(nn.Module):
    """z as it is, so that the token decoder reads latents directly."""

    def __init__(self, latents: LatentRecipe, tower: TowerRecipe, hidden_width: int) -> None:
        super().__init__()

    def forward(self, z: Tensor, latent_mask: Tensor, token_mask: Tensor) -> Tensor:
        """z [B, N, H] to h_hat [B, N, H]."""
        return z
