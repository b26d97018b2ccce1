"""Randomness with an address: every random number is a function of integers, never of what was drawn before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def seed_at(*address: int) -> int:
    """A 63-bit seed from a list of integers (splitmix64 over the list), the same on any machine."""
    state = 0
    for number in address:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def generator_at(device: torch.device, *address: int) -> torch.Generator:
    """A generator on `device` seeded from an address."""
    return torch.Generator(device=device).manual_seed(seed_at(*address))


@dataclass(frozen=True)
class Draws:
    """The random numbers of one training step for the rows of one process.

    uniform: [B, 2] float64 on the CPU in [0, 1): time before warping, self-conditioning coin.
    noise: [2, B, L, D] float: of the forward process, and of the decoder's input (independent: method.md 10.11).
    """

    uniform: Tensor
    noise: Tensor


def draw_rows(rows: Sequence[int], latents: int, width: int, device: torch.device, *address: int) -> Draws:
    """Draws for the given rows of the global batch, addressed by (*address, row).

    Which process or micro-batch holds a row does not change what is drawn for it.
    """
    uniform = torch.empty(len(rows), 2, dtype=torch.float64)
    noise = torch.empty(2, len(rows), latents, width, device=device)
    host = torch.Generator()
    local = torch.Generator(device=device)
    for place, row in enumerate(rows):
        seed = seed_at(*address, row)
        uniform[place] = torch.rand(2, dtype=torch.float64, generator=host.manual_seed(seed))
        noise[:, place] = torch.randn(2, latents, width, device=device, generator=local.manual_seed(seed ^ 1))
    return Draws(uniform, noise)
