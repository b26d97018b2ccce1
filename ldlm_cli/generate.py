"""Snapshot to texts: noise, denoise all positions together, decode once. Serves sample, eval and previews."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldlm_cli.checkpoint import Snapshot
from ldlm_cli.core.draws import generator_at
from ldlm_cli.core.model import LDLM
from ldlm_cli.core.sampler import (
    EULER_LIMIT,
    EULER_T_MIN,
    SAMPLERS,
    euler_refusal,
    guided,
    largest_euler_step,
    time_grid,
)
from ldlm_cli.core.schedule import build_schedule
from ldlm_cli.data.vocabulary import Vocabulary
from ldlm_cli.errors import UsageError
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.runtime import Runtime

LENGTH_STREAM, NOISE_STREAM, TOKEN_STREAM, RECONSTRUCTION_STREAM = 11, 12, 13, 14


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample. steps = number of denoiser calls (twice as many when guidance is not 1)."""

    num: int = 8
    steps: int = 50
    sampler: str = "ddim"
    grid: str = "uniform"
    seed: int = 0
    length: int | None = None
    """Positions in tokens; None draws from the lengths of the training texts."""
    temperature: float = 1.0
    """Scales initial and injected noise."""
    churn: float | None = None
    """eta: 0 deterministic, 1 ancestral; None takes the sampler's own."""
    guidance: float = 1.0
    """Self-conditioning guidance weight."""
    token_temperature: float = 0.0
    """0 takes the most probable token, else tokens are sampled at this temperature."""
    batch_size: int = 64


@dataclass(frozen=True)
class GeneratedText:
    """A sampled text: ids up to and including the first EOS; `length` positions were denoised."""

    index: int
    text: str
    token_ids: list[int]
    length: int


