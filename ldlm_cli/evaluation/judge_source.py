"""Where a judge's weights lie: in the run, in a folder, or on the hub; and what they hash to."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ldlm_cli.data.hub import demand_hub, first_line
from ldlm_cli.errors import UsageError
from ldlm_cli.recipe.schema import Recipe

# Sub-folders in which a run keeps a language model; the token encoder's is last and refused when it is this run's own.
RUN_FOLDERS = ("judge", "baseline", "token_encoder")


def independent_judge_folder(source: str, run: Path, recipe: Recipe) -> Path:
    """`judge_folder`, and the certainty that it does not hold the token encoder of the run.

    Raises:
        UsageError: no such judge, or it is the token encoder, which would flatter its own texts.
    """
    if source != "trained" and source.partition("@")[0] == recipe.token_encoder.source:
        raise UsageError(
            f"The judge '{source}' is the token encoder of {run}, which would flatter its own texts; "
            f"name another model with --judge or judge.source."
        )
    folder = judge_folder(source, run, recipe)
    for other in token_encoder_folders(run, recipe):
        if set(weight_hashes(folder)) & set(weight_hashes(other)):
            raise UsageError(
                f"The judge in {folder} has the weights of the token encoder in {other}; "
                f"name another model with --judge or judge.source."
            )
    return folder


def judge_folder(source: str, run: Path, recipe: Recipe) -> Path:
    """The folder with the weights that `source` means (see `Judge.open`); a hub model is downloaded if need be.

    Raises:
        UsageError: there is none, or the hub is out of reach; says what to do.
    """
    if source == "trained":
        if holds_model(run / "judge"):
            return run / "judge"
        raise UsageError(
            f"{run} has no trained judge in {run / 'judge'}; train one with `ldlm train-lm`, "
            f"or name a model with --judge."
        )
    path = Path(source).expanduser()
    if path.is_dir():
        for folder in (path, *(path / name for name in RUN_FOLDERS)):
            if holds_model(folder):
                return folder
        raise UsageError(
            f"{source} holds no language model (config.json and .safetensors weights, there or in "
            f"{', '.join(name + '/' for name in RUN_FOLDERS)}); name a model folder or a run of `ldlm train-lm`."
        )
    identifier, _, revision = source.partition("@")
    return _hub_folder(identifier, revision or (recipe.judge.revision if identifier == recipe.judge.source else None))


def holds_model(folder: Path) -> bool:
    """Whether a folder has a configuration and safetensors weights."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _hub_folder(identifier: str, revision: str | None) -> Path:
    """The local folder of a hub model: from the cache if it is there, else downloaded; gives up within seconds."""
    cached = _cached_folder(identifier, revision)
    if cached is not None:
        return cached
    way_on = "name a local folder with --judge, or use --judge trained"
    demand_hub(f"The judge '{identifier}'", way_on)
    from huggingface_hub import snapshot_download

    try:
        # Top-level files only, and no pickles: some repositories hold the weights several times over.
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
        folder = Path(
            snapshot_download(identifier, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"])
        )
    except Exception as error:  # the hub client raises errors of several libraries, httpx among them
        raise UsageError(
            f"The hub did not give the judge '{identifier}' ({type(error).__name__}: {first_line(error)}): {way_on}."
        ) from error
    if not holds_model(folder):
        raise UsageError(
            f"The judge '{identifier}' has no .safetensors weights; name a model that has them with --judge."
        )
    return folder


def _cached_folder(identifier: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(identifier, revision=revision, local_files_only=True))
    except Exception:  # not in the cache, or not a hub id at all: the caller decides what that means
        return None
    return folder if holds_model(folder) else None


def token_encoder_folders(run: Path, recipe: Recipe) -> list[Path]:
    """Where the weights of the run's token encoder lie on this machine; empty when they do not."""
    folders = [run / "token_encoder", run / "snapshot" / "token_encoder"]
    source = recipe.token_encoder.source
    if source != "trained":
        local = Path(source).expanduser()
        cached = local if local.is_dir() else _cached_folder(source, recipe.token_encoder.revision)
        folders += [cached] if cached is not None else []
    return [folder for folder in folders if holds_model(folder)]


def weights_hash(folder: Path) -> str:
    """sha256 (hex) over the safetensors files of a model folder, in the order of their names."""
    return hashlib.sha256("".join(weight_hashes(folder)).encode()).hexdigest()


def weight_hashes(folder: Path) -> list[str]:
    """sha256 (hex) of each safetensors file of a model folder, in the order of their names."""
    hashes = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes
