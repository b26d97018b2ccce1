"""What costs too much for every logged step: decoding of fixed held-out texts, and how fast the latent space drifts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ldlm_cli.core.draws import draw_rows
from ldlm_cli.core.model import LDLM
from ldlm_cli.core.process import add_noise
from ldlm_cli.core.schedule import build_schedule
from ldlm_cli.data.batches import Batch
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.recipe.stage_schema import StageRecipe
from ldlm_cli.runtime import Runtime
from ldlm_cli.training.language_model import rows_to_tensors

PROBE_STREAM = 4
TIMES = (0.3, 0.5, 0.7)


class Probe:
    """Measures the weights of the moment (not their average) on texts and noise that stay the same for the whole run.

    Source: what to watch, method.md section 10, items 8, 9 and 12.

    Args:
        batch: held-out texts [B, N].
    """

    def __init__(self, model: LDLM, recipe: Recipe, stage: StageRecipe, batch: Batch, runtime: Runtime) -> None:
        self.model, self.stage, self.runtime = model, stage, runtime
        self.every, self.lags = recipe.training.probe_every_steps, recipe.training.drift_lags_steps
        self.schedule = build_schedule(recipe.diffusion.schedule, recipe.diffusion.schedule_scale)
        self.ids, self.mask, _ = rows_to_tensors(batch, list(range(len(batch.mask))), runtime.device)
        self.latent_mask = model.layout.mask(self.mask)
        rows, latents = len(batch.mask), self.latent_mask.shape[1]
        address = (recipe.seed, PROBE_STREAM)
        self.noise = draw_rows(range(rows), latents, model.latent_width, runtime.device, *address).noise
        self.text_entropy = sum(unigram_entropy(self.ids[row][self.mask[row]]) for row in range(rows)) / rows
        self.h: Tensor | None = None
        self.past: dict[int, Tensor] = {}

    def due(self, step: int) -> bool:
        """Whether the probe is taken after `step` steps."""
        return self.every > 0 and step % self.every == 0

    @torch.no_grad()
    def measure(self, step: int) -> dict[str, float]:
        """Measure after `step` steps, and keep the latents for later.

        Returns:
            probe_accuracy, probe_accuracy_noised: token accuracy without and with sigma_dec; estimate_accuracy_t…: of
            the denoiser's own estimate of z_0 from time t (no self-conditioning), in stages that train it;
            text_variance_share, position_variance_share: see `variance_shares`; text_entropy: nats, of the probe's
            texts, beside sample_entropy; and, in stages that train the latent encoder, for each lag:
            drift_accuracy_…, of today's decoder on the latents of that many steps ago, and drift_distance_…, how far
            they have moved since, in standard deviations.
        """
        model = self.model.eval()
        with self.runtime.autocast():
            if self.h is None:
                self.h = model.hidden(self.ids, self.mask)
            z_0 = model.encode(self.h, self.mask).float()  # [B, L, D]
            noise = self.stage.decoder_noise_std * self.noise[1] / model.latent_normalizer.std
            found = {
                "probe_accuracy": self.accuracy(z_0),
                "probe_accuracy_noised": self.accuracy(z_0 + noise),
                "text_entropy": self.text_entropy,
                **variance_shares(z_0, self.latent_mask),
            }
            if self.stage.losses.get("diffusion", 0) > 0:
                for time in TIMES:
                    t = torch.full((len(z_0),), time, device=z_0.device)
                    z_t = add_noise(z_0, self.noise[0], t, self.schedule)
                    estimate = model.denoise(z_t, t, torch.zeros_like(z_t), self.latent_mask)
                    found[f"estimate_accuracy_t{time:g}"] = self.accuracy(estimate)
            if "latent_encoder" in self.stage.trains:
                found |= self.drift(step, z_0)
        return found

    def drift(self, step: int, z_0: Tensor) -> dict[str, float]:
        """Today's decoder on the latents of earlier steps; keeps today's and drops those no lag will ask for."""
        found, real = {}, z_0[self.latent_mask]
        for lag in self.lags:
            if step - lag in self.past:
                then = self.past[step - lag].to(z_0.device)
                moved = (real - then[self.latent_mask]).square().mean().sqrt()
                found[f"drift_accuracy_{lag}"] = self.accuracy(then)
                found[f"drift_distance_{lag}"] = float(moved / real.std(0).square().mean().sqrt().clamp(min=1e-6))
        self.past[step] = z_0.cpu()
        oldest = step - max(self.lags, default=0)
        self.past = {taken: latents for taken, latents in self.past.items() if taken > oldest}
        return found

    def accuracy(self, z: Tensor) -> float:
        """Share of the probe's real tokens that the decoder reads correctly from latents [B, L, D]."""
        right = self.model.decode(z, self.latent_mask, self.mask).argmax(-1) == self.ids
        return float(right[self.mask].float().mean())

    def state_dict(self) -> dict[str, Tensor]:
        """The latents kept, by step; tensors, which go into the checkpoint beside those of modules."""
        return {f"{step:08d}": latents for step, latents in self.past.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.past = {int(step): latents for step, latents in state.items()}


def variance_shares(z: Tensor, mask: Tensor) -> dict[str, float]:
    """How much of the variance of latents lies between texts, and how much between the positions of a text.

    Args:
        z: latents [B, L, D].
        mask: real latents [B, L] bool.
    Returns:
        text_variance_share: mean variance between texts at one position, over the total variance; near 0 when latents
        say where they are and not what is there. position_variance_share: mean variance within a text; near 0 when
        all latents of a text are the same. Both near 1 in a healthy space.
    """
    weight = mask[..., None].double()
    z = z.double() * weight

    def within(dimension: int) -> Tensor:
        """Sum of squares about the mean along a dimension, over its degrees of freedom."""
        count = weight.sum(dimension, keepdim=True)
        squares = (((z - z.sum(dimension, keepdim=True) / count.clamp(min=1)) * weight) ** 2).sum()
        return squares / (count - 1).clamp(min=0).sum().clamp(min=1)

    flat = z[mask]
    total = (flat - flat.mean(0)).square().sum() / max(len(flat) - 1, 1)
    shares = {"text_variance_share": within(0), "position_variance_share": within(1)}
    return {name: float(value / total.clamp(min=1e-12)) for name, value in shares.items()}


def unigram_entropy(ids: Tensor) -> float:
    """Unigram entropy of one text [N] in nats."""
    counts = torch.unique(ids, return_counts=True)[1].double()
    return float(torch.distributions.Categorical(counts / counts.sum()).entropy())
