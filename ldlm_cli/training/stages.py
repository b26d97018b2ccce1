"""The stages of a plan: what a language model stage and a latent stage build, train and leave behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from ldlm_cli.checkpoint import load_module_tensors, module_tensors, save_checkpoint, write_snapshot
from ldlm_cli.core.draws import seed_at
from ldlm_cli.core.model import LDLM, build_parts
from ldlm_cli.core.token_encoder import build_token_encoder
from ldlm_cli.data.batches import BatchOrder, length_histogram
from ldlm_cli.data.shards import TokenFolder
from ldlm_cli.errors import RecipeError
from ldlm_cli.generate import Generator, SamplingOptions
from ldlm_cli.recipe.schema import Recipe, StageRecipe
from ldlm_cli.runtime import Runtime
from ldlm_cli.training.compute import stage_compute, total_compute
from ldlm_cli.training.language_model import LanguageModelTask, build_language_model, save_language_model
from ldlm_cli.training.latent import LatentTask, init_seed, latent_alarm, measure_statistics
from ldlm_cli.training.loop import Hooks, StageState, run_stage, start_stage
from ldlm_cli.training.plan import plan_stages

HELD_OUT_TOKENS = 32_768
PREVIEW_TEXTS, PREVIEW_STEPS = 8, 20


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


def batch_order(run: Run, stage: StageRecipe, index: int, window: int) -> BatchOrder:
    """The stage's batches: order from (seed, stage), the same for any number of processes."""
    return BatchOrder(
        run.tokens.split("train"),
        window_tokens=window,
        batch_tokens=stage.batch_tokens,
        packing=run.recipe.data.packing,
        seed=seed_at(run.recipe.seed + stage.seed_offset, 3, index) % (1 << 31),
        pad_id=run.tokens.vocabulary.pad_id,
    )


# ------------------------------------------------------------- stage: language model


