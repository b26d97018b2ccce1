"""One plan of one recipe, start to end: build all, then run its stages; resumes where a stopped run left off."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from ldlm_cli import __version__
from ldlm_cli.checkpoint import (
    freeze,
    list_checkpoints,
    load_checkpoint,
    load_module_tensors,
    module_tensors,
    save_checkpoint,
    write_snapshot,
)
from ldlm_cli.core.draws import seed_at
from ldlm_cli.core.model import LDLM, build_parts
from ldlm_cli.core.token_encoder import build_token_encoder
from ldlm_cli.data.batches import BatchOrder, length_histogram
from ldlm_cli.data.shards import TokenFolder, prepare_tokens
from ldlm_cli.errors import RecipeError
from ldlm_cli.generate import Generator, SamplingOptions
from ldlm_cli.recipe.load import dump_recipe
from ldlm_cli.recipe.schema import Recipe, StageRecipe
from ldlm_cli.runtime import Runtime
from ldlm_cli.training.language_model import (
    LanguageModelTask,
    build_language_model,
    save_language_model,
)
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

    def say(self, call: Callable[[], None]) -> None:
        if self.runtime.is_main:
            call()


def run_folder(recipe: Recipe, plan: str) -> Path:
    """Where a run goes unless told: runs/<recipe>-<plan>-s<seed>."""
    return Path("runs") / f"{recipe.name}-{plan}-s{recipe.seed}"


def run_recipe(
    recipe: Recipe, plan: str, *, out: Path | None, fresh: bool, reporter: Reporter, runtime: Runtime | None = None
) -> dict[str, Any]:
    """Train a plan in its run folder.

    Started again, an unfinished run resumes and a finished one says so.

    Returns:
        {"run": folder, "status": "finished" | "already finished", "seconds": …}.
    Raises:
        RecipeError: the plan is unknown, or the folder holds a run of another recipe (the differing fields are named).
    """
    stages = plan_stages(recipe, plan)
    runtime = runtime or Runtime.start(recipe.training.precision)
    folder = (out or run_folder(recipe, plan)) if not fresh else free_folder(out or run_folder(recipe, plan), runtime)
    manifest = read_manifest(folder)
    if manifest is not None:
        refuse_changes(recipe, plan, manifest, folder)
        runtime.precision = manifest["precision"]  # `auto` is a timing and might be decided otherwise today
        if manifest.get("finished"):
            return {"run": str(folder), "status": "already finished"}
    started = time.perf_counter()
    tokens = shared_tokens(recipe, runtime, reporter)
    run = Run(recipe, plan, folder, runtime, tokens, reporter, lambda metrics: None)
    if runtime.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        dump_recipe(recipe, folder / "recipe.yaml")
        write_manifest(folder, manifest or new_manifest(run))
    runtime.barrier()
    run.log = MetricsLog(folder, recipe.training.tensorboard) if runtime.is_main else (lambda metrics: None)
    checkpoints = list_checkpoints(folder)
    resumed = load_checkpoint(checkpoints[-1]) if checkpoints else None
    first = int(resumed[2]["stage"]) if resumed else 0
    for index, (name, stage) in enumerate(stages):
        if index < first:
            continue
        here = resumed if resumed is not None and index == first else None
        RUN_STAGE[stage.kind](run, index, name, stage, here, len(stages))
    if runtime.is_main:
        done = {**(read_manifest(folder) or {}), "finished": True}
        write_manifest(folder, done)
    runtime.barrier()
    return {"run": str(folder), "status": "finished", "seconds": round(time.perf_counter() - started, 1)}


def shared_tokens(recipe: Recipe, runtime: Runtime, reporter: Reporter) -> TokenFolder:
    """Tokenize on the main process (a no-op when done before), then open on all."""
    if runtime.is_main:
        prepare_tokens(recipe.data, recipe.token_encoder, on_progress=reporter.note)
    runtime.barrier()
    return prepare_tokens(recipe.data, recipe.token_encoder)


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
        }
        save_language_model(run.folder / stage.role, model, vocabulary, facts)
    finish_stage(run, index, {}, {})


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
        newest = dict(model.parts.items()) | dict(cast(torch.nn.Module, state.ema.module).named_children())
        averaged = LDLM(newest, None, run.recipe)
        averaged.latent_normalizer.load_state_dict(model.latent_normalizer.state_dict())
        averaged.eval().to(run.runtime.device)
        generator = Generator(averaged, run.recipe, run.tokens.vocabulary, histogram, None, options, run.runtime)
        texts = generator.batch(list(range(PREVIEW_TEXTS)), generator.lengths(), None)
        for part in model.parts.values():
            part.train()
        run.say(lambda: run.reporter.preview(texts[0].text))
        return {"sample_entropy": sum(entropy(text.token_ids) for text in texts) / len(texts)}

    can_sample = all(part in model.parts for part in ("denoiser", "latent_decoder", "token_decoder"))
    show = preview if can_sample and task.has_diffusion else None
    train(run, index, name, stage, task, window, resumed, total, kept, order, show)
    if run.runtime.is_main:
        probabilities = task.times.probabilities if task.has_diffusion and task.times.refreshes else None
        facts = {"plan": run.plan, "stage": name, "data_fingerprint": run.tokens.fingerprint}
        write_snapshot(run.folder, run.recipe, freeze(model), run.tokens.vocabulary, histogram, probabilities, facts)
    finish_stage(run, index, module_tensors(kept), {})


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
) -> StageState:
    """Run one stage's loop from its start or from the checkpoint `resumed`."""
    state = start_stage(task, stage)
    if resumed is not None and resumed[2]["step"] > 0:
        tensors, optimizer, saved = resumed
        load_module_tensors(kept, tensors)
        load_module_tensors({"ema": state.ema}, tensors)
        state.optimizer.load_state_dict(optimizer)
        task.load_state_dict(saved["task"])
        state.step = int(saved["step"])

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
        if run.runtime.is_main:
            tensors = module_tensors(kept) | module_tensors({"ema": state.ema})
            name = checkpoint_name(index, state.step)
            save_checkpoint(
                run.folder, name, tensors, state.optimizer.state_dict(), saved, run.recipe.training.keep_checkpoints
            )
        run.runtime.barrier()

    run.say(lambda: run.reporter.stage_started(name, index, total, stage.steps, state.step))
    started = time.perf_counter()
    hooks = Hooks(on_metrics, preview, on_save, {"stage": name})
    order = order or batch_order(run, stage, index, window)
    run_stage(state, stage, run.recipe.training, order, run.runtime, hooks)
    run.say(lambda: run.reporter.stage_finished(name, time.perf_counter() - started))
    return state


