"""Runs side by side, on real runs of seconds: snapshots on the way, likeness, paired intervals, equal compute."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import training_tree
from safetensors.torch import load_file
from test_training import Recorder, Stopped, changed

from ldlm_cli.checkpoint import list_checkpoints, load_checkpoint, load_snapshot, snapshots_along
from ldlm_cli.cli import app as app_module
from ldlm_cli.errors import UsageError
from ldlm_cli.evaluation.likeness import differing_circumstances, group_labels, open_runs
from ldlm_cli.evaluation.matched import nearest_snapshot
from ldlm_cli.evaluation.paired import at_entropy, paired_interval
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.runtime import Runtime
from ldlm_cli.training.plan import flops_per_token, plan_report
from ldlm_cli.training.run import run_recipe

SMALL = ["--num", "6", "--texts", "8", "--sweep-num", "4", "--steps", "1,2", "--temperatures", "0.5,2"]


def study_tree(cache: Path) -> dict[str, Any]:
    """Joint and sequential plans with a judge, and snapshots every 6 steps."""
    tree = training_tree(cache)
    joint = tree["stages"]["joint"]
    tree["stages"]["judge"] = tree["stages"]["encoder"] | {"role": "judge", "seed_offset": 1000}
    tree["stages"]["autoencoder"] = joint | {
        "steps": 10,
        "trains": ["latent_encoder", "latent_decoder", "token_decoder"],
        "losses": {"hidden": 1, "token": 1},
    }
    tree["stages"]["diffusion"] = joint | {
        "steps": 10,
        "trains": ["denoiser"],
        "losses": {"diffusion": 1},
        "standardize_latents": True,
    }
    tree["judge"] = {"width": 16, "layers": 1, "heads": 2}
    tree["plans"] = {
        "joint": ["encoder", "judge", "joint"],
        "sequential": ["encoder", "judge", "autoencoder", "diffusion"],
    }
    tree["training"] |= {"snapshot_every_steps": 4, "save_every_steps": 4, "keep_checkpoints": 20}
    return tree


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.start("fp32")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return study_tree(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any], runtime: Runtime) -> Path:
    """joint-s0, joint-s1, sequential-s0."""
    folder = tmp_path_factory.mktemp("runs")
    for plan, seed in (("joint", 0), ("sequential", 0), ("joint", 1)):
        out = folder / f"{plan}-s{seed}"
        run_recipe(changed(tree, seed=seed), plan, out=out, fresh=False, reporter=Recorder(), runtime=runtime)
    return folder


@pytest.fixture
def ldlm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            app_module.main(arguments)
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    return run


# ------------------------------------------------------------------ snapshots along a run


def test_snapshots_along_a_run_are_the_averages_of_the_checkpoints(runs: Path) -> None:
    run = runs / "joint-s0"
    along = snapshots_along(run)
    assert [path.name for path in along] == [f"joint-{step:08d}" for step in (4, 8, 12, 16)]
    checkpoints = {path.name: path for path in list_checkpoints(run)}
    for path in along:
        tensors, _, _ = load_checkpoint(checkpoints["02-" + path.name[-8:]])
        for part in ("latent_encoder", "denoiser", "latent_decoder", "token_decoder"):
            for key, value in load_file(path / f"{part}.safetensors").items():
                assert torch.equal(value, tensors[f"ema.module.{part}.{key}"])
        assert load_snapshot(run, folder=path).manifest["step"] == int(path.name[-8:])
    assert load_snapshot(run, folder=along[0]).hash != load_snapshot(run).hash


def test_a_sequential_run_keeps_snapshots_of_both_stages_and_their_statistics(runs: Path) -> None:
    along = snapshots_along(runs / "sequential-s0")
    assert [path.name for path in along] == [
        *("autoencoder-00000004", "autoencoder-00000008"),
        *("diffusion-00000004", "diffusion-00000008"),
    ]
    normal = [load_file(path / "normalization.safetensors")["latent_std"] for path in along]
    assert torch.equal(normal[1], torch.ones(16))
    assert not torch.equal(normal[2], torch.ones(16))


def test_snapshots_neither_change_a_run_nor_differ_after_a_resume(
    runs: Path, tree: dict[str, Any], tmp_path: Path, runtime: Runtime
) -> None:
    recipe = changed(tree)
    reporter = Recorder(("joint", 10))
    with pytest.raises(Stopped):
        run_recipe(recipe, "joint", out=tmp_path / "a", fresh=False, reporter=reporter, runtime=runtime)
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "02-00000008")  # as if it was stopped before this was saved
    run_recipe(recipe, "joint", out=tmp_path / "a", fresh=False, reporter=Recorder(), runtime=runtime)
    for ours, theirs in zip(snapshots_along(tmp_path / "a"), snapshots_along(runs / "joint-s0"), strict=True):
        configs = [json.loads((path / "config.json").read_text()) for path in (ours, theirs)]
        assert configs[0]["hash"] == configs[1]["hash"]
        for one in configs:  # seconds are the clock's
            for row in (one["compute"], one["compute"]["latent"], *one["compute"]["stages"]):
                assert row.pop("seconds") > 0
        assert configs[0]["compute"] == configs[1]["compute"]
    without = changed(tree, training__snapshot_every_steps=0)
    run_recipe(without, "joint", out=tmp_path / "b", fresh=False, reporter=Recorder(), runtime=runtime)
    assert not (tmp_path / "b" / "snapshots").exists()
    assert load_snapshot(tmp_path / "b").hash == load_snapshot(runs / "joint-s0").hash


def test_compute_is_counted_by_stage_and_by_the_formula_of_the_plan(runs: Path, tree: dict[str, Any]) -> None:
    compute = load_snapshot(runs / "sequential-s0").manifest["compute"]
    assert [(row["stage"], row["steps"]) for row in compute["stages"]] == [
        *(("encoder", 8), ("judge", 8)),
        *(("autoencoder", 10), ("diffusion", 10)),
    ]
    assert compute["latent"]["denoiser_steps"] == 10
    assert compute["latent"]["tokens"] == 20 * 512
    assert compute["flops"] == pytest.approx(plan_report(changed(tree), "sequential")["flops"])
    assert 0 < compute["latent"]["denoiser_flops"] < compute["latent"]["flops"] < compute["flops"]


def test_flops_of_a_token(tree: dict[str, Any]) -> None:
    """By hand: a trained part costs 6, one that only runs 2, the self-conditioning pass 2 for its share of texts."""
    recipe: Recipe = changed(tree)
    parts = {"latent_encoder": 10, "denoiser": 100, "latent_decoder": 1000, "token_decoder": 10000}
    encoder = 2 * (12 * 16**2 * 2 + 500 * 16)
    joint = flops_per_token(recipe, recipe.stages["joint"], parts, 500)
    assert joint == (6 * 11110 + 2 * 100 * 0.5 + encoder, 6 * 100 + 2 * 100 * 0.5)
    diffusion = flops_per_token(recipe, recipe.stages["diffusion"], parts, 500)
    assert diffusion == (2 * 10 + 6 * 100 + 2 * 100 * 0.5 + encoder, 6 * 100 + 2 * 100 * 0.5)
    assert flops_per_token(recipe, recipe.stages["autoencoder"], parts, 500) == (6 * 11010 + encoder, 0)
    assert flops_per_token(recipe, recipe.stages["judge"], parts, 500) == (6 * (12 * 16**2 + 500 * 16), 0)


# ------------------------------------------------------------------ intervals


def test_the_paired_interval_of_a_mean_is_that_of_normal_theory() -> None:
    rng = np.random.default_rng(3)
    shared, own = rng.normal(size=(2, 2000))
    first, second = 5 + 10 * shared + own, 4.8 + 10 * shared
    ones = [1.0] * 2000
    found = paired_interval((first.tolist(), ones), (second.tolist(), ones))
    assert found is not None
    differences = first - second
    half = 1.96 * differences.std(ddof=1) / math.sqrt(2000)
    assert found["difference"] == pytest.approx(differences.mean())
    assert found["low"] == pytest.approx(differences.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(differences.mean() + half, abs=0.1 * half)
    # Unpaired, the shared part would drown the difference.
    assert half < 0.05 < 1.96 * math.hypot(first.std(), second.std()) / math.sqrt(2000)


def test_a_paired_interval_of_a_ratio_and_of_nothing() -> None:
    assert paired_interval(([1, 2], [2, 2]), ([1, 2], [2, 2])) == {
        **dict.fromkeys(("difference", "low", "high"), 0.0),
        "num": 2,
        "level": 0.95,
    }
    assert paired_interval(([0, 0], [0, 0]), ([1, 1], [1, 1])) is None
    with pytest.raises(ValueError, match="at least one"):
        paired_interval(([], []), ([], []))


def point(temperature: float, entropy: float | None, perplexity: float, valid: float) -> dict[str, Any]:
    row = {"temperature": temperature, "entropy_nats": entropy, "generative_perplexity": perplexity}
    return row | {"valid_stories": valid}


def test_perplexity_at_an_entropy_is_linear_in_its_logarithm() -> None:
    sweep = [point(0.5, 2.0, 10.0, 0.8), point(1.0, 3.0, 1000.0, 0.4), point(2.0, None, 5.0, 0.0)]
    found = at_entropy(sweep, 2.5)
    assert found["reached"]
    assert found["generative_perplexity"] == pytest.approx(100)
    assert found["temperature"] == pytest.approx(0.75)
    assert found["valid_stories"] == pytest.approx(0.6)
    outside = at_entropy(sweep, 3.5)
    assert not outside["reached"]
    assert outside["entropy_range"] == [2.0, 3.0]
    assert "generative_perplexity" not in outside
    again = at_entropy([*sweep[:2], point(3.0, 2.0, 7.0, 0.1)], 2.5)
    assert (again["crossings"], again["temperature"]) == (2, pytest.approx(0.75))


# ------------------------------------------------------------------ likeness


def test_seeds_of_one_recipe_are_a_group_and_what_differs_is_listed(runs: Path) -> None:
    opened = open_runs([str(runs / name) for name in ("joint-s0", "sequential-s0", "joint-s1")])
    assert [run.name for run in opened] == ["joint-s0", "joint-s1", "sequential-s0"]
    labels = group_labels(opened)
    assert labels == {"joint-s0": "small, joint", "joint-s1": "small, joint", "sequential-s0": "small, sequential"}
    differing = differing_circumstances(opened)
    assert differing["seed"] == {"joint-s0": 0, "joint-s1": 1, "sequential-s0": 0}
    assert differing["stages.diffusion"].keys() == {"sequential-s0"}
    assert "trains denoiser; losses diffusion 1" in differing["stages.diffusion"]["sequential-s0"]
    assert not [name for name in differing if name.startswith(("data.", "training.", "stages.encoder"))]
    assert list(differing_circumstances(opened[:2])) == ["seed"]


def copied(run: Path, to: Path, **changes: Any) -> Path:
    """The run with other values in its snapshot's recipe (dotted, `__` for the dots) or `manifest__…`, `config__…`."""
    shutil.copytree(run, to)
    config = json.loads((to / "snapshot" / "config.json").read_text())
    manifest = json.loads((to / "manifest.json").read_text())
    for dotted, value in changes.items():
        *way, name = dotted.split("__")
        here = {"manifest": manifest, "config": config}.get(way[0]) if way[0] in ("manifest", "config") else None
        if here is None:
            here = config["recipe"]
            for section in way:
                here = here[section]
        here[name] = value
    (to / "snapshot" / "config.json").write_text(json.dumps(config))
    (to / "manifest.json").write_text(json.dumps(manifest))
    return to


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config__data_fingerprint": "x" * 64, "data__test_share": 0.2}, "data_fingerprint differs"),
        ({"config__data_fingerprint": "x" * 64, "data__test_share": 0.2}, "the recipes differ in data.test_share"),
        ({"sampling__sampler": "ancestral"}, "sampling.sampler differs (ddim in joint-s0, ancestral in other)"),
        ({"sampling__temperature": 0.7}, "give --temperature"),
        ({"manifest__precision": "bf16"}, "precision differs (fp32 in joint-s0, bf16 in other)"),
        ({"evaluation__tokens_per_length": 64}, "give --texts"),
        ({"data__max_len_tokens": 32}, "data.max_len_tokens differs"),
    ],
)
def test_unlike_measurements_are_refused_by_field(
    runs: Path, tmp_path: Path, ldlm: Any, changes: dict[str, Any], words: str
) -> None:
    other = copied(runs / "joint-s0", tmp_path / "other", **changes)
    code, out, errors = ldlm("compare", str(runs / "joint-s0"), str(other))
    assert (code, out) == (2, "")
    assert len(errors.splitlines()) == 1
    assert words in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("joint-s0", "at least two runs"),
        ("joint-s0 joint-s0", "is named twice"),
        ("joint-s0 nothing", "holds no snapshot"),
        ("joint-s0 joint-s1", "judge.weights_sha256 differs"),
        ("joint-s0 sequential-s0 --judge joint-s0/token_encoder", "has the weights of the token encoder"),
        ("joint-s0 sequential-s0 --steps 0,5", "--steps is '0,5' but its numbers must be above 0"),
        ("joint-s0 sequential-s0 --steps some", "must be whole numbers"),
        ("joint-s0 sequential-s0 --temperatures 1;2", "must be numbers"),
    ],
)
def test_wrong_use_is_one_sentence(runs: Path, ldlm: Any, arguments: str, words: str) -> None:
    parts = [str(runs / part) if part[:2] in ("jo", "se") else part for part in arguments.split()]
    code, out, errors = ldlm("compare", *parts)
    assert (code, out) == (2, "")
    assert len(errors.splitlines()) == 1
    assert words in errors


