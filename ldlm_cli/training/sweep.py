"""Runs one after the other, each resumed or skipped as it needs; one that fails is reported and the rest go on."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldlm_cli.errors import LdlmError, RecipeError, StoppedBySignal
from ldlm_cli.recipe.resolve import recipe_for_plan
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.recipe.sweep import SweepEntry
from ldlm_cli.runtime import Runtime
from ldlm_cli.training.run import run_recipe
from ldlm_cli.training.run_folder import read_manifest, refuse_changes, run_folder
from ldlm_cli.training.stage_loop import Reporter


@dataclass(frozen=True)
class SweepRun:
    """A checked entry: recipe, plan, and the folder it goes to."""

    recipe: Recipe
    plan: str
    folder: Path
    reuse: Path | None

    @property
    def status(self) -> str:
        """`new`, `unfinished` or `finished`, by what is in the folder."""
        manifest = read_manifest(self.folder)
        return "new" if manifest is None else "finished" if manifest.get("finished") else "unfinished"


def check_sweep(entries: Sequence[SweepEntry]) -> list[SweepRun]:
    """Resolve all entries before any is run.

    Raises:
        RecipeError: a recipe has a mistake, two entries go to one folder, or a folder holds a run of another recipe.
    """
    runs: list[SweepRun] = []
    for number, entry in enumerate(entries, start=1):
        recipe = recipe_for_plan(entry.resolve(), entry.plan)
        folder = Path(entry.out) if entry.out else run_folder(recipe, entry.plan)
        for earlier, other in enumerate(runs, start=1):
            if other.folder.resolve() == folder.resolve():
                raise RecipeError(
                    f"entries {earlier} and {number} both go to '{folder}': give one of them its own `out`"
                )
        manifest = read_manifest(folder)
        if manifest is not None:
            refuse_changes(recipe, entry.plan, manifest, folder)
        reuse = Path(entry.reuse) if entry.reuse else None
        if reuse is not None and read_manifest(reuse) is None and all(run.folder != reuse for run in runs):
            raise RecipeError(f"entry {number} reuses '{reuse}', which is no run folder and no earlier entry's `out`")
        runs.append(SweepRun(recipe, entry.plan, folder, reuse))
    return runs


def run_sweep(
    runs: Sequence[SweepRun],
    *,
    reporter: Reporter,
    on_run: Callable[[int, SweepRun], None],
    on_failure: Callable[[SweepRun, str, str], None],
) -> list[dict[str, Any]]:
    """Run all, in this process; every process of a launcher calls this.

    A language model that an earlier run of the sweep has trained is copied where the same one would be trained again.

    Args:
        on_run: told number (from 0) and run before each.
        on_failure: told run, sentence and traceback of one that failed.
    Returns:
        One row a run: run, plan, seed, status (`finished`, `already finished`, `failed`), seconds or error.
    Raises:
        StoppedBySignal: the run under way has saved; the same sweep goes on from there.
        LdlmError: a run failed and there are several processes, of which the others may wait for ever.
    """
    rows = []
    precision = _auto_precision(runs)
    for number, run in enumerate(runs):
        on_run(number, run)
        row: dict[str, Any] = {"run": str(run.folder), "plan": run.plan, "seed": run.recipe.seed}
        asked = run.recipe.training.precision
        runtime = Runtime.start(precision or asked if asked == "auto" else asked)
        if asked == "auto":
            precision = runtime.precision  # a timing: one answer for the whole sweep, so that its runs are alike
        earlier = [other.folder for other in runs[:number]]
        try:
            result = run_recipe(
                *(run.recipe, run.plan),
                out=run.folder,
                fresh=False,
                reporter=reporter,
                runtime=runtime,
                reuse=[run.reuse] if run.reuse else earlier,
                demand_reuse=run.reuse is not None,
            )
            row |= {key: result[key] for key in ("status", "seconds") if key in result}
        except StoppedBySignal:
            raise
        except Exception as error:
            if runtime.num_processes > 1:
                raise
            known = isinstance(error, LdlmError)
            what = " ".join(str(error).split()) if known else f"{type(error).__name__}: {' '.join(str(error).split())}"
            row |= {"status": "failed", "error": what}
            on_failure(run, what, traceback.format_exc())
        rows.append(row)
    return rows


def _auto_precision(runs: Sequence[SweepRun]) -> str | None:
    """The precision that an already started run of the sweep has picked, None when none has."""
    for run in runs:
        manifest = read_manifest(run.folder)
        if manifest is not None and run.recipe.training.precision == "auto":
            return str(manifest["precision"])
    return None