def finish_stage(run: Run, index: int, tensors: dict[str, torch.Tensor], task: dict[str, Any]) -> None:
    """Mark a stage as done: a checkpoint at step 0 of the next one."""
    if run.runtime.is_main:
        state = {"stage": index + 1, "step": 0, "task": task}
        keep = run.recipe.training.keep_checkpoints
        save_checkpoint(run.folder, checkpoint_name(index + 1, 0), tensors, None, state, keep)
    run.runtime.barrier()


def checkpoint_name(stage: int, step: int) -> str:
    return f"{stage:02d}-{step:08d}"


def entropy(ids: list[int]) -> float:
    """Unigram entropy of one text in nats."""
    counts = torch.unique(torch.tensor(ids), return_counts=True)[1].double()
    return float(torch.distributions.Categorical(counts / counts.sum()).entropy())


# ------------------------------------------------------------------ folder and files


class MetricsLog:
    """metrics.jsonl, one object a logged step, and TensorBoard."""

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self.file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"))

    def __call__(self, metrics: dict[str, Any]) -> None:
        self.file.write(json.dumps({key: rounded(value) for key, value in metrics.items()}) + "\n")
        self.file.flush()
        if self.writer is not None:
            for key, value in metrics.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{metrics['stage']}/{key}", value, metrics["step"])


def rounded(value: Any) -> Any:
    return float(f"{value:.9g}") if isinstance(value, float) else value


def read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    aside = folder / ".manifest.tmp"
    aside.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, folder / "manifest.json")


def new_manifest(run: Run) -> dict[str, Any]:
    """Every circumstance of a run that a reader of its numbers needs."""
    import accelerate
    import transformers

    return {
        "ldlm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "git_commit": git_commit(),
        "device": str(run.runtime.device),
        "threads": torch.get_num_threads(),
        "processes": run.runtime.num_processes,
        "precision": run.runtime.precision,
        "seed": run.recipe.seed,
        "plan": run.plan,
        "stages": list(run.recipe.plans[run.plan]),
        "data_fingerprint": run.tokens.fingerprint,
        "tokenizer_fingerprint": run.tokens.vocabulary.fingerprint,
        "recipe": run.recipe.model_dump(mode="json"),
        "finished": False,
    }


def git_commit() -> str | None:
    """Commit of the checkout that this code runs from, None outside of one."""
    try:
        here = Path(__file__).resolve().parent
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        return found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def refuse_changes(recipe: Recipe, plan: str, manifest: dict[str, Any], folder: Path) -> None:
    """RecipeError when a run folder holds a run of another recipe or plan."""
    changed = differing_fields(manifest["recipe"], recipe.model_dump(mode="json"))
    if manifest["plan"] != plan:
        changed.insert(0, f"plan ({manifest['plan']} there, {plan} now)")
    if changed:
        raise RecipeError(
            f"'{folder}' holds a run of a different recipe; it differs in {', '.join(changed)}: "
            "use --fresh for a new folder, --out for another one, or the same recipe to go on"
        )


def differing_fields(old: Any, new: Any, where: str = "") -> list[str]:
    """Dotted names of the fields in which two resolved recipes differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            field
            for key in sorted(old.keys() | new.keys())
            for field in differing_fields(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if old == new else [f"{where} ({old} there, {new} now)"]


def free_folder(folder: Path, runtime: Runtime) -> Path:
    """The first of folder, folder-2, folder-3 … that does not exist; the same on every process."""
    number, candidate = 1, folder
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    runtime.barrier()  # all have looked before one creates it
    return candidate
