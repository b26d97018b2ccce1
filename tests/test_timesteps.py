"""Adaptive times against a loss curve that is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldlm_cli.core.timesteps import AdaptiveTimesteps, Array, UniformTimesteps, isotonic_increasing, spread
from ldlm_cli.recipe.load import load_recipe
from ldlm_cli.recipe.stage_schema import TimesRecipe

BATCH = 256


def transition(t: Array) -> Array:
    """An increasing loss with most of its rise around t = 0.35, as a latent space of some bits has it."""
    return 0.9 / (1 + np.exp(-12 * (t - 0.35))) + 0.05 * t


def feed(times: AdaptiveTimesteps, steps: int, seed: int = 0, batch: int = BATCH) -> None:
    """`steps` training steps with losses of 20 % noise."""
    rng, bins = np.random.default_rng(seed), times.recipe.bins
    for _ in range(steps):
        t = times.times(rng.random(batch))
        losses = transition(t) * (1 + 0.2 * rng.standard_normal(batch))
        place = times.bin_of(t)
        times.observe(np.bincount(place, losses, bins), np.bincount(place, minlength=bins).astype(float))


def deviation(times: AdaptiveTimesteps) -> float:
    """Largest distance of loss against tau from the straight line between its ends, as a share of its rise."""
    tau = np.linspace(0, 1, 1001)
    loss = transition(times.times(tau))
    line = loss[0] + (loss[-1] - loss[0]) * tau
    return float(np.abs(loss - line).max() / (loss[-1] - loss[0]))


@pytest.mark.parametrize(
    ("bins", "decay", "refresh"), [(50, 0.98, 50), (100, 0.999, 1000)], ids=["base.yaml", "the paper's bins and decay"]
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_is_straight_after_the_first_refresh(bins: int, decay: float, refresh: int, seed: int) -> None:
    times = AdaptiveTimesteps(TimesRecipe(bins=bins, decay=decay, refresh_steps=refresh))
    assert deviation(times) > 0.2  # uniform times are far from it
    feed(times, refresh, seed)
    assert times.maybe_refresh(refresh)
    print(f"{bins} bins, seed {seed}: {100 * deviation(times):.2f} % from a straight line")
    assert deviation(times) < 0.05


def test_the_line_stays_straight_over_many_refreshes() -> None:
    """Rarely drawn bins are noisier than in the first fit; the curve must not drift away from the line for that."""
    times, found = AdaptiveTimesteps(TimesRecipe()), []
    for number in range(1, 21):
        feed(times, 50, seed=number)
        assert times.maybe_refresh(50 * number)
        found.append(deviation(times))
    print(f"deviation over 20 refreshes: mean {100 * np.mean(found):.1f} %, largest {100 * max(found):.1f} %")
    assert times.refreshes == 20
    assert np.mean(found) < 0.05
    assert max(found) < 0.12


def test_every_bin_keeps_a_share() -> None:
    recipe = TimesRecipe(bins=10, uniform_floor=0.05, refresh_steps=1)
    times = AdaptiveTimesteps(recipe)
    times.observe(np.array([0.0] * 5 + [1.0] * 5), np.ones(10))
    assert times.maybe_refresh(1)
    assert times.probabilities.sum() == pytest.approx(1)
    assert times.probabilities.min() == pytest.approx(0.05 / 10)


def test_a_flat_loss_gives_uniform_times() -> None:
    times = AdaptiveTimesteps(TimesRecipe(bins=8, refresh_steps=1))
    times.observe(np.full(8, 0.7), np.ones(8))
    assert times.maybe_refresh(1)
    np.testing.assert_allclose(times.probabilities, 1 / 8)


def test_no_refresh_before_every_bin_was_visited() -> None:
    times = AdaptiveTimesteps(TimesRecipe(bins=4, refresh_steps=10))
    times.observe(np.array([1.0, 2.0, 0.0, 4.0]), np.array([1.0, 1.0, 0.0, 1.0]))
    assert not times.maybe_refresh(10)
    np.testing.assert_array_equal(times.probabilities, np.full(4, 0.25))
    times.observe(np.array([0.0, 0.0, 3.0, 0.0]), np.array([0.0, 0.0, 1.0, 0.0]))
    assert not times.maybe_refresh(11)  # not at the end of an interval
    assert times.maybe_refresh(20)


def test_averages_are_bias_corrected() -> None:
    times = AdaptiveTimesteps(TimesRecipe(bins=2, decay=0.999))
    times.observe(np.array([6.0, 0.0]), np.array([3.0, 0.0]))  # three texts of mean loss 2
    np.testing.assert_allclose(times.mean_losses(), [2.0, np.nan])
    times.observe(np.array([4.0, 1.0]), np.array([1.0, 1.0]))
    np.testing.assert_allclose(times.mean_losses(), [(0.999 * 2 + 4) / 1.999, 1.0])


def test_bins_of_times_at_and_beyond_the_ends() -> None:
    times = AdaptiveTimesteps(TimesRecipe(bins=10))
    np.testing.assert_array_equal(times.bin_of(np.array([0.0, 0.05, 0.95, 1.0])), [0, 0, 9, 9])


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(0.1, 10)), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_isotonic_fit_is_the_projection(points: list[tuple[float, float]]) -> None:
    values, weights = np.array(points).T
    fit = isotonic_increasing(values, weights)
    residual = weights * (values - fit)
    assert fit.shape == values.shape
    assert (np.diff(fit) >= -1e-9).all()
    # Optimality: residuals are orthogonal to the fit, and no non-decreasing direction improves it.
    assert residual.sum() == pytest.approx(0, abs=1e-6)
    assert residual @ fit == pytest.approx(0, abs=1e-5)
    assert (np.cumsum(residual[::-1])[::-1] <= 1e-6).all()


def test_isotonic_fit_leaves_a_rising_sequence_alone() -> None:
    np.testing.assert_allclose(isotonic_increasing(np.array([1.0, 3.0, 2.0, 4.0]), np.ones(4)), [1, 2.5, 2.5, 4])
    np.testing.assert_allclose(isotonic_increasing(np.array([3.0, 0.0]), np.array([3.0, 1.0])), [2.25, 2.25])


def test_state_round_trip_goes_on_identically() -> None:
    import json

    recipe = TimesRecipe(bins=12, refresh_steps=20)
    times, again = AdaptiveTimesteps(recipe), AdaptiveTimesteps(recipe)
    feed(times, 20)
    assert times.maybe_refresh(20)
    feed(times, 7, seed=2)
    again.load_state_dict(json.loads(json.dumps(times.state_dict())))  # as a checkpoint stores it
    for one in (times, again):
        feed(one, 13, seed=3)
        assert one.maybe_refresh(40)
    np.testing.assert_array_equal(times.probabilities, again.probabilities)
    assert times.refreshes == again.refreshes == 2


def test_uniform_times_never_change() -> None:
    times = UniformTimesteps(TimesRecipe(kind="uniform", bins=10, refresh_steps=5))
    feed(times, 5)
    assert not times.maybe_refresh(5)
    np.testing.assert_allclose(times.times(np.array([0.0, 0.25, 0.9])), [0.0, 0.25, 0.9])
    assert not np.isnan(times.mean_losses()).any()


def test_times_are_refreshed_ten_times_in_the_base_recipe() -> None:
    recipe = load_recipe("base.yaml")
    stage = recipe.stages["joint"]
    assert stage.times.kind == "adaptive"
    assert stage.steps // stage.times.refresh_steps >= 10
    # ... and its batches are large enough for every bin to be visited before the first of them.
    times = AdaptiveTimesteps(stage.times)
    rows = stage.batch_tokens // recipe.data.max_len_tokens
    feed(times, stage.times.refresh_steps, batch=rows)
    assert times.maybe_refresh(stage.times.refresh_steps)
    assert math.isclose(times.probabilities.sum(), 1)


def test_spread_keeps_the_sum_and_shares_a_jump_with_its_neighbours() -> None:
    jump = np.zeros(9)
    jump[4] = 9.0
    assert spread(jump).tolist() == [0, 0, 1, 2, 3, 2, 1, 0, 0]
    for place in range(9):  # also at the ends, where the kernel is mirrored
        single = np.zeros(9)
        single[place] = 1.0
        assert spread(single).sum() == pytest.approx(1.0)
    assert spread(np.full(6, 0.5)) == pytest.approx(np.full(6, 0.5))
