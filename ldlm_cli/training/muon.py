"""Muon: momentum whose update is made orthogonal, for the matrices inside the blocks.

torch.optim.Muon does the same one matrix after the other and always in bfloat16. Here matrices of one shape go through
the iteration together and in the dtype of the weights: half the time on the CPUs measured, and one and two processes
stay equal to float32 rounding, which bfloat16 would turn into visible differences within a few steps. The test compares
both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration; source: K. Jordan, Muon (2024), also torch.optim.Muon's defaults."""
ITERATIONS = 5


def orthogonalize(matrices: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Replace the singular values of each matrix by values near 1 (about 0.7 to 1.2).

    Args:
        matrices: [K, rows, columns] float.
    Returns:
        U diag(near 1) V^T of each matrix U S V^T, shape and dtype of the argument; zero matrices stay zero.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; the step has the root mean square of an AdamW step at the same rate.

    Source: K. Jordan, Muon (2024); the factor 0.2 sqrt(max(rows, columns)) from arXiv 2502.16982, Sec. 2.2.
    Takes matrices only (two dimensions). A group may say `pieces`: its matrices are that many maps stacked by rows
    (queries, keys and values, say), each orthogonalised by itself; together, the one with the largest gradient would
    take the whole step.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "pieces": 1})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step over all matrices that have a gradient; those of one shape together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for (rows, columns), weights in by_shape.items():
                buffers = [self._momentum(weight) for weight in weights]
                gradients = [weight.grad for weight in weights if weight.grad is not None]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                steps = torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"]))
                height = rows // group["pieces"]
                updates = orthogonalize(steps.view(-1, height, columns)).reshape(-1, rows, columns)
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                step_size = group["lr"] * 0.2 * max(height, columns) ** 0.5
                torch._foreach_add_(weights, list(updates.unbind()), alpha=-step_size)

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        return state["momentum"]


class Together:
    """Several optimizers, each with its own parameters, used as one."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
