"""Runs side by side: the same held-out texts, judge, noise and precision for all; paired differences with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ldlm_cli import __version__
from ldlm_cli.errors import UsageError
from ldlm_cli.evaluation import metrics
from ldlm_cli.evaluation.evaluate import open_data
from ldlm_cli.evaluation.judge import Judge
from ldlm_cli.evaluation.likeness import (
    ComparedRun,
    differing_circumstances,
    group_labels,
    judge_of,
    measurement_of,
    open_runs,
    refuse_unlike,
)
from ldlm_cli.evaluation.matched import matched_compute
from ldlm_cli.evaluation.measurements import Bench
from ldlm_cli.evaluation.own_estimates import DEFINITION
from ldlm_cli.evaluation.paired import Ratio, at_entropy, paired_interval
from ldlm_cli.generate import SamplingOptions
from ldlm_cli.runtime import Runtime

CURVES = ("diffusion", "hidden", "token", "token_accuracy", "z_std", "effective_rank", "bits", "encoder_gate")


@dataclass(frozen=True)
class CompareSettings:
    """What the user may fix; None takes what the runs' recipes say, and then they must agree."""

    steps: tuple[int, ...] = (10, 50)
    temperatures: tuple[float, ...] = (0.8, 0.9, 1.1, 1.2)
    """Besides the base temperature, for perplexity at real text's entropy; none leaves that out."""
    num: int | None = None
    sweep_num: int = 200
    """Texts a temperature of the sweep, at most `num`."""
    texts: int | None = None
    """Held-out texts reconstructed."""
    sampler: str | None = None
    grid: str | None = None
    seed: int = 0
    temperature: float | None = None
    guidance: float | None = None
    judge: str | None = None
    precision: str | None = None
    matched: bool = True
    """Also measure snapshots along the runs, at equal denoiser steps and at equal FLOPs."""


def compare(
    names: Sequence[str],
    settings: CompareSettings,
    *,
    out: Path,
    write: Callable[[dict[str, Any], Path], None],
    on_progress: Callable[[str], None],
) -> dict[str, Any]:
    """Measure runs under one set of circumstances and set them side by side.

    Args:
        names: two or more run folders, or their names in runs/; the others are compared to the first one's recipe.
        out: folder of the report, and of finished measurements, which are not repeated.
        write: called once with the report and `out` (`report.comparison.write_comparison`).
        on_progress: told what is being done, one line each time.
    Returns:
        The report: identity, runs, circumstances (that differ), curves, encoding, generation, references,
        matched_entropy, paired, matched_compute, notes.
    Raises:
        UsageError: the runs are not alike in something that a column needs; names the field.
    """
    runs = open_runs(names)
    shared = shared_measurement(runs, settings)
    runtime = Runtime.start(shared["precision"])
    if runtime.num_processes > 1:
        raise UsageError("compare runs in one process: start it without a launcher")
    bench = open_bench(runs, settings, shared, out, runtime, on_progress)
    options = SamplingOptions(
        num=shared["evaluation.num_samples"],
        seed=settings.seed,
        batch_size=runs[0].recipe.sampling.batch_size,
        **{name: shared[f"sampling.{name}"] for name in ("sampler", "grid", "temperature", "guidance")},
    )
    labels = group_labels(runs)
    encoding = {run.name: bench.encoding(run, run.folder / "snapshot") for run in runs}
    references = bench.references(runs[0], options)
    generation = {
        (run.name, steps): bench.generation(run, run.folder / "snapshot", replace(options, steps=steps))
        for run in runs
        for steps in settings.steps
    }
    report: dict[str, Any] = {
        "identity": identity(runs, shared, settings, options, bench),
        "runs": [run_row(run, labels[run.name]) for run in runs],
        "circumstances": differing_circumstances(runs),
        "curves": {run.name: curve(run) for run in runs},
        "encoding": [encoding_row(run, encoding[run.name]) for run in runs],
        "generation": [{"run": run, "steps": steps, **found["summary"]} for (run, steps), found in generation.items()],
        "references": references,
    }
    if settings.temperatures:
        target = references["held_out_text"]["entropy_nats"]
        report["matched_entropy"] = matched_entropy(bench, runs, settings, options, generation, target)
    report["paired"] = paired(runs, labels, encoding, generation)
    if settings.matched:
        report["matched_compute"] = matched_compute(bench, runs, settings.steps, options)
    report["notes"] = notes(runs, report)
    write(report, out)
    return report


