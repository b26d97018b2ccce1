"""`ldlm sweep`: parse, then run a list of recipes one after the other."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ldlm_cli.cli import options
from ldlm_cli.cli.launch import run_in_processes
from ldlm_cli.errors import UsageError
from ldlm_cli.recipe.sweep import SweepEntry, load_sweep


def sweep(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE…", help="YAML lists of entries: recipe, plan, set, seed, out, reuse."),
    ] = None,
    recipes: Annotated[
        list[str] | None, typer.Option("--recipe", "-r", help="A recipe to run too; may be repeated.")
    ] = None,
    plan: Annotated[str, typer.Option("--plan", help="Plan of the recipes given by --recipe.")] = "joint",
    overrides: options.Overrides = None,
    seed: options.Seed = None,
    num_processes: options.NumProcesses = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the runs, their steps, FLOPs and time; train nothing.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Run recipes one after the other: finished ones are skipped, unfinished ones go on, a failing one is reported."""
    entries = [entry for file in files or () for entry in load_sweep(file)]
    for name in recipes or ():
        entries.append(SweepEntry(recipe=name, plan=plan))
    if not entries:
        raise UsageError("sweep needs something to run: name a FILE with a list of entries, or recipes with --recipe")
    # --set and --seed are for all entries, over what an entry says itself.
    change: dict[str, Any] = {} if seed is None else {"seed": seed}
    entries = [entry.model_copy(update={**change, "set": (*entry.set, *(overrides or ()))}) for entry in entries]
    for entry in entries:
        entry.resolve()  # mistakes end the command before torch is imported
    if not dry_run:
        run_in_processes(num_processes)

    from ldlm_cli.report import console, tables
    from ldlm_cli.training.sweep import SweepRun, check_sweep, run_sweep

    runs = check_sweep(entries)
    if dry_run:
        _print_plan(runs, as_json)
        return
    failed = []
    is_main = os.environ.get("RANK", "0") == "0"

    def say(message: str) -> None:
        if is_main:
            console.note(message)

    def on_failure(run: SweepRun, what: str, trace: str) -> None:
        failed.append(run)
        say(f"failed: {run.folder}: {what}")
        if os.environ.get("LDLM_DEBUG") or "--debug" in sys.argv:
            say(trace)

    with console.TrainingReporter(silent=not is_main) as reporter:
        rows = run_sweep(
            runs,
            reporter=reporter,
            on_run=lambda number, run: say(f"run {number + 1}/{len(runs)}: {run.folder} ({run.status})"),
            on_failure=on_failure,
        )
    if is_main and as_json:
        tables.print_json({"runs": rows, "failed": len(failed)})
    elif is_main:
        header = ("run", "plan", "seed", "status", "seconds", "error")
        tables.print_table("sweep", header, [tuple(row.get(key) for key in header) for row in rows])
    if failed:
        say(f"error: {len(failed)} of {len(runs)} runs failed; the same command tries them again and skips the others")
        raise typer.Exit(1)


def _print_plan(runs: list[Any], as_json: bool) -> None:
    from ldlm_cli.report import console, tables
    from ldlm_cli.training.plan import plan_report

    rows = []
    for run in runs:
        report = plan_report(run.recipe, run.plan)
        row = {"run": str(run.folder), "plan": run.plan, "seed": run.recipe.seed, "status": run.status}
        rows.append(row | {key: report[key] for key in ("steps", "tokens", "flops", "seconds_estimate")})
    seconds = sum(row["seconds_estimate"] for row in rows if row["status"] != "finished")
    if as_json:
        tables.print_json({"runs": rows, "seconds_estimate": seconds})
        return
    header = ("run", "plan", "seed", "status", "steps", "tokens", "flops")
    table = [(*(row[key] for key in header), console.duration(row["seconds_estimate"])) for row in rows]
    tables.print_table("sweep", (*header, "estimated time"), table)
    typer.echo(f"at most {console.duration(seconds)} by estimate; shared language models are trained once")
