"""Samplers: plain functions from noise to clean latents. `--steps` is the number of denoiser calls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldlm_cli.core.process import amplitudes, noise_estimate
from ldlm_cli.core.schedule import NoiseSchedule
from ldlm_cli.core.timesteps import warp_times
from ldlm_cli.errors import UsageError

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(z_t [B, L, D], t [B], z_self [B, L, D]) to z_0_hat [B, L, D]."""
OnStep = Callable[[int, Tensor], None]
"""Called after denoiser call k = 1, 2, … with the current z_0_hat."""

EULER_T_MIN = 0.05
EULER_LIMIT = 2.0


def time_grid(
    kind: str, steps: int, probabilities: NDArray[np.float64] | None, t_min: float = 0.0
) -> NDArray[np.float64]:
    """Falling times from 1 to `t_min`, [steps + 1].

    `uniform` is linear in t; `warped` is linear in the loss coordinate of adaptive times, t = phi(tau) (method.md 4).
    """
    tau = np.linspace(1, 0, steps + 1)
    if kind == "uniform":
        return t_min + (1 - t_min) * tau
    if kind == "warped":
        if probabilities is None:
            raise UsageError("this snapshot has no loss-warped grid: it was not trained with adaptive times")
        return t_min + (1 - t_min) * warp_times(probabilities, tau)
    raise UsageError(f"unknown grid '{kind}'; known: uniform, warped")


def guided(denoise: Denoise, weight: float) -> Denoise:
    """Self-conditioning guidance: F(0) + w (F(z_self) - F(0)); two network calls a step unless w = 1.

    Source: method.md section 0.
    """
    if weight == 1.0:
        return denoise

    def estimate(z_t: Tensor, t: Tensor, z_self: Tensor) -> Tensor:
        free = denoise(z_t, t, torch.zeros_like(z_self))
        return free + weight * (denoise(z_t, t, z_self) - free)

    return estimate


def sample_ddim(
    denoise: Denoise,
    z: Tensor,
    schedule: NoiseSchedule,
    grid: NDArray[np.float64],
    draw_noise: Callable[[], Tensor],
    eta: float = 0.0,
    temperature: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Deterministic (eta 0) to ancestral (eta 1) steps along the grid; the last estimate is returned.

    Source: DDIM, arXiv 2010.02502, Eq. (12) and (16); injected std = eta (sigma_s / sigma_t) sqrt(1 - alpha_t^2 /
    alpha_s^2) for a step t -> s < t, at most sigma_s (method.md section 0).

    Args:
        denoise: the network, see Denoise.
        z: initial noise, std = temperature, [B, L, D].
        grid: falling times [steps + 1], the first 1.
        draw_noise: gives standard normal noise [B, L, D]; called only when eta > 0.
        temperature: scales injected noise.
    Returns:
        z_0_hat of the last call, [B, L, D].
    """
    z_self = torch.zeros_like(z)
    for index, (now, following) in enumerate(itertools.pairwise(grid)):
        t, s = (torch.full((z.shape[0],), float(time), device=z.device) for time in (now, following))
        z_self = denoise(z, t, z_self)
        if on_step is not None:
            on_step(index + 1, z_self)
        if index + 1 == len(grid) - 1:
            break
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t[:1]), schedule.alpha_sigma(s[:1])
        injected = 0.0
        if eta > 0:
            spread = float(sigma_s / sigma_t) * math.sqrt(max(0.0, 1 - float(alpha_t / alpha_s) ** 2))
            injected = min(eta * spread, float(sigma_s))
        direction = math.sqrt(max(0.0, float(sigma_s) ** 2 - injected**2))
        z = float(alpha_s) * z_self + direction * noise_estimate(z, z_self, t, schedule)
        if injected > 0:
            z = z + injected * temperature * draw_noise()
    return z_self


def largest_euler_step(schedule: NoiseSchedule, grid: NDArray[np.float64]) -> float:
    """Largest beta(t) dt along a grid; above EULER_LIMIT the Euler step overshoots and diverges."""
    rates = schedule.beta(torch.from_numpy(grid[:-1])).numpy()
    return float((rates * -np.diff(grid)).max())


def refined(grid: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
    """The same grid with another number of steps, linear between its times."""
    return np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(grid)), grid)


def euler_refusal(schedule: NoiseSchedule, steps: int, grid_of: Callable[[int], NDArray[np.float64]]) -> UsageError:
    """The error for an unstable grid, naming the least number of steps whose grid is stable."""
    needed = steps + 1
    while largest_euler_step(schedule, grid_of(needed)) > EULER_LIMIT:
        needed += 1
    return UsageError(f"sampler euler is unstable with {steps} steps on this grid: use at least {needed}")


def sample_euler(
    denoise: Denoise,
    z: Tensor,
    schedule: NoiseSchedule,
    grid: NDArray[np.float64],
    draw_noise: Callable[[], Tensor],
    eta: float = 1.0,
    temperature: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Euler-Maruyama on the reverse variance-preserving SDE, the authors' lineage; returns the last step's mean.

    Source: method.md section 4 (2506.21170, 2402.19097). Offered for parity; `eta` scales the injected noise.

    Raises:
        UsageError: a step with beta dt > 2 would diverge; names the number of steps needed.
    """
    if largest_euler_step(schedule, grid) > EULER_LIMIT:
        raise euler_refusal(schedule, len(grid) - 1, lambda steps: refined(grid, steps))
    z_self = torch.zeros_like(z)
    mean = z
    for index, (now, following) in enumerate(itertools.pairwise(grid)):
        t = torch.full((z.shape[0],), float(now), device=z.device)
        z_self = denoise(z, t, z_self)
        if on_step is not None:
            on_step(index + 1, z_self)
        alpha, sigma = amplitudes(t, schedule, z)
        score = (alpha * z_self - z) / sigma**2
        rate, dt = float(schedule.beta(t[:1])), float(now - following)
        mean = z + (0.5 * rate * z + rate * score) * dt
        last = index + 2 == len(grid)
        z = mean if last or eta == 0 else mean + eta * temperature * math.sqrt(rate * dt) * draw_noise()
    return mean


SAMPLERS = {"ddim": (sample_ddim, 0.0), "ancestral": (sample_ddim, 1.0), "euler": (sample_euler, 1.0)}
"""Sampler by name with its default churn (eta)."""
