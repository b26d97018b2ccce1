"""A language model that another run has trained, in place of training it again; only if it would come out the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldlm_cli.checkpoint import weight_hashes
from ldlm_cli.errors import RecipeError
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.training.plan import plan_stages
from ldlm_cli.training.run_folder import differing_fields, read_manifest


def what_decides(recipe: Recipe, plan: str, index: int, manifest: dict[str, Any]) -> dict[str, Any]:
    """All that decides the weights of a plan's language model stage.

    Args:
        index: place of the stage in the plan, which addresses its batches.
        manifest: of the run; gives versions, precision and the fingerprint of the tokens.
    """
    _, stage = plan_stages(recipe, plan)[index]
    shape = recipe.judge if stage.role == "judge" else recipe.token_encoder
    return {
        "stage": stage.model_dump(mode="json"),
        "seed": recipe.seed + stage.seed_offset,
        "place_in_plan": index,
        "shape": {name: getattr(shape, name) for name in ("width", "layers", "heads")},
        "data": {"context_tokens": recipe.data.context_tokens, "packing": recipe.data.packing},
        **{name: manifest.get(name) for name in ("data_fingerprint", "precision", "device", "ldlm", "torch")},
    }


def find_language_model(
    recipe: Recipe, plan: str, index: int, manifest: dict[str, Any], others: Sequence[Path], demanded: bool
) -> Path | None:
    """The run among `others` that holds the language model that this stage would train, None when there is none.

    Args:
        manifest: of the run that is to use it.
        others: run folders, finished or not.
        demanded: it is an error if there is none.
    Raises:
        RecipeError: demanded, and the language model there is missing or another one; names the fields that differ.
    """
    name, stage = plan_stages(recipe, plan)[index]
    wanted = what_decides(recipe, plan, index, manifest)
    reasons = []
    for other in others:
        theirs = read_manifest(other)
        if theirs is None or not (other / stage.role / "language_model.json").is_file():
            reasons.append(f"'{other}' holds no trained {stage.role}")
            continue
        their_recipe = Recipe.model_validate(theirs["recipe"])
        stages = plan_stages(their_recipe, theirs["plan"])
        same_role = [i for i, (_, its) in enumerate(stages) if its.kind == "language_model" and its.role == stage.role]
        found = [what_decides(their_recipe, theirs["plan"], place, theirs) for place in same_role]
        if wanted in found:
            return other
        differing = differing_fields(found[0], wanted) if found else ["the stages of its plan"]
        reasons.append(f"the {stage.role} in '{other}' differs in {', '.join(differing)}")
    if demanded:
        raise RecipeError(
            f"stage '{name}' cannot reuse a language model: {'; '.join(reasons)}: name a run that trained the "
            "same one, or train it here"
        )
    return None


def copy_language_model(source: Path, folder: Path, role: str) -> dict[str, Any]:
    """Copy a trained language model into a run folder, whole or not at all.

    Returns:
        Where it came from and what it is, for the manifest: from, files (sha256 of the weights), steps, compute.
    """
    target, aside = folder / role, folder / f".{role}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source / role, aside)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    about = json.loads((target / "language_model.json").read_text(encoding="utf-8"))
    return {
        "from": str(source),
        "files": weight_hashes(target),
        "steps": about["steps"],
        "compute": about.get("compute"),
    }
