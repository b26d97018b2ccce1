"""Muon against torch's own, and what orthogonalising must do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldlm_cli.core.layers import AdaptiveNormBlock, LlamaBlock, PerceiverBlock
from ldlm_cli.recipe.stage_schema import OptimizerRecipe
from ldlm_cli.training.muon import Muon, orthogonalize
from ldlm_cli.training.optimizer import FUSED, build_optimizer

SHAPES = [(24, 16), (16, 24), (16, 16), (24, 16)]


def weights(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize("shape", [(3, 24, 16), (3, 16, 24), (1, 16, 16)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result = orthogonalize(matrices)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    # In the basis of the matrix itself the result is diagonal with entries near 1.
    inner = u.mT @ result @ vh.mT
    diagonal = torch.diagonal(inner, dim1=1, dim2=2)
    assert (inner - torch.diag_embed(diagonal)).abs().max() < 1e-4
    large = s > 0.05 * s[:, :1]  # five iterations do not lift the smallest ones all the way
    assert diagonal[large].min() > 0.6
    assert diagonal[large].max() < 1.3


def test_zero_gradient_stays_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 8)), torch.zeros(2, 4, 8))


def test_ten_steps_equal_those_of_torch_to_its_bfloat16() -> None:
    ours, theirs = weights(0), weights(0)
    start = [weight.detach().clone() for weight in ours]
    mine = Muon(ours, lr=0.01, momentum=0.95, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.01, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(10):
        gradients = [weight.detach() for weight in weights(step + 1)]
        for group, optimizer in ((ours, mine), (theirs, reference)):
            for weight, gradient in zip(group, gradients, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
    for begun, a, b in zip(start, ours, theirs, strict=True):
        moved = (b - begun).norm()
        assert moved > 0.1
        assert (a - b).norm() < 0.02 * moved


def test_step_has_the_size_of_an_adamw_step() -> None:
    weight = nn.Parameter(torch.zeros(128, 512))
    weight.grad = torch.randn(128, 512, generator=torch.Generator().manual_seed(3))
    Muon([weight], lr=0.01).step()
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.15)


def test_muon_takes_the_matrices_of_blocks_only() -> None:
    part = nn.Module()
    part.blocks = nn.ModuleList([nn.Linear(8, 8)])
    part.out = nn.Linear(8, 4)
    part.queries = nn.Parameter(torch.zeros(1, 8))
    recipe = OptimizerRecipe(kind="muon", learning_rate=1e-3, matrix_learning_rate=4e-3)
    groups = build_optimizer(nn.ModuleDict({"part": part}), recipe).param_groups
    rates = {id(weight): group["rate"] for group in groups for weight in group["params"]}
    decays = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    assert rates[id(part.blocks[0].weight)] == 4.0
    assert {rates[id(weight)] for weight in (part.blocks[0].bias, part.out.weight, part.queries)} == {1.0}
    assert len(rates) == 5
    assert decays[id(part.queries)] == decays[id(part.out.bias)] == 0.0
    assert decays[id(part.out.weight)] == decays[id(part.blocks[0].weight)] == recipe.weight_decay


def test_stacked_maps_take_the_steps_they_would_take_alone() -> None:
    gradients = [scale * weight.detach()[:16, :16] for scale, weight in zip((1.0, 1e-3, 5.0), weights(7), strict=False)]
    stacked = nn.Parameter(torch.zeros(48, 16))
    alone = [nn.Parameter(torch.zeros(16, 16)) for _ in gradients]
    stacked.grad = torch.cat(gradients)
    for weight, gradient in zip(alone, gradients, strict=True):
        weight.grad = gradient
    Muon([{"params": [stacked], "pieces": 3}], lr=0.01).step()
    Muon(alone, lr=0.01).step()
    assert torch.allclose(stacked, torch.cat(list(alone)), atol=1e-7)
    assert stacked[16:32].abs().mean() > 1e-4  # the map with the small gradient moves as far as the others


def test_every_stacked_map_of_the_layers_is_known() -> None:
    part = nn.ModuleDict(
        {"blocks": nn.ModuleList([AdaptiveNormBlock(16, 2), PerceiverBlock(16, 2), LlamaBlock(16, 2)])}
    )
    pieces = {
        names[-2]: weight.shape[0] // 16
        for names, weight in ((key.split("."), weight) for key, weight in part.named_parameters())
        if weight.ndim == 2 and names[-2] not in ("out", "up", "down")
    }
    pieces["gate_up"] //= 4  # each of its two maps is four times as wide
    assert pieces == FUSED


def test_state_survives_a_round_trip() -> None:
    def build() -> tuple[nn.ModuleDict, object]:
        torch.manual_seed(5)
        parts = nn.ModuleDict({"part": nn.ModuleDict({"blocks": nn.Linear(8, 8)})})
        return parts, build_optimizer(parts, OptimizerRecipe(kind="muon"))

    def step(parts: nn.ModuleDict, optimizer: object, number: int) -> None:
        torch.manual_seed(number)
        for weight in parts.parameters():
            weight.grad = torch.randn_like(weight)
        optimizer.step()  # type: ignore[attr-defined]

    straight, optimizer = build()
    for number in range(4):
        step(straight, optimizer, number)
        if number == 1:
            saved, middle = optimizer.state_dict(), {k: v.clone() for k, v in straight.state_dict().items()}
            resumed, other = build()
            resumed.load_state_dict(middle)
            other.load_state_dict(torch.load(_saved(saved), weights_only=True))  # type: ignore[attr-defined]
    for number in (2, 3):
        step(resumed, other, number)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def _saved(state: object) -> object:
    import io

    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return stream
