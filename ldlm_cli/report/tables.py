"""Results on stdout: tables for people, one JSON object for machines."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ldlm_cli.report.files import COLUMNS, LATENT_STATE, ROW_NAMES, latent_state_rows

SHOWN_SECTIONS = {"identity", "generation", "controls", "reconstruction", "own_estimates", "latent_state"}


def stdout_console() -> Console:
    """The console of results. Wide when it is not a terminal, so that no number is cut in a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def number(value: object) -> str:
    """A number in four digits, whole numbers in full; `-` where there is none."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout; columns of numbers are aligned to the right."""
    table = Table(title=title or None, title_justify="left", title_style="bold")
    for column, name in enumerate(header):
        values = [row[column] for row in rows]
        numeric = bool(values) and all(value is None or isinstance(value, int | float) for value in values)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(number(value)) for value in row))
    stdout_console().print(table)


def print_facts(title: str, facts: Mapping[str, object]) -> None:
    """Names and values, one a line, under a title."""
    console = stdout_console()
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(Text(f"  {name}"), Text(number(value)))
    if title:
        console.print(Text(title, style="bold"))
    console.print(table)


def finite(value: Any) -> Any:
    """The same value with infinities and NaN as text: JSON has no such numbers, and null would hide them."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout and nothing else; paths become text."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def human_bytes(count: float) -> str:
    """Bytes in a unit of 1,024 that fits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def print_plan(recipe: str, plan: str, report: Mapping[str, Any], seconds: str | None = None) -> None:
    """The answer of --dry-run: parameters, memory, stages, and the time where it is known."""
    parameters = list(report["parameters"].items())
    if "total" in report:
        parameters.append(("total", report["total"]))
    print_table(f"{recipe}, plan {plan}: parameters", ("part", "parameters"), parameters)
    if report.get("memory_bytes"):
        memory = [(name, human_bytes(count)) for name, count in report["memory_bytes"].items()]
        print_table("memory", ("", "bytes"), memory)
    header = ("stage", "kind", "steps", "tokens")
    print_table(
        "stages", header, [tuple(stage.get(key) for key in ("name", *header[1:])) for stage in report["stages"]]
    )
    facts = {name: report[name] for name in ("steps", "tokens") if name in report}
    print_facts("", {**facts, **({"estimated time": seconds} if seconds else {})})


def print_report(report: Mapping[str, Any]) -> None:
    """An evaluation report: tables of generated texts beside real text and controls, and of reconstruction."""
    console = stdout_console()
    if report.get("identity", {}).get("data_is_synthetic"):
        console.print(Text("The corpus is synthetic: these numbers say nothing about natural text.", style="yellow"))
    if "generation" in report:
        generation = report["generation"]
        rows = {"generated": generation} | {
            ROW_NAMES.get(name, name): row for name, row in report.get("controls", {}).items()
        }
        columns = {key: title for key, title in COLUMNS.items() if any(key in row for row in rows.values())}
        table = [(name, *(row.get(key) for key in columns)) for name, row in rows.items()]
        print_table("generated texts", ("", *columns.values()), table)
        if "judge_held_out_nats_per_token" in generation:
            nats, where = generation["judge_held_out_nats_per_token"], generation["judge_held_out_measured_on"]
            console.print(Text(f"The judge's own held-out nats per token: {number(nats)} ({where})."))
    if "reconstruction" in report:
        _print_reconstruction(report["reconstruction"])
    if "own_estimates" in report:
        section = report["own_estimates"]
        table = [tuple(row[key] for key in ("t", "log_snr", "first", "second")) for row in section["rows"]]
        title = f"decoder on the denoiser's own estimates, {section['num_texts']} held-out texts"
        header = ("t", "log SNR", "accuracy, no self-conditioning", "accuracy, one self-conditioning pass")
        print_table(title, header, table)
    if "latent_state" in report:
        table = [(name, *map(row.get, LATENT_STATE)) for name, row in latent_state_rows(report["latent_state"]).items()]
        print_table("latents of held-out texts", ("", *LATENT_STATE.values()), table)
    # Sections that this version of the terminal report has no table for are not hidden.
    for name in report.keys() - SHOWN_SECTIONS:
        section = report[name]
        plain = {key: value for key, value in section.items() if not isinstance(value, dict | list)}
        print_facts(name, plain or {"": "see eval/report.json"})


def _print_reconstruction(section: Mapping[str, Any]) -> None:
    rows = []
    for row in section["rows"]:
        clean, noised = row.get("clean", {}), row.get("noised", {})
        rows.append(
            (
                row["length"],
                row.get("num_texts"),
                clean.get("accuracy"),
                clean.get("accuracy_words"),
                clean.get("exact_texts"),
                noised.get("accuracy"),
                row.get("refused", "beyond training" if row["beyond_training"] else ""),
            )
        )
    header = ("length", "texts", "accuracy", "without special tokens", "whole texts", "with decoder noise", "")
    print_table("reconstruction of held-out text, by length in tokens", header, rows)
    if section.get("verdict"):
        stdout_console().print(Text(str(section["verdict"])))
