"""`ldlm tokenize`: parse, then text -> tokenizer, token shards and a manifest."""

from __future__ import annotations

from typing import Any

from ldlm_cli.cli import options


def tokenize(recipe: options.RecipeName, overrides: options.Overrides = None, as_json: options.AsJson = False) -> None:
    """Prepare a recipe's text as tokens; training does this by itself where it has not been done."""
    resolved = options.resolve_recipe(recipe, overrides)

    from ldlm_cli.data.shards import prepare_tokens
    from ldlm_cli.report import console, tables

    folder = prepare_tokens(resolved.data, resolved.token_encoder, on_progress=console.note)
    splits: list[dict[str, Any]] = []
    for name in ("train", "valid", "test"):
        lengths = folder.split(name).lengths
        splits.append(
            {
                "split": name,
                "documents": len(lengths),
                "tokens": int(lengths.sum()),
                "mean_tokens": round(float(lengths.mean()), 1) if len(lengths) else None,
                "longest_tokens": int(lengths.max()) if len(lengths) else None,
            }
        )
    facts = {
        "recipe": resolved.name,
        "source": resolved.data.source,
        "folder": str(folder.path),
        "fingerprint": folder.fingerprint,
        "vocabulary": folder.vocabulary.size,
    }
    if as_json:
        tables.print_json({**facts, "splits": splits})
        return
    tables.print_facts("", facts)
    header = ("split", "documents", "tokens", "tokens a document", "longest")
    tables.print_table("", header, [tuple(row.values()) for row in splits])
