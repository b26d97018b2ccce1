"""Joint and sequential training of one recipe: the same start and data; what a stage trains and what it leaves."""

from __future__ import annotations

import copy
import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CPU, draws_of, model_recipe, random_batch, tiny_model, training_tree
from safetensors.torch import load_file
from test_training import Recorder, Stopped, changed, largest_difference, losses_only, metrics_of

from ldlm_cli.checkpoint import list_checkpoints, load_checkpoint, load_snapshot
from ldlm_cli.cli import app as app_module
from ldlm_cli.core.corruption import corrupt_features, draw_corruption, drop_latents
from ldlm_cli.core.model import LDLM, PARTS
from ldlm_cli.core.objective import LatentObjective
from ldlm_cli.core.schedule import TangentSchedule
from ldlm_cli.errors import RecipeError
from ldlm_cli.evaluation.reconstruction import trained_decoder_noise
from ldlm_cli.generate import SamplingOptions, generate_texts
from ldlm_cli.recipe.load import load_recipe
from ldlm_cli.recipe.resolve import recipe_for_plan, resolve_stages
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.recipe.stage_schema import CorruptionRecipe, StageRecipe
from ldlm_cli.runtime import Runtime
from ldlm_cli.training.latent import LatentTask
from ldlm_cli.training.run import run_recipe

WIDTH = 16
AUTOENCODER = ("latent_encoder", "latent_decoder", "token_decoder")


def sequential_recipe(cache: Path) -> Recipe:
    """The tiny recipe with the two stages as base.yaml has them."""
    tree = training_tree(cache)
    tree["stages"] |= {
        "autoencoder": {
            "extends": "joint",
            "steps": {"of": "joint", "from": 0.0, "to": 0.5},
            "trains": list(AUTOENCODER),
            "losses": {"diffusion": 0},
        },
        "diffusion": {
            "extends": "joint",
            "steps": {"of": "joint", "from": 0.5, "to": 1.0},
            "trains": ["denoiser"],
            "losses": {"hidden": 0, "token": 0},
            "gate": {"kind": "zero"},
            "standardize_latents": True,
        },
        "cosmos-autoencoder": {
            "extends": "autoencoder",
            "token_loss_reaches": "latent_encoder",
            "decoder_noise_std": 0.0,
            "corruption": {"masked_share": 0.3, "noise_std": 0.7, "latent_dropout": 0.4},
        },
        "feature-decoder": {"extends": "autoencoder", "trains": ["token_decoder"], "losses": {"hidden": 0}},
    }
    tree["token_encoder"]["width"] = 32  # wider than the latents
    tree["plans"]["sequential"] = ["encoder", "autoencoder", "diffusion"]
    tree["plans"]["sequential-cosmos"] = ["encoder", "cosmos-autoencoder", "diffusion"]
    tree["plans"]["sequential-frozen-features"] = ["encoder", "feature-decoder", "diffusion"]
    tree["plan_changes"] = {"sequential-frozen-features": {"model": {"latents": {"kind": "features"}}}}
    tree["training"]["keep_checkpoints"] = 20
    return changed(resolve_stages(tree, "recipe"))


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.start("fp32")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return sequential_recipe(tmp_path_factory.mktemp("data"))


def weights_of(model: LDLM) -> str:
    """A fingerprint of all trained parts."""
    digest = hashlib.sha256()
    for name in PARTS:
        for value in model.part(name).state_dict().values():
            digest.update(value.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, recipe: Recipe, runtime: Runtime
) -> dict[str, tuple[Path, list[tuple[str, str]]]]:
    """For each plan its run, and for each latent step fingerprints of its weights before and of its batch and noise."""
    found: dict[str, tuple[Path, list[tuple[str, str]]]] = {}
    loss = LatentTask.loss
    for plan in ("joint", "sequential"):
        seen: list[tuple[str, str]] = []

        def recorded(task: LatentTask, prepared: Any, batch: Any, *rest: Any, seen: Any = seen) -> Any:
            inputs = batch.token_ids.tobytes() + batch.mask.tobytes()
            forward = prepared.forward

            def listening(*args: Any) -> Any:
                noise = args[4].noise.numpy().tobytes() + args[4].uniform.numpy().tobytes()
                seen.append((weights_of(task.model), hashlib.sha256(inputs + noise).hexdigest()))
                return forward(*args)

            prepared.forward = listening
            try:
                return loss(task, prepared, batch, *rest)
            finally:
                prepared.forward = forward

        out = tmp_path_factory.mktemp("runs") / plan
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LatentTask, "loss", recorded)
            run_recipe(recipe, plan, out=out, fresh=False, reporter=Recorder(), runtime=runtime)
        found[plan] = out, seen
    return found


