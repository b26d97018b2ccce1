"""Validity, perplexity and entropy of a run's samples against the number of steps, beside an autoregressive LM.

    python benchmarks/story_steps.py runs/base-joint-s0 [--lm runs/base-lm-s0] [--num 500] [--out docs/results/base.md]

For runs on the synthetic built-in corpus (validity is its oracle). The LM's texts are sampled at temperature 1.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from ldlm_cli.checkpoint import load_snapshot
from ldlm_cli.core.draws import generator_at
from ldlm_cli.data.shards import prepare_tokens
from ldlm_cli.data.vocabulary import Vocabulary
from ldlm_cli.evaluation.generation import TextSet, TrainingDocuments, as_text_set, matching_texts, measure_texts
from ldlm_cli.evaluation.judge import Judge
from ldlm_cli.generate import SamplingOptions, generate_texts
from ldlm_cli.runtime import Runtime

STEPS = (5, 10, 20, 50, 100)
COLUMNS = ("valid_stories", "generative_perplexity", "entropy_nats", "memorised_share")


@torch.inference_mode()
def language_model_texts(folder: Path, num: int, longest: int, seed: int) -> TextSet:
    """Texts of a causal LM, token after token at temperature 1, ids up to (not including) EOS."""
    from transformers import AutoModelForCausalLM

    model, vocabulary = AutoModelForCausalLM.from_pretrained(folder), Vocabulary.load(folder)
    torch.manual_seed(generator_at(torch.device("cpu"), seed).initial_seed())
    start = torch.full((num, 1), vocabulary.prefix_id or vocabulary.eos_id)
    found = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, max_new_tokens=longest,
        eos_token_id=vocabulary.eos_id, pad_token_id=vocabulary.pad_id,
    )  # fmt: skip
    ids = [row.tolist() for row in found[:, 1:]]
    ids = [row[: row.index(vocabulary.eos_id)] if vocabulary.eos_id in row else row for row in ids]
    return TextSet([vocabulary.decode(row) for row in ids], ids)


def main() -> None:
    """Measure and print a Markdown table; write it to --out too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--lm", type=Path, help="run of train-lm")
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    snapshot = load_snapshot(arguments.run)
    recipe, runtime = snapshot.recipe, Runtime.start(snapshot.recipe.training.precision)
    tokens = prepare_tokens(recipe.data, recipe.token_encoder)
    judge = Judge.open(recipe.judge.source, run=arguments.run, recipe=recipe, device=runtime.device)
    training = TrainingDocuments(tokens.split("train"))

    def row(name: str, texts: TextSet, seconds: float | None) -> dict[str, Any]:
        measured = measure_texts(texts, judge=judge, vocabulary=tokens.vocabulary, training=training, stories=True)
        return {"row": name, **{key: measured[key] for key in COLUMNS}, "seconds": seconds}

    rows = []
    for steps in STEPS:
        started = time.perf_counter()
        texts = generate_texts(snapshot, SamplingOptions(num=arguments.num, steps=steps), runtime=runtime)
        seconds = time.perf_counter() - started
        as_set = as_text_set(texts, tokens.vocabulary.eos_id)
        rows.append(row(f"{steps} steps", as_set, seconds))
    lengths = [len(ids) for ids in as_set.token_ids]
    if arguments.lm is not None:
        role = next(path for path in (arguments.lm / "baseline", arguments.lm / "token_encoder") if path.is_dir())
        started = time.perf_counter()
        written = language_model_texts(role, arguments.num, recipe.data.max_len_tokens, seed=0)
        rows.append(row("autoregressive LM", written, time.perf_counter() - started))
    real, _ = matching_texts(
        tokens.split("test"), tokens.vocabulary, lengths, window_tokens=recipe.data.max_len_tokens, packed=False, seed=0
    )
    rows.append(row("held-out text", real, None))
    lines = ["| |" + "|".join((*COLUMNS, "seconds")) + "|", "|---" * (len(COLUMNS) + 2) + "|"]
    for values in rows:
        cells = [f"{values[key]:.3f}" for key in COLUMNS] + [f"{values['seconds']:.1f}" if values["seconds"] else ""]
        lines.append(f"| {values['row']} | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        arguments.out.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
