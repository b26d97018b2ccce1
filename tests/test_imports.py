"""Rooms import in one direction only, and the command line imports nothing heavy until a command runs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ldlm_cli"
# A room may import from itself and from rooms of a smaller number; `data` and `core` do not know each other.
LEVEL = {
    "cli": 8,
    "report": 7,
    "evaluation": 6,
    "training": 5,
    "generate": 4,
    "checkpoint": 3,
    "runtime": 2,
    "data": 1,
    "core": 1,
    "recipe": 0,
    "errors": -1,
}
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "accelerate",
    "matplotlib",
    "numpy",
    "psutil",
    "tensorboard",
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST) -> list[str]:
    """Dotted names of the modules that this code imports."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def top_level(tree: ast.Module) -> ast.Module:
    """The module without function bodies and without what only the type checker reads."""

    class Top(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.If | None:
            return None if "TYPE_CHECKING" in ast.dump(node.test) else node

    found = Top().visit(tree)
    assert isinstance(found, ast.Module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_room_imports_only_from_rooms_below(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in {"__init__", "__main__"}:
        return
    for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
        if not name.startswith("ldlm_cli."):
            continue
        other = name.split(".")[1]
        if other not in LEVEL or other == room:
            continue
        assert LEVEL[other] < LEVEL[room], f"{path.name} ({room}) imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_click_is_never_imported(path):
    """typer carries its own click: another one's classes are foreign to it."""
    names = {name.split(".")[0] for name in imported(ast.parse(path.read_text(encoding="utf-8")))}
    assert "click" not in names


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in FILES
        if path.relative_to(PACKAGE).parts[0] in {"cli", "recipe", "errors.py", "__init__.py", "__main__.py"}
    ],
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)
def test_the_command_line_imports_nothing_heavy_at_the_top(path):
    names = imported(top_level(ast.parse(path.read_text(encoding="utf-8"))))
    assert not {name.split(".")[0] for name in names} & HEAVY
    # Rooms that import torch themselves.
    rooms = {name.split(".")[1] for name in names if name.startswith("ldlm_cli.")}
    assert not rooms & {"evaluation", "generate", "training", "checkpoint", "runtime", "data", "core", "report"}


def test_every_room_has_a_level():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__", "__main__"}
    assert rooms <= LEVEL.keys()


def test_data_and_core_do_not_know_each_other():
    for room, other in (("data", "core"), ("core", "data")):
        for path in (PACKAGE / room).rglob("*.py"):
            names = imported(ast.parse(path.read_text(encoding="utf-8")))
            assert not [name for name in names if name.startswith(f"ldlm_cli.{other}.")], path


def test_training_and_evaluation_do_not_print_to_the_terminal_themselves():
    """They reach the report through what their caller hands in; recipes stay free of everything else."""
    for room in ("training", "evaluation", "core", "data"):
        for path in (PACKAGE / room).rglob("*.py"):
            names = imported(ast.parse(path.read_text(encoding="utf-8")))
            assert not [name for name in names if name.split(".")[0] in {"rich", "typer"}], path
