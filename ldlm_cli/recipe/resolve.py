"""What a recipe says by reference, as plain values: stages that extend a stage, shares of steps, a plan's changes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from ldlm_cli.errors import RecipeError
from ldlm_cli.recipe.check import check_tree, nearest_name, show_value
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.recipe.stage_schema import StageRecipe

SHARE = ("of", "from", "to")


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`change` over `base`: mappings are merged key by key, everything else (lists, plans) is replaced."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping) and key != "plans"
        merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def resolve_stages(tree: Mapping[str, Any], label: str) -> dict[str, Any]:
    """The tree with every stage written out in plain values.

    `extends: joint` in a stage merges its own fields over those of the stage joint. `steps: {of: joint, from: 0.5, to:
    1.0}` is that share of joint's steps; shares that join add up exactly to the whole.

    Raises:
        RecipeError: a stage refers to one that is not there or, in a circle, to itself, or a share is none; the
        sentence begins with `label`.
    """
    stages = tree.get("stages")
    if not isinstance(stages, Mapping):
        return dict(tree)
    extended = {name: _extended(stages, str(name), label) for name in stages}
    resolved = {
        name: {**stage, "steps": _steps(extended, str(name), label)}
        if isinstance(stage, Mapping) and "steps" in stage
        else stage
        for name, stage in extended.items()
    }
    return {**tree, "stages": resolved}


def with_references(tree: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved tree in which stages refer to others again wherever `written`, the tree as it was, does."""
    stages = dict(tree["stages"])
    for name, stage in (written.get("stages") or {}).items():
        if "extends" in stage:
            stages[name] = copy.deepcopy(stage)
        elif isinstance(stage.get("steps"), Mapping):
            stages[name] = {**stages[name], "steps": dict(stage["steps"])}
    return {**tree, "stages": stages}


def recipe_for_plan(recipe: Recipe, plan: str) -> Recipe:
    """The recipe as a plan of it is run: with what `plan_changes` says of the plan; unchanged when it says nothing.

    Raises:
        RecipeError: the changes do not fit the recipe.
    """
    changes = recipe.plan_changes.get(plan)
    if not changes:
        return recipe
    tree = merge(recipe.model_dump(mode="json"), changes)
    latents, encoder = (tree.get("model") or {}).get("latents"), tree.get("token_encoder")
    if isinstance(latents, dict) and isinstance(encoder, dict) and latents.get("kind") == "features":
        # The plan says what latents are; as hidden states they are so wide and so many.
        latents |= {"width": encoder.get("width"), "stride": 1, "slots": None}
    changed, problems = check_tree(tree, f"recipe '{recipe.name}' with plan_changes.{plan}")
    if changed is None:
        raise RecipeError(problems[0])
    return changed


def check_plans(recipe: Recipe | None, problems: list[str]) -> tuple[Recipe | None, list[str]]:
    """The outcome of a recipe's check, with the problems of what its plans change."""
    found = list(problems)
    for plan in recipe.plans if recipe is not None else ():
        try:
            recipe_for_plan(recipe, plan)  # type: ignore[arg-type]
        except RecipeError as error:
            found.append(str(error))
    return (None if found else recipe), found


def _other(stages: Mapping[str, Any], name: object, field: str, chain: tuple[str, ...], label: str) -> str:
    """The name of the stage that `field` refers to, checked."""
    if not isinstance(name, str) or name not in stages:
        near = nearest_name(str(name), list(stages))
        hint = f"did you mean '{near}'?" if near else f"the stages are {', '.join(stages)}"
        raise RecipeError(f"{label}: {field} is {show_value(name)}, which is no stage; {hint}")
    if name in chain:
        circle = " -> ".join((*chain[chain.index(name) :], name))
        raise RecipeError(f"{label}: {field} goes round in a circle: {circle}; write one of these stages out")
    return name


def _extended(stages: Mapping[str, Any], name: str, label: str, chain: tuple[str, ...] = ()) -> Any:
    """A stage's fields over those of the stages that it extends."""
    stage = stages[name]
    if not isinstance(stage, Mapping) or "extends" not in stage:
        return stage
    chain = (*chain, name)
    parent = _extended(stages, _other(stages, stage["extends"], f"stages.{name}.extends", chain, label), label, chain)
    if not isinstance(parent, Mapping):
        return {key: value for key, value in stage.items() if key != "extends"}
    # The parent's defaults too: to set one loss is to leave the others as the parent has them.
    parent = {**StageRecipe().model_dump(mode="json"), **parent}
    return merge(parent, {key: value for key, value in stage.items() if key != "extends"})


def _steps(stages: Mapping[str, Any], name: str, label: str, chain: tuple[str, ...] = ()) -> Any:
    """A stage's steps, a share of another stage's worked out."""
    stage = stages[name]
    steps = stage.get("steps", StageRecipe().steps) if isinstance(stage, Mapping) else None
    if not isinstance(steps, Mapping):
        return steps
    field, chain = f"stages.{name}.steps", (*chain, name)
    bounds = [steps.get(bound) for bound in ("from", "to")]
    numbers = all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in bounds)
    if set(steps) != set(SHARE) or not numbers or not 0 <= bounds[0] < bounds[1] <= 1:  # type: ignore[operator]
        raise RecipeError(
            f"{label}: {field} is {show_value(dict(steps))} but must be a whole number, or a share such as "
            "{of: joint, from: 0.0, to: 0.5}"
        )
    whole = _steps(stages, _other(stages, steps["of"], f"{field}.of", chain, label), label, chain)
    if not isinstance(whole, int):
        return whole
    # Both ends are rounded and then subtracted, so that shares that join add up to the whole.
    return round(bounds[1] * whole) - round(bounds[0] * whole)  # type: ignore[operator]
