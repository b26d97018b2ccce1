"""The tangent schedule against its definition, its table and finite differences."""

import math

import pytest
import torch

from ldlm_cli.core.process import add_noise, noise_estimate
from ldlm_cli.core.schedule import SCHEDULES, TangentSchedule, build_schedule, latent_bits
from ldlm_cli.errors import ShapeError, UsageError

SCALES = [1.07, 3.0, 9.0]
TABLE = {  # method.md 3.1, d = 3: t to sigma/alpha and alpha^2
    0.05: (0.24, 0.947),
    0.1: (0.48, 0.816),
    0.2: (0.98, 0.513),
    0.3: (1.53, 0.300),
    0.5: (3.00, 0.100),
    0.7: (5.89, 0.028),
    0.8: (9.23, 0.012),
    0.9: (18.9, 0.0028),
    0.95: (38.1, 0.0007),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variance_is_preserved_and_ends_are_exact(name: str, scale: float, dtype: torch.dtype) -> None:
    t = torch.linspace(0, 1, 1001, dtype=dtype)
    alpha, sigma = build_schedule(name, scale).alpha_sigma(t)
    assert alpha.isfinite().all()
    assert sigma.isfinite().all()
    assert (alpha >= 0).all()
    assert (sigma >= 0).all()
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-12)
    assert (float(alpha[0]), float(sigma[0])) == (1.0, 0.0)
    assert float(alpha[-1]) == pytest.approx(0.0, abs=1e-7)
    assert float(sigma[-1]) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noising_is_finite_at_both_ends(dtype: torch.dtype) -> None:
    z_0, eps = torch.randn(2, 2, 3, 4, dtype=dtype)
    z_t = add_noise(z_0, eps, torch.tensor([0.0, 1.0], dtype=dtype), TangentSchedule(3.0))
    assert z_t.dtype == dtype
    torch.testing.assert_close(z_t[0], z_0[0])
    torch.testing.assert_close(z_t[1], eps[1])


def test_noise_estimate_undoes_noising() -> None:
    z_0, eps = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    t, schedule = torch.tensor([0.01, 0.5, 1.0]), TangentSchedule(3.0)
    torch.testing.assert_close(noise_estimate(add_noise(z_0, eps, t, schedule), z_0, t, schedule), eps)


def test_a_time_per_text_is_demanded() -> None:
    with pytest.raises(ShapeError, match=r"t must be \[2\], got \[1\]"):
        add_noise(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(1), TangentSchedule(3.0))


def test_table_of_the_method() -> None:
    alpha, sigma = TangentSchedule(3.0).alpha_sigma(torch.tensor(list(TABLE), dtype=torch.float64))
    for index, (ratio, power) in enumerate(TABLE.values()):
        assert float(sigma[index] / alpha[index]) == pytest.approx(ratio, abs=0.006, rel=0.003)
        # The table rounds to the last digit shown.
        assert float(alpha[index] ** 2) == pytest.approx(power, abs=0.0006 if power > 0.01 else 0.00006)
    half = TangentSchedule(3.0).alpha_sigma(torch.tensor(0.5))[0]
    assert float(half**2) == pytest.approx(0.1, abs=1e-12)


@pytest.mark.parametrize("scale", SCALES)
def test_signal_to_noise_falls(scale: float) -> None:
    alpha, sigma = TangentSchedule(scale).alpha_sigma(torch.linspace(0.001, 1, 1000, dtype=torch.float64))
    assert ((alpha / sigma).diff() < 0).all()


@pytest.mark.parametrize("scale", SCALES)
def test_beta_is_the_rate_at_which_the_signal_fades(scale: float) -> None:
    schedule, step = TangentSchedule(scale), 1e-5
    t = torch.linspace(0.01, 0.94, 200, dtype=torch.float64)
    later, sooner = (schedule.alpha_sigma(t + shift)[0].log() for shift in (step, -step))
    torch.testing.assert_close(schedule.beta(t), -2 * (later - sooner) / (2 * step), rtol=1e-5, atol=1e-6)


def test_beta_stays_finite_beyond_its_clip() -> None:
    beta = TangentSchedule(3.0).beta(torch.tensor([0.95, 0.99, 1.0], dtype=torch.float64))
    assert beta.isfinite().all()
    assert float(beta[0]) == float(beta[1]) == float(beta[2])


@pytest.mark.parametrize("scale", SCALES)
def test_time_at_ratio_is_the_inverse(scale: float) -> None:
    schedule = TangentSchedule(scale)
    for ratio in (0.0, 0.3, scale, 20.0):
        alpha, sigma = schedule.alpha_sigma(torch.tensor(schedule.time_at_ratio(ratio), dtype=torch.float64))
        assert float(sigma / alpha) == pytest.approx(ratio, rel=1e-9, abs=1e-12)
    assert schedule.time_at_ratio(scale) == pytest.approx(0.5)


def test_latent_bits_keep_the_width_rule() -> None:
    assert latent_bits(768, 3.0) == pytest.approx(58.4, abs=0.1)
    assert latent_bits(256, 1.65) == pytest.approx(58, rel=0.02)
    assert latent_bits(128, 1.07) == pytest.approx(58, rel=0.02)
    assert latent_bits(768, 0.0) == math.inf


def test_unknown_schedule_is_named() -> None:
    with pytest.raises(UsageError, match="'cosine'; known: tangent"):
        build_schedule("cosine", 1.0)
