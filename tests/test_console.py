"""Progress on a terminal and without one, tables, and JSON that is JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from ldlm_cli.generate import GeneratedText
from ldlm_cli.report import console, tables

METRICS = {
    "stage": "joint",
    "step": 20,
    "diffusion": 0.5,
    "hidden": 0.25,
    "encoder_gate": 1.0,
    "tokens_per_second": 1e4,
}


@pytest.fixture(autouse=True)
def colour(monkeypatch):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)


def terminal() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=200), file


def run_stage(reporter: console.TrainingReporter) -> None:
    with reporter:
        reporter.stage_started("joint", 0, 2, 100, 10)
        reporter.step_logged(METRICS)
        reporter.preview("Tom had a red ball.\nHe was [bold]glad[/bold].")
        reporter.alarm("latents have collapsed: std 0.1")
        reporter.stage_finished("joint", 80.0)
        reporter.note("done")


def test_without_a_terminal_a_logged_step_is_one_plain_line():
    file = io.StringIO()
    run_stage(console.TrainingReporter(Console(file=file, width=40, soft_wrap=True)))
    lines = file.getvalue().splitlines()
    assert lines[0] == "stage 1/2 joint: 100 steps, resumed at step 10"
    assert lines[1].startswith("joint 20/100  diffusion 0.5  hidden 0.25  gate 1  10,000 tokens/s")
    assert lines[2] == "  preview: Tom had a red ball. He was [bold]glad[/bold]."
    assert lines[3] == "warning: latents have collapsed: std 0.1"
    assert lines[4] == "stage joint finished in 1 min 20 s"
    assert lines[5] == "done"
    assert "\x1b" not in file.getvalue()


def test_in_a_terminal_there_is_a_bar():
    screen, file = terminal()
    run_stage(console.TrainingReporter(screen))
    assert "20/100" in file.getvalue()
    assert "diffusion 0.5" in file.getvalue()


def test_a_silent_reporter_says_nothing():
    screen, file = terminal()
    run_stage(console.TrainingReporter(screen, silent=True))
    assert file.getvalue() == ""


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_color_and_a_dumb_terminal_are_plain(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert console.is_plain(terminal()[0])
    monkeypatch.delenv(name)
    assert not console.is_plain(terminal()[0])


def test_the_live_view_is_shown_only_to_someone_who_watches():
    screen, file = terminal()
    with console.LiveDenoising(console=screen) as view:
        assert view.on_step is not None
        view.on_step(3, 50, "Tom had [a] ball.")
        view.on_batch(8, 16)
    assert "Tom had [a] ball." in file.getvalue()
    assert "8 of 16 texts" in file.getvalue()
    assert console.LiveDenoising(False, console=screen).on_step is None
    assert console.LiveDenoising(silent=True, console=screen).on_step is None
    assert console.LiveDenoising(True, console=Console(file=io.StringIO())).on_step is None


@pytest.mark.parametrize(("seconds", "words"), [(8.24, "8.2 s"), (80, "1 min 20 s"), (7500, "2 h 05 min")])
def test_durations_are_for_people(seconds, words):
    assert console.duration(seconds) == words


def test_samples_are_printed_as_they_are(capsys):
    console.print_samples([GeneratedText(0, "A [red] ball.\n" + "x" * 300, [1, 2], 64)])
    assert capsys.readouterr().out == "[0] 2 tokens\nA [red] ball.\n" + "x" * 300 + "\n\n"


def test_json_has_no_infinity_and_paths_are_text(capsys):
    tables.print_json({"a": float("inf"), "b": [float("nan"), 1.5], "c": Path("x"), "d": None})
    assert json.loads(capsys.readouterr().out) == {"a": "inf", "b": ["nan", 1.5], "c": "x", "d": None}


def test_a_report_is_printed_whole(capsys):
    row = {"num_texts": 4, "generative_perplexity": 12.5, "entropy_nats": 3.25}
    report = {
        "identity": {"data_is_synthetic": True},
        "generation": {**row, "judge_held_out_nats_per_token": 2.5, "judge_held_out_measured_on": "its data"},
        "controls": {"held_out_text": row},
        "reconstruction": {
            "rows": [
                {"length": 64, "beyond_training": False, "num_texts": 4, "clean": {"accuracy": 0.875}},
                {"length": 128, "beyond_training": True, "refused": "the encoder takes at most 64 tokens"},
            ],
            "verdict": "It holds to 64.",
        },
        "speed": {"tokens_per_second": 1234},
    }
    tables.print_report(report)
    out = capsys.readouterr().out
    for words in ("synthetic", "real held-out text", "12.5", "3.25", "2.5 (its data)", "0.875", "at most 64", "1,234"):
        assert words in out
    assert "It holds to 64." in out
