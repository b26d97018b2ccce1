"""Quality of one run's texts at several step counts, beside an autoregressive language model on the same tokens.

    python benchmarks/story_steps.py runs/base-joint-s0 --lm runs/base-lm-s0 --num 500

Prints a Markdown table: generative perplexity by the run's judge, entropy, valid stories (built-in corpus) and texts
copied whole from the training split, beside held-out text of the same lengths. `--lm` names a finished `ldlm train-lm`
run on the same data, or the folder of a language model; its texts are drawn token by token at temperature 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ldlm_cli.checkpoint import load_snapshot
from ldlm_cli.data.shards import prepare_tokens
from ldlm_cli.evaluation.generation import TextSet, TrainingDocuments, as_text_set, matching_texts, measure_texts
from ldlm_cli.evaluation.judge import Judge
from ldlm_cli.evaluation.metrics import cut_at
from ldlm_cli.generate import SamplingOptions, generate_texts
from ldlm_cli.runtime import Runtime


def main(run: Path, lm: Path | None, steps: list[int], num: int) -> None:
    """Measure and print one row a step count, one for the language model, one for held-out text."""
    runtime = Runtime.start("fp32")
    snapshot = load_snapshot(run)
    recipe = snapshot.recipe
    tokens = prepare_tokens(recipe.data, recipe.token_encoder)
    judge = Judge.open(recipe.judge.source, run=run, recipe=recipe, device="cpu")
    training = TrainingDocuments(tokens.split("train"))
    stories = recipe.data.source == "builtin:stories"
    print("| texts | generative perplexity | entropy (nats) | valid stories | copied whole |\n|---|---|---|---|---|")

    def row(name: str, texts: TextSet) -> None:
        found = measure_texts(texts, judge=judge, vocabulary=tokens.vocabulary, training=training, stories=stories)
        valid = f"{100 * found['valid_stories']:.1f} %" if stories else "-"
        copied = f"{100 * found['memorised_share']:.1f} %"
        figures = f"{found['generative_perplexity']:.2f} | {found['entropy_nats']:.3f} | {valid} | {copied}"
        print(f"| {name} | {figures} |", flush=True)

    eos = tokens.vocabulary.eos_id
    texts: TextSet | None = None
    for count in steps:
        texts = as_text_set(generate_texts(snapshot, SamplingOptions(num=num, steps=count), runtime=runtime), eos)
        row(f"{count} steps", texts)
    if lm is not None:
        row(f"autoregressive ({lm.name})", language_model_texts(lm, tokens, num, recipe.data.max_len_tokens))
    if texts is not None:
        lengths = [len(ids) for ids in texts.token_ids]
        window = recipe.data.max_len_tokens
        held_out, _ = matching_texts(
            tokens.split("test"), tokens.vocabulary, lengths, window_tokens=window, packed=False, seed=0
        )
        row("held-out", held_out)


def language_model_texts(run: Path, tokens: Any, num: int, longest: int) -> TextSet:
    """Texts drawn from a train-lm run at temperature 1, from the start token to the first end token."""
    from transformers import AutoModelForCausalLM

    folder = run if (run / "config.json").is_file() else run / "token_encoder"
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    vocabulary = tokens.vocabulary
    start = vocabulary.eos_id if vocabulary.prefix_id is None else vocabulary.prefix_id
    torch.manual_seed(0)
    prompt = torch.full((num, 1), start)
    drawn = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        top_k=0,
        max_new_tokens=longest,
        eos_token_id=vocabulary.eos_id,
        pad_token_id=vocabulary.pad_id,
    )
    ids = [cut_at(row, vocabulary.eos_id) for row in drawn[:, 1:].tolist()]
    return TextSet([vocabulary.decode(row) for row in ids], ids)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="quality by sampling steps")
    parser.add_argument("run", type=Path)
    parser.add_argument("--lm", type=Path)
    parser.add_argument("--steps", type=int, nargs="*", default=[5, 10, 20, 50, 100])
    parser.add_argument("--num", type=int, default=500)
    given = parser.parse_args()
    main(given.run, given.lm, given.steps, given.num)
