"""The three losses of joint training and their gradient paths.

    h = token_encoder(tokens)                       no gradient
    z_0 = latent_encoder(h)
    L_h    = mean |h - latent_decoder(z_0 + sigma_dec eps')|^2      to latent encoder and latent decoder
    L_w    = CE(tokens, token_decoder(sg(h_hat)))                  to the token decoder only (or further: an ablation)
    L_diff = mean |z_g - denoiser(alpha z_g + sigma eps, t, sc)|^2  to the denoiser; times gamma to the latent encoder
with z_g = sg(z_0) + gamma (z_0 - sg(z_0)). Source: arXiv 2605.07933, Eq. (2), Sec. 4-5 as reconstructed (method.md 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldlm_cli.core.corruption import CorruptionDraws, corrupt_features, drop_latents
from ldlm_cli.core.draws import Draws
from ldlm_cli.core.gate import scale_gradient
from ldlm_cli.core.model import LDLM
from ldlm_cli.core.process import add_noise
from ldlm_cli.core.schedule import NoiseSchedule
from ldlm_cli.recipe.stage_schema import StageRecipe

TOKEN_INPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "token_decoder": lambda h_hat: h_hat.detach(),
    "latent_encoder": lambda h_hat: h_hat,
}
"""What the token decoder reads: h_hat behind the method's stop-gradient, or as it is."""


@dataclass(frozen=True)
class LatentLosses:
    """What one forward pass gives.

    total: scalar to differentiate, already divided by the global counts.
    sums: detached sums over this process's rows, by name, to be reduced and divided by their counts.
    text_diffusion: [B] detached mean diffusion loss of each text (nan-free; rows of weight 0 count nothing).
    z_0: [M, D] detached real latents (for the latent state), only when asked for.
    """

    total: Tensor
    sums: dict[str, Tensor]
    text_diffusion: Tensor | None
    z_0: Tensor | None


class LatentObjective(nn.Module):
    """The one module that is prepared for data-parallel training: all parts inside, one forward, one total loss."""

    def __init__(self, model: LDLM, stage: StageRecipe, schedule: NoiseSchedule, self_conditioning: float) -> None:
        super().__init__()
        self.model = model
        self.weights = {name: weight for name, weight in stage.losses.items() if weight > 0}
        self.decoder_noise_std = stage.decoder_noise_std
        self.corruption = stage.corruption
        self.token_input = TOKEN_INPUT[stage.token_loss_reaches]
        self.schedule, self.self_conditioning = schedule, self_conditioning

    def forward(
        self,
        token_ids: Tensor,
        token_mask: Tensor,
        row_weight: Tensor,
        t: Tensor,
        draws: Draws,
        gate: float,
        token_count: int,
        latent_count: int,
        keep_latents: bool = False,
        corruption: CorruptionDraws | None = None,
    ) -> LatentLosses:
        """Losses of one micro-batch.

        Args:
            token_ids, token_mask: [B, N] int64 and bool.
            row_weight: [B] float, 0 for rows that only fill up a process's share, else 1.
            t: diffusion times [B] in [0, 1].
            draws: see Draws; noise [2, B, L, D].
            gate: gamma in [0, 1].
            token_count, latent_count: unmasked tokens and latents of the whole optimizer step, over all processes.
            keep_latents: return z_0 for the latent state.
            corruption: of the encoder's input and the decoder's, in stages that have any.
        """
        h = self.model.hidden(token_ids, token_mask)
        latent_mask = self.model.layout.mask(token_mask)
        seen = h if corruption is None else corrupt_features(h, corruption, self.corruption)
        z_0 = self.model.encode(seen, token_mask).float()
        token_weight = token_mask * row_weight[:, None]
        latent_weight = latent_mask * row_weight[:, None]
        total = z_0.new_zeros(())
        sums: dict[str, Tensor] = {}
        text_diffusion = None
        if "hidden" in self.weights or "token" in self.weights:
            # sigma_dec is defined on the encoder's own scale; a sequential plan standardises z_0 after it.
            noise = self.decoder_noise_std * draws.noise[1] / self.model.latent_normalizer.std
            noised = z_0 + noise if self.decoder_noise_std > 0 else z_0
            if corruption is not None:
                noised = drop_latents(noised, corruption, self.corruption)
            h_hat = self.model.decode_hidden(noised, latent_mask, token_mask)
            if "hidden" in self.weights:
                per_token = (h_hat.float() - h).square().mean(-1)
                sums["hidden"] = (per_token * token_weight).sum()
                total = total + self.weights["hidden"] * sums["hidden"] / token_count
            if "token" in self.weights:
                logits = self.model.part("token_decoder")(self.token_input(h_hat), token_mask)
                cross_entropy = F.cross_entropy(logits.float().flatten(0, 1), token_ids.flatten(), reduction="none")
                sums["token"] = (cross_entropy.view_as(token_weight) * token_weight).sum()
                sums["correct"] = ((logits.argmax(-1) == token_ids) * token_weight).sum()
                total = total + self.weights["token"] * sums["token"] / token_count
        if "diffusion" in self.weights:
            per_latent = self.diffusion(scale_gradient(z_0, gate), t, latent_mask, draws)
            weighted = per_latent * latent_weight
            sums["diffusion"] = weighted.sum()
            text_diffusion = (weighted.sum(1) / latent_weight.sum(1).clamp(min=1)).detach()
            total = total + self.weights["diffusion"] * sums["diffusion"] / latent_count
        return LatentLosses(
            total=total,
            sums={name: value.detach() for name, value in sums.items()},
            text_diffusion=text_diffusion,
            z_0=z_0.detach()[latent_weight > 0] if keep_latents else None,
        )

    def diffusion(self, z_0: Tensor, t: Tensor, latent_mask: Tensor, draws: Draws) -> Tensor:
        """Mean squared error of the (self-conditioned) estimate at each latent, [B, L] float32.

        A text's own coin decides whether the denoiser first estimates z_0 without gradient and sees that estimate.
        """
        z_t = add_noise(z_0, draws.noise[0], t, self.schedule)
        z_self = torch.zeros_like(z_t)
        chosen = (draws.uniform[:, 1] < self.self_conditioning).nonzero().flatten().to(z_t.device)
        if len(chosen):
            with torch.no_grad():
                first = z_t.detach()[chosen]
                estimate = self.model.denoise(first, t[chosen], torch.zeros_like(first), latent_mask[chosen])
                z_self = z_self.index_copy(0, chosen, estimate.to(z_self.dtype))
        estimate = self.model.denoise(z_t, t, z_self, latent_mask)
        return (estimate - z_0).square().mean(-1)
