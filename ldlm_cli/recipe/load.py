"""Name or path -> `extends` -> overrides -> strict check -> Recipe; every mistake becomes one sentence."""

from __future__ import annotations

import importlib.resources
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ldlm_cli.errors import RecipeError
from ldlm_cli.recipe.check import check_tree, nearest_name, show_value, unknown_name
from ldlm_cli.recipe.resolve import check_plans, merge, resolve_stages, with_references
from ldlm_cli.recipe.schema import Recipe

# YAML 1.1 reads 1e-4 as text, because it wants a dot and a signed exponent; a rate written so must be a number.
_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")


class Loader(yaml.SafeLoader):
    """Safe YAML that knows 1e-4 and refuses a key written twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"key '{key_node.value}' is written twice", problem_mark=key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads back: text that looks like 1e-4 is quoted."""


Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


# ---- finding -----------------------------------------------------------------------------------------------------


def recipe_folders() -> list[Path]:
    """Folders of shipped recipes: inside the package (wheel), then the repository root (editable install)."""
    package = Path(str(importlib.resources.files("ldlm_cli")))
    return [folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir()]


def _shipped() -> dict[str, Path]:
    """Shipped recipes by their path below the recipes folder, e.g. `ablations/uniform-times.yaml`; base.yaml first."""
    found: dict[str, Path] = {}
    for folder in recipe_folders():
        for path in sorted(folder.rglob("*.yaml")):
            found.setdefault(path.relative_to(folder).as_posix(), path)
    return dict(sorted(found.items(), key=lambda item: ("/" in item[0], item[0] != "base.yaml", item[0])))


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: an existing path, else a shipped recipe by name (`.yaml` may be left out).

    Raises:
        RecipeError: neither a file nor a shipped name; proposes the nearest names.
    """
    text, path = str(name), Path(name)
    if path.is_file():
        return path
    shipped = _shipped()
    for candidate in (text, f"{text}.yaml"):
        if candidate in shipped:
            return shipped[candidate]
    near = nearest_name(text.removesuffix(".yaml"), [known.removesuffix(".yaml") for known in shipped])
    hint = f"did you mean '{near}.yaml'?" if near else f"the shipped recipes are {', '.join(shipped) or 'none'}"
    raise RecipeError(f"recipe '{text}' is neither a file nor a shipped recipe; {hint}")


def list_recipes() -> list[tuple[str, str, Path]]:
    """Name, description and file of every shipped recipe."""
    rows = []
    for name, path in _shipped().items():
        try:
            description = str(_read(path).get("description", ""))
        except RecipeError as error:
            description = f"unreadable: {error}"
        rows.append((name, description, path))
    return rows


# ---- reading -----------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise RecipeError(f"recipe {path}{where} is not valid YAML: {problem}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(content, dict) or not content:
        raise RecipeError(f"recipe {path} must be a mapping of sections such as data, model and stages")
    return content


def _find_parent(name: object, child: Path) -> Path:
    if not isinstance(name, str):
        raise RecipeError(f"recipe {child}: extends must be the name of one recipe, not {show_value(name)}")
    beside = child.parent / name
    # A copy called base.yaml that extends base.yaml means the shipped one.
    if beside.is_file() and not beside.samefile(child):
        return beside
    shipped = _shipped()
    for candidate in (name, f"{name}.yaml", Path(name).name, f"{Path(name).name}.yaml"):
        if candidate in shipped and not shipped[candidate].samefile(child):
            return shipped[candidate]
    if beside.is_file():
        raise RecipeError(f"recipe {child} extends itself; name another recipe")
    near = nearest_name(name.removesuffix(".yaml"), [known.removesuffix(".yaml") for known in shipped])
    hint = f"; did you mean '{near}.yaml'?" if near else f"; looked in {child.parent} and in the shipped recipes"
    raise RecipeError(f"recipe {child}: extends '{name}' is not found{hint}")


def _resolve(path: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's content over that of the recipes it extends, unchecked."""
    here = path.resolve()
    if here in chain:
        circle = " -> ".join(p.name for p in (*chain[chain.index(here) :], here))
        raise RecipeError(f"recipe {path} extends itself in a circle: {circle}; remove one `extends`")
    content = _read(path)
    parent_name = content.pop("extends", None)
    if parent_name is None:
        return content
    parent = _resolve(_find_parent(parent_name, path), (*chain, here))
    # A child is another recipe: it does not inherit what its parent is called.
    parent.pop("name", None)
    parent.pop("description", None)
    return merge(parent, content)


