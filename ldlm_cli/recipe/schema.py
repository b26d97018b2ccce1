"""What a recipe may say: one frozen pydantic model per section; default, unit and range per field. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ldlm_cli.recipe.stage_schema import Section, StageRecipe


class DataRecipe(Section):
    """Where the text comes from and how it becomes tokens."""

    source: str = Field("builtin:stories", min_length=1)
    """`builtin:stories` (synthetic), a file, folder or glob of .txt/.jsonl (also .gz), or `hub:owner/name[:config]`."""
    text_field: str = "text"
    """Field of a .jsonl object or hub row that holds the text."""
    text_unit: Literal["line", "paragraph", "file"] = "paragraph"
    """What one document is in a .txt file; paragraphs are separated by blank lines."""
    packing: Literal["document", "pack"] = "document"
    """`document`: one text a row, EOS, padding masked; `pack`: texts joined by EOS and cut into full rows."""
    max_len_tokens: int = Field(64, ge=4)
    """Training length of the latent model in tokens, EOS included; longer texts are cropped at random places."""
    context_tokens: int = Field(1024, ge=4)
    """Length to which the language model and the judge are trained, tokens."""
    tokenizer: Literal["bpe", "encoder"] = "bpe"
    """`bpe`: byte-level BPE trained on the training split; `encoder`: the pretrained token encoder's own."""
    vocab_size: int = Field(2048, ge=260)
    """Entries of the trained BPE vocabulary, special tokens included."""
    valid_share: float = Field(0.03, gt=0, lt=0.5)
    test_share: float = Field(0.03, gt=0, lt=0.5)
    """Shares of the documents held out, by document."""
    deduplicate: bool = True
    """Drop exact duplicates (after trimming white space), across splits."""
    num_documents: int = Field(40_000, ge=1)
    """Built-in corpus only: documents to generate."""
    long_share: float = Field(0.04, ge=0, le=1)
    """Built-in corpus only: share of documents in the long form (over 1,024 tokens)."""
    max_documents: int | None = Field(None, ge=1)
    """Read at most this many documents of a local or hub source."""
    seed: int = Field(0, ge=0)
    """Seeds the built-in corpus and the split; independent of the run's seed."""
    cache: str = "runs/data"
    """Folder in which token shards are kept, one folder per fingerprint."""


class TokenEncoderRecipe(Section):
    """The frozen language model whose hidden states are reconstructed."""

    source: str = Field("trained", min_length=1)
    """`trained` (by a language_model stage of this plan), or a hub id or local folder of any causal or masked LM."""
    revision: str | None = None
    layer: int = -2
    """Index into the list of hidden states (embeddings first, then one per block); -3 in the paper."""
    prefix: bool = True
    """Put the tokenizer's start token (CLS, BOS or EOS) before the text and drop its hidden state."""
    width: int = Field(256, ge=8)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    vocab_size: int | None = Field(None, ge=1)
    """Width, blocks, heads, vocabulary: built so when trained, demanded when loaded (vocabulary: null accepts any)."""
    whiten: bool = False
    """Also level the spectrum of the standardised states. Small language models put most variance into few
    directions and little into which name or object a token is; levelled, the hidden loss asks for both."""
    whitening_floor: float = Field(0.1, gt=0)
    """Variance, in units of a standardised dimension's, below which directions are levelled less and less. The higher,
    the less detail of the states is asked for: text is easier to denoise and, in the end, no longer fully decodable."""
    clip_std: float = Field(10.0, gt=0)
    """Standardised hidden states are clipped at this many standard deviations."""


class JudgeRecipe(Section):
    """The language model that scores generated text; never the token encoder itself."""

    source: str = Field("trained", min_length=1)
    """`trained` (by a language_model stage with role judge), a hub id, a folder, or a train-lm run."""
    revision: str | None = None
    width: int = Field(256, ge=8)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)


