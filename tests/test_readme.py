"""The README's commands are run: the ldlm lines of its sh blocks, verbatim but for base.yaml -> tiny.yaml."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def sh_blocks() -> list[list[str]]:
    text = README.read_text(encoding="utf-8")
    return [
        block.strip().splitlines() for block in re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    ]


def test_the_two_blocks_are_the_setup_commands():
    install, tests = sh_blocks()
    assert install[0].startswith("python3 -m venv .venv && .venv/bin/pip install -q --no-compile torch==2.13.0 -e .")
    assert install[1:] == [
        "ldlm train-joint --recipe base.yaml",
        "ldlm sample --steps 50",
        "ldlm eval --max-len 1024",
    ]
    assert len(tests) == 1
    assert tests[0].endswith(".venv/bin/python -m pytest -n 2")


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(README.parent)}
    lines = [line for block in sh_blocks() for line in block if line.startswith("ldlm ")]
    assert len(lines) == 3
    for line in lines:
        arguments = shlex.split(line.replace("base.yaml", "tiny.yaml"))[1:]
        done = subprocess.run(
            [sys.executable, "-m", "ldlm_cli", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert done.stdout.strip()
    (run,) = (tmp_path / "runs").glob("*/snapshot")
    assert (run.parent / "eval" / "report.json").is_file()
    assert list((run.parent / "samples").glob("*.jsonl"))
