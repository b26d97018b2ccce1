"""The command line: one Typer app, one place where errors become a sentence and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer

from ldlm_cli import __version__
from ldlm_cli.cli import compare, doctor, evaluate, launch, recipes, sample, sweep, tokenize, train
from ldlm_cli.errors import LdlmError, UsageError

app = typer.Typer(
    name="ldlm",
    help="Latent diffusion language models: train encoder, denoiser and decoder jointly, sample, measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_debug = False


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"ldlm {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    debug: Annotated[bool, typer.Option("--debug", envvar="LDLM_DEBUG", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    global _debug
    _debug = debug


_TEXT, _USE, _TOOLS = "Text and training", "Sampling and measuring", "Tools"
app.command("tokenize", rich_help_panel=_TEXT)(tokenize.tokenize)
app.command("train-joint", rich_help_panel=_TEXT)(train.train_joint)
app.command("train-sequential", rich_help_panel=_TEXT)(train.train_sequential)
app.command("train-lm", rich_help_panel=_TEXT)(train.train_lm)
app.command("sweep", rich_help_panel=_TEXT)(sweep.sweep)
app.command("sample", rich_help_panel=_USE)(sample.sample)
app.command("eval", rich_help_panel=_USE)(evaluate.evaluate_run)
app.command("evaluate", hidden=True)(evaluate.evaluate_run)
app.command("compare", rich_help_panel=_USE)(compare.compare_runs)
app.add_typer(recipes.app, name="recipes", rich_help_panel=_TOOLS)
app.command("doctor", rich_help_panel=_TOOLS)(doctor.doctor)


def _complain(message: str, everywhere: bool) -> None:
    """One line on stderr; of several processes that all meet the same mistake, only the first speaks."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or everywhere:
        print(f"{f'[process {rank}] ' if rank else ''}error: {message}", file=sys.stderr, flush=True)


def _run(arguments: Sequence[str] | None) -> int:
    """Run one command; the exit code of what happened (product: 0, 1, 2, 3, 130, 143)."""
    global _debug
    _debug = bool(os.environ.get("LDLM_DEBUG"))
    # Idle OpenMP threads spin long by default; beside any other busy process that makes a step five times slower. Not
    # spinning at all costs a quiet machine a third (measured: 0.56 s a step against 0.39 s at 100,000 spins).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    try:
        app(args=None if arguments is None else list(arguments), prog_name="ldlm")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except LdlmError as error:
        if _debug:
            traceback.print_exc()
        _complain(" ".join(str(error).split()), everywhere=not isinstance(error, UsageError))
        return error.exit_code
    except KeyboardInterrupt:
        if _debug:
            traceback.print_exc()
        _complain("stopped by Ctrl-C", everywhere=False)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; writing more at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        if _debug:
            traceback.print_exc()
        what = " ".join(str(error).split())[:300]
        launch.let_the_first_failure_speak()
        _complain(f"{type(error).__name__}: {what}; run `ldlm --debug …` for the traceback", everywhere=True)
        return 1
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `ldlm`; ends the process with the exit code of the command."""
    # So that SIGTERM ends by way of every `finally`; training has a handler of its own while it runs.
    before = signal.signal(signal.SIGTERM, _end)
    try:
        code = _run(arguments)
    finally:
        signal.signal(signal.SIGTERM, before)
    launch.record_exit_code(code)
    sys.exit(code)
