"""Training the latent model: draws, times, gate and logged quantities around the objective."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldlm_cli.core.corruption import draw_corruption
from ldlm_cli.core.draws import draw_rows, seed_at
from ldlm_cli.core.gate import Gate
from ldlm_cli.core.model import LDLM
from ldlm_cli.core.normalizer import Moments, latent_state
from ldlm_cli.core.objective import LatentObjective
from ldlm_cli.core.schedule import build_schedule
from ldlm_cli.core.timesteps import TIMESTEPS
from ldlm_cli.data.batches import Batch, BatchOrder
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.recipe.stage_schema import StageRecipe
from ldlm_cli.runtime import Runtime
from ldlm_cli.training.language_model import rows_to_tensors
from ldlm_cli.training.probe import Probe

NOISE_STREAM = 2
STATISTICS_TOKENS = 65_536
"""Tokens of the training split over which statistics of h (and of z_0) are measured."""
TIME_BINS = 5
"""Equal parts of the time axis by which the diffusion loss is logged."""


class LatentTask:
    """One stage of latent training. See training.loop.Task.

    Args:
        place: see training.stage_loop.place_in_training.
        probe: the held-out texts on which the costlier quantities are measured.
    """

    def __init__(
        self,
        model: LDLM,
        recipe: Recipe,
        stage: StageRecipe,
        place: tuple[int, int],
        probe: Probe,
        runtime: Runtime,
    ) -> None:
        for name, part in model.parts.items():
            part.requires_grad_(name in stage.trains)
        self.model, self.stage, self.probe, self.runtime = model, stage, probe, runtime
        self.train_mode()
        self.parts = nn.ModuleDict({name: model.part(name) for name in stage.trains})
        schedule = build_schedule(recipe.diffusion.schedule, recipe.diffusion.schedule_scale)
        share = recipe.diffusion.self_conditioning_share
        self.hidden_width = recipe.token_encoder.width
        self.module: LatentObjective = LatentObjective(model, stage, schedule, share).to(runtime.device)
        self.times, self.gate = TIMESTEPS[stage.times.kind](stage.times), Gate(stage.gate)
        began, self.steps_before = place
        self.address = (recipe.seed + stage.seed_offset, NOISE_STREAM, began)
        self.has_diffusion = stage.losses.get("diffusion", 0) > 0
        self.pending: list[tuple[Tensor, Tensor, Tensor]] = []  # t, loss, weight of texts since the last reduction
        self.pending_steps: list[int] = []
        self.sums: dict[str, Tensor] = {}
        self.counts = {"token": 0, "latent": 0}
        self.moments = Moments(model.latent_width)
        self.last_step = 0

    def train_mode(self) -> None:
        """Dropout in the parts that train, none in those that only serve."""
        for name, part in self.model.parts.items():
            part.train(name in self.stage.trains)

    def loss(self, prepared: nn.Module, batch: Batch, rows: list[int], step: int, measure: bool) -> Tensor:
        ids, mask, weight = rows_to_tensors(batch, rows, self.runtime.device)
        latents = self.model.layout.count(ids.shape[1])
        address = (*self.address, self.steps_before + step)
        draws = draw_rows(
            [max(row, 0) for row in rows], latents, self.model.latent_width, self.runtime.device, *address
        )
        corruption = None
        if self.stage.corruption.active:
            shapes = (ids.shape[1], self.hidden_width), (latents, self.model.latent_width)
            corruption = draw_corruption([max(row, 0) for row in rows], *shapes, self.runtime.device, *address)
        t = torch.from_numpy(self.times.times(draws.uniform[:, 0].numpy()))
        global_mask = torch.from_numpy(batch.mask)
        token_count, latent_count = int(global_mask.sum()), int(self.model.layout.mask(global_mask).sum())
        losses = prepared(
            ids,
            mask,
            weight,
            t.to(self.runtime.device),
            draws,
            self.gate.at(step),
            token_count,
            latent_count,
            measure,
            corruption,
        )
        self.last_step = step
        if 0 in rows:  # counted once a step: by the process and micro-batch that hold row 0
            self.counts["token"] += token_count
            self.counts["latent"] += latent_count
        for name, value in losses.sums.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), device=value.device)) + value.float()
        if losses.text_diffusion is not None:
            self.pending.append((t, losses.text_diffusion, weight))
            self.pending_steps.append(step)
        if losses.z_0 is not None:
            self.moments.add(losses.z_0)
        return losses.total

    def after_step(self, step: int) -> bool:
        if self.has_diffusion and (step + 1) % self.stage.times.refresh_steps == 0:
            self.absorb_times()
            self.times.maybe_refresh(step + 1)
        return False

    def absorb_times(self) -> None:
        """Give the adaptive times the losses by bin of each step since the last call, summed over processes."""
        if not self.pending:
            return
        bins, steps = self.stage.times.bins, sorted(set(self.pending_steps))
        table = np.zeros((len(steps), 2, bins))
        for step, (t, loss, weight) in zip(self.pending_steps, self.pending, strict=True):
            place = self.times.bin_of(t.numpy())
            held = weight.cpu().double().numpy()
            np.add.at(table[steps.index(step), 0], place, loss.cpu().double().numpy() * held)
            np.add.at(table[steps.index(step), 1], place, held)
        reduced = self.runtime.reduce_sum(torch.from_numpy(table).to(self.runtime.device)).cpu().numpy()
        for loss_sums, counts in reduced:
            self.times.observe(loss_sums, counts)
        self.pending.clear()
        self.pending_steps.clear()

    def metrics(self) -> dict[str, Any]:
        names = sorted(self.sums)
        local = [float(self.sums[name]) for name in names] + [float(self.counts["token"]), float(self.counts["latent"])]
        reduced = self.runtime.reduce_sum(torch.tensor(local, dtype=torch.float64, device=self.runtime.device))
        *sums, tokens, latents = reduced.tolist()
        found = {
            name: value / (latents if name == "diffusion" else tokens) for name, value in zip(names, sums, strict=True)
        }
        if "correct" in found:
            found["token_accuracy"] = found.pop("correct")
        found |= self.latent_metrics()
        if self.has_diffusion:
            found["encoder_gate"] = self.gate.at(self.last_step + 1)
            found["time_refreshes"] = float(self.times.refreshes)
            found |= self.loss_by_time()
        if self.probe.due(self.last_step + 1):
            found |= self.probe.measure(self.last_step + 1)
            self.train_mode()
        self.sums, self.counts = {}, {"token": 0, "latent": 0}
        if "token_accuracy" in found:
            self.gate.observe(self.last_step + 1, found["token_accuracy"])
        return found

    def loss_by_time(self) -> dict[str, float]:
        """Running mean of the diffusion loss in each fifth of the time axis, named by its middle, if any was seen."""
        self.absorb_times()
        mean = self.times.mean_losses()
        parts = np.array_split(mean, TIME_BINS)
        return {
            f"diffusion_t{(number + 0.5) / TIME_BINS:.1f}": float(np.nanmean(part))
            for number, part in enumerate(parts)
            if len(part) and not np.isnan(part).all()
        }

    def latent_metrics(self) -> dict[str, float]:
        """Latent std, effective rank and measured bits from the latents of the logged step, over all processes."""
        moments = self.moments
        flat = torch.cat([torch.tensor([moments.count], dtype=torch.float64), moments.total, moments.outer.flatten()])
        flat = self.runtime.reduce_sum(flat.to(self.runtime.device)).cpu()
        width = self.model.latent_width
        moments.count, moments.total = float(flat[0]), flat[1 : 1 + width]
        moments.outer = flat[1 + width :].view(width, width)
        self.moments = Moments(width)
        if not moments.count:
            return {}
        # On the encoder's own scale, on which sigma_dec is defined, also where the plan standardises latents.
        std = self.model.latent_normalizer.std.double().cpu()
        return latent_state(moments.covariance() * torch.outer(std, std), self.stage.decoder_noise_std)

    def state_dict(self) -> dict[str, Any]:
        self.absorb_times()
        return {"times": self.times.state_dict(), "gate": self.gate.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.times.load_state_dict(state["times"])
        self.gate.load_state_dict(state["gate"])


@torch.no_grad()
def measure_statistics(model: LDLM, order: BatchOrder, runtime: Runtime, *, latents: bool) -> None:
    """Measure mean and std per dimension on the training split and store them in the model.

    Of hidden states (`latents` False; position 0 is left out when no prefix token is used, since the first position
    of a causal LM has enormous norm) or of latents (True: a sequential plan
    standardises them before the diffusion stage).
    """
    encoder = model.token_encoder
    assert encoder is not None
    model.eval()
    moments, seen, step = Moments(model.latent_width if latents else encoder.width), 0, 0
    while seen < STATISTICS_TOKENS and step < order.steps_per_epoch:
        batch = order.batch_at(step)
        ids, mask, _ = rows_to_tensors(batch, list(range(len(batch.mask))), runtime.device)
        with runtime.autocast():
            if latents:
                moments.add(model.part("latent_encoder")(model.hidden(ids, mask), mask)[model.layout.mask(mask)])
            else:
                states, kept = encoder.hidden(ids, mask), mask.clone()
                if encoder.prefix_id is None:
                    kept[:, 0] = False
                moments.add(states[kept])
        seen, step = seen + int(mask.sum()), step + 1
    target = model.latent_normalizer if latents else encoder.normalizer
    target.set_moments(moments)


def init_seed(recipe: Recipe) -> int:
    """Seed of the fresh weights of the latent model."""
    return seed_at(recipe.seed, 0)
