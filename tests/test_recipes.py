"""Every shipped recipe: loads, builds, trains when made small, and keeps the bits of a latent."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CPU, VOCAB, random_batch, random_token_encoder

from ldlm_cli.core.draws import draw_rows
from ldlm_cli.core.gate import Gate
from ldlm_cli.core.model import LDLM, build_parts, parameters_by_part
from ldlm_cli.core.objective import LatentObjective
from ldlm_cli.core.schedule import build_schedule, latent_bits
from ldlm_cli.core.timesteps import TIMESTEPS
from ldlm_cli.evaluation.likeness import flatten
from ldlm_cli.recipe.load import load_recipe
from ldlm_cli.recipe.resolve import recipe_for_plan
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.recipe.stage_schema import StageRecipe

FOLDER = Path(__file__).parents[1] / "recipes"
FILES = sorted(FOLDER.rglob("*.yaml"))
PAPER_BITS = 58.4

ABLATIONS = [path for path in FILES if path.parent.name == "ablations"]
WHOLE = [path for path in FILES if path not in ABLATIONS]


def over(paths: list[Path]) -> pytest.MarkDecorator:
    """Run a test once for each of these recipes."""
    return pytest.mark.parametrize("path", paths, ids=[str(path.relative_to(FOLDER)) for path in paths])


def latent_stages(recipe: Recipe) -> dict[str, StageRecipe]:
    """The latent stages that a plan of the recipe runs, in order."""
    names = [name for plan in recipe.plans.values() for name in plan]
    return {name: recipe.stages[name] for name in names if recipe.stages[name].kind == "latent"}


@over(FILES)
def test_recipe_loads_and_says_what_it_is(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.description
    assert recipe.plans


@over(FILES)
def test_recipe_builds_without_memory(path: Path) -> None:
    recipe = load_recipe(path)
    vocabulary = recipe.token_encoder.vocab_size or recipe.data.vocab_size
    found = parameters_by_part(recipe, vocabulary)
    assert all(count > 0 for count in found.values())
    for plan in recipe.plans:
        assert parameters_by_part(recipe_for_plan(recipe, plan), vocabulary)["denoiser"] > 0


@over(FILES)
def test_latents_keep_the_bits_of_the_paper(path: Path) -> None:
    """58 bits a token (method.md, width rule)."""
    recipe = load_recipe(path)
    if path.stem == "tiny" or not latent_stages(recipe):
        pytest.skip("too small to keep the rule" if path.stem == "tiny" else "trains no latents")
    latents = recipe.model.latents
    per_latent = recipe.data.max_len_tokens / (latents.slots or recipe.data.max_len_tokens / latents.stride)
    # COSMOS corrupts its input in place of decoder noise.
    reading = {name: stage for name, stage in latent_stages(recipe).items() if stage.losses.get("hidden")}
    noises = {name: stage.decoder_noise_std for name, stage in reading.items() if not stage.corruption.active}
    for name, noise in noises.items():
        bits = latent_bits(latents.width, noise) / per_latent
        print(f"{path.stem}.{name}: width {latents.width}, sigma_dec {noise}: {bits:.1f} bits a token")
        if path.parent.name == "ablations":
            continue
        assert bits == pytest.approx(PAPER_BITS, rel=0.1)


@over(WHOLE)
def test_schedule_moves_with_the_decoder_noise(path: Path) -> None:
    """The decoder's noise level lies at t = 0.5 (the paper: d = sigma_dec) or, by a recipe's choice, from t = 0.35."""
    recipe = load_recipe(path)
    for stage in latent_stages(recipe).values():
        if stage.losses.get("hidden") and stage.decoder_noise_std > 0:
            place = math.atan(stage.decoder_noise_std / recipe.diffusion.schedule_scale) * 2 / math.pi
            assert 0.35 < place < 0.53


@over(FILES)
def test_sequential_plans_take_the_steps_and_settings_of_joint(path: Path) -> None:
    recipe = load_recipe(path, ["stages.joint.steps=1001", "stages.joint.optimizer.beta1=0.8"])
    joint = recipe.stages["joint"]
    plans = [names for plan, names in recipe.plans.items() if plan.startswith("sequential")]
    assert plans or recipe.plans.keys() == {"lm"}
    for names in plans:
        stages = [recipe.stages[name] for name in names if recipe.stages[name].kind == "latent"]
        assert sum(stage.steps for stage in stages) == 1001
        for stage in stages:
            for field in ("batch_tokens", "optimizer", "ema_decay", "times", "seed_offset"):
                assert getattr(stage, field) == getattr(joint, field)


@over(ABLATIONS)
def test_an_ablation_changes_one_thing(path: Path) -> None:
    base = flatten(load_recipe(FOLDER / "base.yaml").model_dump(mode="json"))
    ours = flatten(load_recipe(path).model_dump(mode="json"))
    # The stages of sequential plans follow those of joint.
    differing = {name for name in base if ours[name] != base[name] and not name.startswith("stages.")}
    joint = {name for name in base if ours[name] != base[name] and name.startswith("stages.joint.")}
    changed = (differing | joint) - {"name", "description"}
    most = {"naive-joint": 5, "no-hidden-loss": 2, "waiting-warmup": 1, "learned-slots": 2}.get(path.stem, 1)
    assert 0 < len(changed) <= most, changed


def small_version(path: Path) -> Recipe:
    """The recipe with all its choices, at width 16."""
    recipe = load_recipe(path)
    changes: dict[str, Any] = {
        "token_encoder.width": 16,
        "token_encoder.heads": 2,
        "token_encoder.vocab_size": "null",
        "model.latents.width": 16,
    }
    for tower in ("latent_encoder", "latent_decoder", "token_decoder", "denoiser"):
        changes |= {f"model.{tower}.layers": 1, f"model.{tower}.heads": 2}
    if recipe.model.latents.slots:
        changes["model.latents.slots"] = 4
    return load_recipe(path, [f"{key}={value}" for key, value in changes.items()])


@over(FILES)
def test_recipe_takes_two_steps_when_made_small(path: Path) -> None:
    recipe = small_version(path)
    stages = latent_stages(recipe)
    model = LDLM(build_parts(recipe, VOCAB), random_token_encoder(16), recipe)
    ids, mask = random_batch([12, 7, 9], 12)
    latents, latent_count = model.layout.count(12), int(model.layout.mask(mask).sum())
    for stage in stages.values():
        for name, part in model.parts.items():
            part.requires_grad_(name in stage.trains)
        schedule = build_schedule(recipe.diffusion.schedule, recipe.diffusion.schedule_scale)
        objective = LatentObjective(model, stage, schedule, recipe.diffusion.self_conditioning_share)
        trained = {name: list(model.part(name).parameters()) for name in stage.trains}
        before = {name: torch.cat([p.detach().flatten().clone() for p in held]) for name, held in trained.items()}
        optimizer = torch.optim.AdamW([p for held in trained.values() for p in held], lr=1e-3)
        times, gate = TIMESTEPS[stage.times.kind](stage.times), Gate(stage.gate)
        for step in range(2):
            draws = draw_rows(range(3), latents, 16, CPU, step)
            t = torch.from_numpy(times.times(draws.uniform[:, 0].numpy()))
            losses = objective(
                ids, mask, torch.ones(3), t, draws, gate.at(step), int(mask.sum()), latent_count, keep_latents=True
            )
            assert losses.total.isfinite()
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
        for name, held in trained.items():
            after = torch.cat([p.detach().flatten() for p in held])
            assert after.isfinite().all()
            assert not torch.equal(after, before[name]), f"{name} did not move"