# ------------------------------------------------------------------ the whole command


def test_the_nearest_snapshot_is_not_above_the_target(runs: Path) -> None:
    joint, sequential = open_runs([str(runs / "joint-s0"), str(runs / "sequential-s0")])
    assert nearest_snapshot(joint, "denoiser_steps", 10)[0] == "joint-00000008"  # type: ignore[index]
    assert nearest_snapshot(joint, "denoiser_steps", 20)[0] == "final"  # type: ignore[index]
    assert nearest_snapshot(joint, "denoiser_steps", 3) is None
    assert nearest_snapshot(sequential, "denoiser_steps", 9)[0] == "diffusion-00000008"  # type: ignore[index]


def test_compare_measures_once_and_says_the_same_again(runs: Path, tmp_path: Path, ldlm: Any) -> None:
    names = [str(runs / name) for name in ("joint-s0", "joint-s1", "sequential-s0")]
    common = [*names, *SMALL, "--judge", str(runs / "joint-s0"), "--out", str(tmp_path / "out")]
    code, out, errors = ldlm("compare", *common, "--json")
    assert code == 0, errors
    report = json.loads(out)
    assert {path.name for path in (tmp_path / "out" / "plots").iterdir()} == {
        f"{name}.png" for name in ("losses", "latents", "reconstruction", "generation", "own_estimates")
    }
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == report
    assert [(row["run"], row["steps"]) for row in report["generation"]] == [
        (name, steps) for name in ("joint-s0", "joint-s1", "sequential-s0") for steps in (1, 2)
    ]
    assert report["references"]["held_out_text"]["num_texts"] == 6
    assert list(report["references"])[1:] == [
        *("shuffled_words", "unigram_sampler"),
        *("bigram_sampler", "repeated_sentence"),
    ]
    assert {row["against"] for row in report["paired"]} == {"joint-s0"}
    assert {(row["quantity"], row["steps"]) for row in report["paired"]} >= {("accuracy", None), ("valid_stories", 2)}
    by_steps, by_flops = report["matched_compute"]
    assert by_steps["target"] == 10
    assert [row["snapshot"] for row in by_steps["rows"]] == ["joint-00000008", "joint-00000008", "final"]
    assert all(row["spent"] <= by_flops["target"] for row in by_flops["rows"])
    assert len(report["matched_entropy"]) == 6
    assert [row["t"] for row in report["encoding"][0]["own_estimates"]["rows"]] == [0.3, 0.5, 0.7]
    assert len(report["curves"]["sequential-s0"]["latent_step"]) == 10
    assert report["curves"]["sequential-s0"]["latent_step"][-1] == 20

    code, text, errors = ldlm("compare", *common)
    assert code == 0
    assert errors.splitlines() == [line for line in errors.splitlines() if line.startswith("report:")]  # none measured
    markdown = (tmp_path / "out" / "compare.md").read_text()
    for words in ("Runs and what they spent", "Paired differences", "At equal denoiser steps", "real held-out text"):
        assert words in text
        assert words in markdown
    assert "synthetic" in markdown


