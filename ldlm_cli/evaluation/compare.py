"""Runs side by side: the same held-out texts, judge, noise and precision for all; paired differences with intervals."""

from __future__ import annotations

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
from ldlm_cli.evaluation.matched import matched_compute, matched_entropy
from ldlm_cli.evaluation.measurements import Bench
from ldlm_cli.evaluation.own_estimates import DEFINITION
from ldlm_cli.evaluation.paired import paired_differences
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
    # At different schedules a time t is another noise level, and a column of accuracies at t would be unlike.
    one_schedule = len({(run.recipe.diffusion.schedule, run.recipe.diffusion.schedule_scale) for run in runs}) == 1
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
        "encoding": [encoding_row(run, encoding[run.name], one_schedule) for run in runs],
        "generation": [{"run": run, "steps": steps, **found["summary"]} for (run, steps), found in generation.items()],
        "references": references,
    }
    if settings.temperatures:
        target = references["held_out_text"]["entropy_nats"]
        temperatures, num = report["identity"]["sweep"]["temperatures"], report["identity"]["sweep"]["num"]
        report["matched_entropy"] = matched_entropy(bench, runs, temperatures, num, options, generation, target)
    report["paired"] = paired_differences(runs, labels, encoding, generation)
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
    sweep = sorted({*settings.temperatures, options.temperature}) if settings.temperatures else []
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
        "sweep": {"temperatures": sweep, "num": min(settings.sweep_num, options.num)},
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


def encoding_row(run: ComparedRun, found: dict[str, Any], one_schedule: bool) -> dict[str, Any]:
    """Reconstruction, own estimates and latent state of one run; per-text counts are left out."""
    tokens = sum(found["tokens"])
    noised = found["correct_noised"]
    row = {
        "run": run.name,
        "num_texts": len(found["tokens"]),
        "kind": found["kind"],
        "accuracy": sum(found["correct"]) / tokens,
        "accuracy_noised": None if noised is None else sum(noised) / tokens,
        "latent_state": found["latent_state"],
    }
    return row | {"own_estimates": found["own_estimates"]} if one_schedule else row


def notes(runs: Sequence[ComparedRun], report: dict[str, Any]) -> list[str]:
    """Sentences that belong beside the tables."""
    found = []
    if "own_estimates" not in report["encoding"][0]:
        found.append(
            "diffusion.schedule or schedule_scale differ: a time t is another noise level in each run, and the columns "
            "of own estimates are left out."
        )
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
