"""`ldlm train-joint`, `train-sequential`, `train-lm`: parse, then run one plan of the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ldlm_cli.cli import options
from ldlm_cli.cli.launch import run_in_processes
from ldlm_cli.errors import RecipeError

Out = Annotated[Path | None, typer.Option("--out", help="Run folder; runs/<recipe>-<plan>-s<seed> if absent.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start a new folder instead of resuming.")]
PLAIN_VARIANT = "mse-noise"
Variant = Annotated[
    str,
    typer.Option(
        "--variant",
        help="How the autoencoder is trained: mse-noise as in joint training, cosmos or frozen-features; NAME is plan "
        "`sequential-NAME`.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print parameters, memory, steps and tokens; train nothing.")]


def train_joint(
    recipe: options.RecipeName,
    overrides: options.Overrides = None,
    seed: options.Seed = None,
    out: Out = None,
    fresh: Fresh = False,
    num_processes: options.NumProcesses = 1,
    dry_run: DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Train encoder, denoiser and decoder together (the recipe's plan `joint`); resumes an unfinished run."""
    _train("joint", recipe, overrides, seed, out, fresh, num_processes, dry_run, as_json)


def train_sequential(
    recipe: options.RecipeName,
    overrides: options.Overrides = None,
    variant: Variant = PLAIN_VARIANT,
    seed: options.Seed = None,
    out: Out = None,
    fresh: Fresh = False,
    num_processes: options.NumProcesses = 1,
    dry_run: DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Train the autoencoder first, freeze it, then the denoiser (plan `sequential`): the comparison to joint."""
    plan = "sequential" if variant == PLAIN_VARIANT else f"sequential-{variant}"
    _train(plan, recipe, overrides, seed, out, fresh, num_processes, dry_run, as_json)


def train_lm(
    recipe: options.RecipeName,
    overrides: options.Overrides = None,
    seed: options.Seed = None,
    out: Out = None,
    fresh: Fresh = False,
    num_processes: options.NumProcesses = 1,
    dry_run: DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Train a causal language model on the same tokens (plan `lm`): token encoder, baseline or judge."""
    _train("lm", recipe, overrides, seed, out, fresh, num_processes, dry_run, as_json)


def _train(
    plan: str,
    name: str,
    overrides: list[str] | None,
    seed: int | None,
    out: Path | None,
    fresh: bool,
    num_processes: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    # What can be refused cheaply is refused here, once, before torch is imported or processes are started.
    recipe = options.resolve_recipe(name, overrides, seed)
    if plan not in recipe.plans:
        raise RecipeError(
            f"recipe '{recipe.name}' has no plan '{plan}'; it has {', '.join(recipe.plans)}: "
            f"add plans.{plan}, a list of its stages ({', '.join(recipe.stages)})"
        )
    if not dry_run:
        run_in_processes(num_processes)

    from ldlm_cli.report import console, tables

    if dry_run:
        from ldlm_cli.training.plan import plan_report

        report = plan_report(recipe, plan)
        if as_json:
            tables.print_json({"recipe": recipe.name, "plan": plan, **report})
        else:
            estimate = report.get("seconds_estimate")
            tables.print_plan(recipe.name, plan, report, console.duration(estimate) if estimate else None)
        return
    from ldlm_cli.runtime import Runtime
    from ldlm_cli.training.run import run_recipe

    runtime = Runtime.start(recipe.training.precision)
    with console.TrainingReporter(silent=not runtime.is_main) as reporter:
        result = run_recipe(recipe, plan, out=out, fresh=fresh, reporter=reporter, runtime=runtime)
    if runtime.is_main:
        if as_json:
            tables.print_json({"recipe": recipe.name, "plan": plan, **result})
        else:
            took = f" in {console.duration(result['seconds'])}" if "seconds" in result else ""
            typer.echo(f"{result['run']}: {result['status']}{took}")
    runtime.close()
    # A run that a signal stopped has saved its checkpoint and says so here: 130 or 143.
    if result.get("exit_code"):
        raise typer.Exit(int(result["exit_code"]))