def test_joint_and_sequential_start_alike_and_see_the_same(runs: Any) -> None:
    joint, sequential = (runs[plan][1] for plan in ("joint", "sequential"))
    assert len(joint) == len(sequential) == 20  # total steps are equal
    assert joint[0][0] == sequential[0][0]
    assert [inputs for _, inputs in joint] == [inputs for _, inputs in sequential]
    assert len({inputs for _, inputs in joint}) == 20


def test_the_denoiser_stage_trains_nothing_else(runs: Any) -> None:
    run = runs["sequential"][0]
    boundary = load_checkpoint(next(path for path in list_checkpoints(run) if path.name == "02-00000000"))[0]
    checkpoints = [load_checkpoint(path)[0] for path in list_checkpoints(run) if path.name.startswith("02-0000000")]
    assert len(checkpoints) == 2
    for part in PARTS:
        final = load_file(run / "snapshot" / f"{part}.safetensors")
        for key, value in final.items():
            name = f"{part}.{key}"
            if part in AUTOENCODER:
                assert all(torch.equal(tensors[name], value) for tensors in (boundary, *checkpoints)), name
        if part == "denoiser":
            assert not all(torch.equal(boundary[f"{part}.{key}"], value) for key, value in final.items())


def test_the_autoencoder_stage_leaves_the_denoiser_as_it_was_drawn(runs: Any) -> None:
    run = runs["sequential"][0]
    saved = {path.name: load_checkpoint(path)[0] for path in list_checkpoints(run)}
    drawn, boundary = saved["01-00000006"], saved["02-00000000"]
    names = [name for name in drawn if name.startswith("denoiser.")]
    assert names
    assert all(torch.equal(drawn[name], boundary[name]) for name in names)


def test_latents_are_standardised_between_the_stages(runs: Any) -> None:
    run = runs["sequential"][0]
    model = load_snapshot(run).model
    ids, mask = random_batch([12, 9, 5], 12)
    with torch.no_grad():
        h = model.hidden(ids, mask)
        own, z = model.part("latent_encoder")(h, mask), model.encode(h, mask)
        assert not torch.allclose(own, z, atol=1e-2)
        torch.testing.assert_close(model.latent_normalizer.invert(z), own)
        decoded = model.part("latent_decoder")(own, mask, mask)
        torch.testing.assert_close(model.decode_hidden(z, mask, mask), decoded, rtol=1e-4, atol=1e-4)
    metrics = metrics_of(run)
    # Logged on the encoder's own scale, so that the curve goes on where the first stage ended.
    assert metrics[("diffusion", 2)]["z_std"] == pytest.approx(metrics[("autoencoder", 10)]["z_std"], rel=0.2)


