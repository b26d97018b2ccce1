"""Whole runs in seconds: end to end, stopped and resumed, shared among processes and micro-batches."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CPU, training_tree

from ldlm_cli.checkpoint import Snapshot, list_checkpoints, load_snapshot
from ldlm_cli.errors import LdlmError, RecipeError, UsageError
from ldlm_cli.generate import GeneratedText, Generator, SamplingOptions, generate_texts, reconstruct
from ldlm_cli.recipe.load import dump_recipe
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.recipe.stage_schema import OptimizerRecipe
from ldlm_cli.runtime import Runtime, share_rows
from ldlm_cli.training.ema import build_ema
from ldlm_cli.training.loop import check_finite
from ldlm_cli.training.optimizer import build_optimizer, clip_parts, lr_at
from ldlm_cli.training.run import run_recipe

ROOT = Path(__file__).parents[1]
CLOCK = {"tokens_per_second"}
Metrics = dict[tuple[str, int], dict[str, float]]


class Stopped(Exception):
    """What a test's reporter raises to stop a run."""


class Recorder:
    """A reporter that keeps what it hears, and stops the run after a logged step when asked to."""

    def __init__(self, stop_at: tuple[str, int] | None = None) -> None:
        self.stop_at, self.stages, self.previews, self.started = stop_at, [], [], []

    def stage_started(self, name: str, index: int, total_stages: int, total_steps: int, start_step: int) -> None:
        self.started.append((name, start_step))

    def step_logged(self, metrics: dict[str, Any]) -> None:
        if (metrics["stage"], metrics["step"]) == self.stop_at:
            raise Stopped

    def preview(self, text: str) -> None:
        self.previews.append(text)

    def alarm(self, message: str) -> None: ...

    def stage_finished(self, name: str, seconds: float) -> None:
        self.stages.append(name)

    def note(self, message: str) -> None: ...


def changed(tree: dict[str, Any], **fields: Any) -> Recipe:
    """The recipe with dotted fields changed, `__` for the dots."""
    tree = json.loads(json.dumps(tree))
    for dotted, value in fields.items():
        *sections, name = dotted.split("__")
        here = tree
        for section in sections:
            here = here.setdefault(section, {})
        here[name] = value
    return Recipe.model_validate(tree)


def metrics_of(run: Path) -> Metrics:
    """Logged numbers by (stage, step), without those that depend on the clock; of a step logged twice the later one."""
    found: Metrics = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        key = (row.pop("stage"), row.pop("step"))
        found[key] = {name: value for name, value in row.items() if name not in CLOCK}
    return found


def largest_difference(first: Metrics, second: Metrics) -> float:
    """Largest relative difference over all logged numbers, 1 as the least scale."""
    assert first.keys() == second.keys()
    worst = 0.0
    for key, row in first.items():
        assert row.keys() == second[key].keys()
        for name, value in row.items():
            worst = max(worst, abs(value - second[key][name]) / max(1.0, abs(value)))
    return worst


def losses_only(metrics: Metrics) -> Metrics:
    names = ("diffusion", "hidden", "token", "token_accuracy", "nats_per_token", "held_out_nats_per_token", "z_std")
    return {key: {name: row[name] for name in names if name in row} for key, row in metrics.items()}


def config_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "snapshot" / "config.json").read_text())


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.start("fp32")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return training_tree(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any], runtime: Runtime) -> tuple[Path, Recorder]:
    """The run that all others are compared to: one process, never stopped."""
    out, recorder = tmp_path_factory.mktemp("runs") / "straight", Recorder()
    result = run_recipe(changed(tree), "joint", out=out, fresh=False, reporter=recorder, runtime=runtime)
    assert result["status"] == "finished"
    return out, recorder


@pytest.fixture(scope="module")
def snapshot(straight: tuple[Path, Recorder]) -> Snapshot:
    return load_snapshot(straight[0])


# ------------------------------------------------------------------------ a whole run