def test_generation_is_that_of_eval(runs: Path, tmp_path: Path, ldlm: Any) -> None:
    """The same texts, so the same numbers, as `ldlm eval` with the same settings."""
    names = [str(runs / name) for name in ("joint-s0", "sequential-s0")]
    options = [*SMALL, "--temperatures", "none", "--no-matched", "--json", "--out", "out"]
    code, out, errors = ldlm("compare", *names, *options)
    assert code == 0, errors
    report = json.loads(out)
    assert "matched_entropy" not in report
    assert "matched_compute" not in report
    copy = copied(runs / "joint-s0", tmp_path / "joint-s0")
    evaluated = json.loads(ldlm("eval", "--run", str(copy), "--num", "6", "--steps", "2", "--seed", "0", "--json")[1])
    ours = next(row for row in report["generation"] if (row["run"], row["steps"]) == ("joint-s0", 2))
    for name in ("generative_perplexity", "entropy_nats", "valid_stories", "memorised_share"):
        assert ours[name] == pytest.approx(evaluated["generation"][name])


def test_a_run_without_a_manifest_is_refused(runs: Path, tmp_path: Path) -> None:
    other = copied(runs / "joint-s0", tmp_path / "other")
    (other / "manifest.json").unlink()
    with pytest.raises(UsageError, match=r"has no manifest\.json"):
        open_runs([str(runs / "joint-s0"), str(other)])
