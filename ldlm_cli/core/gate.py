"""The diffusion-to-encoder warmup: how much of the diffusion loss's gradient reaches the latent encoder."""

from __future__ import annotations

import math

from torch import Tensor

from ldlm_cli.recipe.stage_schema import GateRecipe


def scale_gradient(x: Tensor, gate: float) -> Tensor:
    """x unchanged in value, its gradient multiplied by `gate` in [0, 1].

    Source: arXiv 2605.07933 as reconstructed (method.md 3.2): z_g = sg(z_0) + gamma (z_0 - sg(z_0)). With gate 0 the
    result is detached, so that no gradient of exactly zero is computed at a cost.
    """
    if gate == 1.0:
        return x
    if gate == 0.0:
        return x.detach()
    return x.detach() + gate * (x - x.detach())


def sigmoid_gate(step: float, recipe: GateRecipe) -> float:
    """gamma(s), rising late from `minimum` at step 0 to 1 at `warmup_steps`.

    Source: arXiv 2605.07933, Eq. (29-30) as reconstructed (method.md 3.3).
    """
    if step >= recipe.warmup_steps:
        return 1.0

    def sig(share: float) -> float:
        return 1 / (1 + math.exp(-recipe.sharpness * (share - recipe.midpoint)))

    rise = (sig(step / recipe.warmup_steps) - sig(0)) / (sig(1) - sig(0))
    return recipe.minimum + (1 - recipe.minimum) * rise


class Gate:
    """gamma as a function of the step and, for kind `wait`, of the token accuracy seen so far."""

    def __init__(self, recipe: GateRecipe) -> None:
        self.recipe = recipe
        self.opened_at: int | None = 0 if recipe.kind == "sigmoid" else None

    def at(self, step: int) -> float:
        """gamma at optimizer step `step`, in [0, 1]."""
        if self.recipe.kind == "one":
            return 1.0
        if self.recipe.kind == "zero":
            return 0.0
        if self.opened_at is None:
            return self.recipe.minimum
        return sigmoid_gate(step - self.opened_at, self.recipe)

    def observe(self, step: int, token_accuracy: float) -> None:
        """Open a waiting gate once token accuracy on noised latents has reached `wait_accuracy`."""
        if self.recipe.kind == "wait" and self.opened_at is None and token_accuracy >= self.recipe.wait_accuracy:
            self.opened_at = step

    def state_dict(self) -> dict[str, int | None]:
        return {"opened_at": self.opened_at}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        self.opened_at = state["opened_at"]
