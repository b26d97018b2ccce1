"""Plots of a comparison: one colour a recipe and plan, one line or point a run; seeds are never averaged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldlm_cli.report.files import figure_of

LOSSES = {
    "diffusion": "diffusion loss",
    "hidden": "hidden loss",
    "token": "token loss",
    "token_accuracy": "token accuracy",
}
LATENTS = {"z_std": "latent std", "effective_rank": "effective rank", "bits": "bits through decoder noise"}


def write_plots(report: Mapping[str, Any], folder: Path) -> None:
    """Write losses.png, latents.png, reconstruction.png, generation.png, and own_estimates.png where it is measured."""
    colours = group_colours(report)
    _curves(report, colours, LOSSES, folder / "losses.png")
    _curves(report, colours, LATENTS, folder / "latents.png")
    _reconstruction(report, colours, folder / "reconstruction.png")
    _generation(report, colours, folder / "generation.png")
    if "own_estimates" in report["encoding"][0]:
        _own_estimates(report, colours, folder / "own_estimates.png")


def group_colours(report: Mapping[str, Any]) -> dict[str, str]:
    """Colour of each run: that of its recipe and plan."""
    groups = list(dict.fromkeys(run["group"] for run in report["runs"]))
    return {run["run"]: f"C{groups.index(run['group']) % 10}" for run in report["runs"]}


def _legend(report: Mapping[str, Any], colours: Mapping[str, str], axes: Any) -> None:
    for group in dict.fromkeys(run["group"] for run in report["runs"]):
        first = next(run["run"] for run in report["runs"] if run["group"] == group)
        axes.plot([], [], "-", color=colours[first], label=group)
    axes.legend(fontsize="small")


def _curves(report: Mapping[str, Any], colours: Mapping[str, str], columns: Mapping[str, str], path: Path) -> None:
    figure, panels = figure_of(len(columns))
    for axes, (name, title) in zip(panels, columns.items(), strict=True):
        for run, curve in report["curves"].items():
            known = [(x, y) for x, y in zip(curve["latent_step"], curve[name], strict=True) if y is not None]
            if known:
                axes.plot(*zip(*known, strict=True), color=colours[run], linewidth=1)
        axes.set(title=title, xlabel="step, all latent stages")
        if name in ("diffusion", "hidden", "token"):
            axes.set_yscale("log")
    _legend(report, colours, panels[0])
    figure.savefig(path, dpi=120)


def _reconstruction(report: Mapping[str, Any], colours: Mapping[str, str], path: Path) -> None:
    figure, (axes,) = figure_of()
    rows = report["encoding"]
    for place, row in enumerate(rows):
        axes.plot(row["accuracy"], place, "o", color=colours[row["run"]])
        if row["accuracy_noised"] is not None:
            axes.plot(row["accuracy_noised"], place, "s", color=colours[row["run"]], markerfacecolor="none")
    axes.set_yticks(range(len(rows)), [row["run"] for row in rows], fontsize="small")
    noise = report["identity"]["decoder_noise_std"]
    axes.set(xlabel=f"token accuracy, held-out text (hollow: latents with noise {noise:g})")
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def _generation(report: Mapping[str, Any], colours: Mapping[str, str], path: Path) -> None:
    counts = sorted({row["steps"] for row in report["generation"]})
    figure, panels = figure_of(len(counts))
    real = report["references"]["held_out_text"]
    for axes, steps in zip(panels, counts, strict=True):
        for sweep in report.get("matched_entropy", ()):
            points = [(row["entropy_nats"], row["generative_perplexity"]) for row in sweep["points"]]
            if sweep["steps"] == steps and all(None not in point for point in points):
                axes.plot(*zip(*points, strict=True), "-", color=colours[sweep["run"]], linewidth=0.8, alpha=0.6)
        for row in report["generation"]:
            # Perplexity is never shown without entropy.
            if row["steps"] == steps and row["entropy_nats"] is not None and row["generative_perplexity"] is not None:
                axes.plot(row["entropy_nats"], row["generative_perplexity"], "o", color=colours[row["run"]])
        axes.plot(real["entropy_nats"], real["generative_perplexity"], "k*", markersize=11)
        axes.axvline(real["entropy_nats"], color="grey", linewidth=0.6)
        axes.set_yscale("log")
        axes.set(title=f"{steps} steps (star: real text)", xlabel="entropy, nats", ylabel="generative perplexity")
    _legend(report, colours, panels[0])
    figure.savefig(path, dpi=120)


def _own_estimates(report: Mapping[str, Any], colours: Mapping[str, str], path: Path) -> None:
    figure, (axes,) = figure_of()
    for row in report["encoding"]:
        times = [each["t"] for each in row["own_estimates"]["rows"]]
        for kind, style in (("second", "o-"), ("first", "s--")):
            values = [each[kind] for each in row["own_estimates"]["rows"]]
            axes.plot(times, values, style, color=colours[row["run"]], markersize=4, linewidth=1)
    axes.set(xlabel="time t (dashed: without self-conditioning)", ylabel="token accuracy on own estimates")
    _legend(report, colours, axes)
    figure.savefig(path, dpi=120)
