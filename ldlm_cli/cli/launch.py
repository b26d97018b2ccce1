"""`--num-processes N`: the same command again in N processes under torchrun, signals and exit code passed through.

torchrun itself always ends with 1, so process 0 writes its true exit code to a file that the parent reads.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import typer

EXIT_CODE_FILE = "LDLM_EXIT_CODE_FILE"
# torchrun kills its processes this long after a signal; a step must end and a checkpoint be written before.
SHUTDOWN_SECONDS = "600"


def launch_command(arguments: Sequence[str], num_processes: int) -> list[str]:
    """The command that runs `ldlm <arguments>` in that many processes on this machine."""
    agent = [sys.executable, "-m", "ldlm_cli.cli.launch", "--standalone", "--nproc-per-node", str(num_processes)]
    return [*agent, "-m", "ldlm_cli", *arguments]


def launch_environment(environment: Mapping[str, str], num_processes: int, exit_code_file: Path) -> dict[str, str]:
    """The environment of those processes: the cores are shared among them unless OMP_NUM_THREADS says otherwise."""
    threads = str(max(1, (os.cpu_count() or 1) // num_processes))
    defaults = {"OMP_NUM_THREADS": threads, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SHUTDOWN_SECONDS}
    return {**defaults, **environment, EXIT_CODE_FILE: str(exit_code_file)}


def run_in_processes(num_processes: int) -> None:
    """Go on in this process, or run this command in `num_processes` others and end with their exit code.

    Goes on when one process is asked for, or when RANK is set: then a launcher has started this process already.

    Raises:
        typer.Exit: the other processes have ended.
    """
    if num_processes <= 1 or "RANK" in os.environ:
        return
    with tempfile.TemporaryDirectory(prefix="ldlm-") as folder:
        code_file = Path(folder) / "exit_code"
        environment = launch_environment(os.environ, num_processes, code_file)
        received: list[int] = []
        # A session of its own: Ctrl-C in a terminal reaches us alone, and the processes get it once, from us.
        agent = subprocess.Popen(launch_command(sys.argv[1:], num_processes), env=environment, start_new_session=True)

        def forward(number: int, frame: FrameType | None) -> None:
            received.append(number)
            with contextlib.suppress(ProcessLookupError):
                agent.send_signal(number)

        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            status = agent.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        recorded = int(code_file.read_text()) if code_file.is_file() else None
    raise typer.Exit(exit_code_of(status, recorded, received))


def exit_code_of(status: int, recorded: int | None, received: Sequence[int]) -> int:
    """The command's exit code from torchrun's, the one that process 0 recorded, and the signals that we got."""
    if status == 0:
        return 0
    if received:
        return 128 + received[0]
    # Process 0 records 143 too when torchrun ends it because another process failed: that is a failure, not a signal.
    return recorded if recorded in (1, 2, 3) else 1


def let_the_first_failure_speak() -> None:
    """In a process other than the first: wait a moment, in which torchrun ends us if another process failed before.

    What we would say then is only that the other one has gone.
    """
    if os.environ.get("RANK", "0") != "0" and EXIT_CODE_FILE in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)


def record_exit_code(code: int) -> None:
    """Leave process 0's exit code for the parent, where there is one."""
    path = os.environ.get(EXIT_CODE_FILE)
    if path and os.environ.get("RANK") == "0":
        Path(path).write_text(str(code))


def _agent() -> int:
    """torchrun without its own failure report: the processes have said what went wrong."""
    import logging

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    debug = bool(os.environ.get("LDLM_DEBUG")) or "--debug" in sys.argv
    if not debug:
        logging.disable(logging.CRITICAL)
    try:
        parser = run.get_args_parser()
        # argparse looks for abbreviations even behind the script's name, where our --num would be one of its options.
        parser.allow_abbrev = False
        run.run(parser.parse_args())
    except (ChildFailedError, SignalException):
        if debug:
            raise
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_agent())
