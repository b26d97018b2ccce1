"""The only Accelerator: device, precision, processes, and how the global batch is shared among them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ldlm_cli.errors import LdlmError


def native_bf16() -> bool:
    """Whether this machine multiplies bfloat16 matrices natively (CUDA, or a CPU with avx512_bf16 or amx)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(getattr(torch.backends.cpu, "get_cpu_capability", None)) and _cpu_has_bf16()


def _cpu_has_bf16() -> bool:
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check is not None and check())


class Runtime:
    """One process of a run: thin names over accelerate, so that nothing else imports it."""

    def __init__(self, accelerator: Any, precision: str) -> None:
        self.accelerator = accelerator
        self.precision = precision

    @classmethod
    def start(cls, precision: str = "auto") -> Runtime:
        """Join the processes that the launcher started.

        Raises:
            LdlmError: the launcher set WORLD_SIZE, but that many processes did not find each other.
        """
        from accelerate import Accelerator

        if precision == "auto":
            precision = "bf16" if native_bf16() else "fp32"
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision="bf16" if precision == "bf16" else "no"
        )
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if accelerator.num_processes != asked:
            raise LdlmError(
                f"the launcher asked for {asked} processes but {accelerator.num_processes} joined: "
                "start with `ldlm … --num-processes N` or `torchrun -m ldlm_cli …`"
            )
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
        """Context in which matrix products run in this run's precision."""
        return self.accelerator.autocast()

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
            torch.distributed.destroy_process_group()


def share_rows(rows: int, micro_batches: int, num_processes: int, rank: int) -> list[list[int]]:
    """See Runtime.share_of_rows; -1 stands for a row of weight 0."""
    pieces = micro_batches * num_processes
    per_piece = -(-rows // pieces)
    padded: Sequence[int] = [*range(rows), *([-1] * (per_piece * pieces - rows))]
    return [list(padded[(micro * num_processes + rank) :: pieces]) for micro in range(micro_batches)]
