"""Measurements of snapshots for a comparison: by text, with their circumstances, kept so that none is repeated."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ldlm_cli import __version__
from ldlm_cli.checkpoint import Snapshot, file_hash, load_snapshot
from ldlm_cli.data.shards import TokenFolder
from ldlm_cli.data.story_checker import check_story
from ldlm_cli.evaluation import metrics
from ldlm_cli.evaluation.controls import control_texts
from ldlm_cli.evaluation.evaluate import MAX_CONTROL_TEXTS, STORIES
from ldlm_cli.evaluation.generation import TextSet, TrainingDocuments, as_text_set, matching_texts, measure_texts
from ldlm_cli.evaluation.judge import Judge, TextScore
from ldlm_cli.evaluation.likeness import ComparedRun
from ldlm_cli.evaluation.own_estimates import held_out_texts, measure_latent_state, measure_own_estimates
from ldlm_cli.evaluation.reconstruction import predict
from ldlm_cli.generate import Generator, SamplingOptions, generate_texts
from ldlm_cli.runtime import Runtime

MEASURING_CODE = ("core/*.py", "data/*.py", "generate.py", "evaluation/*.py")
NOT_MEASURING = ("compare.py", "likeness.py", "matched.py", "paired.py")


@dataclass
class Bench:
    """Where snapshots are measured: the same held-out texts, judge and precision for all of them.

    shared: the circumstances that all runs have in common (likeness.refuse_unlike).
    num_texts: held-out texts reconstructed.
    noise_std: decoder noise of the noised reconstruction and of the measured bits, the same for all runs.
    cache: folder of finished measurements.
    """

    shared: dict[str, Any]
    tokens: TokenFolder
    judge: Judge
    runtime: Runtime
    num_texts: int
    noise_std: float
    cache: Path
    on_progress: Callable[[str], None]

    def __post_init__(self) -> None:
        self.opened: tuple[Path, Snapshot] | None = None
        self.code = code_hash()
        self.training = TrainingDocuments(self.tokens.split("train"))

    def snapshot(self, run: ComparedRun, folder: Path) -> Snapshot:
        """The snapshot in a folder of a run; the last one opened is kept."""
        if self.opened is None or self.opened[0] != folder:
            self.opened = (folder, load_snapshot(run.folder, device=self.runtime.device, folder=folder))
        return self.opened[1]

    def kept(self, what: str, identity: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A measurement of that identity from the cache, else measured and kept there."""
        identity = {
            "what": what,
            "ldlm": __version__,
            "torch": torch.__version__,
            "code": self.code,
            "device": str(self.runtime.device),
            **{key: value for key, value in self.shared.items() if not key.startswith(("sampling.", "evaluation."))},
            **identity,
        }
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
        path = self.cache / f"{what}-{key}.json"
        if path.is_file():
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if kept["identity"] == identity:
                return kept["measured"]  # type: ignore[no-any-return]
        measured = measure()
        self.cache.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"identity": identity, "measured": measured}) + "\n", encoding="utf-8")
        os.replace(part, path)
        return measured

    # ------------------------------------------------------------------ no sampling

    def encoding(self, run: ComparedRun, folder: Path) -> dict[str, Any]:
        """Reconstruction by text, own estimates and latent state of a snapshot, at the training length.

        Returns:
            correct and correct_noised (tokens read correctly, a text), tokens (a text), own_estimates, latent_state.
        """
        identity = {"snapshot": file_hash(folder / "config.json"), "texts": self.num_texts, "noise_std": self.noise_std}
        return self.kept("encoding", identity, lambda: self._encoding(run, folder))

    def _encoding(self, run: ComparedRun, folder: Path) -> dict[str, Any]:
        self.on_progress(f"{run.name}: reconstruction, own estimates, latents")
        snapshot = self.snapshot(run, folder)
        batch, kind = held_out_texts(snapshot, self.tokens.split("test"), self.num_texts)

        def correct(noise_std: float) -> list[int]:
            found = predict(snapshot, batch.token_ids, batch.mask, noise_std, self.runtime)
            return [int(count) for count in ((found == batch.token_ids) & batch.mask).sum(axis=1)]

        state, _ = measure_latent_state(snapshot, batch, runtime=self.runtime, noise_std=self.noise_std)
        return {
            "kind": kind,
            "tokens": [int(count) for count in batch.mask.sum(axis=1)],
            "correct": correct(0.0),
            "correct_noised": correct(self.noise_std) if self.noise_std > 0 else None,
            "own_estimates": measure_own_estimates(snapshot, batch, runtime=self.runtime),
            "latent_state": state,
        }

    # ------------------------------------------------------------------ sampling

    def generation(self, run: ComparedRun, folder: Path, options: SamplingOptions) -> dict[str, Any]:
        """Texts of a snapshot, measured: `summary` as in `ldlm eval`, and by sample index `nats`, `judge_tokens`,
        `entropy` (None for an empty text) and, for the built-in stories, `valid`."""
        identity = {"snapshot": file_hash(folder / "config.json"), "options": asdict(replace(options, batch_size=0))}
        return self.kept("generation", identity, lambda: self._generation(run, folder, options))

    def _generation(self, run: ComparedRun, folder: Path, options: SamplingOptions) -> dict[str, Any]:
        where = "" if folder.name == "snapshot" else f" ({folder.name})"
        steps = "1 step" if options.steps == 1 else f"{options.steps} steps"
        self.on_progress(f"{run.name}{where}: {options.num} texts, {steps}, temperature {options.temperature:g}")
        snapshot = self.snapshot(run, folder)
        generated = generate_texts(snapshot, options, runtime=self.runtime)
        return self.measured(as_text_set(generated, snapshot.vocabulary.eos_id), run)

    def measured(self, texts: TextSet, run: ComparedRun) -> dict[str, Any]:
        """A set of texts as `generation` returns it."""
        stories = run.recipe.data.source == STORIES
        scores = self.judge.score(texts.texts)
        found: dict[str, Any] = {"summary": self._summary(texts, scores, stories)}
        found["nats"] = [score.nats for score in scores]
        found["judge_tokens"] = [score.tokens for score in scores]
        found["entropy"] = [metrics.unigram_entropy(ids) if ids else None for ids in texts.token_ids]
        if stories:
            found["valid"] = [int(check_story(text).valid) for text in texts.texts]
        return found

    def _summary(self, texts: TextSet, scores: Sequence[TextScore], stories: bool) -> dict[str, Any]:
        return measure_texts(
            texts,
            judge=self.judge,
            vocabulary=self.tokens.vocabulary,
            training=self.training,
            stories=stories,
            scores=scores,
        )

    def references(self, run: ComparedRun, options: SamplingOptions) -> dict[str, Any]:
        """Real held-out text and the naive controls, one set for all runs, of the lengths drawn for sampling."""
        identity = {"num": options.num, "seed": options.seed, "length": options.length}
        return self.kept("references", identity, lambda: self._references(run, options))

    def _references(self, run: ComparedRun, options: SamplingOptions) -> dict[str, Any]:
        self.on_progress("Scoring held-out texts and controls")
        snapshot, vocabulary = self.snapshot(run, run.folder / "snapshot"), self.tokens.vocabulary
        window = run.recipe.data.max_len_tokens
        drawn = Generator(
            *(snapshot.model, snapshot.recipe, vocabulary, snapshot.length_histogram, snapshot.probabilities),
            options=options,
            runtime=self.runtime,
        ).lengths()
        packed = run.recipe.data.packing == "pack"
        test = self.tokens.split("test")
        lengths = [length - 1 for length in drawn]  # without the end token
        real, kind = matching_texts(test, vocabulary, lengths, window_tokens=window, packed=packed, seed=options.seed)
        naive = control_texts(
            real.first(MAX_CONTROL_TEXTS),
            self.tokens.split("train"),
            vocabulary,
            window_tokens=window,
            seed=options.seed,
        )
        rows = {"held_out_text": {"kind": kind, **self.measured(real, run)["summary"]}}
        return rows | {name: self.measured(texts, run)["summary"] for name, texts in naive.items()}


def code_hash() -> str:
    """sha256 over the code that decides a measurement: what was measured before it changed is not used again."""
    package = Path(__file__).parents[1]
    files = [path for pattern in MEASURING_CODE for path in sorted(package.glob(pattern))]
    content = "".join(file_hash(path) for path in files if path.name not in NOT_MEASURING)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
