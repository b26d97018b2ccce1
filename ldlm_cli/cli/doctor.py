"""`ldlm doctor`: the machine, versions and settings; the first thing to paste in a bug report."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ldlm_cli import __version__
from ldlm_cli.cli import options

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "pydantic",
    "typer",
    "rich",
    "PyYAML",
    "matplotlib",
    "tensorboard",
)
VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "TOKENIZERS_PARALLELISM",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_HOME",
    "HF_ENDPOINT",
    "NO_COLOR",
)
HUB_TIMEOUT_SECONDS = 3.0


def doctor(as_json: options.AsJson = False) -> None:
    """Show the machine, versions, precision and settings that ldlm sees."""
    from ldlm_cli.report import tables

    facts = examine()
    if as_json:
        tables.print_json(facts)
        return
    for title, section in facts.items():
        tables.print_facts(title, {name: "-" if value is None else str(value) for name, value in section.items()})


def examine() -> dict[str, dict[str, Any]]:
    """Everything that `doctor` shows, by section; None where it cannot be found out."""
    import psutil

    gib = 1 << 30
    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(Path.cwd())
    return {
        "ldlm": {
            "version": __version__,
            "folder": str(Path(__file__).resolve().parents[1]),
            "git_commit": _git_commit(),
        },
        "packages": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": {
            "system": platform.platform(),
            "executable": sys.executable,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": round(memory.total / gib, 1),
            "memory_free_gib": round(memory.available / gib, 1),
            "disk_free_gib": round(disk.free / gib, 1),
        },
        "compute": _compute(),
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "hub": _hub(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _compute() -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        # A broken installation is what doctor is called for: it is a finding, not the end of the examination.
        return {"torch": f"cannot be imported: {error}"}
    from ldlm_cli.runtime import faster_precision

    cuda = torch.cuda.is_available()
    return {
        "device": "cuda" if cuda else "cpu",
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "bf16_native": torch.cuda.is_bf16_supported(including_emulation=False) if cuda else _cpu_has_bf16(),
        "precision_auto": faster_precision(),
        "distributed": torch.distributed.is_available(),
    }


def _cpu_has_bf16() -> bool | None:
    """Whether the processor announces bfloat16 products; None where the system does not say (not Linux)."""
    try:
        flags = set(re.findall(r"\S+", Path("/proc/cpuinfo").read_text(encoding="utf-8")))
    except OSError:
        return None
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def _git_commit() -> str | None:
    """Commit of the checkout that holds this code; None when it is installed from a wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _hub() -> dict[str, Any]:
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    return {"endpoint": endpoint, "offline_by_setting": offline, "reachable": None if offline else _reaches(endpoint)}


def _reaches(endpoint: str) -> bool:
    """Whether a connection to the hub opens within three seconds, through a proxy where one is set."""
    from urllib.request import getproxies, proxy_bypass

    address = urlsplit(endpoint)
    proxy = None if proxy_bypass(address.hostname or "") else getproxies().get(address.scheme)
    target = urlsplit(proxy if proxy and "://" in proxy else f"http://{proxy}") if proxy else address
    try:
        port = target.port or (443 if target.scheme == "https" else 80)
        with socket.create_connection((target.hostname or "", port), timeout=HUB_TIMEOUT_SECONDS):
            return True
    except (OSError, ValueError):
        return False
