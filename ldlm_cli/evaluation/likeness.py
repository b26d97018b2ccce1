"""Which runs may stand in one table: what must be the same is checked, what differs is listed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldlm_cli.checkpoint import find_run, snapshots_along
from ldlm_cli.errors import SnapshotError, UsageError
from ldlm_cli.evaluation.judge_source import independent_judge_folder, weights_hash
from ldlm_cli.evaluation.reconstruction import trained_decoder_noise
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.recipe.stage_schema import StageRecipe

# Of the manifest: circumstances of training that do not forbid a comparison, and that a reader should know.
MANIFEST_FIELDS = ("ldlm", "torch", "git_commit", "device", "threads", "processes")
# What names a run or says how often it writes; two runs that differ in these only are runs of one recipe.
UNIMPORTANT = (
    *("name", "description", "data.cache", "sampling.", "evaluation.", "training.tensorboard"),
    *("training.sample_every", "training.save_every", "training.snapshot_every", "training.keep_checkpoints"),
)
WHAT_TO_DO = {
    "judge.weights_sha256": "name one judge for all with --judge",
    "precision": "give --precision",
    "evaluation.num_samples": "give --num",
    "evaluation.tokens_per_length": "give --texts",
    "sampling.guidance": "give --guidance",
    "sampling.temperature": "give --temperature",
    "sampling.sampler": "give --sampler",
    "sampling.grid": "give --grid",
}


@dataclass(frozen=True)
class ComparedRun:
    """A finished run: its folder, what its snapshot and manifest say, and its logged steps."""

    name: str
    folder: Path
    recipe: Recipe
    manifest: dict[str, Any]
    config: dict[str, Any]

    @property
    def plan(self) -> str:
        return str(self.config["plan"])

    @property
    def stages(self) -> list[str]:
        """The latent stages of its plan."""
        names = self.recipe.plans.get(self.plan, ())
        return [name for name in names if self.recipe.stages[name].kind == "latent"]

    @property
    def decoder_noise_std(self) -> float:
        """sigma_dec of the stage that trained the decoder."""
        return trained_decoder_noise(self.recipe, self.stages)

    def snapshots(self) -> list[tuple[str, Path, dict[str, Any]]]:
        """Label, folder and config of the snapshots along the run and of the final one, in the order of training."""
        along = [(path.name, path, _read(path / "config.json")) for path in snapshots_along(self.folder)]
        return [*along, ("final", self.folder / "snapshot", self.config)]

    def curves(self) -> list[dict[str, Any]]:
        """Logged steps of the latent stages, with `latent_step` counted through all of them."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        rows = [row for row in map(json.loads, lines) if row["stage"] in self.stages]
        offsets, done = {}, 0
        for name in self.stages:
            offsets[name] = done
            done += max((row["step"] for row in rows if row["stage"] == name), default=0)
        return [{"latent_step": offsets[row["stage"]] + row["step"], **row} for row in rows]


def open_runs(names: Sequence[str]) -> list[ComparedRun]:
    """The runs to compare, ordered so that those of one recipe and plan stand together.

    Raises:
        UsageError: fewer than two runs, or one named twice.
        SnapshotError: a run has no snapshot or no manifest.
    """
    if len(names) < 2:
        raise UsageError("compare needs at least two runs: name two or more run folders")
    folders = [find_run(name) for name in names]
    for place, folder in enumerate(folders):
        if any(folder.samefile(other) for other in folders[:place]):
            raise UsageError(f"the run '{folder}' is named twice: name each run once")
    short = [folder.name for folder in folders]
    runs = []
    for folder in folders:
        if not (folder / "manifest.json").is_file():
            raise SnapshotError(f"'{folder}' has no manifest.json: name a run folder that training has written")
        config = _read(folder / "snapshot" / "config.json")
        name = folder.name if short.count(folder.name) == 1 else str(folder)
        recipe = Recipe.model_validate(config["recipe"])
        runs.append(ComparedRun(name, folder, recipe, _read(folder / "manifest.json"), config))
    labels = group_labels(runs)
    order = list(dict.fromkeys(labels.values()))
    return sorted(runs, key=lambda run: order.index(labels[run.name]))


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SnapshotError(f"'{path}' cannot be read ({str(error).splitlines()[0]}): train the run again") from error
    return found


def group_labels(runs: Sequence[ComparedRun]) -> dict[str, str]:
    """For each run the label of its group: runs of one recipe and plan that differ in the seed only."""
    labels: dict[str, str] = {}
    known: dict[str, str] = {}
    for run in runs:
        fields = {key: value for key, value in relevant_fields(run).items() if key not in ("seed", "plan")}
        key = json.dumps([run.plan, fields], sort_keys=True)
        if key not in known:
            label = f"{run.recipe.name}, {run.plan}"
            taken = sum(other == label or other.startswith(f"{label} #") for other in known.values())
            known[key] = label if not taken else f"{label} #{taken + 1}"
        labels[run.name] = known[key]
    return labels


