"""A sweep of real runs of seconds: one after the other, stopped and gone on with, with shared language models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_compare import study_tree

from ldlm_cli.cli import app as app_module
from ldlm_cli.recipe.sweep import load_sweep

FAST = {"encoder": 2, "judge": 2, "joint": 4, "autoencoder": 2, "diffusion": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def folder(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the recipe small.yaml."""
    tree = study_tree(cache)
    for name, steps in FAST.items():
        tree["stages"][name]["steps"] = steps
    tree["training"] |= {"log_every_steps": 2, "save_every_steps": 2, "snapshot_every_steps": 0}
    (tmp_path / "small.yaml").write_text(yaml.dump(tree))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    return tmp_path


@pytest.fixture
def ldlm(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            app_module.main(arguments)
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    return run


def write(path: Path, *entries: dict[str, Any]) -> str:
    path.write_text(yaml.dump(list(entries)))
    return str(path)


def weights(run: Path) -> str:
    return str(json.loads((run / "snapshot" / "config.json").read_text())["hash"])


def test_a_sweep_goes_on_skips_and_reports(folder: Path, ldlm: Any) -> None:
    broken = {"recipe": "small.yaml", "set": ["stages.joint.batch_tokens=100000000"], "out": "runs/broken"}
    joint = {"recipe": "small.yaml", "seed": 3}
    sequential = {"recipe": "small.yaml", "plan": "sequential", "seed": 3}
    file = write(folder / "study.yaml", broken, joint, sequential)
    # One run of the sweep is there, stopped after its language models.
    assert ldlm("train-joint", "--recipe", "small.yaml", "--seed", "3")[0] == 0
    alone = folder / "runs" / "small-joint-s3"
    expected = weights(alone)
    manifest = json.loads((alone / "manifest.json").read_text())
    (alone / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))
    (alone / "checkpoints" / "03-00000000" / "state.json").unlink()

    code, out, errors = ldlm("sweep", file, "--json")
    assert code == 1
    found = json.loads(out)
    assert [row["status"] for row in found["runs"]] == ["failed", "finished", "finished"]
    assert "shorter than one batch" in found["runs"][0]["error"]
    assert found["failed"] == 1
    assert "1 of 3 runs failed" in errors
    assert weights(alone) == expected

    code, out, _ = ldlm("sweep", write(folder / "rest.yaml", joint, sequential), "--json")
    assert code == 0
    assert [row["status"] for row in json.loads(out)["runs"]] == ["already finished"] * 2


def test_language_models_are_trained_once_and_only_if_they_are_the_same(folder: Path, ldlm: Any) -> None:
    entries = [{"recipe": "small.yaml", "plan": plan, "seed": seed} for plan, seed in (("joint", 0), ("sequential", 0))]
    longer = {"recipe": "small.yaml", "set": ["stages.judge.steps=4"], "out": "runs/longer"}
    assert ldlm("sweep", write(folder / "study.yaml", *entries, longer))[0] == 0
    first, second, third = (folder / "runs" / name for name in ("small-joint-s0", "small-sequential-s0", "longer"))
    assert "reused" not in json.loads((first / "manifest.json").read_text())
    reused = json.loads((second / "manifest.json").read_text())["reused"]
    assert {name: row["from"] for name, row in reused.items()} == dict.fromkeys(
        ("encoder", "judge"), "runs/small-joint-s0"
    )
    assert list(json.loads((third / "manifest.json").read_text())["reused"]) == ["encoder"]
    compute = json.loads((second / "snapshot" / "config.json").read_text())["compute"]
    assert [row.get("reused_from") for row in compute["stages"]] == ["runs/small-joint-s0"] * 2 + [None] * 2
    # What was copied is what would have been trained.
    assert ldlm("sweep", "--recipe", "small.yaml", "--plan", "sequential", "--set", "name=alone")[0] == 0
    assert weights(folder / "runs" / "alone-sequential-s0") == weights(second)
    assert "reused" not in json.loads((folder / "runs" / "alone-sequential-s0" / "manifest.json").read_text())

    other = {"recipe": "small.yaml", "seed": 1, "reuse": "runs/small-joint-s0"}
    code, out, errors = ldlm("sweep", write(folder / "other.yaml", other), "--json")
    assert code == 1
    assert "seed (0 there, 1 now)" in json.loads(out)["runs"][0]["error"]
    assert "failed: runs/small-joint-s1" in errors


def test_dry_run_trains_nothing(folder: Path, ldlm: Any) -> None:
    code, out, _ = ldlm("sweep", "--recipe", "small.yaml", "--dry-run", "--json")
    found = json.loads(out)
    assert code == 0
    assert [(row["run"], row["status"], row["steps"]) for row in found["runs"]] == [("runs/small-joint-s0", "new", 8)]
    assert not (folder / "runs").exists()
    code, out, _ = ldlm("sweep", "--recipe", "small.yaml", "--dry-run")
    assert code == 0
    assert "runs/small-joint-s0" in out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be a list of entries"),
        ("recipe: small.yaml", "must be a list of entries"),
        ("- small.yaml", "entry 1 must be a mapping with a recipe, not str"),
        ("- {plan: joint}", "recipe"),
        ("- {recipe: small.yaml, plna: joint}", "entry 1: plna is not a field; did you mean 'plan'?"),
        ("- {recipe: small.yaml, seed: one}", "seed is 'one' but must be a whole number"),
        ("- {recipe: small.yaml, set: seed=1}", "set is 'seed=1' but must be a list"),
        ("- {recipe: small.yaml, plan: jiont}", "has no plan 'jiont'"),
        ("- {recipe: smal.yaml}", "smal.yaml"),
        ("- {recipe: small.yaml, set: [stages.joint.stepz=1]}", "did you mean 'steps'?"),
        ("- {recipe: small.yaml}\n- {recipe: small.yaml, set: [stages.joint.steps=6]}", "entries 1 and 2 both go to"),
        ("- {recipe: small.yaml, reuse: runs/nothing}", "which is no run folder"),
        ("- {recipe: [", "line 1 is not valid YAML"),
    ],
)
def test_a_mistake_in_a_sweep_ends_it_before_it_starts(folder: Path, ldlm: Any, text: str, words: str) -> None:
    (folder / "study.yaml").write_text(text)
    code, out, errors = ldlm("sweep", "study.yaml")
    assert (code, out) == (2, "")
    assert len(errors.splitlines()) == 1
    assert words in errors
    assert not (folder / "runs").exists()


def test_nothing_to_run_is_wrong_use(folder: Path, ldlm: Any) -> None:
    code, _, errors = ldlm("sweep")
    assert code == 2
    assert "needs something to run" in errors
    assert "cannot be read" in ldlm("sweep", "missing.yaml")[2]


def test_recipes_are_looked_for_beside_the_sweep_file(folder: Path) -> None:
    (folder / "study").mkdir()
    (folder / "study" / "small.yaml").write_text((folder / "small.yaml").read_text())
    write(folder / "study" / "sweep.yaml", {"recipe": "small.yaml"}, {"recipe": "base.yaml"})
    beside, shipped = load_sweep(folder / "study" / "sweep.yaml")
    assert beside.recipe == str(folder / "study" / "small.yaml")
    assert shipped.recipe == "base.yaml"
