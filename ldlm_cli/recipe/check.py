"""The strict check of a recipe: every mistake becomes one sentence with the dotted field and the nearest right name."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ldlm_cli.recipe.schema import Recipe


def nearest_name(name: str, names: Collection[str]) -> str | None:
    """The one of `names` that `name` most likely means, or None."""
    close = difflib.get_close_matches(name.lower(), [n.lower() for n in names], n=1, cutoff=0.6)
    return next((n for n in names if close and n.lower() == close[0]), None)


def check_tree(tree: Mapping[str, Any], label: str) -> tuple[Recipe | None, list[str]]:
    """The recipe that a tree of plain values describes, or None and its problems, a sentence each after `label`."""
    try:
        # JSON mode, because strict Python mode would refuse a YAML list where the schema has a tuple.
        return Recipe.model_validate_json(json.dumps(tree, default=str), strict=True), []
    except ValidationError as error:
        return None, [f"{label}: {sentence(detail)}" for detail in error.errors(include_url=False)]


def show_value(value: object) -> str:
    """A value as the user wrote it, at most 60 characters."""
    text = json.dumps(value, default=str, ensure_ascii=False) if not isinstance(value, str) else f"'{value}'"
    return text if len(text) <= 60 else text[:57] + "..."


def _names_at(location: Sequence[int | str]) -> list[str]:
    """Field names, or known keys, of the schema at a location such as ("stages", "joint")."""
    here: Any = Recipe
    for key in location:
        if isinstance(here, type) and issubclass(here, BaseModel) and key in here.model_fields:
            here = here.model_fields[str(key)].annotation
        elif get_origin(here) is dict:
            here = get_args(here)[1]
        else:
            return []
    return list(here.model_fields) if isinstance(here, type) and issubclass(here, BaseModel) else []


def unknown_name(dotted: str, name: str, names: Sequence[str], kind: str = "field") -> str:
    """The sentence for an unknown name: the nearest right one, or all of them."""
    near = nearest_name(name, names)
    where = dotted.rpartition(".")[0] or "the recipe"
    hint = f"did you mean '{near}'?" if near else f"{where} has {', '.join(names)}"
    return f"{dotted} is not a {kind}; {hint}"


_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "string_type": "text (put quotes around it)",
    "tuple_type": "a list",
    "dict_type": "a mapping of names to values",
    "model_type": "a section with fields",
    "model_attributes_type": "a section with fields",
    "finite_number": "a finite number",
}


def sentence(error: ErrorDetails) -> str:
    """One pydantic error as one sentence: dotted field, value, reason, nearest right name."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    location = [key for key in error["loc"] if key != "[key]"]
    dotted = ".".join(str(key) for key in location)
    if kind == "extra_forbidden":
        return unknown_name(dotted, str(location[-1]), _names_at(location[:-1]))
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context["expected"]))
        if error["loc"][-1] == "[key]":
            return unknown_name(dotted, str(location[-1]), choices)
        near = nearest_name(str(value), choices)
        hint = f"; did you mean '{near}'?" if near else ""
        return f"{dotted} is {show_value(value)} but must be one of {', '.join(choices)}{hint}"
    if kind in _WANTED:
        return f"{dotted or 'it'} is {show_value(value)} but must be {_WANTED[kind]}"
    reason = error["msg"].removeprefix("Value error, ").rstrip(".")
    if kind == "value_error":
        return f"{dotted}: {reason}" if dotted else reason
    reason = reason[0].lower() + reason[1:]
    return f"{dotted} is {show_value(value)}: {reason.replace('input', 'it')}"