@pytest.mark.parametrize(
    ("stop_at", "goes_on"),
    [
        (("autoencoder", 10), [("autoencoder", 6), ("diffusion", 0)]),
        (("diffusion", 2), [("diffusion", 0)]),
        (("diffusion", 8), [("diffusion", 6)]),
    ],
)
def test_a_run_stopped_about_the_stage_boundary_is_the_same_run(
    runs: Any,
    recipe: Recipe,
    tmp_path: Path,
    runtime: Runtime,
    stop_at: tuple[str, int],
    goes_on: list[tuple[str, int]],
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        run_recipe(recipe, "sequential", out=out, fresh=False, reporter=Recorder(stop_at), runtime=runtime)
    torch.manual_seed(99)
    recorder = Recorder()
    run_recipe(recipe, "sequential", out=out, fresh=False, reporter=recorder, runtime=runtime)
    assert recorder.started == goes_on
    assert load_snapshot(out).hash == load_snapshot(runs["sequential"][0]).hash
    assert metrics_of(out) == metrics_of(runs["sequential"][0])


# ------------------------------------------------------------------------- variants


def test_the_cosmos_variant_runs_and_does_not_depend_on_micro_batches(
    recipe: Recipe, tmp_path: Path, runtime: Runtime
) -> None:
    tree = recipe.model_dump(mode="json")
    for pieces in (1, 2):
        tree["stages"]["cosmos-autoencoder"]["micro_batches"] = pieces
        out = tmp_path / str(pieces)
        run_recipe(changed(tree), "sequential-cosmos", out=out, fresh=False, reporter=Recorder(), runtime=runtime)
    whole, halves = (losses_only(metrics_of(tmp_path / name)) for name in ("1", "2"))
    assert largest_difference(whole, halves) < 1e-5
    assert load_snapshot(tmp_path / "1").manifest["plan"] == "sequential-cosmos"


def test_the_frozen_features_variant_denoises_hidden_states(recipe: Recipe, tmp_path: Path, runtime: Runtime) -> None:
    plan = "sequential-frozen-features"
    run_recipe(recipe, plan, out=tmp_path / "run", fresh=False, reporter=Recorder(), runtime=runtime)
    snapshot = load_snapshot(tmp_path / "run")
    assert snapshot.recipe.model.latents.width == snapshot.model.latent_width == 32
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == snapshot.recipe
    model = snapshot.model
    assert not list(model.part("latent_encoder").parameters())
    ids, mask = random_batch([12, 5], 12)
    h = model.hidden(ids, mask)
    torch.testing.assert_close(model.latent_normalizer.invert(model.encode(h, mask)), h)
    texts = generate_texts(snapshot, SamplingOptions(num=2, steps=2), runtime=runtime)
    assert len(texts) == 2
    assert trained_decoder_noise(snapshot.recipe, ["feature-decoder", "diffusion"]) == 0.2
    finished = run_recipe(recipe, plan, out=tmp_path / "run", fresh=False, reporter=Recorder(), runtime=runtime)
    assert finished["status"] == "already finished"


def test_the_recipe_of_a_plan_is_checked_with_what_the_plan_changes(recipe: Recipe) -> None:
    assert recipe_for_plan(recipe, "sequential") is recipe
    features = recipe_for_plan(recipe, "sequential-frozen-features")
    assert (features.model.latents.kind, features.model.latents.width) == ("features", 32)
    assert recipe_for_plan(features, "sequential-frozen-features") == features
    wrong = recipe.model_copy(update={"plan_changes": {"joint": {"model": {"latents": {"widht": 8}}}}})
    with pytest.raises(RecipeError, match="did you mean 'width'"):
        recipe_for_plan(wrong, "joint")


def test_corruption_is_drawn_by_row_and_spoils_what_it_says() -> None:
    shapes = (6, 400), (6, 300)
    draws = draw_corruption(range(40), *shapes, CPU, 3, 1)
    part = draw_corruption([7, 30], *shapes, CPU, 3, 1)
    for name in ("masked", "features", "latents"):
        assert torch.equal(getattr(part, name), getattr(draws, name)[[7, 30]])
    assert 10 <= int(draws.masked.sum()) <= 30
    given = CorruptionRecipe(masked_share=0.3, noise_std=0.7, latent_dropout=0.4)
    h = torch.randn(40, 6, 400, generator=torch.Generator().manual_seed(0))
    spoilt = corrupt_features(h, draws, given)
    masked, noised = spoilt[draws.masked], spoilt[~draws.masked]
    assert float((masked == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(masked[masked != 0], h[draws.masked][masked != 0])
    assert float(noised.std()) == pytest.approx(1, abs=0.01)  # the variance of h
    correlation = float((noised * h[~draws.masked]).mean())
    assert correlation == pytest.approx(math.sqrt(1 - 0.7**2), abs=0.01)
    dropped = drop_latents(torch.ones(40, 6, 300), draws, given)
    assert float((dropped == 0).float().mean()) == pytest.approx(0.4, abs=0.01)
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)
    nothing = CorruptionRecipe()
    assert not nothing.active
    assert torch.equal(corrupt_features(h, draws, nothing), h)


def test_variants_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    def train(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as done:
            app_module.main(("train-sequential", "--recipe", "tiny.yaml", *arguments))
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out + captured.err

    for variant in ((), ("--variant", "mse-noise"), ("--variant", "cosmos"), ("--variant", "frozen-features")):
        code, text = train(*variant, "--dry-run", "--json")
        assert code == 0, text
        plan = "sequential" if variant in ((), ("--variant", "mse-noise")) else f"sequential-{variant[1]}"
        assert f'"plan": "{plan}"' in text
    code, text = train("--variant", "cosmic", "--dry-run")
    assert code == 2
    assert "has no plan 'sequential-cosmic'; it has joint, sequential, sequential-cosmos" in text
    assert len(text.splitlines()) == 1


# ------------------------------------------------------------------------- gradients, bit for bit


def step_inputs(model: LDLM, gate: float, step: int) -> dict[str, Any]:
    ids, mask = random_batch([12, 9, 5, 12], 12, seed=step)
    return {
        "token_ids": ids,
        "token_mask": mask,
        "row_weight": torch.ones(4),
        "t": torch.tensor([0.2, 0.5, 0.8, 0.35], dtype=torch.float64),
        "draws": draws_of(range(4 * step, 4 * step + 4), 12, WIDTH),
        "gate": gate,
        "token_count": int(mask.sum()),
        "latent_count": int(mask.sum()),
    }


def objective(model: LDLM, **fields: Any) -> LatentObjective:
    stage = StageRecipe.model_validate({"decoder_noise_std": 0.3} | fields)
    return LatentObjective(model, stage, TangentSchedule(1.5), 0.5)


def test_gate_zero_is_a_detached_encoder_bit_for_bit() -> None:
    """Trained jointly with gate 0, or with the diffusion loss on latents that were encoded without gradient."""
    together = tiny_model(model_recipe(WIDTH))
    apart = copy.deepcopy(together)
    joint = objective(together)
    alone = [objective(apart, losses={"diffusion": 1}), objective(apart, losses={"hidden": 1, "token": 1})]
    optimizers = [torch.optim.AdamW(model.parts.parameters(), lr=1e-2) for model in (together, apart)]
    for step in range(4):
        joint(**step_inputs(together, 0.0, step)).total.backward()
        apart.part("latent_encoder").requires_grad_(False)
        alone[0](**step_inputs(apart, 1.0, step)).total.backward()
        apart.part("latent_encoder").requires_grad_(True)
        alone[1](**step_inputs(apart, 1.0, step)).total.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for (name, ours), theirs in zip(together.parts.named_parameters(), apart.parts.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def gradient(model: LDLM, part: str) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.part(part).parameters() if p.grad is not None])


@pytest.mark.parametrize("gate", [0.5, 0.125])
def test_the_encoder_gets_exactly_gamma_of_the_diffusion_gradient(gate: float) -> None:
    """Powers of two scale without rounding, so the two gradients are equal bit for bit."""
    found = []
    for value in (1.0, gate):
        model = tiny_model(model_recipe(WIDTH))
        objective(model, losses={"diffusion": 1})(**step_inputs(model, value, 0)).total.backward()
        found.append((gradient(model, "latent_encoder"), gradient(model, "denoiser")))
    (full, denoiser), (scaled, denoiser_again) = found
    assert full.any()
    assert torch.equal(scaled, gate * full)
    assert torch.equal(denoiser, denoiser_again)


@pytest.mark.parametrize(
    ("reaches", "trained"),
    [("token_decoder", ["token_decoder"]), ("latent_encoder", ["latent_encoder", "latent_decoder", "token_decoder"])],
)
def test_how_far_the_token_loss_reaches(reaches: str, trained: list[str]) -> None:
    model = tiny_model(model_recipe(WIDTH))
    built = objective(model, losses={"token": 1}, token_loss_reaches=reaches)
    built(**step_inputs(model, 1.0, 0)).total.backward()
    assert [name for name in PARTS if any(p.grad is not None for p in model.part(name).parameters())] == trained


def test_decoder_noise_has_the_scale_of_the_encoder() -> None:
    """Standardising latents for the denoiser changes nothing of what the decoder sees."""
    model = tiny_model(model_recipe(WIDTH))
    build = objective(model, losses={"hidden": 1})
    before = float(build(**step_inputs(model, 1.0, 0)).sums["hidden"])
    model.latent_normalizer.set_statistics(torch.linspace(-1, 1, WIDTH), torch.linspace(0.2, 2, WIDTH))
    assert float(build(**step_inputs(model, 1.0, 0)).sums["hidden"]) == pytest.approx(before, rel=1e-4)
