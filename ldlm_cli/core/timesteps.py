"""How diffusion times are drawn in training: uniformly, or so that the loss falls on a straight line."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ldlm_cli.recipe.stage_schema import TimesRecipe

Array = NDArray[np.float64]


class Timesteps(Protocol):
    """Maps uniform draws to times and learns from the losses seen there."""

    def times(self, uniform: Array) -> Array: ...

    def observe(self, loss_sums: Array, counts: Array) -> None: ...

    def bin_of(self, t: Array) -> NDArray[np.int64]: ...

    def mean_losses(self) -> Array: ...

    def maybe_refresh(self, step: int) -> bool: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def isotonic_increasing(values: Array, weights: Array) -> Array:
    """The non-decreasing sequence nearest to `values` in weighted least squares (pool adjacent violators)."""
    blocks: list[list[float]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        blocks.append([float(value), float(weight), 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, weight_right, length = blocks.pop()
            left = blocks[-1]
            total = left[1] + weight_right
            left[0] = (left[0] * left[1] + mean * weight_right) / total
            left[1], left[2] = total, left[2] + length
    return np.concatenate([np.full(int(length), mean) for mean, _, length in blocks])


def spread(values: Array) -> Array:
    """Share each value [bins] with its two neighbours on either side (weights 1 2 3 2 1, mirrored at the ends).

    An isotonic fit rises in jumps; taken as they are, single bins would get most draws and those between them none.
    """
    kernel = np.array([1.0, 2.0, 3.0, 2.0, 1.0])
    return np.convolve(np.pad(values, 2, mode="symmetric"), kernel / kernel.sum(), mode="valid")


class AdaptiveTimesteps:
    """Times drawn with density p(t) proportional to dL/dt, so that the loss is affine in the warped time.

    Source: arXiv 2605.07933, Eq. (5) as reconstructed, hardened (method.md 3.4): bias-corrected averages, an isotonic
    fit, edges extrapolated linearly, a uniform floor, and no refresh before every bin has been visited.
    """

    def __init__(self, recipe: TimesRecipe) -> None:
        self.recipe = recipe
        bins = recipe.bins
        self.loss_sum, self.weight = np.zeros(bins), np.zeros(bins)
        self.probabilities = np.full(bins, 1 / bins)
        self.refreshes = 0

    def times(self, uniform: Array) -> Array:
        """Times in [0, 1] for uniform draws in [0, 1): the inverse of the piecewise linear distribution function."""
        return warp_times(self.probabilities, uniform)

    def bin_of(self, t: Array) -> NDArray[np.int64]:
        """Bin of each time, int64, shape of `t`."""
        return np.clip((t * self.recipe.bins).astype(np.int64), 0, self.recipe.bins - 1)

    def observe(self, loss_sums: Array, counts: Array) -> None:
        """Take one step's per-text losses, summed by bin over all processes; [bins] each."""
        seen, decay = counts > 0, self.recipe.decay
        mean = loss_sums[seen] / counts[seen]
        self.loss_sum[seen] = decay * self.loss_sum[seen] + (1 - decay) * mean
        self.weight[seen] = decay * self.weight[seen] + (1 - decay)

    def mean_losses(self) -> Array:
        """Bias-corrected mean loss by bin, [bins]; nan where nothing was seen."""
        with np.errstate(invalid="ignore"):
            return self.loss_sum / self.weight

    def maybe_refresh(self, step: int) -> bool:
        """Recompute the distribution when `step` completes a refresh interval and every bin has been visited."""
        if step == 0 or step % self.recipe.refresh_steps or (self.weight == 0).any():
            return False
        mean = isotonic_increasing(self.mean_losses(), np.ones(self.recipe.bins))
        inner = (mean[1:] + mean[:-1]) / 2
        first = max(mean[0] - (inner[0] - mean[0]), 0.0)
        edges = np.concatenate([[first], inner, [mean[-1] + (mean[-1] - inner[-1])]])
        rise = spread(np.maximum(np.diff(edges), 0.0))
        floor = self.recipe.uniform_floor
        share = rise / rise.sum() if rise.sum() > 0 else np.full_like(rise, 1 / len(rise))
        self.probabilities = (1 - floor) * share + floor / len(rise)
        self.refreshes += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        return {
            "loss_sum": self.loss_sum.tolist(),
            "weight": self.weight.tolist(),
            "probabilities": self.probabilities.tolist(),
            "refreshes": self.refreshes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss_sum, self.weight = np.array(state["loss_sum"]), np.array(state["weight"])
        self.probabilities, self.refreshes = np.array(state["probabilities"]), int(state["refreshes"])


class UniformTimesteps(AdaptiveTimesteps):
    """Times drawn uniformly; losses by bin are kept for the log, the distribution never changes."""

    def maybe_refresh(self, step: int) -> bool:
        return False


TIMESTEPS = {"adaptive": AdaptiveTimesteps, "uniform": UniformTimesteps}


def warp_times(probabilities: Array, tau: Array) -> Array:
    """t = phi(tau): the quantile function of the piecewise constant density with these bin probabilities.

    Args:
        probabilities: [bins], positive, summing to 1.
        tau: any shape, in [0, 1].
    Returns:
        times in [0, 1], shape of tau; 0 at 0 and 1 at 1.
    """
    cumulative = np.concatenate([[0.0], np.cumsum(probabilities)])
    cumulative /= cumulative[-1]
    return np.interp(tau, cumulative, np.linspace(0, 1, len(cumulative)))