def _parse_override(override: str) -> tuple[list[str], Any]:
    key, equals, text = override.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override}: write section.field=value, e.g. --set training.log_every_steps=10")
    try:
        return keys, yaml.load(text, Loader)
    except yaml.YAMLError:
        # Not YAML, e.g. the glob *.txt: plain text, which the strict check takes only where the field is text.
        return keys, text


def _apply(tree: dict[str, Any], known: dict[str, Any], override: str, label: str) -> None:
    """Set one dotted key in `tree`; every section on the way must exist there already, or in the resolved tree `known`.

    A stage that extends another holds in `tree` only what it changes.
    """
    keys, value = _parse_override(override)
    here: Any = tree
    for depth, key in enumerate(keys[:-1]):
        dotted = ".".join(keys[: depth + 1])
        found = here.get(key, known.get(key))
        if key not in here and key not in known:
            raise RecipeError(f"{label}: {unknown_name(dotted, key, list(known), 'section')}")
        if not isinstance(found, dict):
            raise RecipeError(f"{label}: {dotted} is a value, not a section with fields")
        resolved = known.get(key)
        known = resolved if isinstance(resolved, dict) else found
        here = here.setdefault(key, {})
    here[keys[-1]] = value


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe and check every field.

    Args:
        name_or_path: a file, or the name of a shipped recipe with or without `.yaml`.
        overrides: `section.field=value`, values read as YAML; a later one wins.
    Returns:
        The resolved recipe; its name is the file's stem unless the file gives one.
    Raises:
        RecipeError: not found, not YAML, or a field that is unknown, ill-typed or out of range; one sentence.
    """
    path = find_recipe(name_or_path)
    content, label = _content(path), f"recipe {path}"
    recipe, problems = check_plans(*check_tree(resolve_stages(content, label), label))
    if recipe is not None and overrides:
        # On the resolved tree, so that an override changes one field and never hides a default beside it; but a stage
        # that refers to another still does, and follows what is overridden there.
        known = recipe.model_dump(mode="json")
        tree = with_references(known, content)
        for override in overrides:
            _apply(tree, known, override, f"{label} with --set {override}")
        label = f"{label} with --set {' --set '.join(overrides)}"
        recipe, problems = check_plans(*check_tree(resolve_stages(tree, label), label))
    if recipe is None:
        more = f" ({len(problems) - 1} more: `ldlm recipes validate` lists all)" if len(problems) > 1 else ""
        raise RecipeError(problems[0] + more)
    return recipe


def validate_recipe(name_or_path: str | Path) -> list[str]:
    """Every problem of a recipe, a sentence each; empty when it is valid."""
    try:
        path = find_recipe(name_or_path)
        label = f"recipe {path}"
        return check_plans(*check_tree(resolve_stages(_content(path), label), label))[1]
    except RecipeError as error:
        return [str(error)]


def dump_text(recipe: Recipe) -> str:
    """The resolved recipe as YAML that loads to an equal Recipe."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def dump_recipe(recipe: Recipe, path: Path) -> None:
    """Write `dump_text` to a file, which appears whole or not at all."""
    text = dump_text(recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes private files; a recipe is to be read by others
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _content(path: Path) -> dict[str, Any]:
    return {"name": re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem)} | _resolve(path)
