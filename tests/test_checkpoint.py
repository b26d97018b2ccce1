"""Snapshots and checkpoints: whole or refused, and nothing in them is ever run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import model_recipe, random_batch
from safetensors.torch import load_file, save_file

from ldlm_cli import checkpoint
from ldlm_cli.checkpoint import (
    find_run,
    list_checkpoints,
    load_checkpoint,
    load_module_tensors,
    load_snapshot,
    module_tensors,
    save_checkpoint,
    weights_hash,
    write_snapshot,
)
from ldlm_cli.core.model import LDLM, PARTS, build_parts
from ldlm_cli.core.token_encoder import build_token_encoder
from ldlm_cli.data.vocabulary import Vocabulary, train_vocabulary
from ldlm_cli.errors import SnapshotError
from ldlm_cli.recipe.stage_schema import StageRecipe
from ldlm_cli.training.language_model import build_language_model, save_language_model

HISTOGRAM = np.array([0, 0, 3, 1])
FACTS = {"plan": "joint", "stage": "joint", "data_fingerprint": "abc"}


def written(run: Path, seed: int = 0) -> LDLM:
    """A model with its own statistics, left in `run` as training leaves it."""
    recipe = model_recipe(16)
    vocabulary = train_vocabulary(["the cat sat on the mat and the dog did not"] * 3, 280)
    stage = StageRecipe(kind="language_model")
    save_language_model(run / "token_encoder", build_language_model(recipe, stage, vocabulary), vocabulary, {})
    encoder = build_token_encoder(recipe.token_encoder, run / "token_encoder", vocabulary.prefix_id, vocabulary.size)
    torch.manual_seed(seed)
    model = LDLM(build_parts(recipe, vocabulary.size), encoder, recipe).eval()
    encoder.normalizer.set_statistics(torch.randn(16), torch.rand(16) + 0.5)
    model.latent_normalizer.set_statistics(torch.randn(16), torch.rand(16) + 0.5)
    write_snapshot(run, recipe, model, vocabulary, HISTOGRAM, np.array([0.25, 0.75]), FACTS)
    return model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LDLM]:
    run = tmp_path_factory.mktemp("runs") / "one"
    return run, written(run)


@pytest.fixture
def copy(original: tuple[Path, LDLM], tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(original[0], tmp_path / "copy"))


# ------------------------------------------------------------------ snapshots


def test_snapshot_round_trip(original: tuple[Path, LDLM]) -> None:
    run, model = original
    snapshot = load_snapshot(run)
    ids, mask = random_batch([6, 4], 6)
    for name, value in model.state_dict().items():
        assert torch.equal(snapshot.model.state_dict()[name], value), name
    with torch.no_grad():
        expected = model.decode(model.encode(model.hidden(ids, mask), mask), mask, mask)
        found = snapshot.model.decode(snapshot.model.encode(snapshot.model.hidden(ids, mask), mask), mask, mask)
    assert torch.equal(found, expected)
    assert not snapshot.model.training
    assert not any(parameter.requires_grad for parameter in snapshot.model.parameters())
    assert snapshot.recipe == model_recipe(16)
    assert snapshot.length_histogram.tolist() == HISTOGRAM.tolist()
    assert snapshot.probabilities is not None
    assert snapshot.probabilities.tolist() == [0.25, 0.75]
    assert snapshot.hash == weights_hash(run / "snapshot")
    assert snapshot.vocabulary.fingerprint == Vocabulary.load(run / "token_encoder").fingerprint
    assert snapshot.manifest["data_fingerprint"] == "abc"


def test_sampling_parts_alone(original: tuple[Path, LDLM]) -> None:
    snapshot = load_snapshot(original[0], ["denoiser", "latent_decoder", "token_decoder"], token_encoder=False)
    assert set(snapshot.model.parts) == {"denoiser", "latent_decoder", "token_decoder"}
    with pytest.raises(SnapshotError, match="'latent_encoder' was not loaded"):
        snapshot.model.part("latent_encoder")


def test_hash_changes_with_a_weight(copy: Path) -> None:
    before = weights_hash(copy / "snapshot")
    path = copy / "snapshot" / "denoiser.safetensors"
    weights = load_file(path)
    weights["out.bias"] = weights["out.bias"] + 1e-7
    save_file(weights, path)
    assert weights_hash(copy / "snapshot") != before


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert "Traceback" not in text
    assert len(text) < 400
    return text


def test_another_format_is_refused_in_one_sentence(copy: Path) -> None:
    path = copy / "snapshot" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99, "ldlm": "9.9"}))
    with pytest.raises(SnapshotError) as refusal:
        load_snapshot(copy)
    text = one_sentence(refusal.value)
    assert "has format 99, this ldlm reads 1" in text
    assert "9.9" in text


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path: Path) -> None:
    path.write_bytes(os.urandom(200))


def of_another_width(path: Path) -> None:
    save_file({key: torch.zeros(3) for key in load_file(path)}, path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *[(f"{part}.safetensors", truncate) for part in PARTS],
        ("denoiser.safetensors", overwrite),
        ("denoiser.safetensors", of_another_width),
        ("denoiser.safetensors", Path.unlink),
        ("normalization.safetensors", truncate),
        ("config.json", truncate),
        ("config.json", Path.unlink),
        ("vocabulary/tokenizer.json", truncate),
        ("vocabulary/vocabulary.json", Path.unlink),
    ],
)
def test_a_damaged_snapshot_is_refused(copy: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(copy / "snapshot" / name)
    with pytest.raises(SnapshotError) as refusal:
        load_snapshot(copy)
    assert str(copy) in one_sentence(refusal.value)


def test_changed_weights_are_refused(copy: Path) -> None:
    path = copy / "snapshot" / "denoiser.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(SnapshotError):
        load_snapshot(copy)


def test_a_snapshot_is_replaced_whole(tmp_path: Path) -> None:
    run = tmp_path / "run"
    written(run)
    first = load_snapshot(run).hash
    (run / "snapshot" / "left_over").write_text("old")
    written(run, seed=1)
    assert load_snapshot(run).hash != first
    assert not (run / "snapshot" / "left_over").exists()
    assert not list(run.glob(".snapshot*"))


def test_newest_and_named_runs_are_found(original: tuple[Path, LDLM], tmp_path: Path) -> None:
    for age, name in enumerate(("old", "new")):
        shutil.copytree(original[0], tmp_path / name)
        os.utime(tmp_path / name / "snapshot" / "config.json", (1_000_000 + age, 1_000_000 + age))
    (tmp_path / "unfinished").mkdir()
    assert find_run(None, tmp_path) == tmp_path / "new"
    assert find_run("old", tmp_path) == tmp_path / "old"
    assert find_run(str(tmp_path / "old"), tmp_path) == tmp_path / "old"
    with pytest.raises(SnapshotError, match="'unfinished' holds no snapshot"):
        find_run("unfinished", tmp_path)
    with pytest.raises(SnapshotError, match="train one first"):
        find_run(None, tmp_path / "empty")


# ---------------------------------------------------------------- checkpoints


def saved(run: Path, step: int, keep: int = 2) -> Path:
    weight = torch.full((3,), float(step), requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    state = {"stage": 0, "step": step, "task": {"best": 1.5}}
    return save_checkpoint(run, f"00-{step:08d}", {"w": weight}, optimizer.state_dict(), state, keep)


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    tensors, optimizer, state = load_checkpoint(saved(tmp_path, 7))
    assert state == {"stage": 0, "step": 7, "task": {"best": 1.5}}
    assert tensors["w"].tolist() == pytest.approx([6.999] * 3, abs=1e-3)
    assert optimizer is not None
    assert optimizer["state"][0]["exp_avg"].tolist() == pytest.approx([0.1] * 3)


def test_checkpoint_without_optimizer(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, "01-00000000", {"w": torch.zeros(2)}, None, {"step": 0}, 2)
    assert load_checkpoint(folder)[1] is None


def test_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 10, 100):
        saved(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["00-00000010", "00-00000100"]
    save_checkpoint(tmp_path, "01-00000000", {"w": torch.zeros(2)}, None, {"step": 0}, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["00-00000100", "01-00000000"]


@pytest.mark.parametrize("broken", ["save_file", "fsync", "rename"])
def test_an_interrupted_write_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    older = saved(tmp_path, 5)

    def power_cut(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    place = {"save_file": (checkpoint, "save_file"), "fsync": (os, "fsync"), "rename": (Path, "rename")}[broken]
    with monkeypatch.context() as patch:
        patch.setattr(*place, power_cut)
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, 6)
    assert list_checkpoints(tmp_path) == [older]
    assert load_checkpoint(older)[2]["step"] == 5
    assert list_checkpoints(tmp_path)[-1] != saved(tmp_path, 6)  # what was left lying does not stand in the way
    assert load_checkpoint(list_checkpoints(tmp_path)[-1])[2]["step"] == 6


class Malicious:
    """Pickled, it writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_nothing_pickled_is_run(tmp_path: Path) -> None:
    folder, mark = saved(tmp_path, 5), tmp_path / "executed"
    torch.save({"state": Malicious(mark)}, folder / "optimizer.pt")
    torch.load(folder / "optimizer.pt", weights_only=False)
    assert mark.exists()  # the trap works
    mark.unlink()
    with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported"):
        load_checkpoint(folder)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "tensors.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, 5)
    truncate(folder / name)
    with pytest.raises(SnapshotError, match="is damaged") as refusal:
        load_checkpoint(folder)
    assert str(folder) in one_sentence(refusal.value)


def test_module_tensors_round_trip_and_mismatch() -> None:
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    tensors = module_tensors({"a": first, "ab": torch.nn.Linear(5, 5)})
    load_module_tensors({"a": second}, tensors)
    assert torch.equal(first.weight, second.weight)
    with pytest.raises(SnapshotError, match="does not fit the part 'a'"):
        load_module_tensors({"a": torch.nn.Linear(4, 2)}, tensors)
