"""Checkpoint (all that a resume needs) and snapshot (averaged weights and recipe, to use): save, load, find."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldlm_cli import __version__
from ldlm_cli.core.model import LDLM, PARTS, build_parts
from ldlm_cli.core.token_encoder import build_token_encoder
from ldlm_cli.data.vocabulary import Vocabulary
from ldlm_cli.errors import DataError, SnapshotError
from ldlm_cli.recipe.schema import Recipe

SNAPSHOT_FORMAT = 1


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(
    run: Path,
    name: str,
    tensors: Mapping[str, Tensor],
    optimizer: dict[str, Any] | None,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `checkpoints/<name>` whole or not at all: aside, synced, renamed; then drop all but the newest `keep`."""
    folder, aside = run / "checkpoints" / name, run / "checkpoints" / f".{name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, aside / "tensors.safetensors")
    if optimizer is not None:
        torch.save(optimizer, aside / "optimizer.pt")
    (aside / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for path in aside.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first (names sort by stage, then step)."""
    folder = run / "checkpoints"
    return sorted(path for path in folder.glob("[0-9]*") if (path / "state.json").is_file()) if folder.is_dir() else []


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None, dict[str, Any]]:
    """Tensors, optimizer state (or None) and the JSON state. Never unpickles anything but tensors and plain values."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        optimizer = folder / "optimizer.pt"
        loaded = torch.load(optimizer, map_location="cpu", weights_only=True) if optimizer.exists() else None
        return load_file(folder / "tensors.safetensors"), loaded, state
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise SnapshotError(
            f"the checkpoint '{folder}' is damaged ({str(error).splitlines()[0][:120]}): delete it to go on from "
            "the one before, or start again with --fresh"
        ) from error


# ------------------------------------------------------------------ snapshots


@dataclass
class Snapshot:
    """A trained latent diffusion language model, opened for use.

    hash: sha256 over the weight files' hashes, 16 hex digits.
    length_histogram: texts by length in tokens, [window + 1].
    probabilities: the adaptive times' bin probabilities (for the warped grid), None when times were uniform.
    """

    run: Path
    recipe: Recipe
    vocabulary: Vocabulary
    hash: str
    manifest: dict[str, Any]
    model: LDLM
    length_histogram: NDArray[np.int64]
    probabilities: NDArray[np.float64] | None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def write_snapshot(
    run: Path,
    recipe: Recipe,
    model: LDLM,
    vocabulary: Vocabulary,
    length_histogram: NDArray[np.int64],
    probabilities: NDArray[np.float64] | None,
    facts: dict[str, Any],
    folder: Path | None = None,
) -> Path:
    """Write a snapshot: one safetensors file a part, normalisation, vocabulary, config; an older one is replaced.

    Args:
        folder: where, in the run; `snapshot/` if None. It appears whole or not at all.
    """
    folder = folder or run / "snapshot"
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, part in model.parts.items():
        weights = {key: value.detach().cpu().contiguous() for key, value in part.state_dict().items()}
        save_file(weights, aside / f"{name}.safetensors")
    encoder = model.token_encoder
    assert encoder is not None
    normal = {"latent_mean": model.latent_normalizer.mean, "latent_std": model.latent_normalizer.std}
    normal |= {f"hidden_{key}": value for key, value in encoder.normalizer.state_dict().items()}
    save_file(
        {key: value.detach().cpu().contiguous() for key, value in normal.items()}, aside / "normalization.safetensors"
    )
    vocabulary.save(aside / "vocabulary")
    if recipe.token_encoder.source == "trained":
        shutil.copytree(run / "token_encoder", aside / "token_encoder")
    config = {
        "format": SNAPSHOT_FORMAT,
        "ldlm": __version__,
        "recipe": recipe.model_dump(mode="json"),
        "vocab_size": vocabulary.size,
        "files": weight_hashes(aside),
        "hash": weights_hash(aside),
        "length_histogram": [int(count) for count in length_histogram],
        "time_probabilities": None if probabilities is None else [float(share) for share in probabilities],
        **facts,
    }
    (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (aside / "README.md").write_text(model_card(recipe, config), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return folder


def weight_hashes(folder: Path) -> dict[str, str]:
    """sha256 of each weight file of a snapshot, by file name."""
    return {path.name: file_hash(path) for path in sorted(folder.glob("*.safetensors"))}


def weights_hash(folder: Path) -> str:
    """sha256 over the names and hashes of a snapshot's weight files, first 16 hex digits."""
    return hashlib.sha256(json.dumps(weight_hashes(folder)).encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(folder: Path, name: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """A weight file of a snapshot, checked against the hash that its config states; ValueError when they differ."""
    path = folder / f"{name}.safetensors"
    if file_hash(path) != config["files"][path.name]:
        raise ValueError(f"{path.name} is not the file that was written")
    return load_file(path)


def model_card(recipe: Recipe, config: dict[str, Any]) -> str:
    """A short model card in Markdown."""
    synthetic = " (synthetic)" if recipe.data.source.startswith("builtin:") else ""
    return (
        f"# {recipe.name}\n\nA latent diffusion language model (method: arXiv 2605.07933, as reconstructed) trained "
        f"with ldlm {config['ldlm']} on `{recipe.data.source}`{synthetic}.\n\n"
        f"- weights: `{config['hash']}` (exponential averages)\n- seed: {recipe.seed}\n"
        f"- training length: {recipe.data.max_len_tokens} tokens\n- use: `ldlm sample --run RUN --steps 50`\n"
    )


def find_run(run: str | None, runs: Path = Path("runs")) -> Path:
    """The run folder named (a path, or a name in `runs`), or the newest that holds a latent-diffusion snapshot.

    Raises:
        SnapshotError: there is none; says how to make one.
    """
    if run is not None:
        for path in (Path(run), runs / run):
            if (path / "snapshot" / "config.json").is_file():
                return path
        raise SnapshotError(f"'{run}' holds no snapshot: name a run folder whose training has finished")
    found = [path.parent.parent for path in runs.glob("*/snapshot/config.json")]
    if not found:
        raise SnapshotError(
            f"no run with a snapshot in '{runs}/': train one first, for example `ldlm train-joint --recipe base.yaml`"
        )
    return max(found, key=lambda path: (path / "snapshot" / "config.json").stat().st_mtime)


def snapshots_along(run: Path) -> list[Path]:
    """Complete snapshots that a run kept on its way (`training.snapshot_every_steps`), in the order of training."""
    folders = [path for path in (run / "snapshots").glob("[!.]*") if (path / "config.json").is_file()]
    configs = {path: json.loads((path / "config.json").read_text(encoding="utf-8")) for path in folders}
    return sorted(folders, key=lambda path: (len(configs[path]["compute"]["stages"]), configs[path]["step"]))


def load_snapshot(
    run: Path,
    parts: Collection[str] | None = None,
    device: torch.device | str = "cpu",
    *,
    token_encoder: bool = True,
    folder: Path | None = None,
) -> Snapshot:
    """Open a run's snapshot in evaluation mode.

    Args:
        run: run folder.
        parts: trained parts to load; None for all. Sampling needs denoiser, latent_decoder and token_decoder only.
        token_encoder: also load the frozen LM (not needed for sampling).
        folder: one of `snapshots_along`; the final `snapshot/` if None.
    Raises:
        SnapshotError: missing, damaged, or of another format version.
    """
    folder = folder or run / "snapshot"
    names = tuple(PARTS if parts is None else parts)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.get("format") != SNAPSHOT_FORMAT:
            raise SnapshotError(
                f"the snapshot in '{folder}' has format {config.get('format')}, this ldlm reads {SNAPSHOT_FORMAT}: "
                f"use the ldlm version that wrote it ({config.get('ldlm', 'unknown')}) or train again"
            )
        recipe = Recipe.model_validate(config["recipe"])
        vocabulary = Vocabulary.load(folder / "vocabulary")
        built = build_parts(recipe, int(config["vocab_size"]), names)
        for name, part in built.items():
            part.load_state_dict(load_weights(folder, name, config))
        normal = load_weights(folder, "normalization", config)
        encoder = None
        if token_encoder:
            own = recipe.token_encoder.source == "trained"
            source = folder / "token_encoder" if own else recipe.token_encoder.source
            encoder = build_token_encoder(recipe.token_encoder, source, vocabulary.prefix_id, vocabulary.size)
            own_statistics = {key[7:]: value for key, value in normal.items() if key.startswith("hidden_")}
            encoder.normalizer.load_state_dict(own_statistics)
        model = LDLM(built, encoder, recipe)
        model.latent_normalizer.set_statistics(normal["latent_mean"], normal["latent_std"])
        histogram = np.asarray(config["length_histogram"], dtype=np.int64)
        probabilities = config["time_probabilities"]
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError, ValidationError, DataError) as error:
        raise SnapshotError(
            f"the snapshot in '{folder}' cannot be read ({str(error).splitlines()[0]}): train again or name another run"
        ) from error
    return Snapshot(
        run=run,
        recipe=recipe,
        vocabulary=vocabulary,
        hash=config["hash"],
        manifest=config,
        model=freeze(model).to(device),
        length_histogram=histogram,
        probabilities=None if probabilities is None else np.asarray(probabilities),
    )


def freeze(model: LDLM) -> LDLM:
    """The model in evaluation mode, needing no gradients."""
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


class HasTensors(Protocol):
    """A module, or anything else whose state is tensors."""

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> Any: ...


def module_tensors(modules: Mapping[str, HasTensors]) -> dict[str, Tensor]:
    """All tensors of some modules under dotted names."""
    return {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}


def load_module_tensors(modules: Mapping[str, HasTensors], tensors: Mapping[str, Tensor]) -> None:
    """The inverse of module_tensors; SnapshotError when a tensor is missing or has another shape."""
    for name, module in modules.items():
        own = {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            raise SnapshotError(f"the checkpoint does not fit the part '{name}': start again with --fresh") from error
