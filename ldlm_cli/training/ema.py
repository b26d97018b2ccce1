"""Averaged weights, the same on every process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

TensorList = tuple[Tensor, ...] | list[Tensor]


def warmed_up_average(decay: float) -> Callable[[TensorList, TensorList, Tensor | int], None]:
    """Exponential average with decay min(decay, (1 + n) / (10 + n)): a short run does not average its own start."""

    @torch.no_grad()
    def update(averaged: TensorList, current: TensorList, count: Tensor | int) -> None:
        number = float(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + number) / (10 + number)))

    return update


def build_ema(parts: nn.Module, decay: float) -> AveragedModel:
    """Averages of all trained parts together, one decay (method.md section 0)."""
    return AveragedModel(parts, multi_avg_fn=warmed_up_average(decay), use_buffers=False)