class Generator:
    """Everything a sampling run needs, held together: model, recipe, vocabulary, lengths, grid."""

    def __init__(
        self,
        model: LDLM,
        recipe: Recipe,
        vocabulary: Vocabulary,
        length_histogram: NDArray[np.int64],
        probabilities: NDArray[np.float64] | None,
        options: SamplingOptions,
        runtime: Runtime,
    ) -> None:
        if options.sampler not in SAMPLERS:
            raise UsageError(f"unknown sampler '{options.sampler}'; known: {', '.join(SAMPLERS)}")
        if recipe.model.latents.kind == "slots" and options.length is not None:
            raise UsageError("--length needs positional latents: this model has a fixed number of learned slots")
        self.model, self.vocabulary, self.options, self.runtime = model, vocabulary, options, runtime
        self.histogram = length_histogram
        self.window = recipe.data.max_len_tokens
        self.fixed = recipe.model.latents.kind == "slots"
        self.schedule = build_schedule(recipe.diffusion.schedule, recipe.diffusion.schedule_scale)
        t_min = EULER_T_MIN if options.sampler == "euler" else 0.0

        def grid_of(steps: int) -> NDArray[np.float64]:
            return time_grid(options.grid, steps, probabilities, t_min)

        self.grid = grid_of(options.steps)
        if options.sampler == "euler" and largest_euler_step(self.schedule, self.grid) > EULER_LIMIT:
            raise euler_refusal(self.schedule, options.steps, grid_of)
        self.sampler, default_churn = SAMPLERS[options.sampler]
        self.churn = default_churn if options.churn is None else options.churn

    def lengths(self) -> list[int]:
        """Positions of each text: `length`, or drawn by (seed, index) from the histogram of training texts."""
        if self.options.length is not None:
            return [self.options.length] * self.options.num
        if self.fixed:
            return [self.window] * self.options.num
        cumulative = np.cumsum(self.histogram) / self.histogram.sum()
        uniform = [
            float(torch.rand(1, dtype=torch.float64, generator=self.rng(index, LENGTH_STREAM)))
            for index in range(self.options.num)
        ]
        return [int(length) for length in np.searchsorted(cumulative, uniform, side="right")]

    def rng(self, index: int, stream: int) -> torch.Generator:
        return generator_at(torch.device("cpu"), self.options.seed, stream, index)

    @torch.inference_mode()
    def batch(
        self, indices: list[int], lengths: list[int], on_step: Callable[[int, int, str], None] | None
    ) -> list[GeneratedText]:
        """Sample the texts of these indices together; what is drawn for a text depends on (seed, index) only."""
        device, layout = self.runtime.device, self.model.layout
        token_mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        latent_mask = layout.mask(token_mask)
        generators = [self.rng(index, NOISE_STREAM) for index in indices]

        def draw_noise() -> Tensor:
            noise = torch.zeros(*latent_mask.shape, self.model.latent_width)
            for row, generator in enumerate(generators):
                count = layout.count(lengths[row])
                noise[row, :count] = torch.randn(count, self.model.latent_width, generator=generator)
            return noise.to(device)

        token_mask, latent_mask = token_mask.to(device), latent_mask.to(device)

        def denoise(z_t: Tensor, t: Tensor, z_self: Tensor) -> Tensor:
            return self.model.denoise(z_t, t, z_self, latent_mask)

        def show(step: int, z_0_hat: Tensor) -> None:
            assert on_step is not None
            first = slice(0, 1)
            ids = self.model.decode(z_0_hat[first], latent_mask[first], token_mask[first]).argmax(-1)[0, : lengths[0]]
            on_step(step, self.options.steps, self.vocabulary.decode(ids.tolist()))

        with self.runtime.autocast():
            z_0 = self.sampler(
                guided(denoise, self.options.guidance),
                self.options.temperature * draw_noise(),
                self.schedule,
                self.grid,
                draw_noise,
                self.churn,
                self.options.temperature,
                None if on_step is None else show,
            )
            logits = self.model.decode(z_0, latent_mask, token_mask).float().cpu()
        return [self.finish(index, logits[row, : lengths[row]], lengths[row]) for row, index in enumerate(indices)]

    def finish(self, index: int, logits: Tensor, length: int) -> GeneratedText:
        """Logits [N, V] of one text to tokens, cut after the first EOS."""
        if self.options.token_temperature > 0:
            shares = torch.softmax(logits / self.options.token_temperature, dim=-1)
            ids = torch.multinomial(shares, 1, generator=self.rng(index, TOKEN_STREAM)).flatten().tolist()
        else:
            ids = logits.argmax(-1).tolist()
        eos = self.vocabulary.eos_id
        ids = ids[: ids.index(eos) + 1] if eos in ids else ids
        return GeneratedText(index, self.vocabulary.decode(ids), ids, length)

    def run(
        self,
        on_step: Callable[[int, int, str], None] | None = None,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> list[GeneratedText]:
        """All texts in index order, on every process. Batches are formed before they are shared among processes."""
        lengths = self.lengths()
        order = sorted(range(self.options.num), key=lambda index: (lengths[index], index))
        size = self.options.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        done: list[GeneratedText] = []
        for number, indices in enumerate(batches):
            if number % self.runtime.num_processes != self.runtime.rank:
                continue
            done += self.batch(indices, [lengths[index] for index in indices], on_step if number == 0 else None)
            if on_batch is not None:
                on_batch(min((number + 1) * size, len(order)), len(order))
        return sorted(self.runtime.gather_objects(done), key=lambda text: text.index)


def generate_texts(
    snapshot: Snapshot,
    options: SamplingOptions,
    *,
    runtime: Runtime | None = None,
    on_step: Callable[[int, int, str], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[GeneratedText]:
    """Sample `options.num` texts, ordered by index; identical for any number of processes.

    Args:
        on_step: called as (step, steps, text of the first row) after each denoiser call of the first batch.
        on_batch: called as (texts done, texts in all) after each batch of this process.
    """
    runtime = runtime or Runtime.start(snapshot.recipe.training.precision)
    generator = Generator(
        snapshot.model,
        snapshot.recipe,
        snapshot.vocabulary,
        snapshot.length_histogram,
        snapshot.probabilities,
        options,
        runtime,
    )
    return generator.run(on_step, on_batch)


@torch.inference_mode()
def reconstruct(
    snapshot: Snapshot,
    token_ids: Tensor,
    mask: Tensor,
    *,
    noise_std: float = 0.0,
    seed: int = 0,
    runtime: Runtime | None = None,
) -> Tensor:
    """Tokens to latents and back, [B, N] predicted ids, with noise of that std on the decoder's input.

    Args:
        token_ids, mask: [B, N] int64 and bool.
    Raises:
        UsageError: N exceeds what the frozen token encoder takes.
    """
    runtime = runtime or Runtime.start(snapshot.recipe.training.precision)
    model, device = snapshot.model, snapshot.device
    token_ids, mask = token_ids.to(device), mask.to(device)
    with runtime.autocast():
        z_0 = model.encode(model.hidden(token_ids, mask), mask)
        if noise_std > 0:
            generator = generator_at(torch.device("cpu"), seed, RECONSTRUCTION_STREAM)
            # sigma_dec is defined on the encoder's own scale; a sequential plan standardises z_0 after it.
            noise = noise_std * torch.randn(z_0.shape, generator=generator).to(device)
            z_0 = z_0 + noise / model.latent_normalizer.std
        return model.decode(z_0, model.layout.mask(mask), mask).argmax(-1).cpu()


def write_samples(path: Path, texts: list[GeneratedText], identity: dict[str, Any]) -> None:
    """Write one JSON object a line, in index order, with the identity of the run on each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({**asdict(text), **identity}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
