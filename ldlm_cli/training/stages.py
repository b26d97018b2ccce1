"""The stages of a plan: what a language model stage and a latent stage build, train and leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from ldlm_cli.checkpoint import HasTensors, load_module_tensors, write_snapshot
from ldlm_cli.core.model import LDLM, build_parts
from ldlm_cli.core.token_encoder import build_token_encoder
from ldlm_cli.data.batches import Batch, BatchOrder, first_texts, length_histogram
from ldlm_cli.errors import RecipeError
from ldlm_cli.generate import Generator, SamplingOptions
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.recipe.stage_schema import StageRecipe
from ldlm_cli.training.compute import total_compute
from ldlm_cli.training.language_model import LanguageModelTask, build_language_model, save_language_model
from ldlm_cli.training.latent import LatentTask, init_seed, measure_statistics
from ldlm_cli.training.loop import StageState
from ldlm_cli.training.plan import plan_stages
from ldlm_cli.training.probe import Probe, unigram_entropy
from ldlm_cli.training.stage_loop import Run, batch_order, finish_stage, latent_modules, place_in_training, train

HELD_OUT_TOKENS = 32_768
PREVIEW_TEXTS, PREVIEW_STEPS = 8, 20


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


def run_latent(run: Run, index: int, name: str, stage: StageRecipe, resumed: tuple | None, total: int) -> None:
    """Train parts of the latent model; the last such stage of a plan leaves the snapshot."""
    window = run.recipe.data.max_len_tokens
    order = batch_order(run, stage, index, window)
    model = run.model or build_model(run)
    model.to(run.runtime.device)
    kept: dict[str, HasTensors] = dict(latent_modules(model))
    if resumed is not None and resumed[0]:  # empty right after a language model stage
        load_module_tensors(kept, resumed[0])
    elif run.model is None:
        measure_statistics(model, order, run.runtime, latents=False)
    run.model = model
    if stage.standardize_latents and (resumed is None or resumed[2]["step"] == 0):
        measure_statistics(model, order, run.runtime, latents=True)
    probe = Probe(model, run.recipe, stage, probe_texts(run, window), run.runtime)
    place = place_in_training(run.recipe, run.plan, index)
    task = LatentTask(model, run.recipe, stage, place, probe, run.runtime)
    histogram = length_histogram(run.tokens.split("train"), window, run.recipe.data.packing)

    def preview(state: StageState) -> dict[str, Any]:
        options = SamplingOptions(num=PREVIEW_TEXTS, steps=PREVIEW_STEPS, batch_size=PREVIEW_TEXTS)
        averaged = averaged_model(run.recipe, model, state).eval()
        generator = Generator(averaged, run.recipe, run.tokens.vocabulary, histogram, None, options, run.runtime)
        texts = generator.batch(list(range(PREVIEW_TEXTS)), generator.lengths(), None)
        task.train_mode()
        run.say(lambda: run.reporter.preview(texts[0].text))
        return {"sample_entropy": sum(unigram_entropy(torch.tensor(text.token_ids)) for text in texts) / len(texts)}

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

    kept |= {"probe": probe}
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


def probe_texts(run: Run, window: int) -> Batch:
    """The first held-out texts, for the probe."""
    valid = run.tokens.split("valid")
    return first_texts(valid, run.recipe.training.probe_texts, window, run.tokens.vocabulary.pad_id)


RUN_STAGE = {"language_model": run_language_model, "latent": run_latent}
