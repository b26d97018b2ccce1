"""The files and tables of a comparison: compare.json for machines, compare.md and plots for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from ldlm_cli.report.comparison_plots import write_plots
from ldlm_cli.report.files import COLUMNS, ROW_NAMES, markdown_table, write_whole
from ldlm_cli.report.tables import finite, number, print_table, stdout_console

GENERATION = (
    "generative_perplexity",
    "entropy_nats",
    "valid_stories",
    "distinct_2",
    "duplicate_share",
    "memorised_share",
)
QUANTITIES = {
    "accuracy": "reconstruction accuracy",
    "accuracy_noised": "reconstruction accuracy with decoder noise",
    "nats_per_judge_token": "nats a judge token (log perplexity)",
    "entropy_nats": "entropy, nats",
    "valid_stories": "valid stories",
}
MATCHED = {"denoiser_steps": "denoiser steps", "flops": "FLOPs of the latent stages"}


@dataclass(frozen=True)
class Table:
    """A table of any output: title, column names, rows of numbers or words, a sentence below."""

    title: str
    header: list[str]
    rows: list[list[object]]
    below: str = ""


def comparison_tables(report: Mapping[str, Any]) -> list[Table]:
    """All tables of a comparison, in the order in which they are read."""
    tables = [_compute_table(report), _encoding_table(report), _generation_table(report)]
    if "matched_entropy" in report:
        tables.append(_entropy_table(report))
    tables.append(_paired_table(report))
    tables += [_matched_table(matched) for matched in report.get("matched_compute", ())]
    return [*tables, _circumstances_table(report)]


def _compute_table(report: Mapping[str, Any]) -> Table:
    header = ["run", "recipe, plan", "seed", "latent steps", "denoiser steps", "latent tokens", "seconds"]
    header += ["FLOPs, latent stages", "FLOPs, denoiser", "FLOPs, all stages"]
    rows: list[list[object]] = []
    for run in report["runs"]:
        compute = run["compute"] or {"latent": {}}
        latent = compute["latent"]
        spent = [latent.get(key) for key in ("steps", "denoiser_steps", "tokens", "seconds", "flops", "denoiser_flops")]
        rows.append([run["run"], run["group"], run["seed"], *spent, compute.get("flops")])
    below = (
        "FLOPs by formula: 6 a parameter and token trained, 2 where only the forward pass runs; attention is left out."
    )
    return Table("Runs and what they spent", header, rows, below)


def _encoding_table(report: Mapping[str, Any]) -> Table:
    noise = report["identity"]["decoder_noise_std"]
    first = report["encoding"][0]
    header = ["run", "accuracy", f"accuracy, noise {noise:g}", "latent std", "effective rank", f"bits, noise {noise:g}"]
    times = first["own_estimates"]["rows"] if "own_estimates" in first else []
    header += [f"t = {row['t']:g}{kind}" for row in times for kind in ("", ", self-cond.")]
    rows: list[list[object]] = []
    for found in report["encoding"]:
        state = found["latent_state"]
        row = [found["run"], found["accuracy"], found["accuracy_noised"]]
        row += [state["z_std"], state["effective_rank"], state.get("bits")]
        estimates = found["own_estimates"]["rows"] if times else []
        rows.append(row + [each[kind] for each in estimates for kind in ("first", "second")])
    below = (
        f"{first['num_texts']} held-out texts of {report['identity']['data.max_len_tokens']} tokens, the same for all."
    )
    if times:
        below += (
            " Columns t: token accuracy of the decoder on the denoiser's own estimate of a text noised to time t, "
            "without and with one self-conditioning pass."
        )
    return Table("Held-out texts: reconstruction, latents, own estimates", header, rows, below)


def _generation_table(report: Mapping[str, Any]) -> Table:
    references = report["references"]
    measured = [*references.values(), *report["generation"]]
    columns = [key for key in GENERATION if any(key in row for row in measured)]
    rows: list[list[object]] = [
        [ROW_NAMES.get(name, name), None, row["num_texts"], *map(row.get, columns)] for name, row in references.items()
    ]
    for row in sorted(report["generation"], key=lambda row: row["steps"]):
        rows.append([row["run"], row["steps"], row["num_texts"], *map(row.get, columns)])
    judge = report["identity"]["judge"]["held_out_nats_per_token"]
    real = references["held_out_text"]
    below = f"Real texts are {'whole documents' if real['kind'] == 'document' else 'windows of documents'}."
    if judge is not None:
        below += f" The judge's own held-out nats per token: {number(judge)}."
    return Table("Generated texts", ["", "steps", "texts", *(COLUMNS[key] for key in columns)], rows, below)


def _entropy_table(report: Mapping[str, Any]) -> Table:
    target = report["references"]["held_out_text"]["entropy_nats"]
    rows: list[list[object]] = []
    for row in report["matched_entropy"]:
        low, high = row["entropy_range"] or (None, None)
        remark = "" if row["reached"] else f"out of range: the sweep has {number(low)} to {number(high)} nats"
        if row["crossings"] > 1:
            remark = f"{row['crossings']} crossings; the one nearest to temperature 1"
        values = [row.get(key) for key in ("temperature", "generative_perplexity", "valid_stories")]
        rows.append([row["run"], row["steps"], *values, remark])
    sweep = report["identity"]["sweep"]
    temperatures = ", ".join(f"{value:g}" for value in sweep["temperatures"])
    below = f"Interpolated between temperatures {temperatures}, {sweep['num']} texts each."
    header = ["run", "steps", "temperature", "perplexity", "valid stories", ""]
    return Table(f"At the entropy of real text ({number(target)} nats)", header, rows, below)


def _paired_table(report: Mapping[str, Any]) -> Table:
    rows: list[list[object]] = []
    for row in report["paired"]:
        sure = "" if row["low"] <= 0 <= row["high"] else "differs"
        values = [row[key] for key in ("difference", "low", "high")]
        rows.append([row["run"], row["against"], QUANTITIES[row["quantity"]], row["steps"], *values, sure])
    header = ["run", "minus", "of", "steps", "difference", "from", "to", ""]
    below = (
        "95 % intervals by paired bootstrap over the same held-out texts, or the same sampling noise, of two runs; "
        "the spread over training seeds is not in them."
    )
    return Table("Paired differences", header, rows, below)


def _matched_table(matched: Mapping[str, Any]) -> Table:
    rows: list[list[object]] = []
    for row in matched["rows"]:
        if row["snapshot"] is None:
            rows.append([row["run"], row["reason"], *[None] * 5])
        for found in row.get("generation", ()):
            values = [found.get(key) for key in GENERATION[:3]]
            rows.append([row["run"], row["snapshot"], row["spent"], found["steps"], *values])
    header = ["run", "snapshot", "spent", "sampling steps", "perplexity", "entropy, nats", "valid stories"]
    name = MATCHED[matched["by"]]
    if not matched["rows"]:
        return Table(f"At equal {name}", header, [], f"Not measured: {matched['reason']}.")
    below = f"Of each run the snapshot nearest to {number(matched['target'])} {name} and not above."
    return Table(f"At equal {name}", header, rows, below)


def _circumstances_table(report: Mapping[str, Any]) -> Table:
    names = [run["run"] for run in report["runs"]]
    rows: list[list[object]] = [
        [field, *(str(values[name]) if name in values else "-" for name in names)]
        for field, values in report["circumstances"].items()
    ]
    return Table("What differs between the runs", ["field", *names], rows, "" if rows else "Nothing.")


def print_comparison(report: Mapping[str, Any]) -> None:
    """The tables and notes on stdout."""
    console = stdout_console()
    if report["identity"]["data_is_synthetic"]:
        console.print(Text("The corpus is synthetic: these numbers say nothing about natural text.", style="yellow"))
    for table in comparison_tables(report):
        print_table(table.title, table.header, table.rows)
        if table.below:
            console.print(Text(table.below))
    for note in report["notes"]:
        console.print(Text(note))


def comparison_markdown(report: Mapping[str, Any]) -> str:
    """The comparison as Markdown: tables, notes, and all circumstances that the columns share."""
    lines = ["# Comparison", ""]
    if report["identity"]["data_is_synthetic"]:
        lines += ["The corpus is synthetic: these numbers say nothing about natural text.", ""]
    for table in comparison_tables(report):
        lines += [f"## {table.title}", ""]
        if table.rows:
            lines += [*markdown_table(table.header, [[number(value) for value in row] for row in table.rows]), ""]
        lines += [table.below, ""] if table.below else []
    lines += ["## Notes", "", *(f"- {note}" for note in report["notes"]), ""] if report["notes"] else []
    identity = json.dumps(finite(report["identity"]), indent=2, ensure_ascii=False)
    return "\n".join([*lines, "## Circumstances", "", "```json", identity, "```", ""])


def write_comparison(report: dict[str, Any], folder: Path) -> None:
    """Write compare.json, compare.md and plots/*.png into a folder, which is made if it is missing."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite(report), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(folder / "compare.json", text + "\n")
    write_whole(folder / "compare.md", comparison_markdown(report))
    write_plots(report, folder / "plots")
