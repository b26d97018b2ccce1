"""What the terminal shows while work is under way, on stderr: progress of a training run, texts taking shape."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

# metrics.jsonl's name of a field, and the short one of the progress line; in the order in which they are shown.
SHOWN = {
    "nats_per_token": "nats/token",
    "held_out_nats_per_token": "held-out",
    "diffusion": "diffusion",
    "hidden": "hidden",
    "token": "token",
    "token_accuracy": "accuracy",
    "encoder_gate": "gate",
    "z_std": "z std",
    "effective_rank": "rank",
    "sample_entropy": "entropy",
}


def is_plain(console: Console) -> bool:
    """Whether to print plain lines instead of a live display: no terminal, NO_COLOR set, or TERM=dumb."""
    return not console.is_terminal or console.is_dumb_terminal or "NO_COLOR" in os.environ


def stderr_console() -> Console:
    """The console of progress and notes."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def note(message: str) -> None:
    """One line on stderr."""
    print(message, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds for people: 8.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def metrics_line(metrics: Mapping[str, Any]) -> str:
    """The losses and the rate of one logged step, short; what the step did not measure is left out."""
    shown = [
        f"{title} {metrics[name]:.4g}" for name, title in SHOWN.items() if isinstance(metrics.get(name), int | float)
    ]
    if "tokens_per_second" in metrics:
        shown.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(shown)


class TrainingReporter:
    """Progress of a training run: a live bar in a terminal, else one line a logged step.

    Args:
        console: where to write; stderr if None.
        plain: lines instead of a live display; decided by the console if None.
        silent: say nothing; for every process but the main one.
    """

    def __init__(self, console: Console | None = None, plain: bool | None = None, *, silent: bool = False) -> None:
        self.console = stderr_console() if console is None else console
        self.plain = is_plain(self.console) if plain is None else plain
        self.silent = silent
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._stage, self._steps, self._started_at, self._start_step = "", 0, 0.0, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def stage_started(self, name: str, index: int, total_stages: int, total_steps: int, start_step: int) -> None:
        """A stage begins, or goes on, at `start_step` of `total_steps`; `index` counts from 0."""
        if self.silent:
            return
        self._stop()
        self._stage, self._steps, self._start_step = name, total_steps, start_step
        self._started_at = time.monotonic()
        resumed = f", resumed at step {start_step:,}" if start_step else ""
        self.note(f"stage {index + 1}/{total_stages} {name}: {total_steps:,} steps{resumed}")
        if not self.plain:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[line]}"),
                console=self.console,
            )
            self._task = self._progress.add_task(name, total=total_steps, completed=start_step, line="")
            self._progress.start()

    def step_logged(self, metrics: Mapping[str, Any]) -> None:
        """One logged step; fields as in metrics.jsonl, whichever are there."""
        if self.silent:
            return
        step, line = int(metrics["step"]), metrics_line(metrics)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, line=line)
            return
        done = step - self._start_step
        left = (time.monotonic() - self._started_at) / done * (self._steps - step) if done > 0 else None
        self._print(f"{self._stage} {step}/{self._steps}  {line}{f'  {duration(left)} left' if left else ''}")

    def preview(self, text: str) -> None:
        """A text sampled with the weights of this moment."""
        words = " ".join(text.split())
        self._print(f"  preview: {words[:200]}{'…' if len(words) > 200 else ''}")

    def alarm(self, message: str) -> None:
        """Something that makes the run's result doubtful; said once a cause and stage."""
        self._print(f"warning: {message}", style="bold yellow")

    def stage_finished(self, name: str, seconds: float) -> None:
        """A stage has ended after this time, early or not."""
        self._stop()
        self._print(f"stage {name} finished in {duration(seconds)}")

    def note(self, message: str) -> None:
        """A line for the user."""
        self._print(message)

    def _print(self, line: str, style: str = "") -> None:
        if not self.silent:
            self.console.print(Text(line, style=style))

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class LiveDenoising:
    """The first text of a sampling run taking shape, step by step, in a terminal; plain otherwise.

    Args:
        wanted: show it; None shows it in a terminal only. Without a terminal it is never shown.
        silent: say nothing at all.
    """

    def __init__(self, wanted: bool | None = None, *, silent: bool = False, console: Console | None = None) -> None:
        self.console = stderr_console() if console is None else console
        self.silent = silent
        shown = wanted is not False and not silent and not is_plain(self.console)
        # Decoding at every step costs time, so a sampler that nobody watches is not asked for it.
        self.on_step: Callable[[int, int, str], None] | None = self._show if shown else None
        self._live = Live(console=self.console, refresh_per_second=12, transient=True) if shown else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def _show(self, step: int, steps: int, text: str) -> None:
        assert self._live is not None
        self._live.update(Panel(Text(text), title=f"step {step}/{steps}", title_align="left", border_style="cyan"))

    def on_batch(self, done: int, total: int) -> None:
        """So many texts are finished."""
        if not self.silent and done < total:
            self.console.print(Text(f"{done} of {total} texts"))


def print_samples(texts: Sequence[Any]) -> None:
    """Texts (index, text, token_ids) on stdout: coloured rules between them in a terminal, plain numbers elsewhere."""
    console = Console(highlight=False, soft_wrap=True)
    for item in texts:
        head = f"[{item.index}] {len(item.token_ids)} tokens"
        console.print(Text(head, style="bold cyan"))
        console.print(Text(item.text))
        console.print()
