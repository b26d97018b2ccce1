"""The only Accelerator: device, precision, processes, and how the global batch is shared among them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ldlm_cli.errors import LdlmError


def faster_precision() -> str:
    """`bf16` on a GPU that has it, or on a CPU with matrix units for it; else `fp32`.

    A CPU that only announces bfloat16 vectors (avx512_bf16) multiplies it at half the speed of float32, one with
    matrix units (AMX) at five times. Read from the machine's flags, not timed: a timing on a busy machine may come out
    either way, and two commands on one machine must not sample different texts.
    """
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.12
    return "bf16" if capabilities.get("amx_bf16", False) else "fp32"


def _matmul_seconds(dtype: torch.dtype, device: str = "cpu") -> float:
    """Best of five products [2048, 512] x [512, 512]."""
    left, right = torch.ones(2048, 512, dtype=dtype, device=device), torch.ones(512, 512, dtype=dtype, device=device)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_flops() -> float:
    """Measured matrix speed of this machine in FLOP/s, in the precision that `auto` picks."""
    dtype = torch.bfloat16 if faster_precision() == "bf16" else torch.float32
    return 2 * 2048 * 512 * 512 / _matmul_seconds(dtype, "cuda" if torch.cuda.is_available() else "cpu")


class Runtime:
    """One process of a run: thin names over accelerate, so that nothing else imports it."""

    def __init__(self, accelerator: Any, precision: str) -> None:
        self.accelerator = accelerator
        self.precision = precision
        self._signal = 0

    @classmethod
    def start(cls, precision: str = "auto") -> Runtime:
        """Join the processes that the launcher started.

        Raises:
            LdlmError: the launcher set WORLD_SIZE, but that many processes did not find each other.
        """
        from accelerate import Accelerator
        from accelerate.utils import broadcast_object_list
        from transformers.utils import logging

        # Its load reports and progress bars belong to no table of ours; its errors still come through.
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if accelerator.num_processes != asked:
            raise LdlmError(
                f"the launcher asked for {asked} processes but {accelerator.num_processes} joined: "
                "start with `ldlm … --num-processes N` or `torchrun -m ldlm_cli …`"
            )
        if precision == "auto":
            chosen = [faster_precision()]
            if accelerator.num_processes > 1:
                broadcast_object_list(chosen)  # machines may differ: the first one decides
            precision = chosen[0]
        return cls(accelerator, precision)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def num_processes(self) -> int:
        return self.accelerator.num_processes

    def autocast(self) -> Any:
        """Context in which matrix products run in this run's precision; weights and losses stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def accumulate(self, prepared: Any, last: bool) -> Any:
        """Context of one micro-batch: gradients are exchanged with the last one only."""
        return nullcontext() if last or self.num_processes == 1 else prepared.no_sync()

    def reduce_sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all processes, on each of them."""
        return self.accelerator.reduce(values, reduction="sum") if self.num_processes > 1 else values

    def gather_objects(self, values: list[Any]) -> list[Any]:
        """Lists of picklable objects of this run's own processes, joined in rank order."""
        if self.num_processes == 1:
            return values
        from accelerate.utils import gather_object

        return gather_object(values)

    @contextmanager
    def signals_noted(self) -> Iterator[None]:
        """Within: the first SIGINT or SIGTERM is only noted (see `stop_signal`), a second one stops at once."""

        def note(number: int, frame: object) -> None:
            self._signal = number
            for watched in before:
                signal.signal(watched, signal.default_int_handler if watched == signal.SIGINT else signal.SIG_DFL)

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if threading.current_thread() is threading.main_thread():
            for number in before:
                signal.signal(number, note)
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in before.items():
                    signal.signal(number, handler)

    def stop_signal(self) -> int:
        """The signal that any process has noted, 0 for none; the same answer on every process."""
        if self.num_processes == 1:
            return self._signal
        return max(self.gather_objects([self._signal]))

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def share_of_rows(self, rows: int, micro_batches: int) -> list[list[int]]:
        """Rows of the global batch for this process, one list per micro-batch.

        Every process gets lists of equal length; where the rows do not divide evenly, row 0 fills up with weight 0
        (marked as -1), so that losses do not depend on the number of processes.
        """
        return share_rows(rows, micro_batches, self.num_processes, self.rank)

    def close(self) -> None:
        """Leave the process group; a launcher may otherwise wait for it."""
        if self.num_processes > 1:
            self.accelerator.end_training()


def share_rows(rows: int, micro_batches: int, num_processes: int, rank: int) -> list[list[int]]:
    """See Runtime.share_of_rows; -1 stands for a row of weight 0."""
    pieces = micro_batches * num_processes
    per_piece = -(-rows // pieces)
    padded: Sequence[int] = [*range(rows), *([-1] * (per_piece * pieces - rows))]
    return [list(padded[(micro * num_processes + rank) :: pieces]) for micro in range(micro_batches)]
