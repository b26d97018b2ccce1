"""How much of held-out text survives tokens -> latents -> tokens, by length and by position; no diffusion involved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ldlm_cli.checkpoint import Snapshot
from ldlm_cli.data.batches import held_out_windows
from ldlm_cli.data.shards import TokenSplit
from ldlm_cli.errors import SnapshotError, UsageError
from ldlm_cli.generate import reconstruct
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.runtime import Runtime

BUCKET_TOKENS = 128
BATCH_TOKENS = 8192
SHORTEST_TOKENS = 16


def reconstruction_lengths(training_length: int, max_len: int) -> list[int]:
    """Lengths to measure: doubling from a quarter of the training length (at least 16) to `max_len`, tokens.

    The training length is always among them, and so is `max_len`.

    Raises:
        UsageError: max_len is below 4 tokens.
    """
    if max_len < 4:
        raise UsageError(f"The longest length to evaluate is {max_len} tokens; give --max-len at least 4.")
    lengths = {training_length, max_len}
    length = max(SHORTEST_TOKENS, training_length // 4)
    while length < max_len:
        lengths.add(length)
        length *= 2
    return sorted(lengths)


def measure_reconstruction(
    snapshot: Snapshot,
    split: TokenSplit,
    *,
    max_len: int,
    runtime: Runtime,
    plan_stages: list[str],
    on_progress: Callable[[str], None],
) -> dict[str, Any]:
    """The section `reconstruction` of the report.

    Args:
        snapshot: the model; all parts but the denoiser are used.
        split: held-out tokens.
        max_len: longest length, tokens; lengths beyond the training length are marked so.
        runtime: this process; gives device and precision.
        plan_stages: names of the stages that were trained; give the decoder noise.
        on_progress: told each length before it is measured.
    Returns:
        `rows` (one a length, or `refused` with the reason), the fidelity threshold, how far it holds, and a sentence.
    """
    recipe = snapshot.recipe
    training_length = recipe.data.max_len_tokens
    encoder = snapshot.model.token_encoder
    if encoder is None:
        raise SnapshotError(f"The snapshot of {snapshot.run} was opened without its token encoder.")
    noise_std = trained_decoder_noise(recipe, plan_stages)
    rows = []
    for length in reconstruction_lengths(training_length, max_len):
        row: dict[str, Any] = {"length": length, "beyond_training": length > training_length}
        on_progress(f"Reconstruction at {length} tokens")
        if encoder.max_tokens is not None and length > encoder.max_tokens:
            row["refused"] = f"the frozen token encoder takes at most {encoder.max_tokens} tokens"
        else:
            try:
                row |= _measure_length(snapshot, split, length, noise_std, runtime)
            except UsageError as error:  # no held-out text that long, or latents that cannot hold it
                row["refused"] = str(error)
        rows.append(row)
    threshold = recipe.evaluation.fidelity_threshold
    return {
        "training_length": training_length,
        "decoder_noise_std": noise_std,
        "bucket_tokens": BUCKET_TOKENS,
        "rows": rows,
        "fidelity_threshold": threshold,
        **fidelity_verdict(rows, training_length, threshold),
    }


def trained_decoder_noise(recipe: Recipe, stages: list[str]) -> float:
    """sigma_dec of the last of these stages that trained a decoder; 0 when none did."""
    latent = [recipe.stages[name] for name in stages if recipe.stages[name].kind == "latent"]
    return next((stage.decoder_noise_std for stage in reversed(latent) if "token_decoder" in stage.trains), 0.0)


def _measure_length(
    snapshot: Snapshot, split: TokenSplit, length: int, noise_std: float, runtime: Runtime
) -> dict[str, Any]:
    count = max(1, snapshot.recipe.evaluation.tokens_per_length // length)
    batch, kind = held_out_windows(split, length, count, snapshot.vocabulary.pad_id)
    clean = predict(snapshot, batch.token_ids, batch.mask, 0.0, runtime)
    measured = {
        "kind": kind,
        "num_texts": len(batch.token_ids),
        "num_tokens": int(batch.mask.sum()),
        "clean": accuracies(batch.token_ids, clean, batch.mask, snapshot.vocabulary.special_ids),
    }
    if noise_std > 0:
        noisy = predict(snapshot, batch.token_ids, batch.mask, noise_std, runtime)
        measured["noised"] = accuracies(batch.token_ids, noisy, batch.mask, snapshot.vocabulary.special_ids)
    return measured


def predict(
    snapshot: Snapshot, token_ids: np.ndarray, mask: np.ndarray, noise_std: float, runtime: Runtime
) -> np.ndarray:
    """Reconstructed ids [B, N] of texts [B, N], with noise of that std on the decoder's input."""
    rows = max(1, BATCH_TOKENS // token_ids.shape[1])
    parts = []
    for start in range(0, len(token_ids), rows):
        ids = torch.from_numpy(np.ascontiguousarray(token_ids[start : start + rows]))  # [B, N]
        real = torch.from_numpy(np.ascontiguousarray(mask[start : start + rows]))
        # The seed is the place of the batch, so that every batch gets noise of its own.
        parts.append(reconstruct(snapshot, ids, real, noise_std=noise_std, seed=start, runtime=runtime).numpy())
    return np.concatenate(parts)


def accuracies(
    token_ids: np.ndarray, predicted: np.ndarray, mask: np.ndarray, special_ids: frozenset[int]
) -> dict[str, Any]:
    """Token accuracy of a reconstruction, all in [0, 1].

    Args:
        token_ids, predicted: [B, N] int.
        mask: [B, N] bool, True = real token; nothing else counts.
        special_ids: ids left out of `accuracy_words`.
    Returns:
        `accuracy` of all real tokens, `accuracy_words` without special tokens, `exact_texts` (share of texts without a
        wrong token), and `by_position`: accuracy and token count of each stretch of 128 positions.
    """
    correct = (token_ids == predicted) & mask
    words = mask & ~np.isin(token_ids, list(special_ids))
    positions = np.broadcast_to(np.arange(token_ids.shape[1]), token_ids.shape) // BUCKET_TOKENS
    total = np.bincount(positions[mask])
    right = np.bincount(positions[correct], minlength=len(total))
    return {
        "accuracy": float(correct.sum() / mask.sum()),
        "accuracy_words": float(correct[words].mean()) if words.any() else None,
        "exact_texts": float((correct == mask).all(axis=1).mean()),
        "by_position": [
            {
                "from": bucket * BUCKET_TOKENS,
                "to": min((bucket + 1) * BUCKET_TOKENS, token_ids.shape[1]),
                "num_tokens": int(total[bucket]),
                "accuracy": float(right[bucket] / total[bucket]),
            }
            for bucket in range(len(total))
            if total[bucket]
        ],
    }


def fidelity_verdict(rows: list[dict[str, Any]], training_length: int, threshold: float) -> dict[str, Any]:
    """Up to which length the clean token accuracy stays at `threshold` times the one at the training length.

    Args:
        rows: rows of the section, in order of length.
        training_length: tokens.
        threshold: share in (0, 1].
    Returns:
        `fidelity_holds_to` (tokens; None when the training length itself was not measured) and `verdict`, a sentence.
    """
    base = next((row for row in rows if row["length"] == training_length and "clean" in row), None)
    if base is None:
        return {
            "fidelity_holds_to": None,
            "verdict": f"No verdict: the training length of {training_length} tokens could not be measured.",
        }
    base_accuracy = base["clean"]["accuracy"]
    holds_to, stop = training_length, None
    for row in rows:
        if row["length"] <= training_length:
            continue
        if "clean" not in row:
            stop = f"at {row['length']} it was not measured: {row['refused'].rstrip('.')}"
            break
        if row["clean"]["accuracy"] < threshold * base_accuracy:
            stop = f"at {row['length']} it is {row['clean']['accuracy']:.1%}"
            break
        holds_to = row["length"]
    start = f"Token accuracy is {base_accuracy:.1%} at the training length of {training_length} tokens"
    if rows[-1]["length"] <= training_length:
        return {"fidelity_holds_to": holds_to, "verdict": f"{start}; longer texts were not asked for."}
    sentence = f"{start} and at least {threshold:.0%} of that up to {holds_to} tokens"
    return {
        "fidelity_holds_to": holds_to,
        "verdict": f"{sentence}; {stop}." if stop else f"{sentence}, the longest asked for.",
    }
