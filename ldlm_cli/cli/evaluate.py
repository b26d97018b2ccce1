"""`ldlm eval`: parse, measure a run, print and write one report."""

from __future__ import annotations

from typing import Annotated

import typer

from ldlm_cli.cli import options
from ldlm_cli.cli.launch import run_in_processes


def evaluate_run(
    run: options.RunName = None,
    max_len: Annotated[
        int | None,
        typer.Option(
            "--max-len", callback=options.at_least(4), help="Longest reconstruction, tokens; may exceed training."
        ),
    ] = None,
    num: Annotated[
        int | None, typer.Option("--num", "-n", callback=options.at_least(1), help="Texts to generate.")
    ] = None,
    steps: options.Steps = None,
    sampler: options.Sampler = None,
    grid: options.Grid = None,
    seed: options.SamplingSeed = None,
    temperature: options.Temperature = None,
    judge: Annotated[
        str | None, typer.Option("--judge", help="Language model that scores texts: hub id, folder, or train-lm run.")
    ] = None,
    num_processes: options.NumProcesses = 1,
    as_json: options.AsJson = False,
) -> None:
    """Measure a run: reconstruction by length, generated texts beside real text and naive controls."""
    from ldlm_cli.checkpoint import find_run

    folder = find_run(run)
    recipe = options.run_recipe_of(folder)
    run_in_processes(num_processes)

    from ldlm_cli.evaluation.evaluate import evaluate
    from ldlm_cli.report import console, tables
    from ldlm_cli.report.files import write_evaluation
    from ldlm_cli.runtime import Runtime

    runtime = Runtime.start(recipe.training.precision)

    def say(message: str) -> None:
        if runtime.is_main:
            console.note(message)

    say(f"run: {folder}")
    given = {"steps": steps, "sampler": sampler, "grid": grid, "seed": seed, "temperature": temperature}
    report = evaluate(
        folder,
        max_len=max_len,
        options=options.sampling_options(recipe, given),
        num=num,
        judge=judge,
        runtime=runtime,
        write=write_evaluation,
        on_progress=say,
    )
    if runtime.is_main:
        if as_json:
            tables.print_json(report)
        else:
            tables.print_report(report)
        say(f"report: {folder / 'eval' / 'report.md'}, report.json, plots in {folder / 'eval' / 'plots'}")
    runtime.close()
