"""`ldlm compare`: parse, measure runs under one set of circumstances, print and write one report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from ldlm_cli.cli import options
from ldlm_cli.errors import UsageError


def compare_runs(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="Two or more run folders, or names in runs/.")],
    steps: Annotated[
        str, typer.Option("--steps", metavar="N,N", help="Numbers of denoiser calls per text, each a column.")
    ] = "10,50",
    temperatures: Annotated[
        str,
        typer.Option(
            "--temperatures", metavar="T,T", help="Sweep for perplexity at real text's entropy; 'none' leaves it out."
        ),
    ] = "0.8,0.9,1.1,1.2",
    num: Annotated[
        int | None, typer.Option("--num", "-n", callback=options.at_least(1), help="Texts to generate per run.")
    ] = None,
    sweep_num: Annotated[
        int, typer.Option("--sweep-num", callback=options.at_least(1), help="Texts per temperature of the sweep.")
    ] = 200,
    texts: Annotated[
        int | None, typer.Option("--texts", callback=options.at_least(1), help="Held-out texts to reconstruct.")
    ] = None,
    sampler: options.Sampler = None,
    grid: options.Grid = None,
    seed: Annotated[int, typer.Option("--seed", callback=options.at_least(0), help="Seed of the noise.")] = 0,
    temperature: options.Temperature = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", callback=options.real(at_least=0), help="Self-conditioning guidance; 1 is off."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option("--judge", help="One language model that scores the texts of all runs: hub id, folder, or run."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", callback=options.one_of(("fp32", "bf16")), help="fp32 or bf16, for all runs."),
    ] = None,
    matched: Annotated[
        bool, typer.Option("--matched/--no-matched", help="Also compare at equal denoiser steps and equal FLOPs.")
    ] = True,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the report and its measurements.")] = Path(
        "runs/compare"
    ),
    as_json: options.AsJson = False,
) -> None:
    """Set runs side by side: the same texts, judge and noise for all; paired differences; equal compute."""
    step_counts = [int(value) for value in _numbers("--steps", steps, whole=True)]
    sweep = [] if temperatures == "none" else _numbers("--temperatures", temperatures, whole=False)
    if len(runs) < 2:
        raise UsageError("compare needs at least two runs: name two or more run folders")

    from ldlm_cli.evaluation.compare import CompareSettings, compare
    from ldlm_cli.report import console, tables
    from ldlm_cli.report.comparison import print_comparison, write_comparison

    settings = CompareSettings(
        steps=tuple(step_counts),
        temperatures=tuple(sweep),
        num=num,
        sweep_num=sweep_num,
        texts=texts,
        sampler=sampler,
        grid=grid,
        seed=seed,
        temperature=temperature,
        guidance=guidance,
        judge=judge,
        precision=precision,
        matched=matched,
    )
    report = compare(runs, settings, out=out, write=write_comparison, on_progress=console.note)
    if as_json:
        tables.print_json(report)
    else:
        print_comparison(report)
    console.note(f"report: {out / 'compare.md'}, compare.json, plots in {out / 'plots'}")


def _numbers(option: str, text: str, *, whole: bool) -> list[float]:
    """Distinct positive numbers of a list such as 10,50, rising."""
    try:
        values = [float(int(part) if whole else float(part)) for part in text.split(",")]
    except ValueError as error:
        kind = "whole numbers" if whole else "numbers"
        raise UsageError(f"{option} is '{text}' but must be {kind} with commas between them") from error
    if any(value <= 0 or not math.isfinite(value) for value in values):
        raise UsageError(f"{option} is '{text}' but its numbers must be above 0")
    return sorted(set(values))
