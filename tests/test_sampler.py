"""Samplers on Gaussian data, for which the best denoiser is known in closed form."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldlm_cli.core.process import add_noise, amplitudes
from ldlm_cli.core.sampler import EULER_T_MIN, SAMPLERS, guided, sample_ddim, sample_euler, time_grid
from ldlm_cli.core.schedule import TangentSchedule
from ldlm_cli.core.timesteps import warp_times
from ldlm_cli.errors import UsageError

DATA_STD = 0.6
SCHEDULE = TangentSchedule(3.0)
VALUES = 40_000


def exact(z_t: Tensor, t: Tensor, z_self: Tensor) -> Tensor:
    """E[z_0 | z_t] for data from N(0, DATA_STD^2)."""
    alpha, sigma = amplitudes(t, SCHEDULE, z_t)
    return alpha * DATA_STD**2 * z_t / (alpha**2 * DATA_STD**2 + sigma**2)


def noise_source(seed: int, values: int = VALUES) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(1, 1, values, generator=generator, dtype=torch.float64)


def no_noise() -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def mean_std_at_end(name: str, steps: int) -> float:
    """Std of the last step's mean (its noise left out) at t = 0.05, after `steps` steps of a linear grid from 1."""
    sampler, eta = SAMPLERS[name]
    source, seen, draws = noise_source(0), [], 0

    def noise() -> Tensor:
        nonlocal draws
        draws += 1
        return source() if draws <= steps else torch.zeros(1, 1, VALUES, dtype=torch.float64)

    def watched(z_t: Tensor, t: Tensor, z_self: Tensor) -> Tensor:
        seen.append(z_t)
        return exact(z_t, t, z_self)

    # One more step, whose denoiser call sees the state that the last real step left.
    grid = np.append(time_grid("uniform", steps, None, 0.05), 0.04)
    sampler(watched, noise(), SCHEDULE, grid, noise, eta)
    return float(seen[-1].std())


def test_ddim_converges_to_the_data_at_first_order_or_better() -> None:
    counts = np.array([25, 50, 100, 200, 400, 800])
    # With this denoiser the sampler is linear: noise of 1 goes to the factor by which the std is multiplied.
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    ends = [float(sample_ddim(exact, one, SCHEDULE, time_grid("uniform", n, None), no_noise)) for n in counts]
    errors = np.abs(np.array(ends) - DATA_STD)
    order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    print(f"ddim: measured order of accuracy {order:.2f}, errors {errors}")
    assert (np.diff(errors) < 0).all()
    assert order > 0.9
    assert errors[-1] < 0.01 * DATA_STD


@pytest.mark.parametrize(
    ("name", "steps", "std"),  # method.md 4; the marginal at t = 0.05 has std 0.628
    [
        ("ddim", 10, 0.53),
        ("ddim", 25, 0.59),
        ("ddim", 50, 0.61),
        ("ddim", 200, 0.62),
        ("ancestral", 10, 0.40),
        ("ancestral", 25, 0.50),
        ("ancestral", 50, 0.56),
        ("ancestral", 200, 0.61),
        ("euler", 25, 0.57),
        ("euler", 50, 0.61),
        ("euler", 200, 0.62),
    ],
)
def test_figures_of_the_method(name: str, steps: int, std: float) -> None:
    assert mean_std_at_end(name, steps) == pytest.approx(std, abs=0.012)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.9), (0.9, 0.4), (0.5, 0.45), (0.2, 0.01)])
def test_forward_then_an_exact_reverse_step_is_the_marginal(eta: float, t: float, s: float) -> None:
    z_0 = torch.full((1, 1, VALUES), 0.8, dtype=torch.float64)
    noise, seen = noise_source(3), []

    def knows(z_t: Tensor, time: Tensor, z_self: Tensor) -> Tensor:
        seen.append(z_t)
        return z_0

    z_t = add_noise(z_0, noise(), torch.tensor([t]), SCHEDULE)
    sample_ddim(knows, z_t, SCHEDULE, np.array([t, s, 0.0]), noise, eta)
    alpha, sigma = SCHEDULE.alpha_sigma(torch.tensor(s, dtype=torch.float64))
    assert float(seen[1].mean()) == pytest.approx(float(alpha) * 0.8, abs=0.02)
    assert float(seen[1].std()) == pytest.approx(float(sigma), rel=0.015)


@pytest.mark.parametrize("sampler", [sample_ddim, sample_euler])
def test_an_exact_denoiser_of_one_point_finds_it(sampler: Callable[..., Tensor]) -> None:
    z_0 = torch.randn(2, 3, 4)
    t_min = EULER_T_MIN if sampler is sample_euler else 0.0
    found = sampler(
        lambda z, t, z_self: z_0, torch.randn(2, 3, 4), SCHEDULE, time_grid("uniform", 50, None, t_min), lambda: 0 * z_0
    )
    torch.testing.assert_close(found, z_0, rtol=0, atol=1e-6 if sampler is sample_ddim else 0.25)