def run_language_model(run: Run, index: int, name: str, stage: StageRecipe, resumed: tuple | None, total: int) -> None:
    """Train a causal LM and store it under its role."""
    vocabulary, data = run.tokens.vocabulary, run.recipe.data
    model = build_language_model(run.recipe, stage, vocabulary).to(run.runtime.device)
    valid = BatchOrder(
        run.tokens.split("valid"),
        window_tokens=data.context_tokens,
        batch_tokens=min(stage.batch_tokens, int(run.tokens.split("valid").lengths.sum())),
        packing=data.packing,
        seed=0,
        pad_id=vocabulary.pad_id,
    )
    count = min(valid.steps_per_epoch, max(1, HELD_OUT_TOKENS // stage.batch_tokens))
    held_out = [valid.batch_at(step) for step in range(count)]
    task = LanguageModelTask(model, stage, vocabulary, held_out, run.runtime)
    state = train(run, index, name, stage, task, data.context_tokens, resumed, total, {"language_model": model})
    nats = task.held_out_nats()  # of the averaged weights that are kept
    if run.runtime.is_main:
        facts = {
            "role": stage.role,
            "seed": run.recipe.seed + stage.seed_offset,
            "steps": state.step,
            "held_out_nats_per_token": nats,
            "context_tokens": data.context_tokens,
            "data_fingerprint": run.tokens.fingerprint,
            "compute": run.compute(name, stage, state),
        }
        save_language_model(run.folder / stage.role, model, vocabulary, facts)
    run.spent.append(run.compute(name, stage, state))
    finish_stage(run, index)


# ---------------------------------------------------------------------- stage: latent


def run_latent(run: Run, index: int, name: str, stage: StageRecipe, resumed: tuple | None, total: int) -> None:
    """Train parts of the latent model; the last such stage of a plan leaves the snapshot."""
    window = run.recipe.data.max_len_tokens
    order = batch_order(run, stage, index, window)
    model = run.model or build_model(run)
    model.to(run.runtime.device)
    kept = latent_modules(model)
    if resumed is not None and resumed[0]:  # empty right after a language model stage
        load_module_tensors(kept, resumed[0])
    elif run.model is None:
        measure_statistics(model, order, run.runtime, latents=False)
    run.model = model
    if stage.standardize_latents and (resumed is None or resumed[2]["step"] == 0):
        measure_statistics(model, order, run.runtime, latents=True)
    task = LatentTask(model, run.recipe, stage, index, run.runtime)
    histogram = length_histogram(run.tokens.split("train"), window, run.recipe.data.packing)

    def preview(state: StageState) -> dict[str, Any]:
        options = SamplingOptions(num=PREVIEW_TEXTS, steps=PREVIEW_STEPS, batch_size=PREVIEW_TEXTS)
        averaged = averaged_model(run.recipe, model, state).eval()
        generator = Generator(averaged, run.recipe, run.tokens.vocabulary, histogram, None, options, run.runtime)
        texts = generator.batch(list(range(PREVIEW_TEXTS)), generator.lengths(), None)
        task.train_mode()
        run.say(lambda: run.reporter.preview(texts[0].text))
        return {"sample_entropy": sum(entropy(text.token_ids) for text in texts) / len(texts)}

    can_sample = all(part in model.parts for part in ("denoiser", "latent_decoder", "token_decoder"))
    show = preview if can_sample and task.has_diffusion else None

    def snapshot(state: StageState, folder: Path) -> None:
        probabilities = task.times.probabilities if task.has_diffusion and task.times.refreshes else None
        facts = {
            "plan": run.plan,
            "stage": name,
            "step": state.step,
            "data_fingerprint": run.tokens.fingerprint,
            "compute": total_compute([*run.spent, run.compute(name, stage, state)]),
        }
        averaged = averaged_model(run.recipe, model, state)
        write_snapshot(run.folder, run.recipe, averaged, run.tokens.vocabulary, histogram, probabilities, facts, folder)

    def snapshot_along(state: StageState) -> None:
        run.say(lambda: snapshot(state, run.folder / "snapshots" / f"{name}-{state.step:08d}"))
        run.runtime.barrier()

    state = train(run, index, name, stage, task, window, resumed, total, kept, order, show, snapshot_along)
    later = [other for _, other in plan_stages(run.recipe, run.plan)[index + 1 :]]
    if run.runtime.is_main and not any(other.kind == "latent" for other in later):
        snapshot(state, run.folder / "snapshot")
    run.spent.append(run.compute(name, stage, state))
    finish_stage(run, index)


def averaged_model(recipe: Recipe, model: LDLM, state: StageState) -> LDLM:
    """The model as it would be used now: averaged weights of the parts that train, the others as they are."""
    newest = dict(model.parts.items()) | dict(cast(torch.nn.Module, state.ema.module).named_children())
    averaged = LDLM(newest, model.token_encoder, recipe)
    averaged.latent_normalizer.load_state_dict(model.latent_normalizer.state_dict())
    return averaged.to(next(model.parameters()).device)


def build_model(run: Run) -> LDLM:
    """Fresh parts on top of the frozen token encoder."""
    recipe, vocabulary = run.recipe, run.tokens.vocabulary
    own = recipe.token_encoder.source == "trained"
    source = run.folder / "token_encoder" if own else recipe.token_encoder.source
    if own and not (run.folder / "token_encoder" / "language_model.json").is_file():
        raise RecipeError(
            f"plan '{run.plan}' trains latents before the token encoder: put a language_model stage with role "
            "token_encoder first, or set token_encoder.source to a pretrained model"
        )
    encoder = build_token_encoder(recipe.token_encoder, source, vocabulary.prefix_id, vocabulary.size)
    torch.manual_seed(init_seed(recipe))
    return LDLM(build_parts(recipe, vocabulary.size), encoder, recipe)


def latent_modules(model: LDLM) -> dict[str, torch.nn.Module]:
    """What a checkpoint of a latent stage holds besides averages and optimizer."""
    assert model.token_encoder is not None
    return dict(model.parts.items()) | {
        "hidden_normalizer": model.token_encoder.normalizer,
        "latent_normalizer": model.latent_normalizer,
    }


RUN_STAGE = {"language_model": run_language_model, "latent": run_latent}


# ---------------------------------------------------------------------- both kinds


def train(
    run: Run,
    index: int,
    name: str,
    stage: StageRecipe,
    task: Any,
    window: int,
    resumed: tuple | None,
    total: int,
    kept: dict[str, torch.nn.Module],
    order: BatchOrder | None = None,
    preview: Callable[[StageState], dict[str, Any]] | None = None,
    on_snapshot: Callable[[StageState], None] = lambda state: None,
) -> StageState:
    """Run one stage's loop from its start or from the checkpoint `resumed`."""
    state = start_stage(task, stage)
    if resumed is not None and resumed[2]["step"] > 0:
        tensors, optimizer, saved = resumed
        load_module_tensors(kept, tensors)
        load_module_tensors({"ema": state.ema}, tensors)
        state.optimizer.load_state_dict(optimizer)
        task.load_state_dict(saved["task"])
        state.step, state.seconds = int(saved["step"]), float(saved.get("seconds", 0.0))

    def on_metrics(metrics: dict[str, Any]) -> None:
        if not run.runtime.is_main:
            return
        run.log(metrics)
        run.reporter.step_logged(metrics)
        alarm = latent_alarm(metrics, stage.steps)
        if alarm:
            run.reporter.alarm(alarm)

    def on_save(state: StageState) -> None:
        saved = {"stage": index, "step": state.step, "task": task.state_dict()}
        saved |= {"seconds": state.seconds, "spent": run.spent}
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


def entropy(ids: list[int]) -> float:
    """Unigram entropy of one text in nats."""
    counts = torch.unique(torch.tensor(ids), return_counts=True)[1].double()
    return float(torch.distributions.Categorical(counts / counts.sum()).entropy())
