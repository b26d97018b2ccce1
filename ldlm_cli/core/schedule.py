"""Noise schedules: how much signal and how much noise a latent holds at time t (0 = data, 1 = noise)."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from ldlm_cli.errors import UsageError


class NoiseSchedule(Protocol):
    """Amplitudes of a variance-preserving process, alpha_t^2 + sigma_t^2 = 1."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]: ...

    def beta(self, t: Tensor) -> Tensor: ...


class TangentSchedule:
    """sigma_t / alpha_t = scale * tan(pi t / 2).

    Source: arXiv 2605.07933 as reconstructed (method.md 3.1); the formula is the authors' earlier code (2506.21170).
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, float64, shape of `t` (any shape, values in [0, 1]); exact at both ends."""
        angle = t.double() * (math.pi / 2)
        # tan(pi/2) is large and of either sign in floating point; sine and cosine are not.
        sine, cosine = torch.sin(angle), torch.cos(angle).clamp(min=0.0)
        norm = torch.sqrt(cosine**2 + (self.scale * sine) ** 2)
        return cosine / norm, self.scale * sine / norm

    def beta(self, t: Tensor) -> Tensor:
        """Rate of the reverse SDE, -2 d(log alpha)/dt, float64, shape of `t`; t is clipped at 0.95 (lineage)."""
        tangent = torch.tan(t.double().clamp(max=0.95) * (math.pi / 2))
        squared = self.scale**2
        return math.pi * squared * tangent * (1 + tangent**2) / (1 + squared * tangent**2)

    def time_at_ratio(self, ratio: float) -> float:
        """The time at which sigma/alpha equals `ratio` (>= 0)."""
        return math.atan(ratio / self.scale) * 2 / math.pi


SCHEDULES = {"tangent": TangentSchedule}


def build_schedule(name: str, scale: float) -> NoiseSchedule:
    """The schedule of that name; UsageError when there is none."""
    if name not in SCHEDULES:
        raise UsageError(f"unknown noise schedule '{name}'; known: {', '.join(SCHEDULES)}")
    return SCHEDULES[name](scale)


def latent_bits(width: int, noise_std: float) -> float:
    """Bits that one unit-variance latent passes through the decoder noise: (D/2) log2(1 + 1/sigma_dec^2).

    Source: capacity of D parallel Gaussian channels (method.md section 0, width rule); inf when noise_std is 0.
    """
    return math.inf if noise_std == 0 else width / 2 * math.log2(1 + noise_std**-2)
