"""The forward process: clean latents to noised latents, and back to the noise that a clean estimate implies."""

from __future__ import annotations

from torch import Tensor

from ldlm_cli.core.schedule import NoiseSchedule
from ldlm_cli.errors import ShapeError


def amplitudes(t: Tensor, schedule: NoiseSchedule, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t of `t` [B], shaped [B, 1, 1] in the dtype of `like` [B, L, D]."""
    if t.shape != like.shape[:1]:
        raise ShapeError(f"t must be [{like.shape[0]}], got {list(t.shape)}")
    alpha, sigma = schedule.alpha_sigma(t)
    return alpha.to(like.dtype)[:, None, None], sigma.to(like.dtype)[:, None, None]


def add_noise(z_0: Tensor, eps: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Noise clean latents to time t: z_t = alpha_t z_0 + sigma_t eps.

    Source: arXiv 2605.07933 as reconstructed (method.md 3.1).

    Args:
        z_0: clean latents, about unit variance, [B, L, D].
        eps: standard normal noise, shape of z_0.
        t: diffusion time, [B] in [0, 1]; 0 = data, 1 = noise.
    Returns:
        z_t [B, L, D], dtype of z_0. Draws no randomness.
    Raises:
        ShapeError: t is not [B].
    """
    alpha, sigma = amplitudes(t, schedule, z_0)
    return alpha * z_0 + sigma * eps


def noise_estimate(z_t: Tensor, z_0_hat: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The noise that a clean estimate implies: eps_hat = (z_t - alpha_t z_0_hat) / sigma_t, [B, L, D]; t > 0."""
    alpha, sigma = amplitudes(t, schedule, z_t)
    return (z_t - alpha * z_0_hat) / sigma