def test_a_run_leaves_all_that_it_should(straight: tuple[Path, Recorder]) -> None:
    run, recorder = straight
    assert recorder.stages == ["encoder", "joint"]
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["finished"] is True
    assert manifest["processes"] == 1
    assert manifest["precision"] == "fp32"
    metrics = metrics_of(run)
    assert [step for stage, step in metrics if stage == "joint"] == list(range(2, 21, 2))
    assert all(value == pytest.approx(value) for row in metrics.values() for value in row.values())  # none is nan
    last = metrics[("joint", 20)]
    assert last["time_refreshes"] >= 1
    assert last["encoder_gate"] == 1.0
    assert 0 < last["z_std"] <= 1.01
    assert metrics[("joint", 20)]["hidden"] < metrics[("joint", 2)]["hidden"]
    assert (run / "token_encoder" / "language_model.json").is_file()
    config = config_of(run)
    assert sum(config["length_histogram"]) > 0
    assert sum(config["time_probabilities"]) == pytest.approx(1)


def test_a_finished_run_says_so(straight: tuple[Path, Recorder], tree: dict[str, Any], runtime: Runtime) -> None:
    recorder = Recorder()
    result = run_recipe(changed(tree), "joint", out=straight[0], fresh=False, reporter=recorder, runtime=runtime)
    assert result["status"] == "already finished"
    assert recorder.started == []


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("seed", 3, r"seed \(0 there, 3 now\)"),
        ("stages__joint__decoder_noise_std", 0.5, r"stages\.joint\.decoder_noise_std \(0\.2 there, 0\.5 now\)"),
    ],
)
def test_a_changed_recipe_is_refused_by_field(
    straight: tuple[Path, Recorder], tree: dict[str, Any], runtime: Runtime, field: str, value: Any, named: str
) -> None:
    other = changed(tree, **{field: value})
    with pytest.raises(RecipeError, match=named):
        run_recipe(other, "joint", out=straight[0], fresh=False, reporter=Recorder(), runtime=runtime)


def test_an_unknown_plan_is_refused(tree: dict[str, Any], tmp_path: Path, runtime: Runtime) -> None:
    with pytest.raises(RecipeError, match="no plan 'sequential'; it has: joint"):
        run_recipe(changed(tree), "sequential", out=tmp_path, fresh=False, reporter=Recorder(), runtime=runtime)


def test_previews_do_not_change_the_training(
    straight: tuple[Path, Recorder], tree: dict[str, Any], tmp_path: Path, runtime: Runtime
) -> None:
    recorder = Recorder()
    recipe = changed(tree, training__sample_every_steps=10)
    run_recipe(recipe, "joint", out=tmp_path / "run", fresh=False, reporter=recorder, runtime=runtime)
    assert len(recorder.previews) == 2
    assert config_of(tmp_path / "run")["hash"] == config_of(straight[0])["hash"]


# --------------------------------------------------------------------- stop and resume


def resumed(tree: dict[str, Any], out: Path, runtime: Runtime, stop_at: tuple[str, int]) -> Recorder:
    """Stop a run after that logged step, start it again; what the second start said."""
    recipe = changed(tree)
    with pytest.raises(Stopped):
        run_recipe(recipe, "joint", out=out, fresh=False, reporter=Recorder(stop_at), runtime=runtime)
    recorder = Recorder()
    result = run_recipe(recipe, "joint", out=out, fresh=False, reporter=recorder, runtime=runtime)
    assert result["status"] == "finished"
    return recorder


@pytest.mark.parametrize(
    ("stop_at", "goes_on"),
    [
        (("encoder", 8), [("encoder", 6), ("joint", 0)]),
        (("joint", 8), [("joint", 6)]),
        (("joint", 16), [("joint", 12)]),
    ],
)
def test_a_resumed_run_is_the_same_run(
    straight: tuple[Path, Recorder],
    tree: dict[str, Any],
    tmp_path: Path,
    runtime: Runtime,
    stop_at: tuple[str, int],
    goes_on: list[tuple[str, int]],
) -> None:
    torch.manual_seed(99)  # a new process would not have the old one's global state
    recorder = resumed(tree, tmp_path / "run", runtime, stop_at)
    assert recorder.started == goes_on
    assert config_of(tmp_path / "run")["hash"] == config_of(straight[0])["hash"]
    assert config_of(tmp_path / "run")["time_probabilities"] == config_of(straight[0])["time_probabilities"]
    assert metrics_of(tmp_path / "run") == metrics_of(straight[0])