class LatentRecipe(Section):
    """Shape of the latent space."""

    width: int = Field(256, ge=4)
    kind: Literal["positional", "slots", "features"] = "positional"
    """`positional`: one latent per `stride` tokens, placed by rotary position; `slots`: learned slots (the paper's);
    `features`: the standardised hidden states themselves, no latent encoder or decoder."""
    stride: int = Field(1, ge=1)
    """Tokens per latent (positional)."""
    aligned: bool = True
    """Positional queries start from the states at their own tokens, so that content has a short way through encoder and
    decoder; off, a query is one shared vector placed by rotary position only."""
    slots: int | None = Field(None, ge=1)
    """Number of learned slots (kind slots)."""
    encoder_norm_gain: bool = False
    """A learnable gain in the latent encoder's final norm (ablation: it lets the encoder out-scale the noise)."""


class TowerRecipe(Section):
    """Depth of one trained part."""

    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)


class DenoiserRecipe(TowerRecipe):
    """Depth and kind of the denoiser."""

    kind: Literal["dit", "cosmos"] = "dit"
    """`dit`: adaptive norms, the earlier estimate joined to the input; `cosmos`: Llama-type blocks with long skips,
    time and earlier estimate added before each."""


class ModelRecipe(Section):
    """The trained parts."""

    latents: LatentRecipe = LatentRecipe()
    latent_encoder: TowerRecipe = TowerRecipe()
    latent_decoder: TowerRecipe = TowerRecipe()
    token_decoder: TowerRecipe = TowerRecipe(layers=1)
    denoiser: DenoiserRecipe = DenoiserRecipe(layers=6)


class DiffusionRecipe(Section):
    """The forward process and how the denoiser is conditioned."""

    schedule: Literal["tangent"] = "tangent"
    schedule_scale: float = Field(1.65, gt=0)
    """d of the tangent schedule: sigma/alpha at t = 0.5."""
    self_conditioning_share: float = Field(0.5, ge=0, le=1)
    """Share of training texts whose denoiser sees its own first estimate."""


class TrainingRecipe(Section):
    """The loop: precision, logging, saving."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 where the machine computes it natively, else fp32."""
    log_every_steps: int = Field(20, ge=1)
    sample_every_steps: int = Field(250, ge=0)
    """Decode a preview text this often; 0 never."""
    save_every_steps: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    snapshot_every_steps: int = Field(0, ge=0)
    """Also keep a snapshot this often in latent stages, as snapshots/<stage>-<step>; 0 only at the end."""
    probe_every_steps: int = Field(100, ge=0)
    """Measure decoding of held-out texts, estimates and drift this often in latent stages; 0 never."""
    probe_texts: int = Field(16, ge=2)
    """Held-out texts of the probe."""
    drift_lags_steps: tuple[Annotated[int, Field(ge=1)], ...] = (100, 200, 500)
    """Drift: how well today's decoder reads the latents of this many steps ago."""
    tensorboard: bool = True

    @model_validator(mode="after")
    def _saves_after_logs(self) -> TrainingRecipe:
        # Sums since the last logged step are not saved; a checkpoint between two would change the next logged row.
        if self.save_every_steps % self.log_every_steps:
            raise ValueError("save_every_steps must be a multiple of log_every_steps")
        if self.probe_every_steps % self.log_every_steps:
            raise ValueError("probe_every_steps must be a multiple of log_every_steps")
        if self.probe_every_steps and any(lag % self.probe_every_steps for lag in self.drift_lags_steps):
            raise ValueError("drift_lags_steps must be multiples of probe_every_steps")
        return self


class GuardRecipe(Section):
    """The stability guard: what it does, and from where on a logged quantity is taken for a failure."""

    action: Literal["warn", "stop", "off"] = "warn"
    """`warn`: say the likely cause and the field to change, once a cause and stage; `stop`: end the run too, with exit
    code 1 and a checkpoint."""
    grace_steps: int = Field(100, ge=0)
    """Steps at the beginning of a stage that are not judged."""
    min_std: float = Field(0.3, ge=0)
    max_std: float = Field(3.0, gt=0)
    """Centred std of latents on the encoder's own scale."""
    min_effective_rank: float = Field(3.0, ge=0)
    min_diffusion_share: float = Field(0.02, ge=0)
    """Diffusion loss as a share of the latents' variance, where the encoder hears of it."""
    min_accuracy: float = Field(0.5, ge=0, le=1)
    """Token accuracy on noised latents once the gate is half open."""
    max_accuracy_loss: float = Field(0.2, ge=0, le=1)
    """Fall of that accuracy below its best."""
    max_drift_loss: float = Field(0.3, ge=0, le=1)
    """Accuracy that today's decoder loses on latents of the shortest lag ago."""
    min_entropy_share: float = Field(0.6, ge=0)
    """Entropy of samples as a share of that of real text, in the second half of a stage."""


