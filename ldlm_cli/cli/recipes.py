"""`ldlm recipes`: list, show, copy, validate."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from ldlm_cli.cli import options
from ldlm_cli.errors import RecipeError, UsageError
from ldlm_cli.recipe.load import dump_text, find_recipe, list_recipes, validate_recipe

app = typer.Typer(help="List, show, copy and validate recipes.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")]


@app.command("list")
def list_all(as_json: options.AsJson = False) -> None:
    """The recipes that ldlm brings along."""
    from ldlm_cli.report import tables

    rows = list_recipes()
    if as_json:
        tables.print_json({"recipes": [{"name": n, "description": d, "path": str(p)} for n, d, p in rows]})
    else:
        tables.print_table("", ("recipe", "what it is"), [(name, description) for name, description, _ in rows])


@app.command()
def show(recipe: Name, overrides: options.Overrides = None, as_json: options.AsJson = False) -> None:
    """Print a recipe as it is after `extends` and --set, every field with its value."""
    resolved = options.resolve_recipe(recipe, overrides)
    if as_json:
        from ldlm_cli.report import tables

        tables.print_json(resolved.model_dump(mode="json"))
    else:
        typer.echo(dump_text(resolved), nl=False)


@app.command()
def copy(
    recipe: Name,
    destination: Annotated[Path, typer.Argument(help="A new file, or a folder.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Copy a recipe to change it."""
    source = find_recipe(recipe)
    target = destination / source.name if destination.is_dir() else destination
    if target.exists() and not force:
        raise UsageError(f"'{target}' exists already; give another name, or --force to overwrite it")
    if target.exists() and target.samefile(source):
        raise UsageError(f"'{target}' is the recipe itself; give another name")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise UsageError(f"'{target}' cannot be written: {error.strerror}") from error
    typer.echo(str(target))


@app.command()
def validate(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE…", help="Files or names.")],
    as_json: options.AsJson = False,
) -> None:
    """Check recipes without training; prints every problem and ends with 2 where there is one."""
    found = {name: validate_recipe(name) for name in recipes}
    problems = [problem for each in found.values() for problem in each]
    if as_json:
        from ldlm_cli.report import tables

        tables.print_json({"valid": not problems, "problems": found})
    else:
        for name, each in found.items():
            typer.echo("\n".join(each) if each else f"{name}: valid")
    if problems:
        raise RecipeError(f"{len(problems)} problem{'s' * (len(problems) > 1)} found; change the fields named above")