def shared_measurement(runs: Sequence[ComparedRun], settings: CompareSettings) -> dict[str, Any]:
    """The circumstances of the measurement that the runs and the settings agree on; UsageError where they do not."""
    given = {f"sampling.{name}": getattr(settings, name) for name in ("sampler", "grid", "temperature", "guidance")}
    given |= {"precision": settings.precision, "evaluation.num_samples": settings.num}
    if settings.texts is not None:
        given["evaluation.tokens_per_length"] = settings.texts * runs[0].recipe.data.max_len_tokens
    return refuse_unlike(runs, [measurement_of(run, judge_of(run, settings.judge), given) for run in runs])


def open_bench(
    runs: Sequence[ComparedRun],
    settings: CompareSettings,
    shared: dict[str, Any],
    out: Path,
    runtime: Runtime,
    on_progress: Callable[[str], None],
) -> Bench:
    """The judge, the tokens and the cache of a comparison."""
    first = runs[0]
    source = settings.judge or first.recipe.judge.source
    judge = Judge.open(
        source, run=first.folder, recipe=first.recipe, device=runtime.device, precision=runtime.precision
    )
    return Bench(
        shared=shared,
        tokens=open_data(first.folder, first.recipe, shared["data_fingerprint"], runtime, on_progress),
        judge=judge,
        runtime=runtime,
        num_texts=max(1, shared["evaluation.tokens_per_length"] // first.recipe.data.max_len_tokens),
        noise_std=first.decoder_noise_std,
        cache=out / "measurements",
        on_progress=on_progress,
    )


def identity(
    runs: Sequence[ComparedRun],
    shared: dict[str, Any],
    settings: CompareSettings,
    options: SamplingOptions,
    bench: Bench,
) -> dict[str, Any]:
    """Every circumstance that the columns share."""
    return {
        "ldlm_version": __version__,
        **shared,
        "data_source": runs[0].recipe.data.source,
        "data_is_synthetic": runs[0].recipe.data.source.startswith("builtin:"),
        "judge": bench.judge.identity() | {"held_out_nats_per_token": bench.judge.held_out_nats_per_token},
        "device": str(bench.runtime.device),
        "held_out_texts": bench.num_texts,
        "decoder_noise_std": bench.noise_std,
        "sampling": asdict(options) | {"steps": list(settings.steps)},
        "sweep": {"temperatures": sweep_temperatures(settings, options), "num": min(settings.sweep_num, options.num)},
        "definitions": {
            "entropy_nats": metrics.ENTROPY_DEFINITION,
            "generative_perplexity": metrics.PERPLEXITY_DEFINITION,
            "own_estimates": DEFINITION,
        },
    }


def run_row(run: ComparedRun, label: str) -> dict[str, Any]:
    """What a run is and what it has spent."""
    return {
        "run": run.name,
        "folder": str(run.folder),
        "group": label,
        "recipe": run.recipe.name,
        "plan": run.plan,
        "seed": run.recipe.seed,
        "snapshot_hash": run.config["hash"],
        "decoder_noise_std": run.decoder_noise_std,
        "reused": run.manifest.get("reused", {}),
        "snapshots": [name for name, _, _ in run.snapshots()],
        "compute": run.config.get("compute"),
    }


def curve(run: ComparedRun) -> dict[str, list[Any]]:
    """Columns of the logged steps of the latent stages; None where a step did not log a quantity."""
    rows = run.curves()
    return {name: [row.get(name) for row in rows] for name in ("latent_step", "stage", "step", *CURVES)}


def encoding_row(run: ComparedRun, found: dict[str, Any]) -> dict[str, Any]:
    """Reconstruction, own estimates and latent state of one run; per-text counts are left out."""
    tokens = sum(found["tokens"])
    noised = found["correct_noised"]
    return {
        "run": run.name,
        "num_texts": len(found["tokens"]),
        "kind": found["kind"],
        "accuracy": sum(found["correct"]) / tokens,
        "accuracy_noised": None if noised is None else sum(noised) / tokens,
        "own_estimates": found["own_estimates"],
        "latent_state": found["latent_state"],
    }


# ---------------------------------------------------------------------- matched entropy


def sweep_temperatures(settings: CompareSettings, options: SamplingOptions) -> list[float]:
    return sorted({*settings.temperatures, options.temperature}) if settings.temperatures else []


def matched_entropy(
    bench: Bench,
    runs: Sequence[ComparedRun],
    settings: CompareSettings,
    options: SamplingOptions,
    generation: dict[tuple[str, int], dict[str, Any]],
    target: float,
) -> list[dict[str, Any]]:
    """For each run and step count: the temperature sweep, and perplexity where its entropy is that of real text."""
    num = min(settings.sweep_num, options.num)
    rows = []
    for run in runs:
        for steps in settings.steps:
            points = []
            for temperature in sweep_temperatures(settings, options):
                if temperature == options.temperature:
                    found = generation[run.name, steps]
                else:
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


# ---------------------------------------------------------------------- paired differences


def paired(
    runs: Sequence[ComparedRun],
    labels: dict[str, str],
    encoding: dict[str, dict[str, Any]],
    generation: dict[tuple[str, int], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Each run minus the run of the first group with its seed (else the first run), with paired intervals.

    Intervals are over texts and sampling noise for these two runs; the spread over training seeds is in the rows.
    """
    base = [run for run in runs if labels[run.name] == labels[runs[0].name]]
    step_counts = sorted({steps for _, steps in generation})
    rows = []
    for run in runs[1:]:
        others = [other for other in base if run not in base and other.recipe.seed == run.recipe.seed]
        against = (others or base)[0]
        pairs: list[tuple[str, int | None, Ratio | None, Ratio | None]] = [
            (name, None, *(accuracy_ratio(encoding[each.name], column) for each in (run, against)))
            for name, column in (("accuracy", "correct"), ("accuracy_noised", "correct_noised"))
        ]
        for steps in step_counts:
            both = [generation[each.name, steps] for each in (run, against)]
            for name in ("nats_per_judge_token", "entropy_nats", "valid_stories"):
                pairs.append((name, steps, *(text_ratio(found, name) for found in both)))
        for name, number, ours, theirs in pairs:
            interval = paired_interval(ours, theirs) if ours is not None and theirs is not None else None
            if interval is not None:
                rows.append({"run": run.name, "against": against.name, "quantity": name, "steps": number, **interval})
    return rows


def accuracy_ratio(found: dict[str, Any], column: str) -> Ratio | None:
    return None if found[column] is None else (found[column], found["tokens"])


def text_ratio(found: dict[str, Any], quantity: str) -> Ratio | None:
    """A quantity of generated texts as a ratio of sums by sample index; None when it was not measured."""
    if quantity == "nats_per_judge_token":
        return found["nats"], found["judge_tokens"]
    if quantity == "entropy_nats":
        return [value or 0.0 for value in found["entropy"]], [float(value is not None) for value in found["entropy"]]
    return (found["valid"], [1.0] * len(found["valid"])) if "valid" in found else None


# ---------------------------------------------------------------------- what a reader must know


def notes(runs: Sequence[ComparedRun], report: dict[str, Any]) -> list[str]:
    """Sentences that belong beside the tables."""
    found = []
    scales = {(run.recipe.diffusion.schedule, run.recipe.diffusion.schedule_scale) for run in runs}
    if len(scales) > 1:
        found.append(
            "The noise schedules differ: a time t is another noise level in each, so own estimates are left out."
        )
        for row in report["encoding"]:
            del row["own_estimates"]
    if len({run.decoder_noise_std for run in runs}) > 1:
        found.append(
            f"The runs were trained with different decoder noise; noised reconstruction and bits are at "
            f"{runs[0].decoder_noise_std:g} for all."
        )
    if any(run.config.get("compute") is None for run in runs):
        found.append("A run was written by an ldlm that did not record compute; its row has none.")
    if any(name.startswith("stages.") for name in report["circumstances"]):
        found.append("The stages differ: training losses are each run's own and stand in plots, not in a column.")
    if "matched_compute" in report:
        found.append("Snapshots along a run are from before its learning rate has fallen to the end.")
    return found
