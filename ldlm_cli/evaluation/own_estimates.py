"""What the decoder makes of the denoiser's own estimates, and the state of held-out latents.

In sampling the decoder never sees an encoded text, only what the denoiser believes; a decoder that reads the one and
not the other is the usual failure of a latent space that was trained by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldlm_cli.checkpoint import Snapshot
from ldlm_cli.core.draws import generator_at
from ldlm_cli.core.normalizer import Moments, latent_state
from ldlm_cli.core.process import add_noise
from ldlm_cli.core.schedule import build_schedule
from ldlm_cli.data.batches import Batch, first_texts, held_out_windows
from ldlm_cli.data.shards import TokenSplit
from ldlm_cli.runtime import Runtime

TIMES = (0.3, 0.5, 0.7)
ESTIMATE_STREAM = 15
BATCH_TOKENS = 8192
DEFINITION = (
    "share of real tokens that the decoder reads correctly from the denoiser's estimate of a held-out text noised to "
    "time t; 'first' is the estimate without self-conditioning, 'second' the one that has seen the first"
)


def held_out_texts(snapshot: Snapshot, split: TokenSplit, count: int | None = None) -> tuple[Batch, str]:
    """Held-out texts as in training and their kind; without `count` as many as `evaluation.tokens_per_length` gives.

    With packing "document" whole texts (cut at the training length), not windows of exactly that length, which only
    longer texts than those that the model writes could fill.
    """
    data, pad_id = snapshot.recipe.data, snapshot.vocabulary.pad_id
    count = count or max(1, snapshot.recipe.evaluation.tokens_per_length // data.max_len_tokens)
    if data.packing == "pack":
        return held_out_windows(split, data.max_len_tokens, count, pad_id)
    return first_texts(split, count, data.max_len_tokens, pad_id), "text"


def measure_own_estimates(
    snapshot: Snapshot, batch: Batch, *, runtime: Runtime, seed: int = 0, times: Sequence[float] = TIMES
) -> dict[str, Any]:
    """The section `own_estimates`: token accuracy of the decoder on the denoiser's own estimates.

    Args:
        snapshot: the model, all parts.
        batch: held-out texts [B, N].
        runtime: this process; gives device and precision.
        seed: of the noise, which belongs to (seed, text) and is the same at all times.
        times: diffusion times in [0, 1]; 0 = data, 1 = noise.
    Returns:
        `rows`, one a time: t, log_snr, and accuracies in [0, 1]: `first` without self-conditioning, `second` with one
        self-conditioning pass; `clean`, the accuracy on the encoded latents themselves.
    """
    schedule = build_schedule(snapshot.recipe.diffusion.schedule, snapshot.recipe.diffusion.schedule_scale)
    model, layout, device = snapshot.model, snapshot.model.layout, snapshot.device
    correct = np.zeros((len(times), 2))
    clean = 0
    for start, ids, mask in batches(batch, device):
        latent_mask = layout.mask(mask)

        def read(z: Tensor, ids: Tensor = ids, mask: Tensor = mask, latent_mask: Tensor = latent_mask) -> int:
            return int(((model.decode(z, latent_mask, mask).argmax(-1) == ids) & mask).sum())

        with torch.inference_mode(), runtime.autocast():
            z_0 = model.encode(model.hidden(ids, mask), mask).float()  # [B, L, D], standardised in a sequential plan
            clean += read(z_0)
            sources = [generator_at(torch.device("cpu"), seed, ESTIMATE_STREAM, start + row) for row in range(len(ids))]
            eps = torch.stack([torch.randn(z_0.shape[1:], generator=source) for source in sources]).to(device)
            for place, time in enumerate(times):
                t = torch.full((len(ids),), float(time), device=device)
                z_t = add_noise(z_0, eps, t, schedule)
                first = model.denoise(z_t, t, torch.zeros_like(z_t), latent_mask)
                correct[place] += read(first), read(model.denoise(z_t, t, first, latent_mask))
    tokens = int(batch.mask.sum())
    rows = []
    for place, time in enumerate(times):
        alpha, sigma = schedule.alpha_sigma(torch.tensor(float(time)))
        log_snr = float(2 * (alpha / sigma).log()) if sigma > 0 else float("inf")
        first_share, second_share = (correct[place] / tokens).tolist()
        rows.append({"t": float(time), "log_snr": log_snr, "first": first_share, "second": second_share})
    return {"num_texts": len(batch.mask), "num_tokens": tokens, "clean": clean / tokens, "rows": rows}


def measure_latent_state(
    snapshot: Snapshot, batch: Batch, *, runtime: Runtime, noise_std: float
) -> tuple[dict[str, Any], Tensor]:
    """The section `latent_state`: std, effective rank and measured bits of held-out latents.

    On the encoder's own scale, on which sigma_dec is defined; where a plan standardises latents for the denoiser,
    `standardised` holds std and effective rank of what the denoiser sees.

    Args:
        noise_std: sigma_dec with which the decoder was trained; without noise there are no bits.
    Returns:
        The section, and the eigenvalues of the latents' covariance [D], float64 on the CPU.
    """
    model = snapshot.model
    own, seen = Moments(model.latent_width), Moments(model.latent_width)
    for _, ids, mask in batches(batch, snapshot.device):
        with torch.inference_mode(), runtime.autocast():
            z_0 = model.encode(model.hidden(ids, mask), mask).float()
            real = z_0[model.layout.mask(mask)]
        seen.add(real)
        own.add(model.latent_normalizer.invert(real))
    covariance = own.covariance()
    section: dict[str, Any] = {
        "num_texts": len(batch.mask),
        "num_latents": int(own.count),
        "decoder_noise_std": noise_std,
    }
    section |= latent_state(covariance, noise_std)
    if not torch.equal(model.latent_normalizer.std, torch.ones_like(model.latent_normalizer.std)):
        section["standardised"] = latent_state(seen.covariance(), 0.0)
    return section, torch.linalg.eigvalsh(covariance).clamp(min=0)


def batches(batch: Batch, device: torch.device) -> list[tuple[int, Tensor, Tensor]]:
    """Held-out texts in pieces that fit the memory: number of the first, ids [B, N], mask [B, N]."""
    rows = max(1, BATCH_TOKENS // batch.token_ids.shape[1])
    return [
        (
            start,
            torch.from_numpy(np.ascontiguousarray(batch.token_ids[start : start + rows])).to(device),
            torch.from_numpy(np.ascontiguousarray(batch.mask[start : start + rows])).to(device),
        )
        for start in range(0, len(batch.token_ids), rows)
    ]
