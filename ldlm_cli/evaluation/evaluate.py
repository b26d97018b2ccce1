"""A run in, its report out: every number of `eval/report.json`, section by section."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ldlm_cli import __version__
from ldlm_cli.checkpoint import Snapshot, load_snapshot
from ldlm_cli.data.shards import TokenFolder, prepare_tokens
from ldlm_cli.errors import SnapshotError, UsageError
from ldlm_cli.evaluation import metrics
from ldlm_cli.evaluation.controls import control_texts
from ldlm_cli.evaluation.generation import (
    MEMORISED_DEFINITION,
    TextSet,
    TrainingDocuments,
    as_text_set,
    generation_section,
    matching_texts,
    measure_texts,
)
from ldlm_cli.evaluation.judge import Judge
from ldlm_cli.evaluation.own_estimates import (
    DEFINITION,
    held_out_texts,
    measure_latent_state,
    measure_own_estimates,
)
from ldlm_cli.evaluation.reconstruction import measure_reconstruction, reconstruction_lengths, trained_decoder_noise
from ldlm_cli.generate import GeneratedText, SamplingOptions, generate_texts
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.runtime import Runtime

STORIES = "builtin:stories"
# Controls differ from real text by far more than the spread at this count, and five rows of them must stay cheap.
MAX_CONTROL_TEXTS = 250


def evaluate(
    run: Path,
    *,
    max_len: int | None = None,
    options: SamplingOptions | None = None,
    num: int | None = None,
    judge: str | None = None,
    runtime: Runtime,
    write: Callable[[dict[str, Any], Path], None],
    on_progress: Callable[[str], None],
) -> dict[str, Any]:
    """Measure a run: reconstruction by length, generated texts beside held-out text and naive controls.

    Every process must call this; the main process measures and writes.

    Args:
        run: a run folder with a snapshot.
        max_len: longest length to reconstruct, tokens; the training length if None.
        options: how to sample; the recipe's sampling section and seed if None. Its `num` is not read.
        num: texts to generate; the recipe's `evaluation.num_samples` if None.
        judge: as for `Judge.open`; the recipe's `judge.source` if None.
        runtime: this process.
        write: called once, by the main process, with the report and the folder `run/eval`
            (`report.files.write_evaluation`; handed in because this room may not import `report`).
        on_progress: told what is being done, one line each time.
    Returns:
        The report; empty on every process but the main one.
    Raises:
        UsageError: a setting out of range, or no usable judge.
        SnapshotError: the run has no usable snapshot, or the data has changed since.
    """
    snapshot = load_snapshot(run, device=runtime.device)
    recipe = snapshot.recipe
    options = sampling_options(recipe, options, num)
    longest = recipe.data.max_len_tokens if max_len is None else max_len
    reconstruction_lengths(recipe.data.max_len_tokens, longest)  # refuses a bad max_len before minutes of work
    # The judge is opened on all processes, so that a missing one ends all of them instead of leaving some waiting.
    opened = Judge.open(
        judge or recipe.judge.source, run=run, recipe=recipe, device=runtime.device, precision=runtime.precision
    )
    tokens = open_data(run, recipe, snapshot.manifest["data_fingerprint"], runtime, on_progress)
    on_progress(f"Generating {options.num} texts in {options.steps} steps")
    generated = generate_texts(
        snapshot,
        options,
        runtime=runtime,
        on_batch=lambda done, total: on_progress(f"Generated {done} of {total} texts"),
    )
    if not runtime.is_main:
        return {}
    report = {"identity": identity_section(snapshot, tokens, opened, options, runtime)}
    report["reconstruction"] = measure_reconstruction(
        snapshot,
        tokens.split("test"),
        max_len=longest,
        runtime=runtime,
        plan_stages=trained_stages(snapshot),
        on_progress=on_progress,
    )
    on_progress("Decoding the denoiser's own estimates")
    batch, kind = held_out_texts(snapshot, tokens.split("test"))
    about = {"length": recipe.data.max_len_tokens, "kind": kind}
    estimates = measure_own_estimates(snapshot, batch, runtime=runtime, seed=options.seed)
    report["own_estimates"] = about | estimates
    noise_std = trained_decoder_noise(recipe, trained_stages(snapshot))
    report["latent_state"] = about | measure_latent_state(snapshot, batch, runtime=runtime, noise_std=noise_std)[0]
    report |= text_sections(
        generated, recipe=recipe, tokens=tokens, judge=opened, seed=options.seed, on_progress=on_progress
    )
    write(report, run / "eval")
    return report


def sampling_options(recipe: Recipe, options: SamplingOptions | None, num: int | None) -> SamplingOptions:
    """The options to sample with: those given, or the recipe's; the count from `num` or the recipe.

    Raises:
        UsageError: num is below 1.
    """
    if num is not None and num < 1:
        raise UsageError(f"The number of texts to generate is {num}; give --num at least 1.")
    if options is None:
        options = SamplingOptions(seed=recipe.seed, **recipe.sampling.model_dump())
    return replace(options, num=recipe.evaluation.num_samples if num is None else num)


def trained_stages(snapshot: Snapshot) -> list[str]:
    """Names of the stages of the plan that the run followed."""
    plan = snapshot.manifest.get("plan")
    if plan not in snapshot.recipe.plans:
        raise SnapshotError(f"The manifest of {snapshot.run} names plan '{plan}', which its recipe does not define.")
    return list(snapshot.recipe.plans[plan])


def text_sections(
    generated: Sequence[GeneratedText],
    *,
    recipe: Recipe,
    tokens: TokenFolder,
    judge: Judge,
    seed: int,
    on_progress: Callable[[str], None],
) -> dict[str, Any]:
    """The sections `generation` and `controls`; all rows are measured by the same function.

    Args:
        generated: the texts of the model, in order of index.
        recipe, tokens, judge: of the run.
        seed: of the choice of held-out texts and of the controls.
        on_progress: told each row before it is measured.
    """
    vocabulary = tokens.vocabulary
    training = TrainingDocuments(tokens.split("train"))
    window = recipe.data.max_len_tokens

    def measure(texts: TextSet) -> dict[str, Any]:
        return measure_texts(
            texts, judge=judge, vocabulary=vocabulary, training=training, stories=recipe.data.source == STORIES
        )

    lengths = [len(ids) for ids in as_text_set(generated, vocabulary.eos_id).token_ids]
    reference, kind = matching_texts(
        tokens.split("test"),
        vocabulary,
        lengths[: recipe.evaluation.num_texts],
        window_tokens=window,
        packed=recipe.data.packing == "pack",
        seed=seed,
    )
    on_progress("Scoring held-out texts")
    rows = {"held_out_text": {"kind": kind, **measure(reference)}}
    naive = control_texts(
        reference.first(MAX_CONTROL_TEXTS), tokens.split("train"), vocabulary, window_tokens=window, seed=seed
    )
    for name, texts in naive.items():
        on_progress(f"Scoring the control {name}")
        rows[name] = measure(texts)
    on_progress("Scoring generated texts")
    generation = generation_section(generated, rows["held_out_text"], measure, vocabulary.eos_id)
    return {"generation": generation | judge_baseline(judge, rows["held_out_text"]), "controls": rows}


def judge_baseline(judge: Judge, held_out: dict[str, Any]) -> dict[str, Any]:
    """The judge's own nats per token on held-out text: what its training measured, else the held-out row's."""
    own = judge.held_out_nats_per_token
    if own is not None:
        return {
            "judge_held_out_nats_per_token": own,
            "judge_held_out_measured_on": "held-out documents of its training",
        }
    return {
        "judge_held_out_nats_per_token": held_out["nats_per_judge_token"],
        "judge_held_out_measured_on": "the held-out texts of this report",
    }


def identity_section(
    snapshot: Snapshot, tokens: TokenFolder, judge: Judge, options: SamplingOptions, runtime: Runtime
) -> dict[str, Any]:
    """Every circumstance of the measurement, so that two reports can be told apart or put side by side."""
    import transformers

    recipe = snapshot.recipe
    return {
        "ldlm_version": __version__,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "python_version": platform.python_version(),
        "run": snapshot.run.name,
        "recipe": recipe.name,
        "plan": snapshot.manifest.get("plan"),
        "snapshot_hash": snapshot.hash,
        "data_source": recipe.data.source,
        "data_fingerprint": tokens.fingerprint,
        "data_is_synthetic": recipe.data.source.startswith("builtin:"),
        "vocabulary_fingerprint": snapshot.vocabulary.fingerprint,
        "held_out_split": "test",
        "training_length": recipe.data.max_len_tokens,
        "training_seed": recipe.seed,
        "judge": judge.identity(),
        "sampling": asdict(options),
        "precision": runtime.precision,
        "device": str(runtime.device),
        "num_processes": runtime.num_processes,
        "definitions": {
            "entropy_nats": metrics.ENTROPY_DEFINITION,
            "generative_perplexity": metrics.PERPLEXITY_DEFINITION,
            "trimmed_mean_perplexity": metrics.TRIMMED_PERPLEXITY_DEFINITION,
            "memorised_share": MEMORISED_DEFINITION,
            "own_estimates": DEFINITION,
        },
    }


def open_data(
    run: Path, recipe: Recipe, fingerprint: str, runtime: Runtime, on_progress: Callable[[str], None]
) -> TokenFolder:
    """The tokens that a run was trained on, tokenized again where they are missing.

    Raises:
        SnapshotError: they do not have the fingerprint that the run has recorded.
    """
    # The main process prepares missing tokens, the others wait and then find them.
    if not runtime.is_main:
        runtime.barrier()
    tokens = prepare_tokens(recipe.data, recipe.token_encoder, on_progress=on_progress)
    if runtime.is_main:
        runtime.barrier()
    if tokens.fingerprint != fingerprint:
        # Other tokens mean another split: texts that the model was trained on could pass as held out.
        raise SnapshotError(
            f"The tokens in {tokens.path} are not those that {run} was trained on: evaluate where its data "
            f"lies unchanged, or train again."
        )
    return tokens