class SamplingRecipe(Section):
    """Defaults of `ldlm sample` and of the texts that `ldlm eval` generates."""

    sampler: Literal["ddim", "ancestral", "euler"] = "ddim"
    steps: int = Field(50, ge=1)
    grid: Literal["uniform", "warped"] = "uniform"
    """`uniform` in t, or `warped`: uniform in the adaptive sampler's loss coordinate."""
    temperature: float = Field(1.0, gt=0)
    guidance: float = Field(1.0, ge=0)
    batch_size: int = Field(64, ge=1)


class EvaluationRecipe(Section):
    """Defaults of `ldlm eval`."""

    num_samples: int = Field(500, ge=1)
    num_texts: int = Field(500, ge=1)
    """Held-out texts per measurement."""
    tokens_per_length: int = Field(16_384, ge=1)
    """Held-out tokens reconstructed at each length."""
    fidelity_threshold: float = Field(0.95, gt=0, le=1)
    """A length passes when token accuracy is at least this share of the accuracy at the training length."""


class Recipe(Section):
    """A whole recipe: this alone reproduces a run."""

    name: str = Field("recipe", pattern=r"^[A-Za-z0-9._-]+$")
    description: str = ""
    seed: int = Field(0, ge=0)
    data: DataRecipe = DataRecipe()
    token_encoder: TokenEncoderRecipe = TokenEncoderRecipe()
    judge: JudgeRecipe = JudgeRecipe()
    model: ModelRecipe = ModelRecipe()
    diffusion: DiffusionRecipe = DiffusionRecipe()
    stages: dict[str, StageRecipe] = Field({"joint": StageRecipe()})
    plans: dict[str, tuple[str, ...]] = Field({"joint": ("joint",)})
    """A plan is a list of stage names: train-joint runs `joint`, train-sequential `sequential` (or a
    variant, `sequential-<name>`), train-lm `lm`."""
    plan_changes: dict[str, dict[str, Any]] = Field({})
    """What a plan changes besides its stages: sections and fields that are merged over the recipe's when it is run."""
    training: TrainingRecipe = TrainingRecipe()
    guard: GuardRecipe = GuardRecipe()
    sampling: SamplingRecipe = SamplingRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for plan, names in self.plans.items():
            for name in names:
                if name not in self.stages:
                    raise ValueError(f"plan '{plan}' names stage '{name}', which stages does not define")
        if self.data.max_len_tokens > self.data.context_tokens:
            raise ValueError("data.max_len_tokens may not exceed data.context_tokens")
        if self.data.tokenizer == "encoder" and self.token_encoder.source == "trained":
            raise ValueError("data.tokenizer: encoder needs a pretrained token_encoder.source (hub id or folder)")
        if self.token_encoder.source != "trained" and self.data.tokenizer == "bpe":
            raise ValueError("a pretrained token_encoder.source needs data.tokenizer: encoder (its own vocabulary)")
        if self.judge.source != "trained" and self.judge.source == self.token_encoder.source:
            raise ValueError("the judge may not be the token encoder itself; name another model as judge.source")
        if self.model.latents.kind == "slots" and self.model.latents.slots is None:
            raise ValueError("model.latents.kind: slots needs model.latents.slots")
        if self.model.latents.kind == "features":
            latents = self.model.latents
            if (latents.width, latents.stride, latents.slots) != (self.token_encoder.width, 1, None):
                raise ValueError(
                    "model.latents.kind: features needs the width of the token encoder, stride 1 and no slots"
                )
            towers: tuple[str, ...] = ("denoiser",)
        else:
            towers = ("latent_encoder", "latent_decoder", "denoiser")
        widths = dict.fromkeys(towers, self.model.latents.width)
        for name, width in (widths | {"token_decoder": self.token_encoder.width}).items():
            heads = getattr(self.model, name).heads
            if width % (2 * heads):
                raise ValueError(f"model.{name}: width {width} must be a multiple of twice its {heads} heads")
        return self
