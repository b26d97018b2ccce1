"""Blocks shared by the parts. B batch, N, M positions of two streams, D width, A heads, K head size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with or without a learnable gain (starts at 1)."""

    def __init__(self, width: int, gain: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if gain else None
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, (self.width,), weight, eps=1e-6)


def rotary_angles(positions: Tensor, head_size: int, base: float = 10_000.0) -> Tensor:
    """exp(i angle) for positions [N] (float, tokens): [N, head_size / 2] complex64.

    Source: rotary position embedding, arXiv 2104.09864, Eq. (13) and (15).
    """
    frequencies = base ** (-torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float64) / head_size)
    angles = (positions.double()[:, None] * frequencies).float()
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate queries or keys [B, A, N, K] by the angles of their positions [N, K / 2]; dtype of x.

    One complex product in float32: on a CPU much less memory traffic than products with cosines and sines.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary).flatten(-2).to(x.dtype)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, D] to [B, A, N, K]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, A, N, K] to [B, N, D]."""
    return x.transpose(1, 2).flatten(-2)


def key_mask(mask: Tensor) -> Tensor:
    """Boolean attention mask [B, 1, 1, M] from a key mask [B, M], True = attend."""
    return mask[:, None, None, :]


class SelfAttention(nn.Module):
    """Bidirectional attention, rotary positions, no biases: 4 D^2 parameters."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor) -> Tensor:
        """x [B, N, D], mask [B, 1, 1, N] bool; returns [B, N, D]."""
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        query, key = rotate(query, rotary), rotate(key, rotary)
        return self.out(merge_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=mask)))


class Mlp(nn.Module):
    """Two linear maps with GELU between, ratio 4: 8 D^2 parameters."""

    def __init__(self, width: int, dropout: float = 0.0, bias: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width, bias=bias), nn.Linear(4 * width, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(F.gelu(self.up(x), approximate="tanh")))


class SwiGlu(nn.Module):
    """Gated feed-forward with hidden width 4 D: 12 D^2 parameters. Source: arXiv 2002.05202, Eq. (6)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(width, 8 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class PerceiverBlock(nn.Module):
    """Queries attend to themselves and to a context in one attention, then an MLP: 14 D^2 parameters.

    Source: the COSMOS block (arXiv 2506.21170), which the paper's parameter count singles out (method.md 2.1).
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.stream_norm, self.context_norm = RMSNorm(width), RMSNorm(width)
        self.stream_qkv = nn.Linear(width, 3 * width, bias=False)
        self.context_kv = nn.Linear(width, 2 * width, bias=False)
        self.query_norm, self.key_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm, self.mlp = nn.LayerNorm(width), Mlp(width, dropout)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        rotary: Tensor,
        context_rotary: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """x [B, N, D], context [B, M, D], mask [B, 1, 1, N + M] bool (stream first); returns [B, N, D]."""
        query, key, value = (
            split_heads(part, self.heads) for part in self.stream_qkv(self.stream_norm(x)).chunk(3, dim=-1)
        )
        context_key, context_value = (
            split_heads(part, self.heads) for part in self.context_kv(self.context_norm(context)).chunk(2, dim=-1)
        )
        query = rotate(self.query_norm(query), rotary)
        key = torch.cat([rotate(self.key_norm(key), rotary), rotate(self.key_norm(context_key), context_rotary)], dim=2)
        value = torch.cat([value, context_value], dim=2)
        x = x + self.out(merge_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=mask)))
        return x + self.mlp(self.mlp_norm(x))


class LlamaBlock(nn.Module):
    """Pre-norm attention and gated feed-forward, bidirectional: 16 D^2 parameters."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(width), SelfAttention(width, heads)
        self.mlp_norm, self.mlp = RMSNorm(width), SwiGlu(width)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, mask)
        return x + self.mlp(self.mlp_norm(x))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, with shift and scale [B, D] for x [B, N, D]."""
    return torch.addcmul(shift[:, None].to(x.dtype), x, (1 + scale)[:, None].to(x.dtype))


class AdaptiveNormBlock(nn.Module):
    """Transformer block whose norms are shifted, scaled and gated by the time embedding: 12 D^2 + 6 D^2 parameters.

    Source: DiT with adaLN-Zero, arXiv 2212.09748, Sec. 3.2; starts as the identity.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention, self.mlp = SelfAttention(width, heads), Mlp(width, dropout)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, rotary: Tensor, mask: Tensor) -> Tensor:
        """x [B, N, D], condition [B, D]; returns [B, N, D]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        attended = self.attention(modulate(self.norm(x), shift_a, scale_a), rotary, mask)
        x = torch.addcmul(x, gate_a[:, None].to(x.dtype), attended.to(x.dtype))
        return torch.addcmul(
            x, gate_m[:, None].to(x.dtype), self.mlp(modulate(self.norm(x), shift_m, scale_m)).to(x.dtype)
        )


class TimeEmbedding(nn.Module):
    """Sinusoids of t in [0, 1] (scaled by 1,000, longest period 10,000) through a two-layer map: [B] to [B, D]."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.up, self.out = nn.Linear(frequencies, width), nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        rates = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
        angles = 1000 * t.float()[:, None] * rates
        return self.out(F.silu(self.up(torch.cat([angles.cos(), angles.sin()], dim=-1))))


class EndPositions(nn.Module):
    """How far each latent lies from the two ends of its text, as sinusoids through one linear map.

    Rotary positions are relative: at high noise, where all latents look alike, they say neither where a text begins nor
    how long it is, and what every text of a corpus has in common at one place cannot be told from its neighbour's.
    Distances are clipped at the training length, so that in a longer text a latent far from an end is only "far".
    """

    FREQUENCIES, LONGEST_PERIOD = 32, 200.0

    def __init__(self, width: int, longest: int) -> None:
        super().__init__()
        self.longest = longest
        self.map = nn.Linear(4 * self.FREQUENCIES, width)

    def forward(self, mask: Tensor) -> Tensor:
        """Mask of real latents [B, L] bool (padding behind them); returns [B, L, D]."""
        place = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        behind = (mask.sum(1, keepdim=True) - 1 - place).clamp(min=0)
        distances = torch.stack([place, behind], dim=-1).clamp(max=self.longest - 1).float()
        steps = torch.arange(self.FREQUENCIES, device=mask.device, dtype=torch.float32) / self.FREQUENCIES
        angles = distances[..., None] * self.LONGEST_PERIOD**-steps
        return self.map(torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(2))


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weights for every linear map and zero biases, as in DiT: the scale follows the width."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