def relevant_fields(run: ComparedRun) -> dict[str, Any]:
    """Dotted recipe fields that had a part in this run's training: stages of other plans are left out."""
    tree = run.recipe.model_dump(mode="json")
    own = run.recipe.plans.get(run.plan, ())
    tree["stages"] = {name: stage for name, stage in tree["stages"].items() if name in own}
    tree["plans"] = list(own)
    fields = flatten(tree) | {"plan": run.plan}
    return {key: value for key, value in fields.items() if not key.startswith(UNIMPORTANT)}


def flatten(tree: Any, where: str = "") -> dict[str, Any]:
    """Dotted names and plain values of a nested mapping; lists are values."""
    if not isinstance(tree, dict):
        return {where: tree}
    return {
        name: value
        for key, item in tree.items()
        for name, value in flatten(item, f"{where}.{key}" if where else str(key)).items()
    }


def differing_circumstances(runs: Sequence[ComparedRun]) -> dict[str, dict[str, Any]]:
    """Fields in which the runs' training differs, with the value in each run: recipe fields, then the machine's.

    A stage that is not in every run's plan is one entry, in words, and absent where it was not run.
    """
    common = set.intersection(*({*run.recipe.plans.get(run.plan, ())} for run in runs))
    described = {}
    for run in runs:
        fields = relevant_fields(run)
        for name in run.recipe.plans.get(run.plan, ()):
            if name not in common:
                fields = {key: value for key, value in fields.items() if not key.startswith(f"stages.{name}.")}
                fields[f"stages.{name}"] = stage_in_words(run.recipe.stages[name])
        described[run.name] = fields | {f"manifest.{key}": run.manifest.get(key) for key in MANIFEST_FIELDS}
    differing: dict[str, dict[str, Any]] = {}
    for field in dict.fromkeys(field for fields in described.values() for field in fields):
        values = {name: fields[field] for name, fields in described.items() if field in fields}
        if len(values) < len(runs) or len({json.dumps(value) for value in values.values()}) > 1:
            differing[field] = values
    return differing


def stage_in_words(stage: StageRecipe) -> str:
    """What a stage trains, in one line."""
    size = f"{stage.steps} steps of {stage.batch_tokens} tokens"
    if stage.kind == "language_model":
        return f"{size}, language model, {stage.role}"
    losses = ", ".join(f"{name} {weight:g}" for name, weight in stage.losses.items() if weight > 0)
    return f"{size}; trains {', '.join(stage.trains)}; losses {losses}; decoder noise {stage.decoder_noise_std:g}"


def judge_of(run: ComparedRun, judge: str | None) -> Path:
    """Folder of the judge of a run, or of the one named for all; never the run's token encoder."""
    return independent_judge_folder(judge or run.recipe.judge.source, run.folder, run.recipe)


def measurement_of(run: ComparedRun, judge: Path, given: dict[str, Any]) -> dict[str, Any]:
    """All that must be the same for two runs to stand in one column.

    Args:
        judge: its folder.
        given: settings that the user has fixed for all runs, by the same names; the others come from the run.
    """
    sampling = {f"sampling.{key}": value for key, value in run.recipe.sampling.model_dump(mode="json").items()}
    sampling.pop("sampling.steps")  # steps are columns of their own
    sampling.pop("sampling.batch_size")  # texts do not depend on it
    found = {
        "data_fingerprint": run.config["data_fingerprint"],
        "tokenizer_fingerprint": run.manifest.get("tokenizer_fingerprint"),
        "held_out_split": "test",
        "data.max_len_tokens": run.recipe.data.max_len_tokens,
        "data.packing": run.recipe.data.packing,
        "judge.weights_sha256": weights_hash(judge),
        "precision": run.manifest.get("precision"),
        "evaluation.num_samples": run.recipe.evaluation.num_samples,
        "evaluation.tokens_per_length": run.recipe.evaluation.tokens_per_length,
        **sampling,
    }
    return found | {key: value for key, value in given.items() if value is not None}


def refuse_unlike(runs: Sequence[ComparedRun], measurements: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The measurement that all runs share.

    Raises:
        UsageError: they differ in a field; names it, two runs and their values, and what to do.
    """
    first = measurements[0]
    for field in first:
        for run, other in zip(runs, measurements, strict=True):
            if other[field] == first[field]:
                continue
            values = f"{_short(first[field])} in {runs[0].name}, {_short(other[field])} in {run.name}"
            way_on = WHAT_TO_DO.get(field, "compare runs on the same data")
            if field == "data_fingerprint":
                ours, theirs = (flatten(one.recipe.data.model_dump(mode="json")) for one in (runs[0], run))
                names = [f"data.{key}" for key in ours if ours[key] != theirs[key] and key != "cache"]
                way_on += f"; the recipes differ in {', '.join(names)}" if names else ""
            raise UsageError(f"{field} differs ({values}): unlike measurements do not go in one column; {way_on}")
    return first


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else text[:12] + "…"
