"""The files of an evaluation: eval/report.json for machines, eval/report.md for people, plots/ for both."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

ROW_NAMES = {
    "held_out_text": "real held-out text",
    "shuffled_words": "real text, words shuffled",
    "unigram_sampler": "unigram sampler",
    "bigram_sampler": "bigram sampler",
    "repeated_sentence": "first sentence repeated",
}
COLUMNS = {
    "num_texts": "texts",
    "generative_perplexity": "perplexity",
    "trimmed_mean_perplexity": "perplexity, mean of texts",
    "entropy_nats": "entropy, nats",
    "distinct_2": "distinct-2",
    "repetition_4": "repeated 4-grams",
    "duplicate_share": "duplicates",
    "memorised_share": "memorised",
    "empty_share": "empty",
    "mean_length_tokens": "tokens",
    "valid_stories": "valid stories",
}

LATENT_STATE = {
    "z_std": "centred std",
    "effective_rank": "effective rank",
    "bits": "bits through decoder noise",
    "decoder_noise_std": "decoder noise std",
}


def write_evaluation(report: dict[str, Any], folder: Path) -> None:
    """Write report.json, report.md and plots/*.png into a folder, which is made if it is missing.

    report.json and report.md are replaced whole or not at all. Sections that the report does not have are left out.
    """
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    write_whole(
        folder / "report.json", json.dumps(_finite(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )
    write_whole(folder / "report.md", report_markdown(report))
    if "reconstruction" in report:
        _plot_reconstruction(report["reconstruction"], folder / "plots" / "reconstruction.png")
    if "generation" in report and "controls" in report:
        _plot_perplexity(report, folder / "plots" / "perplexity.png")


def report_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: the tables, the verdict, the first texts, and all circumstances at the end."""
    lines = [f"# Evaluation of {report['identity']['run']}", ""]
    if report["identity"]["data_is_synthetic"]:
        lines += ["The corpus is synthetic: these numbers say nothing about natural text.", ""]
    if "generation" in report and "controls" in report:
        lines += _generation_lines(report["generation"], report["controls"])
    if "reconstruction" in report:
        lines += _reconstruction_lines(report["reconstruction"])
    if "own_estimates" in report:
        lines += _own_estimates_lines(report["own_estimates"])
    if "latent_state" in report:
        lines += _latent_state_lines(report["latent_state"])
    lines += ["## Circumstances", "", "```json", json.dumps(_finite(report["identity"]), indent=2), "```", ""]
    return "\n".join(lines)


def _generation_lines(generation: dict[str, Any], controls: dict[str, Any]) -> list[str]:
    rows = {"generated": generation} | {ROW_NAMES.get(name, name): row for name, row in controls.items()}
    columns = {key: title for key, title in COLUMNS.items() if any(key in row for row in rows.values())}
    lines = ["## Generated texts", "", *markdown_table(["", *columns.values()], [
        [name, *(_number(row.get(key)) for key in columns)] for name, row in rows.items()
    ])]  # fmt: skip
    lines += [
        "",
        f"The judge's own held-out text costs it {generation['judge_held_out_nats_per_token']:.4f} nats per token "
        f"({generation['judge_held_out_measured_on']}).",
        f"Entropy of generated texts is {_number(generation['entropy_ratio'])} times that of held-out texts of "
        f"matching lengths ({generation['num_texts']} texts against {controls['held_out_text']['num_texts']}, each a "
        f"{controls['held_out_text']['kind']}).",
        "",
    ]
    if generation.get("broken_stories"):
        broken = ", ".join(f"{reason} {count}" for reason, count in generation["broken_stories"].items())
        lines += [f"Generated stories that are not valid break first at: {broken}.", ""]
    lines += [f"### The first {len(generation['samples'])} texts", ""]
    for sample in generation["samples"]:
        # Indented code: a generated text may hold any Markdown.
        lines += [f"Text {sample['index']}:", "", *(f"    {line}" for line in sample["text"].splitlines() or [""]), ""]
    return lines


def _reconstruction_lines(section: dict[str, Any]) -> list[str]:
    header = [
        "length",
        "texts",
        "accuracy",
        "accuracy without special tokens",
        "whole texts",
        "accuracy with decoder noise",
    ]
    rows = []
    for row in section["rows"]:
        name = f"{row['length']}{' (beyond training)' if row['beyond_training'] else ''}"
        if "refused" in row:
            rows.append([name, "-", f"refused: {row['refused']}", "", "", ""])
            continue
        clean = row["clean"]
        values = [
            clean["accuracy"],
            clean["accuracy_words"],
            clean["exact_texts"],
            row.get("noised", {}).get("accuracy"),
        ]
        rows.append([name, f"{row['num_texts']} {row['kind']}", *map(_number, values)])
    return ["## Reconstruction", "", section["verdict"], "", *markdown_table(header, rows), ""]


def _own_estimates_lines(section: dict[str, Any]) -> list[str]:
    header = ["t", "log SNR", "accuracy, no self-conditioning", "accuracy, one self-conditioning pass"]
    rows = [[_number(row[key]) for key in ("t", "log_snr", "first", "second")] for row in section["rows"]]
    return [
        "## Decoder on the denoiser's own estimates",
        "",
        f"Held-out texts of {section['length']} tokens ({section['num_texts']} {section['kind']}) noised to time t; "
        f"their encoded latents themselves are read with accuracy {_number(section['clean'])}.",
        "",
        *markdown_table(header, rows),
        "",
    ]


def _latent_state_lines(section: dict[str, Any]) -> list[str]:
    rows = [
        [title, *(_number(row.get(key)) for key in LATENT_STATE)] for title, row in latent_state_rows(section).items()
    ]
    return ["## Latents of held-out texts", "", *markdown_table(["", *LATENT_STATE.values()], rows), ""]


def latent_state_rows(section: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a table of the section `latent_state`: the encoder's own scale, and what the denoiser sees."""
    rows = {"as encoded": section}
    return rows | {"standardised for the denoiser": section["standardised"]} if "standardised" in section else rows


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _finite(value: Any) -> Any:
    """The same value with infinities and NaN as strings: JSON has no such numbers, and null would hide them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, which appears whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def figure_of(panels: int = 1) -> tuple[Any, list[Any]]:
    """A figure that is only ever saved, with panels side by side, and the axes of each."""
    # The Agg canvas is asked for directly: no display is needed, and a user's own pyplot backend is left alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 if panels == 1 else 4.2 * panels, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _plot_reconstruction(section: dict[str, Any], path: Path) -> None:
    rows = [row for row in section["rows"] if "clean" in row]
    if not rows:
        return
    figure, (axes,) = figure_of()
    axes.plot([row["length"] for row in rows], [row["clean"]["accuracy"] for row in rows], "o-", label="clean latents")
    noised = [row for row in rows if "noised" in row]
    if noised:
        label = f"latents with noise {section['decoder_noise_std']:g}"
        axes.plot([row["length"] for row in noised], [row["noised"]["accuracy"] for row in noised], "s--", label=label)
    axes.axvline(section["training_length"], color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["length"] for row in rows], [str(row["length"]) for row in rows])
    axes.set(xlabel="length, tokens (line: training length)", ylabel="token accuracy", ylim=(0, 1.02))
    axes.legend()
    figure.savefig(path, dpi=120)


def _plot_perplexity(report: dict[str, Any], path: Path) -> None:
    rows = {"generated": report["generation"]}
    rows |= {ROW_NAMES.get(name, name): row for name, row in report["controls"].items()}
    figure, (axes,) = figure_of()
    for name, row in rows.items():
        # Perplexity is never shown without entropy: a row that lacks one of them has no place here.
        if row["generative_perplexity"] is not None and row["entropy_nats"] is not None:
            marker = "*" if name == "generated" else "o"
            axes.plot(row["entropy_nats"], row["generative_perplexity"], marker, markersize=10, label=name)
    axes.set_yscale("log")
    axes.set(xlabel="entropy, nats", ylabel="generative perplexity")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
