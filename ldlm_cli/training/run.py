"""One plan of one recipe, start to end: build all, then run its stages; resumes where a stopped run left off."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldlm_cli.checkpoint import list_checkpoints, load_checkpoint
from ldlm_cli.data.shards import TokenFolder, prepare_tokens
from ldlm_cli.recipe.load import dump_recipe
from ldlm_cli.recipe.resolve import recipe_for_plan
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.recipe.stage_schema import StageRecipe
from ldlm_cli.runtime import Runtime
from ldlm_cli.training.plan import plan_stages
from ldlm_cli.training.reuse import copy_language_model, find_language_model
from ldlm_cli.training.run_folder import (
    MetricsLog,
    free_folder,
    new_manifest,
    read_manifest,
    refuse_changes,
    run_folder,
    write_manifest,
)
from ldlm_cli.training.stage_loop import Reporter, Run, finish_stage
from ldlm_cli.training.stages import RUN_STAGE


def run_recipe(
    recipe: Recipe,
    plan: str,
    *,
    out: Path | None,
    fresh: bool,
    reporter: Reporter,
    runtime: Runtime | None = None,
    reuse: Sequence[Path] = (),
    demand_reuse: bool = False,
) -> dict[str, Any]:
    """Train a plan in its run folder.

    Started again, an unfinished run resumes and a finished one says so.

    Args:
        reuse: run folders whose language models are copied where a stage would train the same ones.
        demand_reuse: a language model stage that finds none there is an error.
    Returns:
        {"run": folder, "status": "finished" | "already finished", "seconds": …}.
    Raises:
        RecipeError: the plan is unknown, or the folder holds a run of another recipe (the differing fields are named).
    """
    recipe = recipe_for_plan(recipe, plan)
    stages = plan_stages(recipe, plan)
    runtime = runtime or Runtime.start(recipe.training.precision)
    folder = (out or run_folder(recipe, plan)) if not fresh else free_folder(out or run_folder(recipe, plan), runtime)
    manifest = read_manifest(folder)
    if manifest is not None:
        refuse_changes(recipe, plan, manifest, folder)
        runtime.precision = manifest["precision"]  # `auto` may mean another on the machine that resumes
        if manifest.get("finished"):
            return {"run": str(folder), "status": "already finished"}
    started = time.perf_counter()
    tokens = shared_tokens(recipe, runtime, reporter)
    run = Run(recipe, plan, folder, runtime, tokens, reporter, lambda metrics: None)
    if runtime.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        dump_recipe(recipe, folder / "recipe.yaml")
        write_manifest(folder, manifest or new_manifest(recipe, plan, tokens, runtime))
    runtime.barrier()
    checkpoints = list_checkpoints(folder)
    resumed = load_checkpoint(checkpoints[-1]) if checkpoints else None
    first, step = (int(resumed[2]["stage"]), int(resumed[2]["step"])) if resumed else (0, 0)
    if resumed is not None:
        run.spent = list(resumed[2].get("spent", []))
    names = [name for name, _ in stages]
    if runtime.is_main:
        run.log = MetricsLog(
            folder,
            recipe.training.tensorboard,
            keep=lambda row: (names.index(row["stage"]), row["step"]) <= (first, step) or row["stage"] in names[:first],
        )
    for index, (name, stage) in enumerate(stages):
        if index < first:
            continue
        here = resumed if resumed is not None and index == first else None
        if stage.kind == "language_model" and reuse and (here is None or here[2]["step"] == 0):
            manifest = read_manifest(folder) or {}
            source = find_language_model(recipe, plan, index, manifest, reuse, demand_reuse)
            if source is not None:
                reuse_stage(run, index, name, stage, source)
                continue
        with runtime.signals_noted():
            RUN_STAGE[stage.kind](run, index, name, stage, here, len(stages))
    if runtime.is_main:
        done = {**(read_manifest(folder) or {}), "finished": True}
        write_manifest(folder, done)
    runtime.barrier()
    return {"run": str(folder), "status": "finished", "seconds": round(time.perf_counter() - started, 1)}


def reuse_stage(run: Run, index: int, name: str, stage: StageRecipe, source: Path) -> None:
    """Finish a language model stage with what another run has trained, and say so in the manifest."""
    run.say(lambda: run.reporter.note(f"stage {name}: the same {stage.role} as in {source}, copied"))
    if run.runtime.is_main:
        reused = copy_language_model(source, run.folder, stage.role)
        manifest = read_manifest(run.folder) or {}
        write_manifest(run.folder, {**manifest, "reused": {**manifest.get("reused", {}), name: reused}})
        if reused["compute"]:
            # Counted as if it had been spent here: the run could not have been made without it.
            run.spent.append({**reused["compute"], "stage": name, "reused_from": str(source)})
    finish_stage(run, index)


def shared_tokens(recipe: Recipe, runtime: Runtime, reporter: Reporter) -> TokenFolder:
    """Tokenize on the main process (a no-op when done before), then open on all."""
    if runtime.is_main:
        prepare_tokens(recipe.data, recipe.token_encoder, on_progress=reporter.note)
    runtime.barrier()
    return prepare_tokens(recipe.data, recipe.token_encoder)