def test_a_run_stopped_before_a_stage_has_saved_goes_on(
    straight: tuple[Path, Recorder], tree: dict[str, Any], tmp_path: Path, runtime: Runtime
) -> None:
    recorder = resumed(tree, tmp_path / "run", runtime, ("joint", 4))
    assert recorder.started == [("joint", 0)]
    assert config_of(tmp_path / "run")["hash"] == config_of(straight[0])["hash"]


def test_fresh_starts_beside_the_old_run(tree: dict[str, Any], tmp_path: Path, runtime: Runtime) -> None:
    (tmp_path / "run").mkdir()
    recorder = Recorder(("encoder", 2))
    with pytest.raises(Stopped):
        run_recipe(changed(tree), "joint", out=tmp_path / "run", fresh=True, reporter=recorder, runtime=runtime)
    assert (tmp_path / "run-2" / "manifest.json").is_file()
    assert not list((tmp_path / "run").iterdir())
    assert list_checkpoints(tmp_path / "run-2") == []


@pytest.fixture(scope="module")
def sequential(tree: dict[str, Any]) -> dict[str, Any]:
    """The same parts, the autoencoder first and then the denoiser on standardised latents."""
    changed_tree = json.loads(json.dumps(tree))
    joint = changed_tree["stages"].pop("joint")
    autoencoder = {"trains": ["latent_encoder", "latent_decoder", "token_decoder"], "losses": {"hidden": 1, "token": 1}}
    denoiser = {"trains": ["denoiser"], "losses": {"diffusion": 1}, "standardize_latents": True}
    changed_tree["stages"] |= {
        "autoencoder": joint | {"steps": 8} | autoencoder,
        "denoiser": joint | {"steps": 8} | denoiser,
    }
    changed_tree["plans"] = {"joint": ["encoder", "autoencoder", "denoiser"]}
    return changed_tree


def test_sequential_plan_standardises_and_resumes(sequential: dict[str, Any], tmp_path: Path, runtime: Runtime) -> None:
    run_recipe(changed(sequential), "joint", out=tmp_path / "a", fresh=False, reporter=Recorder(), runtime=runtime)
    for stop_at, goes_on in ((("denoiser", 4), 0), (("denoiser", 8), 6)):
        out = tmp_path / f"stopped-{stop_at[1]}"
        assert resumed(sequential, out, runtime, stop_at).started == [("denoiser", goes_on)]
        assert config_of(out)["hash"] == config_of(tmp_path / "a")["hash"]
    model = load_snapshot(tmp_path / "a").model
    assert not torch.equal(model.latent_normalizer.mean, torch.zeros(16))
    metrics = metrics_of(tmp_path / "a")
    assert "hidden" not in metrics[("denoiser", 8)]
    assert metrics[("denoiser", 8)]["z_std"] == pytest.approx(1, abs=0.3)


def test_a_plan_that_is_not_finished_leaves_no_snapshot(
    sequential: dict[str, Any], tmp_path: Path, runtime: Runtime
) -> None:
    with pytest.raises(Stopped):
        run_recipe(
            changed(sequential),
            "joint",
            out=tmp_path,
            fresh=False,
            reporter=Recorder(("denoiser", 4)),
            runtime=runtime,
        )
    assert not (tmp_path / "snapshot").exists()


# ------------------------------------------------------- micro-batches and processes


def test_micro_batches_do_not_change_the_run(
    straight: tuple[Path, Recorder], tree: dict[str, Any], tmp_path: Path, runtime: Runtime
) -> None:
    recipe = changed(tree, stages__joint__micro_batches=2, stages__encoder__micro_batches=3)
    run_recipe(recipe, "joint", out=tmp_path / "run", fresh=False, reporter=Recorder(), runtime=runtime)
    difference = largest_difference(losses_only(metrics_of(straight[0])), losses_only(metrics_of(tmp_path / "run")))
    print(f"one micro-batch against two or three: largest difference of a logged loss {difference:.2g}")
    assert difference < 1e-5


