"""The loop: draw, forward, backward, step, average, report, save. It does not know the method."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ldlm_cli.data.batches import Batch, BatchOrder
from ldlm_cli.errors import LdlmError, StoppedBySignal
from ldlm_cli.recipe.schema import TrainingRecipe
from ldlm_cli.recipe.stage_schema import StageRecipe
from ldlm_cli.runtime import Runtime
from ldlm_cli.training.ema import build_ema
from ldlm_cli.training.muon import Together
from ldlm_cli.training.optimizer import build_optimizer, clip_parts, lr_at


class Task(Protocol):
    """What one stage trains: a module to prepare, and how to run it on rows of a batch."""

    module: nn.Module
    parts: nn.ModuleDict

    def loss(self, prepared: nn.Module, batch: Batch, rows: list[int], step: int, measure: bool) -> Tensor:
        """Loss of these rows of the global batch (-1 = a row of weight 0), as a share of the global loss."""

    def after_step(self, step: int) -> bool:
        """Called after optimizer step `step` on every process; True ends the stage."""

    def metrics(self) -> dict[str, Any]:
        """Means since the last call, reduced over processes; called on every process."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class StageState:
    """All of a stage that must survive a restart."""

    task: Task
    optimizer: Together
    ema: AveragedModel
    step: int = 0
    stopped: bool = False
    seconds: float = 0.0
    """Wall clock of the steps so far, logging, previews and saving included; what a stopped run repeats counts once."""


@dataclass(frozen=True)
class Hooks:
    """What the caller wants to hear; main process only, but every process enters `on_save` and `on_snapshot`."""

    on_metrics: Callable[[dict[str, Any]], None] = lambda metrics: None
    on_preview: Callable[[StageState], dict[str, Any]] | None = None
    on_save: Callable[[StageState], None] = lambda state: None
    on_snapshot: Callable[[StageState], None] = lambda state: None
    extra: Mapping[str, Any] = field(default_factory=dict)


def start_stage(task: Task, stage: StageRecipe) -> StageState:
    """Optimizer and averages for a task's parts."""
    return StageState(task, build_optimizer(task.parts, stage.optimizer), build_ema(task.parts, stage.ema_decay))


def run_stage(
    state: StageState, stage: StageRecipe, training: TrainingRecipe, order: BatchOrder, runtime: Runtime, hooks: Hooks
) -> StageState:
    """Train until `stage.steps` or until the task asks to stop; returns the state, its parts holding averaged weights.

    Raises:
        LdlmError: the loss or a gradient is not finite; names the step and what was not finite.
    """
    task = state.task
    prepared = runtime.accelerator.prepare_model(task.module)
    last_log, tokens, norms = time.perf_counter(), 0, {}
    clock = last_log
    while state.step < stage.steps and not state.stopped:
        step = state.step
        measure = (step + 1) % training.log_every_steps == 0 or step + 1 == stage.steps
        batch = order.batch_at(step)
        learning_rate = lr_at(step, stage.steps, stage.optimizer)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate"]
        shares = runtime.share_of_rows(len(batch.token_ids), stage.micro_batches)
        for number, rows in enumerate(shares):
            with runtime.accumulate(prepared, last=number + 1 == len(shares)):
                with runtime.autocast():
                    loss = task.loss(prepared, batch, rows, step, measure)
                # Data-parallel training averages gradients; our losses are already shares of the global mean.
                runtime.accelerator.backward(loss * runtime.num_processes)
        norms = clip_parts(task.parts, stage.optimizer.clip_norm)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.ema.update_parameters(task.parts)
        state.step += 1
        tokens += int(batch.mask.sum())
        state.stopped = task.after_step(step)
        if measure or state.stopped:
            metrics = task.metrics()
            now = time.perf_counter()
            metrics |= {"lr": learning_rate, "tokens_per_second": tokens / (now - last_log)}
            metrics |= {f"grad_norm_{name}": float(norm) for name, norm in norms.items()}
            check_finite(metrics, state.step)
            if hooks.on_preview is not None and due(state.step, training.sample_every_steps):
                metrics |= hooks.on_preview(state)
            hooks.on_metrics({**hooks.extra, "step": state.step, **metrics})
            last_log, tokens = time.perf_counter(), 0
        clock, before = time.perf_counter(), clock
        state.seconds += clock - before
        stop = runtime.stop_signal()
        going_on = state.step < stage.steps and not state.stopped
        if going_on and due(state.step, training.snapshot_every_steps):
            hooks.on_snapshot(state)
        if going_on and (stop or due(state.step, training.save_every_steps)):
            hooks.on_save(state)
        if stop:
            raise StoppedBySignal(
                f"stopped after step {state.step}, all saved: the same command goes on from there", stop
            )
    if state.step:
        task.parts.load_state_dict(state.ema.module.state_dict())
    return state


def due(step: int, every: int) -> bool:
    """Whether an action that happens every `every` steps (0 = never) happens after `step` steps."""
    return every > 0 and step % every == 0


def check_finite(metrics: dict[str, Any], step: int) -> None:
    """Stop on a loss or gradient that is not a number: what comes after it cannot be trusted."""
    broken = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
    if broken:
        raise LdlmError(
            f"{', '.join(broken)} not finite at step {step}: the last checkpoint is from before; lower "
            "optimizer.learning_rate, or set training.precision=fp32, and start again"
        )
