"""The stability guard: reads each logged row, and says once what goes wrong, why, and which field to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldlm_cli.recipe.schema import GuardRecipe
from ldlm_cli.recipe.stage_schema import StageRecipe

OPEN_GATE = 0.5


@dataclass(frozen=True)
class Alarm:
    """One cause, with a sentence for the user."""

    cause: str
    message: str


class Guard:
    """Judges one stage. Thresholds are fields of the recipe's section `guard`.

    Source: the ways in which joint training fails, method.md section 10, items 8, 9 and 12, and section 11.
    """

    def __init__(self, recipe: GuardRecipe, name: str, stage: StageRecipe) -> None:
        self.recipe, self.name, self.stage = recipe, name, stage
        self.raised: list[str] = []
        self.best_accuracy = 0.0
        self.last_preview: tuple[float, float] | None = None  # entropy, diffusion loss

    def check(self, row: Mapping[str, Any]) -> list[Alarm]:
        """Causes that this row of metrics.jsonl shows for the first time in this stage."""
        if self.recipe.action == "off" or "z_std" not in row:
            return []
        found = [self.degenerate(row), self.inflated(row), self.trivial(row), self.unread(row), self.repetitive(row)]
        self.best_accuracy = max(self.best_accuracy, row.get("token_accuracy", 0.0))
        if "sample_entropy" in row:
            self.last_preview = row["sample_entropy"], row["diffusion"]
        if row["step"] < self.recipe.grace_steps:
            return []
        new = [alarm for alarm in found if alarm is not None and alarm.cause not in self.raised]
        self.raised += [alarm.cause for alarm in new]
        return new

    def degenerate(self, row: Mapping[str, Any]) -> Alarm | None:
        """Latents that hardly differ from one another, in all or in most directions."""
        std, rank = row["z_std"], row["effective_rank"]
        if std >= self.recipe.min_std and rank >= self.recipe.min_effective_rank:
            return None
        what = f"centred std {std:.2f}, effective rank {rank:.1f}"
        return Alarm("collapse", f"latents have collapsed ({what}): {self.pressure(row)}")

    def inflated(self, row: Mapping[str, Any]) -> Alarm | None:
        """Latents so large that the decoder noise no longer limits them."""
        if row["z_std"] <= self.recipe.max_std:
            return None
        return Alarm(
            "inflation",
            f"latents have inflated (centred std {row['z_std']:.2f}), so that the decoder noise no longer limits them: "
            "set model.latents.encoder_norm_gain to false",
        )

    def trivial(self, row: Mapping[str, Any]) -> Alarm | None:
        """A denoiser that has nothing left to do, in a stage whose encoder it can teach."""
        if not self.joint(row) or row["diffusion"] >= self.recipe.min_diffusion_share * row["z_std"] ** 2:
            return None
        return Alarm(
            "trivial latents",
            f"the denoiser recovers latents almost perfectly (diffusion loss {row['diffusion']:.2g} of variance "
            f"{row['z_std'] ** 2:.2g}), which says that they hide from the noise: {self.pressure(row)}",
        )

    def unread(self, row: Mapping[str, Any]) -> Alarm | None:
        """A decoder that cannot read the latents while the denoiser already changes them, or can no longer."""
        accuracy = row.get("token_accuracy")
        if accuracy is None or not self.joint(row):
            return None
        lost = self.best_accuracy - accuracy
        if lost > self.recipe.max_accuracy_loss:
            what = f"token accuracy on noised latents has fallen from {self.best_accuracy:.2f} to {accuracy:.2f}"
        elif row["encoder_gate"] > OPEN_GATE and accuracy < self.recipe.min_accuracy:
            what = f"token accuracy on noised latents is {accuracy:.2f} with the gate at {row['encoder_gate']:.2f}"
        else:
            return self.drifted(row)
        return Alarm("unread latents", f"{what}, so the decoder loses its map: {self.pressure(row)}")

    def drifted(self, row: Mapping[str, Any]) -> Alarm | None:
        """Latents that move faster than the decoder follows."""
        lags = sorted(int(key.rpartition("_")[2]) for key in row if key.startswith("drift_accuracy_"))
        if not lags or row["probe_accuracy"] - row[f"drift_accuracy_{lags[0]}"] <= self.recipe.max_drift_loss:
            return None
        return Alarm(
            "drift",
            f"latents of {lags[0]} steps ago are read with accuracy {row[f'drift_accuracy_{lags[0]}']:.2f}, today's "
            f"with {row['probe_accuracy']:.2f}: lower stages.{self.name}.optimizer.learning_rate, or lengthen "
            f"stages.{self.name}.gate.warmup_steps",
        )

    def repetitive(self, row: Mapping[str, Any]) -> Alarm | None:
        """Samples that repeat themselves while the denoiser's loss keeps falling; judged in the second half."""
        if "sample_entropy" not in row or "text_entropy" not in row or self.last_preview is None:
            return None
        low = self.recipe.min_entropy_share * row["text_entropy"]
        entropy, diffusion = self.last_preview
        falling = row["diffusion"] < diffusion and max(entropy, row["sample_entropy"]) < low
        if not falling or 2 * row["step"] < self.stage.steps:
            return None
        return Alarm(
            "repetition",
            f"samples repeat themselves (entropy {row['sample_entropy']:.2f} nats, real text "
            f"{row['text_entropy']:.2f}) while the diffusion loss falls: {self.pressure(row)}",
        )

    def joint(self, row: Mapping[str, Any]) -> bool:
        """Whether the diffusion loss changes the encoder in this row."""
        return "latent_encoder" in self.stage.trains and row.get("encoder_gate", 0.0) > 0

    def pressure(self, row: Mapping[str, Any]) -> str:
        """What most likely lets the encoder please the denoiser at the decoder's cost, and the field to change."""
        stage, gate = f"stages.{self.name}", self.stage.gate
        if self.stage.losses.get("hidden", 0) == 0 and "latent_decoder" in self.stage.trains:
            return f"nothing asks for the hidden states; set {stage}.losses.hidden to 1"
        if self.stage.decoder_noise_std == 0:
            return f"the decoder sees no noise; set {stage}.decoder_noise_std (1.0 at width 128)"
        if gate.kind == "one" or (gate.kind == "sigmoid" and gate.warmup_steps == 0):
            return f"the diffusion loss reaches the encoder from the first step; set {stage}.gate.kind to wait"
        if self.joint(row):
            return (
                f"the diffusion loss reaches the encoder before it is learnt; lengthen {stage}.gate.warmup_steps, or "
                f"set {stage}.gate.kind to wait"
            )
        return f"lower {stage}.optimizer.learning_rate"

    def state_dict(self) -> dict[str, Any]:
        return {"raised": self.raised, "best_accuracy": self.best_accuracy, "last_preview": self.last_preview}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.raised, self.best_accuracy = list(state["raised"]), float(state["best_accuracy"])
        self.last_preview = None if state["last_preview"] is None else tuple(state["last_preview"])