def test_two_processes_do_not_change_the_run(
    straight: tuple[Path, Recorder], tree: dict[str, Any], tmp_path: Path
) -> None:
    dump_recipe(changed(tree), tmp_path / "small.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ldlm_cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "train-joint", "--recipe", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "run")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["processes"] == 2
    difference = largest_difference(losses_only(metrics_of(straight[0])), losses_only(metrics_of(tmp_path / "run")))
    print(f"one process against two: largest difference of a logged loss {difference:.2g}")
    assert difference < 1e-5


@pytest.mark.parametrize("rows", [1, 5, 8, 13])
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_rows_are_shared_evenly_and_each_once(rows: int, micro_batches: int, processes: int) -> None:
    shares = [share_rows(rows, micro_batches, processes, rank) for rank in range(processes)]
    assert {len(share) for share in shares} == {micro_batches}
    assert len({len(piece) for share in shares for piece in share}) == 1
    held = sorted(row for share in shares for piece in share for row in piece if row >= 0)
    assert held == list(range(rows))


# ------------------------------------------------------------------------- generation


class OneOf:
    """Stands in for the runtime of process `rank` of several; what is gathered is left to the test."""

    def __init__(self, rank: int, num_processes: int) -> None:
        self.rank, self.num_processes, self.device = rank, num_processes, CPU

    def autocast(self) -> Any:
        return nullcontext()

    def gather_objects(self, values: list[Any]) -> list[Any]:
        return values


OPTIONS: dict[str, dict[str, Any]] = {
    "ddim": {},
    "ancestral": {"sampler": "ancestral", "token_temperature": 1.0},
    "euler": {"sampler": "euler", "steps": 30},
    "warped, guided": {"grid": "warped", "guidance": 1.5, "temperature": 0.9},
}


def sampled(snapshot: Snapshot, runtime: Any, **options: Any) -> list[GeneratedText]:
    return generate_texts(
        snapshot, SamplingOptions(**{"num": 7, "steps": 4, "batch_size": 2} | options), runtime=runtime
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_processes_share_the_same_texts(snapshot: Snapshot, runtime: Runtime, name: str) -> None:
    alone = sampled(snapshot, runtime, **OPTIONS[name])
    shares = [sampled(snapshot, OneOf(rank, 2), **OPTIONS[name]) for rank in range(2)]
    assert [len(share) for share in shares] == [4, 3]
    assert sorted(shares[0] + shares[1], key=lambda text: text.index) == alone
    assert [text.index for text in alone] == list(range(7))
    assert len({tuple(text.token_ids) for text in alone}) > 1


def test_a_text_does_not_change_when_more_are_sampled(snapshot: Snapshot, runtime: Runtime) -> None:
    few, more = (
        sampled(snapshot, runtime, num=num, length=20, token_temperature=1.0, sampler="ancestral") for num in (3, 8)
    )
    assert more[:3] == few
    assert sampled(snapshot, runtime, num=3, length=20, token_temperature=1.0, sampler="ancestral", seed=1) != few


def test_lengths_belong_to_the_index_and_to_the_training_texts(snapshot: Snapshot, runtime: Runtime) -> None:
    few, more = (sampled(snapshot, runtime, num=num, steps=1) for num in (3, 6))
    assert [text.length for text in more[:3]] == [text.length for text in few]
    assert all(snapshot.length_histogram[text.length] > 0 for text in more)
    assert all(1 <= len(text.token_ids) <= text.length for text in more)


def test_lengths_follow_the_histogram(snapshot: Snapshot, runtime: Runtime) -> None:
    histogram = [0, 0, 0, 1, 0, 3]
    build: Callable[..., Generator] = Generator
    options = SamplingOptions(num=400)
    lengths = build(
        snapshot.model, snapshot.recipe, snapshot.vocabulary, torch.tensor(histogram).numpy(), None, options, runtime
    ).lengths()
    assert set(lengths) == {3, 5}
    assert lengths.count(5) / 400 == pytest.approx(0.75, abs=0.07)


def test_texts_end_at_the_first_end_token(snapshot: Snapshot, runtime: Runtime) -> None:
    eos = snapshot.vocabulary.eos_id
    texts = sampled(snapshot, runtime, num=6, token_temperature=5.0, length=64)
    assert all(eos not in text.token_ids[:-1] for text in texts)
    assert all(snapshot.vocabulary.decode(text.token_ids) == text.text for text in texts)


def test_live_view_hears_every_step(snapshot: Snapshot, runtime: Runtime) -> None:
    heard: list[tuple[int, int, str]] = []
    batches: list[tuple[int, int]] = []
    texts = generate_texts(
        snapshot,
        SamplingOptions(num=3, steps=3, batch_size=2, length=12),
        runtime=runtime,
        on_step=lambda *args: heard.append(args),
        on_batch=lambda *args: batches.append(args),
    )
    assert [(step, total) for step, total, _ in heard] == [(1, 3), (2, 3), (3, 3)]
    assert heard[-1][2] == texts[0].text
    assert batches == [(2, 3), (3, 3)]


def test_unknown_sampler_and_unstable_euler_are_refused(snapshot: Snapshot, runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="unknown sampler 'heun'; known: ddim, ancestral, euler"):
        sampled(snapshot, runtime, sampler="heun")
    with pytest.raises(UsageError, match=r"use at least \d+"):
        sampled(snapshot, runtime, sampler="euler", steps=3)


def test_reconstruction_depends_on_noise_and_seed(snapshot: Snapshot, runtime: Runtime) -> None:
    ids = torch.randint(5, 200, (3, 15), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 15, dtype=torch.bool)
    clean = reconstruct(snapshot, ids, mask, runtime=runtime)
    assert clean.shape == ids.shape
    assert torch.equal(clean, reconstruct(snapshot, ids, mask, runtime=runtime, seed=4))
    noised = [reconstruct(snapshot, ids, mask, runtime=runtime, noise_std=3.0, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(noised[0], noised[1])
    assert not torch.equal(noised[0], noised[2])


# --------------------------------------------------------------- optimizer and averages


def test_learning_rate_by_step() -> None:
    recipe = OptimizerRecipe(learning_rate=0.1, warmup_steps=4, final_share=0.2)
    assert [lr_at(step, 24, recipe) for step in (0, 1, 3, 4)] == pytest.approx([0.025, 0.05, 0.1, 0.1])
    assert lr_at(14, 24, recipe) == pytest.approx(0.06)  # half-way down
    assert lr_at(24, 24, recipe) == pytest.approx(0.02)
    constant = OptimizerRecipe(learning_rate=0.1, warmup_steps=0, schedule="constant")
    assert {lr_at(step, 24, constant) for step in range(24)} == {0.1}


def test_each_part_is_clipped_on_its_own() -> None:
    parts = {name: torch.nn.Linear(2, 1, bias=False) for name in ("a", "b")}
    for part, size in zip(parts.values(), (100.0, 0.01), strict=True):
        part.weight.grad = torch.tensor([[3.0, 4.0]]) * size / 5
    norms = clip_parts(parts, 1.0)
    assert {name: float(norm) for name, norm in norms.items()} == pytest.approx({"a": 100.0, "b": 0.01})
    assert [float(part.weight.grad.norm()) for part in parts.values()] == pytest.approx([1.0, 0.01], rel=1e-4)


def test_only_matrices_decay() -> None:
    part = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    groups = build_optimizer({"part": part}, OptimizerRecipe(weight_decay=0.1)).param_groups
    assert {tuple(p.shape): group["weight_decay"] for group in groups for p in group["params"]} == {
        (3, 3): 0.1,
        (3,): 0,
    }
    assert sum(len(group["params"]) for group in groups) == 4


def test_average_forgets_the_start_of_a_short_run() -> None:
    part = torch.nn.Linear(1, 1, bias=False)
    ema = build_ema(torch.nn.ModuleDict({"part": part}), 0.999)
    for value in range(30):
        with torch.no_grad():
            part.weight.fill_(float(value > 5))
        ema.update_parameters(torch.nn.ModuleDict({"part": part}))
    assert float(next(ema.module.parameters()).detach()) > 0.95


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    check_finite({"token": 1.0, "step": 3, "stage": "joint"}, 3)
    with pytest.raises(LdlmError, match="token not finite at step 3"):
        check_finite({"token": float("nan"), "hidden": 1.0}, 3)
