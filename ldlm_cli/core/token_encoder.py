"""The frozen pretrained language model: token ids to standardised hidden states h."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldlm_cli.core.normalizer import Normalizer
from ldlm_cli.errors import RecipeError, UsageError
from ldlm_cli.recipe.schema import TokenEncoderRecipe


class TokenEncoder(nn.Module):
    """A frozen causal or masked LM; gives the hidden states of one layer, standardised per dimension.

    Args:
        backbone: any `transformers` model that returns hidden states.
        layer: index into the list of hidden states (embeddings first).
        prefix_id: token put before the text, its hidden state dropped; None for none.
        whitening_floor: level the spectrum of the standardised states too, down to this variance; None: do not.
        clip_std: standardised states are clipped at this many standard deviations.
    """

    def __init__(
        self,
        backbone: nn.Module,
        layer: int,
        prefix_id: int | None,
        clip_std: float,
        whitening_floor: float | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        config: Any = backbone.config
        self.layer, self.prefix_id, self.width = layer, prefix_id, int(config.hidden_size)
        positions = getattr(config, "max_position_embeddings", None)
        self.max_tokens: int | None = None if positions is None else int(positions) - (prefix_id is not None)
        self.normalizer = Normalizer(self.width, clip_std, whitening_floor)

    def train(self, mode: bool = True) -> TokenEncoder:
        """Frozen: dropout stays off whatever the trainer asks."""
        return super().train(False)

    @torch.no_grad()
    def hidden(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """Raw hidden states, [B, N, H] float, of token_ids [B, N] int64 with token_mask [B, N] bool."""
        if self.max_tokens is not None and token_ids.shape[1] > self.max_tokens:
            raise UsageError(
                f"the frozen token encoder takes at most {self.max_tokens} tokens, got {token_ids.shape[1]}: "
                "use a shorter length"
            )
        if self.prefix_id is not None:
            token_ids = nn.functional.pad(token_ids, (1, 0), value=self.prefix_id)
            token_mask = nn.functional.pad(token_mask, (1, 0), value=True)
        output = self.backbone(input_ids=token_ids, attention_mask=token_mask.long(), output_hidden_states=True)
        states = output.hidden_states[self.layer]
        return (states[:, 1:] if self.prefix_id is not None else states).float()

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """Standardised hidden states h, [B, N, H], about unit variance per dimension."""
        return self.normalizer(self.hidden(token_ids, token_mask))


def load_backbone(source: str | Path, revision: str | None = None) -> nn.Module:
    """Open a pretrained model by hub id or folder without running code from it; UsageError when it cannot be had."""
    from transformers import AutoModel

    try:
        return AutoModel.from_pretrained(str(source), revision=revision, trust_remote_code=False, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot load the token encoder '{source}': {str(error).splitlines()[0]} "
            "Offline, name a local folder: --set token_encoder.source=PATH"
        ) from error


def build_token_encoder(
    recipe: TokenEncoderRecipe, source: str | Path, prefix_id: int | None, vocab_size: int | None
) -> TokenEncoder:
    """Load the frozen model and check it against what the recipe states.

    Raises:
        RecipeError: width, number of layers or vocabulary differ; names the field, the value stated and the one found.
    """
    backbone = load_backbone(source, recipe.revision)
    config: Any = backbone.config
    stated = {"width": recipe.width, "layers": recipe.layers, "vocab_size": recipe.vocab_size}
    found = {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
    }
    for field, value in stated.items():
        if value is not None and value != found[field]:
            raise RecipeError(
                f"token_encoder.{field} is {value} in the recipe but {found[field]} in '{source}': "
                f"set token_encoder.{field}={found[field]} or name another model"
            )
    if vocab_size is not None and vocab_size > config.vocab_size:
        raise RecipeError(
            f"the tokenizer has {vocab_size} entries but the token encoder '{source}' knows {config.vocab_size}: "
            "use its own tokenizer (data.tokenizer: encoder)"
        )
    if not -recipe.layers - 1 <= recipe.layer <= recipe.layers:
        raise RecipeError(f"token_encoder.layer {recipe.layer} is outside the {recipe.layers + 1} hidden states")
    floor = recipe.whitening_floor if recipe.whiten else None
    return TokenEncoder(backbone, recipe.layer, prefix_id if recipe.prefix else None, recipe.clip_std, floor)
