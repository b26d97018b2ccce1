"""The stability guard: a planted collapse is caught, a healthy run is left alone; and what the probe measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import training_tree
from test_training import Recorder, Stopped, changed, metrics_of

from ldlm_cli.checkpoint import list_checkpoints, load_checkpoint, load_snapshot
from ldlm_cli.errors import LdlmError
from ldlm_cli.recipe.schema import GuardRecipe, Recipe
from ldlm_cli.recipe.stage_schema import StageRecipe
from ldlm_cli.runtime import Runtime
from ldlm_cli.training.guard import Guard
from ldlm_cli.training.probe import unigram_entropy, variance_shares
from ldlm_cli.training.run import run_recipe

HEALTHY = {"step": 200, "z_std": 0.9, "effective_rank": 40.0, "diffusion": 0.2, "token_accuracy": 0.99}
HEALTHY |= {"encoder_gate": 1.0, "probe_accuracy": 0.99, "text_entropy": 3.5, "drift_accuracy_100": 0.98}


def guard(stage: dict[str, Any] | None = None, **fields: Any) -> Guard:
    return Guard(GuardRecipe(**fields), "joint", StageRecipe.model_validate({"steps": 300} | (stage or {})))


@pytest.mark.parametrize(
    ("row", "cause", "words"),
    [
        ({"z_std": 0.1}, "collapse", "stages.joint.gate.warmup_steps"),
        ({"effective_rank": 1.5}, "collapse", "effective rank 1.5"),
        ({"z_std": 3.1}, "inflation", "model.latents.encoder_norm_gain"),
        ({"diffusion": 0.001}, "trivial latents", "hide from the noise"),
        ({"token_accuracy": 0.3}, "unread latents", "0.30 with the gate at 1.00"),
        ({"drift_accuracy_100": 0.5}, "drift", "latents of 100 steps ago are read with accuracy 0.50"),
    ],
)
def test_each_failure_has_its_cause_and_is_said_once(row: dict[str, float], cause: str, words: str) -> None:
    judge = guard()
    assert judge.check(HEALTHY | {"step": 100}) == []
    found = judge.check(HEALTHY | row)
    if cause == "unread latents":
        assert "fallen from 0.99 to 0.30" in found[0].message
        judge = guard()
        found = judge.check(HEALTHY | row)
    assert [alarm.cause for alarm in found] == [cause]
    assert words in found[0].message
    assert judge.check(HEALTHY | row) == []
    again = guard()
    again.load_state_dict(json.loads(json.dumps(judge.state_dict())))
    assert again.check(HEALTHY | row) == []
    assert guard(action="off").check(HEALTHY | row) == []
    assert guard().check(HEALTHY | row | {"step": 60}) == []  # too early to judge


def test_samples_that_repeat_themselves_are_an_alarm_in_the_second_half() -> None:
    judge = guard()
    rows = [{"step": step, "sample_entropy": 0.5, "diffusion": 0.4 - step / 1000} for step in (50, 100, 150, 200)]
    found = [judge.check(HEALTHY | row) for row in rows]
    assert [[alarm.cause for alarm in alarms] for alarms in found] == [[], [], ["repetition"], []]
    judge = guard()
    assert not any(judge.check(HEALTHY | row | {"sample_entropy": 3.3}) for row in rows)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"losses": {"diffusion": 1, "token": 1}}, "set stages.joint.losses.hidden to 1"),
        ({"decoder_noise_std": 0}, "set stages.joint.decoder_noise_std"),
        ({"gate": {"kind": "one"}}, "set stages.joint.gate.kind to wait"),
        ({"gate": {"warmup_steps": 0}}, "set stages.joint.gate.kind to wait"),
        ({"gate": {"kind": "wait"}}, "lengthen stages.joint.gate.warmup_steps"),
    ],
)
def test_the_likely_cause_is_read_off_the_stage(stage: dict[str, Any], words: str) -> None:
    assert words in guard(stage).check(HEALTHY | {"diffusion": 0.001})[0].message


def test_a_frozen_encoder_is_not_blamed_for_an_easy_denoiser() -> None:
    frozen = guard({"trains": ["denoiser"], "losses": {"diffusion": 1}, "gate": {"kind": "zero"}})
    row = HEALTHY | {"diffusion": 0.001, "encoder_gate": 0.0}
    row.pop("token_accuracy")
    assert frozen.check(row) == []


# ------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.start("fp32")


class Listener(Recorder):
    """Also keeps the alarms."""

    def __init__(self, stop_at: tuple[str, int] | None = None) -> None:
        super().__init__(stop_at)
        self.alarms: list[str] = []

    def alarm(self, message: str) -> None:
        self.alarms.append(message)


def study(cache: Path, **joint: Any) -> dict[str, Any]:
    """A tiny recipe of 200 steps, probed every 20."""
    tree = training_tree(cache)
    tree["stages"]["joint"] |= {"steps": 200, "optimizer": {"warmup_steps": 10, "learning_rate": 3e-3}} | joint
    tree["training"] |= {
        "log_every_steps": 10,
        "save_every_steps": 50,
        "probe_every_steps": 20,
        "drift_lags_steps": [20, 60],
        "probe_texts": 8,
    }
    tree["stages"]["joint"]["times"] = {"bins": 10, "refresh_steps": 10, "decay": 0.9}
    tree["guard"] = {"grace_steps": 40}
    return tree


def planted(cache: Path) -> Recipe:
    """Decoder noise 0, no warmup, a high rate."""
    high = {"warmup_steps": 0, "learning_rate": 1e-2, "schedule": "constant"}
    tree = study(cache, decoder_noise_std=0.0, gate={"kind": "one"}, optimizer=high)
    return changed(tree, guard__action="stop")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def test_a_planted_collapse_stops_within_200_steps(cache: Path, tmp_path: Path, runtime: Runtime) -> None:
    out, listener = tmp_path / "run", Listener()
    with pytest.raises(LdlmError, match=r"stopped by the guard at step \d+, checkpoint saved") as stopped:
        run_recipe(planted(cache), "joint", out=out, fresh=False, reporter=listener, runtime=runtime)
    print(stopped.value)
    assert stopped.value.exit_code == 1
    assert len(str(stopped.value).splitlines()) == 1
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] < 200
    assert last["alarms"]
    assert len(listener.alarms) == len(last["alarms"])
    assert load_checkpoint(list_checkpoints(out)[-1])[2]["step"] == last["step"]


@pytest.fixture(scope="module")
def healthy(
    cache: Path, tmp_path_factory: pytest.TempPathFactory, runtime: Runtime
) -> tuple[Path, dict[str, Any], Listener]:
    tree = study(cache, gate={"kind": "wait", "warmup_steps": 100})
    out, listener = tmp_path_factory.mktemp("runs") / "healthy", Listener()
    run_recipe(changed(tree), "joint", out=out, fresh=False, reporter=listener, runtime=runtime)
    return out, tree, listener


def test_a_healthy_run_raises_no_alarm(healthy: tuple[Path, dict[str, Any], Listener]) -> None:
    run, _, listener = healthy
    assert listener.alarms == []
    assert not any("alarms" in row for row in metrics_of(run).values())


def test_the_probe_measures_what_it_says(healthy: tuple[Path, dict[str, Any], Listener]) -> None:
    metrics = metrics_of(healthy[0])
    plain, probed = metrics[("joint", 10)], metrics[("joint", 100)]
    extra = {"probe_accuracy", "probe_accuracy_noised", "text_entropy", "text_variance_share"}
    extra |= {"position_variance_share", "drift_accuracy_20", "drift_distance_20", "drift_accuracy_60"}
    extra |= {"drift_distance_60", *(f"estimate_accuracy_t{t}" for t in (0.3, 0.5, 0.7))}
    assert probed.keys() - plain.keys() == extra
    assert "drift_accuracy_60" not in metrics[("joint", 60)]  # nothing was kept 60 steps before
    assert "drift_accuracy_60" in metrics[("joint", 80)]
    assert {f"diffusion_t{t}" for t in (0.1, 0.3, 0.5, 0.7, 0.9)} <= probed.keys()
    assert probed["diffusion_t0.1"] < probed["diffusion_t0.9"]
    last = metrics[("joint", 200)]
    assert last["probe_accuracy"] >= last["probe_accuracy_noised"] > 0.05
    assert last["estimate_accuracy_t0.3"] >= last["estimate_accuracy_t0.7"]
    assert 0 < last["drift_distance_20"] < last["drift_distance_60"]


def test_drift_survives_a_restart(
    healthy: tuple[Path, dict[str, Any], Listener], tmp_path: Path, runtime: Runtime
) -> None:
    run, tree, _ = healthy
    out, reporter = tmp_path / "run", Listener(("joint", 130))
    with pytest.raises(Stopped):
        run_recipe(changed(tree), "joint", out=out, fresh=False, reporter=reporter, runtime=runtime)
    run_recipe(changed(tree), "joint", out=out, fresh=False, reporter=Listener(), runtime=runtime)
    assert metrics_of(out) == metrics_of(run)
    assert load_snapshot(out).hash == load_snapshot(run).hash


# ------------------------------------------------------------------------- shares of variance


def test_shares_of_variance_tell_places_from_contents() -> None:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    mask = torch.ones(40, 12, dtype=torch.bool)
    mask[::2, 9:] = False
    healthy = variance_shares(noise(40, 12, 8), mask)
    assert healthy["text_variance_share"] == pytest.approx(1, abs=0.05)
    assert healthy["position_variance_share"] == pytest.approx(1, abs=0.05)
    places = variance_shares(noise(1, 12, 8).expand(40, 12, 8), mask)
    assert places["text_variance_share"] == pytest.approx(0, abs=1e-6)
    assert places["position_variance_share"] == pytest.approx(1, abs=0.2)
    same = variance_shares(noise(40, 1, 8).expand(40, 12, 8), mask)
    assert same["position_variance_share"] == pytest.approx(0, abs=1e-6)
    assert same["text_variance_share"] == pytest.approx(1, abs=0.1)
    garbage = torch.where(mask[..., None], noise(40, 12, 8), 1e6)
    assert variance_shares(garbage, mask)["text_variance_share"] == pytest.approx(1, abs=0.05)


def test_entropy_of_a_text() -> None:
    assert unigram_entropy(torch.tensor([3, 3, 3])) == pytest.approx(0)
    assert unigram_entropy(torch.arange(8)) == pytest.approx(2.0794, abs=1e-4)
