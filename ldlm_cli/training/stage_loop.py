"""What all stages of a run share: the run itself, its reporter, and one stage's loop with its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ldlm_cli.checkpoint import HasTensors, load_module_tensors, module_tensors, save_checkpoint
from ldlm_cli.core.draws import seed_at
from ldlm_cli.core.model import LDLM
from ldlm_cli.data.batches import BatchOrder
from ldlm_cli.data.shards import TokenFolder
from ldlm_cli.errors import LdlmError
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.recipe.stage_schema import StageRecipe
from ldlm_cli.runtime import Runtime
from ldlm_cli.training.compute import stage_compute
from ldlm_cli.training.guard import Guard
from ldlm_cli.training.loop import Hooks, StageState, run_stage, start_stage
from ldlm_cli.training.plan import plan_stages


class Reporter(Protocol):
    """What a run tells its user; implemented by report.console, called on the main process."""

    def stage_started(self, name: str, index: int, total_stages: int, total_steps: int, start_step: int) -> None: ...

    def step_logged(self, metrics: dict[str, Any]) -> None: ...

    def preview(self, text: str) -> None: ...

    def alarm(self, message: str) -> None: ...

    def stage_finished(self, name: str, seconds: float) -> None: ...

    def note(self, message: str) -> None: ...


@dataclass
class Run:
    """What all stages of a run share."""

    recipe: Recipe
    plan: str
    folder: Path
    runtime: Runtime
    tokens: TokenFolder
    reporter: Reporter
    log: Callable[[dict[str, Any]], None]
    model: LDLM | None = None
    spent: list[dict[str, Any]] = field(default_factory=list)
    """Compute of the finished stages, see training.compute."""

    def compute(self, name: str, stage: StageRecipe, state: StageState) -> dict[str, Any]:
        """Compute of the stage under way."""
        return stage_compute(self.recipe, name, stage, self.tokens.vocabulary.size, state.step, state.seconds)

    def say(self, call: Callable[[], None]) -> None:
        if self.runtime.is_main:
            call()


def place_in_training(recipe: Recipe, plan: str, index: int) -> tuple[int, int]:
    """Where a stage's random draws and batches begin: index of the stage that began its training, steps before it.

    The latent stages of a plan are one training, whose steps are counted through: a sequential plan sees the batches
    and the noise that a joint one sees at the same step.
    """
    stages = [stage for _, stage in plan_stages(recipe, plan)]
    if stages[index].kind != "latent":
        return index, 0
    before = [number for number in range(index) if stages[number].kind == "latent"]
    return min([*before, index]), sum(stages[number].steps for number in before)


def batch_order(run: Run, stage: StageRecipe, index: int, window: int) -> BatchOrder:
    """The stage's batches: order from (seed, stage), the same for any number of processes."""
    began, first_step = place_in_training(run.recipe, run.plan, index)
    return BatchOrder(
        run.tokens.split("train"),
        window_tokens=window,
        batch_tokens=stage.batch_tokens,
        packing=run.recipe.data.packing,
        seed=seed_at(run.recipe.seed + stage.seed_offset, 3, began) % (1 << 31),
        pad_id=run.tokens.vocabulary.pad_id,
        first_step=first_step,
    )


def train(
    run: Run,
    index: int,
    name: str,
    stage: StageRecipe,
    task: Any,
    window: int,
    resumed: tuple | None,
    total: int,
    kept: Mapping[str, HasTensors],
    order: BatchOrder | None = None,
    preview: Callable[[StageState], dict[str, Any]] | None = None,
    on_snapshot: Callable[[StageState], None] = lambda state: None,
) -> StageState:
    """Run one stage's loop from its start or from the checkpoint `resumed`."""
    state, guard = start_stage(task, stage), Guard(run.recipe.guard, name, stage)
    if resumed is not None and resumed[2]["step"] > 0:
        tensors, optimizer, saved = resumed
        load_module_tensors(kept, tensors)
        load_module_tensors({"ema": state.ema}, tensors)
        state.optimizer.load_state_dict(optimizer)
        task.load_state_dict(saved["task"])
        guard.load_state_dict(saved["guard"])
        state.step, state.seconds = int(saved["step"]), float(saved.get("seconds", 0.0))

    def on_metrics(metrics: dict[str, Any]) -> None:
        alarms = guard.check(metrics)
        if run.runtime.is_main:
            run.log(metrics | ({"alarms": [alarm.cause for alarm in alarms]} if alarms else {}))
            run.reporter.step_logged(metrics)
            for alarm in alarms:
                run.reporter.alarm(alarm.message)
        if run.recipe.guard.action == "stop" and any(run.runtime.gather_objects([bool(alarms)])):
            on_save(state)
            why = alarms[0].message if alarms else "another process saw the latents fail"
            raise LdlmError(
                f"stage {name} stopped by the guard at step {metrics['step']}, checkpoint saved, the same command goes "
                f"on from there: {why}"
            )

    def on_save(state: StageState) -> None:
        saved = {"stage": index, "step": state.step, "task": task.state_dict()}
        saved |= {"guard": guard.state_dict(), "seconds": state.seconds, "spent": run.spent}
        if run.runtime.is_main:
            tensors = module_tensors(kept) | module_tensors({"ema": state.ema})
            name = checkpoint_name(index, state.step)
            save_checkpoint(
                run.folder, name, tensors, state.optimizer.state_dict(), saved, run.recipe.training.keep_checkpoints
            )
        run.runtime.barrier()

    run.say(lambda: run.reporter.stage_started(name, index, total, stage.steps, state.step))
    started = time.perf_counter()
    hooks = Hooks(on_metrics, preview, on_save, on_snapshot, {"stage": name})
    order = order or batch_order(run, stage, index, window)
    run_stage(state, stage, run.recipe.training, order, run.runtime, hooks)
    run.say(lambda: run.reporter.stage_finished(name, time.perf_counter() - started))
    return state


def latent_modules(model: LDLM) -> dict[str, torch.nn.Module]:
    """What a checkpoint of a latent stage holds besides averages and optimizer."""
    assert model.token_encoder is not None
    return dict(model.parts.items()) | {
        "hidden_normalizer": model.token_encoder.normalizer,
        "latent_normalizer": model.latent_normalizer,
    }


def finish_stage(run: Run, index: int) -> None:
    """Mark a stage as done: a checkpoint at step 0 of the next one, with the latent model if there is one by now."""
    if run.runtime.is_main:
        tensors = module_tensors(latent_modules(run.model)) if run.model else {}
        state = {"stage": index + 1, "step": 0, "task": {}, "spent": run.spent}
        keep = run.recipe.training.keep_checkpoints
        save_checkpoint(run.folder, checkpoint_name(index + 1, 0), tensors, None, state, keep)
    run.runtime.barrier()


def checkpoint_name(stage: int, step: int) -> str:
    return f"{stage:02d}-{step:08d}"