def test_the_last_estimate_is_returned_and_steps_are_calls() -> None:
    calls: list[float] = []
    shown: list[int] = []

    def denoise(z_t: Tensor, t: Tensor, z_self: Tensor) -> Tensor:
        assert float(z_self.mean()) == len(calls)  # the estimate of the call before; zeros at first
        calls.append(float(t[0]))
        return torch.full_like(z_t, float(len(calls)))

    end = sample_ddim(
        denoise,
        torch.randn(1, 2, 3),
        SCHEDULE,
        time_grid("uniform", 5, None),
        no_noise,
        on_step=lambda k, z: shown.append(k),
    )
    assert calls == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert shown == [1, 2, 3, 4, 5]
    assert (end == 5).all()


def test_eta_zero_draws_no_noise() -> None:
    z = torch.randn(1, 4, 4)
    grid = time_grid("uniform", 7, None)
    first, again = (sample_ddim(exact, z, SCHEDULE, grid, no_noise, eta=0.0) for _ in range(2))
    assert torch.equal(first, again)
    with pytest.raises(AssertionError, match="drew noise"):
        sample_ddim(exact, z, SCHEDULE, grid, no_noise, eta=0.1)


def test_temperature_scales_injected_noise() -> None:
    def spread(temperature: float) -> float:
        noise, grid = noise_source(5), time_grid("uniform", 100, None)
        return float(sample_ddim(exact, temperature * noise(), SCHEDULE, grid, noise, 1.0, temperature).std())

    assert spread(0.5) == pytest.approx(0.5 * spread(1.0), rel=1e-9)  # everything is linear in the noise


def refused_then_taken(grid_of: Callable[[int], Any], steps: int) -> int:
    """The number that the refusal names, which must then work."""
    z = torch.ones(1, 1, 1, dtype=torch.float64)
    with pytest.raises(UsageError, match=r"euler is unstable with .* use at least \d+") as refusal:
        sample_euler(exact, z, SCHEDULE, grid_of(steps), lambda: torch.zeros_like(z))
    needed = int(str(refusal.value).rsplit(" ", 1)[1])
    assert needed > steps
    end = sample_euler(exact, z, SCHEDULE, grid_of(needed), lambda: torch.zeros_like(z))
    assert end.isfinite().all()
    return needed


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 18])
def test_euler_refuses_too_few_steps_and_names_enough(steps: int) -> None:
    needed = refused_then_taken(lambda n: time_grid("uniform", n, None, EULER_T_MIN), steps)
    assert needed < 25


def test_guidance_of_one_is_the_denoiser_itself() -> None:
    assert guided(exact, 1.0) is exact


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_guidance_formula(weight: float) -> None:
    calls = 0

    def denoise(z_t: Tensor, t: Tensor, z_self: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 2 * z_t + 3 * z_self**2 + 1

    z_t, z_self, t = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.full((2,), 0.5)
    free = 2 * z_t + 1
    torch.testing.assert_close(guided(denoise, weight)(z_t, t, z_self), free + weight * 3 * z_self**2)
    assert calls == 2


def test_grids_fall_from_one_to_the_end() -> None:
    probabilities = np.array([0.1, 0.6, 0.05, 0.25])
    for kind in ("uniform", "warped"):
        for t_min in (0.0, 0.05):
            grid = time_grid(kind, 37, probabilities, t_min)
            assert grid.shape == (38,)
            assert (grid[0], grid[-1]) == (1.0, pytest.approx(t_min))
            assert (np.diff(grid) < 0).all()


def test_warp_is_the_quantile_function() -> None:
    probabilities = np.array([0.1, 0.6, 0.05, 0.25])
    # A quarter of the times lies below each quartile of the warp; a bin holds its share of a fine grid.
    grid = time_grid("warped", 10_000, probabilities)
    held = np.histogram(grid, bins=4, range=(0, 1))[0] / len(grid)
    np.testing.assert_allclose(held, probabilities, atol=2e-3)
    np.testing.assert_allclose(warp_times(probabilities, np.array([0.0, 0.1, 0.7, 0.75, 1.0])), [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(warp_times(np.full(8, 1 / 8), np.linspace(0, 1, 9)), np.linspace(0, 1, 9))


def test_unknown_and_missing_grids_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown grid 'cosine'"):
        time_grid("cosine", 5, None)
    with pytest.raises(UsageError, match="no loss-warped grid"):
        time_grid("warped", 5, None)
