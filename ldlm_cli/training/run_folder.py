"""The files of a run folder around its training: manifest, metrics, and whether a folder may be gone on with."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from ldlm_cli import __version__
from ldlm_cli.data.shards import TokenFolder
from ldlm_cli.errors import RecipeError
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.runtime import Runtime


def run_folder(recipe: Recipe, plan: str) -> Path:
    """Where a run goes unless told: runs/<recipe>-<plan>-s<seed>."""
    return Path("runs") / f"{recipe.name}-{plan}-s{recipe.seed}"


class MetricsLog:
    """metrics.jsonl, one object a logged step, and TensorBoard."""

    def __init__(self, folder: Path, tensorboard: bool, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Open for appending; rows for which `keep` is false (logged after the checkpoint resumed from) are dropped."""
        path = folder / "metrics.jsonl"
        if path.is_file():
            rows = [line for line in path.read_text(encoding="utf-8").splitlines() if keep(json.loads(line))]
            path.write_text("".join(f"{line}\n" for line in rows), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"))

    def __call__(self, metrics: dict[str, Any]) -> None:
        self.file.write(json.dumps({key: rounded(value) for key, value in metrics.items()}) + "\n")
        self.file.flush()
        if self.writer is not None:
            for key, value in metrics.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{metrics['stage']}/{key}", value, metrics["step"])


def rounded(value: Any) -> Any:
    return float(f"{value:.9g}") if isinstance(value, float) else value


def read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    aside = folder / ".manifest.tmp"
    aside.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, folder / "manifest.json")


def new_manifest(recipe: Recipe, plan: str, tokens: TokenFolder, runtime: Runtime) -> dict[str, Any]:
    """Every circumstance of a run that a reader of its numbers needs."""
    import accelerate
    import transformers

    return {
        "ldlm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "git_commit": git_commit(),
        "device": str(runtime.device),
        "threads": torch.get_num_threads(),
        "processes": runtime.num_processes,
        "precision": runtime.precision,
        "seed": recipe.seed,
        "plan": plan,
        "stages": list(recipe.plans[plan]),
        "data_fingerprint": tokens.fingerprint,
        "tokenizer_fingerprint": tokens.vocabulary.fingerprint,
        "recipe": recipe.model_dump(mode="json"),
        "finished": False,
    }


def git_commit() -> str | None:
    """Commit of the checkout that this code runs from, None outside of one."""
    try:
        here = Path(__file__).resolve().parent
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        return found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def refuse_changes(recipe: Recipe, plan: str, manifest: dict[str, Any], folder: Path) -> None:
    """RecipeError when a run folder holds a run of another recipe or plan."""
    changed = differing_fields(own_part(manifest["recipe"], plan), own_part(recipe.model_dump(mode="json"), plan))
    if manifest["plan"] != plan:
        changed.insert(0, f"plan ({manifest['plan']} there, {plan} now)")
    if changed:
        raise RecipeError(
            f"'{folder}' holds a run of a different recipe; it differs in {', '.join(changed)}: "
            "use --fresh for a new folder, --out for another one, or the same recipe to go on"
        )


def own_part(tree: dict[str, Any], plan: str) -> dict[str, Any]:
    """What of a resolved recipe has a part in a plan, with today's defaults for fields that it was written without."""
    try:
        tree = Recipe.model_validate(tree).model_dump(mode="json")
    except ValidationError:  # written by an ldlm with other fields: compared as it is
        return tree
    own = tree["plans"].get(plan, ())
    stages = {name: stage for name, stage in tree["stages"].items() if name in own}
    return tree | {"stages": stages, "plans": {plan: own}}


def differing_fields(old: Any, new: Any, where: str = "") -> list[str]:
    """Dotted names of the fields in which two resolved recipes differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            field
            for key in sorted(old.keys() | new.keys())
            for field in differing_fields(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if old == new else [f"{where} ({old} there, {new} now)"]


def free_folder(folder: Path, runtime: Runtime) -> Path:
    """The first of folder, folder-2, folder-3 … that does not exist; the same on every process."""
    number, candidate = 1, folder
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    runtime.barrier()  # all have looked before one creates it
    return candidate
