"""The warmup of the diffusion loss's gradient into the encoder."""

import itertools
import json

import pytest
import torch

from ldlm_cli.core.gate import Gate, scale_gradient, sigmoid_gate
from ldlm_cli.recipe.stage_schema import GateRecipe

TABLE = {0: 0.001, 0.25: 0.005, 0.5: 0.054, 0.6: 0.136, 0.7: 0.306, 0.8: 0.568, 0.9: 0.830, 1: 1.0}  # method.md 3.3


@pytest.mark.parametrize(("share", "gate"), TABLE.items())
def test_table_of_the_method(share: float, gate: float) -> None:
    recipe = GateRecipe(warmup_steps=50_000)
    assert sigmoid_gate(share * 50_000, recipe) == pytest.approx(gate, abs=0.0006)


def test_gate_rises_to_one_without_a_jump_and_stays() -> None:
    gate = Gate(GateRecipe(warmup_steps=200))
    values = [gate.at(step) for step in range(300)]
    steps = [later - sooner for sooner, later in itertools.pairwise(values[:201])]
    assert all(step > 0 for step in steps)
    assert max(steps) < 0.02
    assert values[200:] == [1.0] * 100
    assert values[0] == pytest.approx(0.001)


def test_no_warmup_is_open_at_once() -> None:
    assert Gate(GateRecipe(warmup_steps=0)).at(0) == 1.0


@pytest.mark.parametrize(("kind", "value"), [("one", 1.0), ("zero", 0.0)])
def test_constant_gates(kind: str, value: float) -> None:
    gate = Gate(GateRecipe.model_validate({"kind": kind}))
    gate.observe(5, 1.0)
    assert [gate.at(step) for step in (0, 10, 10_000)] == [value] * 3


def test_wait_gate_opens_with_accuracy_and_only_once() -> None:
    recipe = GateRecipe(kind="wait", wait_accuracy=0.9, warmup_steps=100, minimum=0.002)
    gate = Gate(recipe)
    gate.observe(40, 0.899)
    assert [gate.at(step) for step in (0, 40, 10_000)] == [0.002] * 3
    gate.observe(60, 0.9)
    rise = GateRecipe(warmup_steps=100, minimum=0.002)
    assert gate.at(60) == pytest.approx(0.002)
    assert [gate.at(60 + step) for step in (10, 50, 90)] == [sigmoid_gate(step, rise) for step in (10, 50, 90)]
    assert gate.at(160) == 1.0
    gate.observe(80, 0.2)
    gate.observe(90, 0.95)
    assert gate.opened_at == 60


def test_wait_gate_survives_a_restart() -> None:
    gate, again = (Gate(GateRecipe(kind="wait", warmup_steps=100)) for _ in range(2))
    again.load_state_dict(json.loads(json.dumps(gate.state_dict())))
    assert again.opened_at is None
    gate.observe(30, 0.95)
    again.load_state_dict(json.loads(json.dumps(gate.state_dict())))
    assert [again.at(step) for step in range(0, 200, 7)] == [gate.at(step) for step in range(0, 200, 7)]


@pytest.mark.parametrize("gate", [0.0, 0.001, 0.3, 1.0])
def test_scaling_changes_the_gradient_and_not_the_value(gate: float) -> None:
    x = torch.randn(5, 4, requires_grad=True)
    scaled = scale_gradient(x, gate)
    torch.testing.assert_close(scaled, x, rtol=0, atol=1e-6)
    if gate == 0.0:
        assert not scaled.requires_grad
        return
    (3 * scaled).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x, 3 * gate))
