"""Runs at equal compute: snapshots along the runs at equal denoiser steps, and at equal FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldlm_cli.evaluation.likeness import ComparedRun
from ldlm_cli.evaluation.measurements import Bench
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
