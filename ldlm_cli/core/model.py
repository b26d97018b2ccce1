"""LDLM: the five parts of a latent diffusion language model, and the three things they do together."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from ldlm_cli.core.cosmos_denoiser import CosmosDenoiser
from ldlm_cli.core.denoiser import Denoiser
from ldlm_cli.core.features import FeatureDecoder, FeatureEncoder
from ldlm_cli.core.latent_decoder import LatentDecoder
from ldlm_cli.core.latent_encoder import LatentEncoder, LatentLayout
from ldlm_cli.core.normalizer import Normalizer
from ldlm_cli.core.token_decoder import TokenDecoder
from ldlm_cli.core.token_encoder import TokenEncoder
from ldlm_cli.errors import SnapshotError
from ldlm_cli.recipe.schema import Recipe

PARTS = ("latent_encoder", "denoiser", "latent_decoder", "token_decoder")
LATENT_ENCODERS = {"positional": LatentEncoder, "slots": LatentEncoder, "features": FeatureEncoder}
LATENT_DECODERS = {"positional": LatentDecoder, "slots": LatentDecoder, "features": FeatureDecoder}
DENOISERS = {"dit": Denoiser, "cosmos": CosmosDenoiser}


class LDLM(nn.Module):
    """Holds the parts by name; a part that is not loaded is absent, and using it says so.

    `parts` are the trained parts; `latent_normalizer` standardises latents for the denoiser in a sequential plan and is
    the identity in a joint one.
    """

    def __init__(self, parts: dict[str, nn.Module], token_encoder: TokenEncoder | None, recipe: Recipe) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.token_encoder = token_encoder
        self.layout = LatentLayout(recipe.model.latents)
        self.latent_width = recipe.model.latents.width
        self.latent_normalizer = Normalizer(self.latent_width)

    def part(self, name: str) -> nn.Module:
        """The part of that name; SnapshotError when it was not loaded."""
        if name not in self.parts:
            raise SnapshotError(f"the part '{name}' was not loaded from the snapshot: load it to use it")
        return self.parts[name]

    def hidden(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """Token ids [B, N] to standardised hidden states h [B, N, H]; no gradient."""
        if self.token_encoder is None:
            raise SnapshotError("the token encoder was not loaded from the snapshot: load it to encode text")
        return self.token_encoder(token_ids, token_mask)

    def encode(self, h: Tensor, token_mask: Tensor) -> Tensor:
        """Hidden states [B, N, H] to the latents z_0 [B, L, D] that the denoiser works on."""
        return self.latent_normalizer(self.part("latent_encoder")(h, token_mask))

    def denoise(self, z_t: Tensor, t: Tensor, z_self: Tensor, latent_mask: Tensor) -> Tensor:
        """Noised latents [B, L, D] at times t [B] to an estimate of the clean ones, float32."""
        return self.part("denoiser")(z_t, t, z_self, latent_mask).float()

    def decode_hidden(self, z: Tensor, latent_mask: Tensor, token_mask: Tensor) -> Tensor:
        """Latents [B, L, D] to reconstructed hidden states h_hat [B, N, H]."""
        return self.part("latent_decoder")(self.latent_normalizer.invert(z), latent_mask, token_mask)

    def decode(self, z: Tensor, latent_mask: Tensor, token_mask: Tensor) -> Tensor:
        """Latents [B, L, D] to token logits [B, N, V]."""
        return self.part("token_decoder")(self.decode_hidden(z, latent_mask, token_mask), token_mask)


def build_parts(recipe: Recipe, vocab_size: int, names: Collection[str] = PARTS) -> dict[str, nn.Module]:
    """The trained parts with fresh weights, drawn in a fixed order from torch's global generator."""
    model, hidden, kind = recipe.model, recipe.token_encoder.width, recipe.model.latents.kind
    longest = LatentLayout(model.latents).count(recipe.data.max_len_tokens)
    builders = {
        "latent_encoder": lambda: LATENT_ENCODERS[kind](model.latents, model.latent_encoder, hidden),
        "denoiser": lambda: DENOISERS[model.denoiser.kind](model.latents, model.denoiser, longest),
        "latent_decoder": lambda: LATENT_DECODERS[kind](model.latents, model.latent_decoder, hidden),
        "token_decoder": lambda: TokenDecoder(hidden, model.token_decoder, vocab_size),
    }
    return {name: build() for name, build in builders.items() if name in names}


def count_parameters(module: nn.Module) -> int:
    """Number of scalar parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def parameters_by_part(recipe: Recipe, vocab_size: int) -> dict[str, int]:
    """Parameters of each trained part, counted on the meta device: needs no memory and no network."""
    with torch.device("meta"):
        return {name: count_parameters(part) for name, part in build_parts(recipe, vocab_size).items()}
