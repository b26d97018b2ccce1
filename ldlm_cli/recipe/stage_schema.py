"""What a recipe may say of a stage of training; see recipe.schema."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Part = Literal["latent_encoder", "denoiser", "latent_decoder", "token_decoder"]
Loss = Literal["diffusion", "hidden", "token"]


class Section(BaseModel):
    """A recipe section: unknown fields are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class GateRecipe(Section):
    """How much of the diffusion loss's gradient reaches the latent encoder (gamma)."""

    kind: Literal["sigmoid", "wait", "one", "zero"] = "sigmoid"
    """`sigmoid`: rises over `warmup_steps`; `wait`: held at the minimum until token accuracy on noised latents
    reaches `wait_accuracy`, then the same rise; `one`, `zero`: constant."""
    warmup_steps: int = Field(1000, ge=0)
    minimum: float = Field(0.001, ge=0, le=1)
    sharpness: float = Field(10.0, gt=0)
    midpoint: float = Field(0.8, gt=0, lt=1)
    wait_accuracy: float = Field(0.9, gt=0, le=1)


class TimesRecipe(Section):
    """How diffusion times are drawn in training."""

    kind: Literal["adaptive", "uniform"] = "adaptive"
    bins: int = Field(50, ge=2)
    decay: float = Field(0.98, gt=0, lt=1)
    refresh_steps: int = Field(50, ge=1)
    uniform_floor: float = Field(0.05, ge=0, le=1)
    """Share of draws that stay uniform over the bins."""


class CorruptionRecipe(Section):
    """What spoils the autoencoder's input and latents in training (COSMOS); all 0: nothing does."""

    masked_share: float = Field(0.0, ge=0, lt=1)
    """Half of the texts: share of the features of h that are set to 0 before the latent encoder."""
    noise_std: float = Field(0.0, ge=0, le=1)
    """The other half: h becomes sqrt(1 - std^2) h + std eps."""
    latent_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the entries of z_0 that are set to 0 before the latent decoder."""

    @property
    def active(self) -> bool:
        return max(self.masked_share, self.noise_std, self.latent_dropout) > 0


class OptimizerRecipe(Section):
    """How weights follow their gradients, and the learning rate as a function of the step."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`adamw`: the paper's; `muon`: orthogonalised momentum for the matrices inside blocks, AdamW for the rest. On the
    built-in stories it halves the generative perplexity at equal steps."""
    matrix_learning_rate: float = Field(5e-3, gt=0)
    """Peak rate of the matrices under Muon, in AdamW's units (root mean square of a step); same shape over steps."""
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(50, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    final_share: float = Field(0.05, ge=0, le=1)
    """Learning rate at the last step, as a share of the peak (cosine)."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.98, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    """Largest gradient norm of each part, clipped part by part."""


class StageRecipe(Section):
    """One training phase."""

    kind: Literal["language_model", "latent"] = "latent"
    steps: int = Field(1000, ge=1)
    """Optimizer steps; in a file also a share of another stage's, {of: joint, from: 0.0, to: 0.5}. There a stage may
    also say `extends: <stage>` and only what it changes. See recipe/resolve.py."""
    batch_tokens: int = Field(4096, ge=1)
    """Tokens of the global batch of one optimizer step, padding included."""
    micro_batches: int = Field(1, ge=1)
    """Gradient accumulation: the global batch is cut into this many pieces."""
    optimizer: OptimizerRecipe = OptimizerRecipe()
    ema_decay: float = Field(0.998, ge=0, lt=1)
    """Decay of the weight average, warmed up as (1 + step) / (10 + step)."""
    # language_model
    role: Literal["token_encoder", "judge", "baseline"] = "token_encoder"
    """What the trained language model is for; decides its shape and where it is stored."""
    seed_offset: int = Field(0, ge=0)
    """Added to the run's seed: the judge gets other weights and another data order than the token encoder."""
    eval_every_steps: int = Field(100, ge=1)
    patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations in a row without the held-out loss falling by 0.2 %; null never stops early."""
    # latent
    standardize_latents: bool = False
    """Measure mean and std of z_0 before this stage and standardise it for the denoiser (sequential plans)."""
    trains: tuple[Part, ...] = ("latent_encoder", "denoiser", "latent_decoder", "token_decoder")
    losses: dict[Loss, float] = {"diffusion": 1.0, "hidden": 1.0, "token": 1.0}
    """Weights; a loss that is absent or 0 is not computed."""
    token_loss_reaches: Literal["token_decoder", "latent_encoder"] = "token_decoder"
    """How far back the token loss trains: the token decoder only (the method), or through the latent decoder to the
    latent encoder as well."""
    gate: GateRecipe = GateRecipe()
    times: TimesRecipe = TimesRecipe()
    decoder_noise_std: float = Field(1.65, ge=0)
    """sigma_dec: standard deviation of the noise added to the latent decoder's input in training."""
    corruption: CorruptionRecipe = CorruptionRecipe()

    @model_validator(mode="after")
    def _weights(self) -> StageRecipe:
        if self.kind == "latent" and not any(weight > 0 for weight in self.losses.values()):
            raise ValueError("at least one loss needs a weight above 0")
        if any(weight < 0 for weight in self.losses.values()):
            raise ValueError("loss weights may not be negative")
        return self
