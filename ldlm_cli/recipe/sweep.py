"""A sweep file: a YAML list of runs, each a recipe, a plan, overrides, a seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from ldlm_cli.errors import RecipeError
from ldlm_cli.recipe.check import sentence, show_value, unknown_name
from ldlm_cli.recipe.load import Loader, load_recipe
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.recipe.stage_schema import Section


class SweepEntry(Section):
    """One run of a sweep."""

    recipe: str = Field(min_length=1)
    """A file (beside the sweep file, or from the working folder), or the name of a shipped recipe."""
    plan: str = "joint"
    """A plan of the recipe."""
    set: tuple[str, ...] = ()
    """Overrides, section.field=value."""
    seed: int | None = Field(None, ge=0)
    """Overrides the recipe's seed."""
    out: str | None = None
    """Run folder; runs/<recipe>-<plan>-s<seed> if absent."""
    reuse: str | None = None
    """A run folder whose token encoder and judge take the place of training the same ones; refused if they differ."""

    def resolve(self) -> Recipe:
        """The recipe of this run; RecipeError when it has a mistake or lacks the plan."""
        seed = () if self.seed is None else (f"seed={self.seed}",)
        recipe = load_recipe(self.recipe, [*self.set, *seed])
        if self.plan not in recipe.plans:
            raise RecipeError(f"recipe '{recipe.name}' has no plan '{self.plan}'; it has: {', '.join(recipe.plans)}")
        return recipe


def load_sweep(path: Path) -> list[SweepEntry]:
    """The entries of a sweep file.

    Raises:
        RecipeError: not a list of entries, or a field that is unknown or ill-typed; names file, entry and field.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"sweep {path}{where} is not valid YAML: {getattr(error, 'problem', error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"sweep {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(content, list) or not content:
        raise RecipeError(f"sweep {path} must be a list of entries such as '- {{recipe: base.yaml, plan: joint}}'")
    return [_entry(path, number, item) for number, item in enumerate(content, start=1)]


def _entry(path: Path, number: int, item: Any) -> SweepEntry:
    label = f"sweep {path}, entry {number}"
    if not isinstance(item, dict):
        raise RecipeError(f"{label} must be a mapping with a recipe, not {type(item).__name__}")
    known: Sequence[str] = list(SweepEntry.model_fields)
    for key in item:
        if key not in known:
            raise RecipeError(f"{label}: {unknown_name(str(key), str(key), known)}")
    overrides = item.get("set", [])
    if not isinstance(overrides, list):
        raise RecipeError(
            f"{label}: set is {show_value(overrides)} but must be a list such as [stages.joint.steps=100]"
        )
    try:
        entry = SweepEntry.model_validate({**item, "set": tuple(overrides)}, strict=True)
    except ValidationError as error:
        raise RecipeError(f"{label}: {sentence(error.errors(include_url=False)[0])}") from error
    beside = path.parent / entry.recipe
    return entry.model_copy(update={"recipe": str(beside)}) if beside.is_file() else entry
