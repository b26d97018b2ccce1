"""Per-dimension standardisation with measured statistics: of hidden states, and of latents in a sequential plan."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MIN_STD = 1e-4


class Normalizer(nn.Module):
    """(x - mean) / std per dimension, clipped; mean 0 and std 1 until `set_statistics` is called."""

    def __init__(self, width: int, clip_std: float = math.inf, whitening_floor: float | None = None) -> None:
        super().__init__()
        self.clip_std, self.whitening_floor = clip_std, whitening_floor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.register_buffer("whitening", None if whitening_floor is None else torch.eye(width))
        self.whitening: Tensor | None
        self.mean: Tensor
        self.std: Tensor

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Take measured statistics, [width] each; a constant dimension is left unscaled."""
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > MIN_STD, std, torch.ones_like(std)))

    def set_moments(self, moments: Moments) -> None:
        """Take the statistics of all rows that `moments` has seen, and level their spectrum if this one does."""
        self.set_statistics(moments.mean().float(), moments.std().float())
        if self.whitening is not None and self.whitening_floor is not None:
            self.whitening.copy_(whitening_matrix(moments.covariance(), moments.std(), self.whitening_floor))

    def forward(self, x: Tensor) -> Tensor:
        """Standardise x [..., width]."""
        x = (x - self.mean) / self.std
        if self.whitening is not None:
            x = x.float() @ self.whitening
        return x if math.isinf(self.clip_std) else x.clamp(-self.clip_std, self.clip_std)

    def invert(self, x: Tensor) -> Tensor:
        """Undo the standardisation exactly (where nothing was clipped)."""
        return x * self.std + self.mean


def whitening_matrix(covariance: Tensor, std: Tensor, floor: float) -> Tensor:
    """Symmetric matrix that levels the spectrum of standardised rows: (C + floor I)^(-1/2), to unit mean variance.

    C is the correlation matrix (covariance [W, W] over the outer product of std [W]); directions far below the floor,
    which hold noise rather than words, are not blown up.
    """
    correlation = covariance / torch.outer(std, std).clamp(min=MIN_STD**2)
    values, vectors = torch.linalg.eigh(correlation)
    values = values.clamp(min=0)
    gains = (values + floor).rsqrt()
    gains = gains / (gains.square() * values).mean().sqrt()
    return (vectors * gains) @ vectors.T


class Moments:
    """Running count, sum and sum of outer products of rows [M, width], float64: mean, std, covariance."""

    def __init__(self, width: int) -> None:
        self.count = 0.0
        self.total = torch.zeros(width, dtype=torch.float64)
        self.outer = torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        rows = rows.detach().float()
        self.count += rows.shape[0]
        self.total += rows.sum(0).double().cpu()
        self.outer += (rows.T @ rows).double().cpu()

    def mean(self) -> Tensor:
        return self.total / self.count

    def covariance(self) -> Tensor:
        mean = self.mean()
        return self.outer / self.count - torch.outer(mean, mean)

    def std(self) -> Tensor:
        return self.covariance().diagonal().clamp(min=0).sqrt()


def latent_state(covariance: Tensor, noise_std: float) -> dict[str, float]:
    """The state of a latent space from its covariance [D, D]: what collapse and inflation show in.

    Returns:
        z_std: root of the mean centred variance over dimensions; effective_rank: exp of the entropy of the normalised
        eigenvalues; bits: 1/2 sum log2(1 + lambda_i / sigma_dec^2), the measured bits a latent passes through the
        decoder noise (method.md section 0; absent when noise_std is 0).
    """
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
    share = eigenvalues / eigenvalues.sum().clamp(min=1e-12)
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    state = {"z_std": float(eigenvalues.mean().sqrt()), "effective_rank": float(entropy.exp())}
    if noise_std > 0:
        state["bits"] = float(0.5 * torch.log2(1 + eigenvalues / noise_std**2).sum())
    return state
