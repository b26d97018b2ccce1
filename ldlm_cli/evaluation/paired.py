"""Differences between two runs over the same texts or the same noise, with intervals; quality at a given entropy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldlm_cli.evaluation.likeness import ComparedRun

RESAMPLES = 4000
LEVEL = 0.95
CHUNK = 256  # resamples drawn at once: 256 x 10,000 texts are 20 MB of indices

Ratio = tuple[Sequence[float], Sequence[float]]
"""A quantity that is sum(numerators) / sum(denominators) over texts; a mean has denominators 1."""


def paired_interval(first: Ratio, second: Ratio, *, level: float = LEVEL, seed: int = 0) -> dict[str, Any] | None:
    """First minus second, with a paired percentile bootstrap interval: the same texts are drawn for both.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), Sec. 13.3.

    Args:
        first, second: numerators and denominators by text, [n] each; place i is the same text (or noise) in both.
        level: share of resampled differences inside the interval.
        seed: of the resampling.
    Returns:
        difference, low, high, num (texts), level; None when a denominator sums to 0.
    Raises:
        ValueError: the four lists differ in length, or are empty.
    """
    table = np.array([*first, *second], dtype=np.float64)  # [4, n]; ragged lists raise ValueError here
    count = table.shape[1]
    if count == 0:
        raise ValueError("a paired interval needs at least one pair")
    if not (table[1].sum() and table[3].sum()):
        return None
    rng, found = np.random.default_rng(seed), []
    for start in range(0, RESAMPLES, CHUNK):
        drawn = rng.integers(count, size=(min(CHUNK, RESAMPLES - start), count))
        sums = np.stack([row[drawn].sum(axis=1) for row in table])
        usable = (sums[1] != 0) & (sums[3] != 0)
        found.append(sums[0, usable] / sums[1, usable] - sums[2, usable] / sums[3, usable])
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    totals = table.sum(axis=1)
    difference = float(totals[0] / totals[1] - totals[2] / totals[3])
    return {"difference": difference, "low": float(low), "high": float(high), "num": count, "level": level}


def at_entropy(points: Sequence[dict[str, Any]], target: float) -> dict[str, Any]:
    """Perplexity (and validity) where a temperature sweep has the entropy of real text.

    Between neighbouring temperatures log-perplexity and validity are taken as linear in entropy. Where the sweep passes
    the target more than once, the crossing nearest to temperature 1 counts.

    Args:
        points: temperature, entropy_nats, generative_perplexity and perhaps valid_stories of each sweep point.
        target: entropy of real text, nats.
    Returns:
        reached, crossings, entropy_range; and when reached: temperature, generative_perplexity, valid_stories if known.
    """
    known = [row for row in points if row["entropy_nats"] is not None and row["generative_perplexity"] is not None]
    known = sorted(known, key=lambda row: row["temperature"])
    entropies = [row["entropy_nats"] for row in known]
    result: dict[str, Any] = {
        "target_entropy_nats": target,
        "entropy_range": [min(entropies), max(entropies)] if known else None,
        "temperatures": [row["temperature"] for row in known],
    }
    crossings = []
    for left, right in itertools.pairwise(known):
        low, high = left["entropy_nats"], right["entropy_nats"]
        if low == high or not min(low, high) <= target <= max(low, high):
            continue
        share = (target - low) / (high - low)

        def between(name: str, left: dict = left, right: dict = right, share: float = share) -> float:
            return float((1 - share) * left[name] + share * right[name])

        logs = [math.log(row["generative_perplexity"]) for row in (left, right)]
        crossing = {
            "temperature": between("temperature"),
            "generative_perplexity": math.exp((1 - share) * logs[0] + share * logs[1]),
        }
        if "valid_stories" in left and "valid_stories" in right:
            crossing["valid_stories"] = between("valid_stories")
        crossings.append(crossing)
    result |= {"reached": bool(crossings), "crossings": len(crossings)}
    if crossings:
        result |= min(crossings, key=lambda row: abs(math.log(row["temperature"])))
    return result


def paired_differences(
    runs: Sequence[ComparedRun],
    labels: Mapping[str, str],
    encoding: Mapping[str, dict[str, Any]],
    generation: Mapping[tuple[str, int], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Each run minus the run of the first group with its seed (else the first run), with paired intervals.

    Intervals are over held-out texts or sampling noise for these two runs; what another training seed would give is not
    in them, and shows in the rows of the other seeds.
    """
    base = [run for run in runs if labels[run.name] == labels[runs[0].name]]
    rows: list[dict[str, Any]] = []
    for run in runs[1:]:
        same_seed = [other for other in base if run not in base and other.recipe.seed == run.recipe.seed]
        against = (same_seed or base)[0]

        def add(
            quantity: str,
            steps: int | None,
            ours: Ratio | None,
            theirs: Ratio | None,
            who: tuple[str, str] = (run.name, against.name),
        ) -> None:
            interval = paired_interval(ours, theirs) if ours is not None and theirs is not None else None
            if interval is not None:
                about = {"run": who[0], "against": who[1], "quantity": quantity, "steps": steps}
                rows.append(about | interval)

        for name, column in (("accuracy", "correct"), ("accuracy_noised", "correct_noised")):
            own, other = (_accuracy(encoding[each.name], column) for each in (run, against))
            add(name, None, own, other)
        for steps in sorted({steps for _, steps in generation}):
            for name in ("nats_per_judge_token", "entropy_nats", "valid_stories"):
                own, other = (_text_ratio(generation[each.name, steps], name) for each in (run, against))
                add(name, steps, own, other)
    return rows


def _accuracy(found: dict[str, Any], column: str) -> Ratio | None:
    return None if found[column] is None else (found[column], found["tokens"])


def _text_ratio(found: dict[str, Any], quantity: str) -> Ratio | None:
    """A quantity of generated texts as a ratio of sums by sample index; None when it was not measured."""
    if quantity == "nats_per_judge_token":
        return found["nats"], found["judge_tokens"]
    if quantity == "entropy_nats":
        return [value or 0.0 for value in found["entropy"]], [float(value is not None) for value in found["entropy"]]
    return (found["valid"], [1.0] * len(found["valid"])) if "valid" in found else None
