"""Runs at equal compute (snapshots along the runs), and at the entropy of real text (a sweep of temperatures)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldlm_cli.evaluation import metrics
from ldlm_cli.evaluation.likeness import ComparedRun
from ldlm_cli.evaluation.measurements import Bench
from ldlm_cli.evaluation.paired import at_entropy
from ldlm_cli.generate import SamplingOptions

MATCHED_BY = ("denoiser_steps", "flops")
"""Of the latent stages; language models, which runs may share, are not counted."""


def matched_compute(
    bench: Bench, runs: Sequence[ComparedRun], steps: Sequence[int], options: SamplingOptions
) -> list[dict[str, Any]]:
    """Generation at equal compute, for each measure of compute.

    The target is what the run that spent least has spent in the end; of each run the snapshot nearest to it and not
    above it is measured.

    Returns:
        For each measure: by, target, and rows: run, snapshot (None with a reason when there is none), spent, and
        `generation`, one entry a step count. A measure that a run has not recorded gives a reason and no rows.
    """
    return [_matched(bench, runs, steps, options, by) for by in MATCHED_BY]


def _matched(
    bench: Bench, runs: Sequence[ComparedRun], steps: Sequence[int], options: SamplingOptions, by: str
) -> dict[str, Any]:
    missing = [run.name for run in runs if run.config.get("compute") is None]
    if missing:
        return {"by": by, "reason": f"{', '.join(missing)} recorded no compute", "rows": []}
    target = min(run.config["compute"]["latent"][by] for run in runs)
    rows: list[dict[str, Any]] = []
    for run in runs:
        nearest = nearest_snapshot(run, by, target)
        if nearest is None:
            first = next((f"; its first one has {_spent(config, by):,.4g}" for _, _, config in run.snapshots()), "")
            reason = f"no snapshot at or below{first}: set training.snapshot_every_steps"
            rows.append({"run": run.name, "snapshot": None, "reason": reason})
            continue
        name, folder, config = nearest
        generation = [
            {"steps": number, **bench.generation(run, folder, replace(options, steps=number))["summary"]}
            for number in steps
        ]
        rows.append({"run": run.name, "snapshot": name, "spent": _spent(config, by), "generation": generation})
    return {"by": by, "target": target, "rows": rows}


def nearest_snapshot(run: ComparedRun, by: str, target: float) -> tuple[str, Path, dict[str, Any]] | None:
    """The last snapshot of a run that has a trained denoiser and spent at most `target`; the final one if equal."""
    usable = [
        entry for entry in run.snapshots() if _spent(entry[2], "denoiser_steps") and _spent(entry[2], by) <= target
    ]
    return usable[-1] if usable else None


def _spent(config: dict[str, Any], by: str) -> float:
    return float(config["compute"]["latent"][by])


def matched_entropy(
    bench: Bench,
    runs: Sequence[ComparedRun],
    temperatures: Sequence[float],
    num: int,
    options: SamplingOptions,
    generation: Mapping[tuple[str, int], dict[str, Any]],
    target: float,
) -> list[dict[str, Any]]:
    """For each run and step count: a sweep of temperatures, and perplexity where its entropy is that of real text.

    Args:
        temperatures: of the sweep; at the base temperature the first texts of `generation` serve.
        num: texts a temperature.
        generation: measurements at the base temperature, by run and steps.
        target: entropy of real text, nats.
    """
    rows = []
    for run in runs:
        for steps in sorted({steps for _, steps in generation}):
            points = []
            for temperature in temperatures:
                found = generation[run.name, steps]
                if temperature != options.temperature:
                    at = replace(options, steps=steps, temperature=temperature, num=num)
                    found = bench.generation(run, run.folder / "snapshot", at)
                points.append({"temperature": temperature, **first_texts(found, num)})
            rows.append({"run": run.name, "steps": steps, **at_entropy(points, target), "points": points})
    return rows


def first_texts(found: dict[str, Any], num: int) -> dict[str, Any]:
    """Perplexity, entropy and validity of the first `num` texts of a measurement."""
    entropies = [value for value in found["entropy"][:num] if value is not None]
    row = {
        "generative_perplexity": metrics.perplexity(found["nats"][:num], found["judge_tokens"][:num]),
        "entropy_nats": math.fsum(entropies) / len(entropies) if entropies else None,
    }
    return row | {"valid_stories": sum(found["valid"][:num]) / num} if "valid" in found else row
