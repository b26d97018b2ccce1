"""Options that several commands share, and the checks that turn a wrong value into one sentence and exit code 2."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ldlm_cli.errors import UsageError
from ldlm_cli.recipe.check import nearest_name
from ldlm_cli.recipe.load import list_recipes, load_recipe
from ldlm_cli.recipe.schema import Recipe, SamplingRecipe

if TYPE_CHECKING:
    from ldlm_cli.generate import SamplingOptions

SAMPLERS: tuple[str, ...] = get_args(SamplingRecipe.model_fields["sampler"].annotation)
GRIDS: tuple[str, ...] = get_args(SamplingRecipe.model_fields["grid"].annotation)


def _name(parameter: typer.CallbackParam) -> str:
    return max(parameter.opts, key=len)


def at_least(minimum: int) -> Callable[[typer.CallbackParam, int | None], int | None]:
    """A check that a whole number is at least `minimum`."""

    def check(param: typer.CallbackParam, value: int | None) -> int | None:
        if value is not None and value < minimum:
            raise UsageError(f"{_name(param)} is {value} but must be at least {minimum}")
        return value

    return check


def real(*, above: float | None = None, at_least: float | None = None) -> Callable[..., float | None]:
    """A check that a number is finite and above, or at least, a bound."""

    def check(param: typer.CallbackParam, value: float | None) -> float | None:
        if value is None:
            return None
        low = (above is not None and value <= above) or (at_least is not None and value < at_least)
        if low or not math.isfinite(value):
            bound = f"above {above:g}" if above is not None else f"at least {at_least:g}"
            raise UsageError(f"{_name(param)} is {value:g} but must be a finite number {bound}")
        return value

    return check


def one_of(names: Sequence[str]) -> Callable[[typer.CallbackParam, str | None], str | None]:
    """A check that a name is one of `names`; the sentence proposes the nearest."""

    def check(param: typer.CallbackParam, value: str | None) -> str | None:
        if value is not None and value not in names:
            near = nearest_name(value, names)
            hint = f"did you mean '{near}'? The choices" if near else "the choices"
            raise UsageError(f"{_name(param)} '{value}' is unknown; {hint} are {', '.join(names)}")
        return value

    return check


def _recipe_names(incomplete: str) -> list[str]:
    return [name for name, _, _ in list_recipes() if name.startswith(incomplete)]


RecipeName = Annotated[
    str,
    typer.Option("--recipe", "-r", autocompletion=_recipe_names, help="A YAML file, or the name of a shipped recipe."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change one field of the recipe; may be repeated."),
]
Seed = Annotated[int | None, typer.Option("--seed", callback=at_least(0), help="Overrides the recipe's seed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]
NumProcesses = Annotated[
    int,
    typer.Option("--num-processes", callback=at_least(1), help="Processes on this machine (CPU ranks, or one a GPU)."),
]
RunName = Annotated[
    str | None, typer.Option("--run", help="A run folder or its name in runs/; the newest with a snapshot if absent.")
]
Steps = Annotated[int | None, typer.Option("--steps", callback=at_least(1), help="Denoiser calls per text.")]
Sampler = Annotated[str | None, typer.Option("--sampler", callback=one_of(SAMPLERS), help=", ".join(SAMPLERS) + ".")]
Grid = Annotated[str | None, typer.Option("--grid", callback=one_of(GRIDS), help=", ".join(GRIDS) + " in time.")]
SamplingSeed = Annotated[int | None, typer.Option("--seed", callback=at_least(0), help="Seed of the noise.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", callback=real(above=0), help="Scales initial and injected noise.")
]


def resolve_recipe(name: str, overrides: Sequence[str] | None, seed: int | None = None) -> Recipe:
    """The recipe that the options describe; an explicit --seed wins over --set seed=…"""
    return load_recipe(name, [*(overrides or ()), *(() if seed is None else (f"seed={seed}",))])


def sampling_options(recipe: Recipe, given: Mapping[str, Any]) -> SamplingOptions:
    """The recipe's sampling section, with those of the `given` options over it that are not None."""
    from ldlm_cli.generate import SamplingOptions

    chosen = {name: value for name, value in given.items() if value is not None}
    return SamplingOptions(**{"seed": recipe.seed, **recipe.sampling.model_dump(), **chosen})


def run_recipe_of(run: Path) -> Recipe:
    """The recipe stored in a run folder."""
    return load_recipe(run / "recipe.yaml")
