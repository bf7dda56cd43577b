"""What the figures were measured on: enough to judge them, nothing that names a person or host."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

__all__ = ["describe"]


def describe() -> dict[str, object]:
    """Machine and versions as plain data for the JSON file."""
    facts: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_model(),
        "cores": _cores(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "numpy": np.__version__,
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": _load(),
        "commit": _commit(),
    }
    facts.update(_paramkit())
    return facts


def _paramkit() -> dict[str, object]:
    import paramkit

    status = paramkit.status()
    return {
        "paramkit": getattr(paramkit, "__version__", "unknown"),
        "backend": status.backend,
        "capability": status.capability or "none",
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _load() -> float | None:
    """What else ran before, as the load of the last minute; figures of a busy machine mislead."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def _commit() -> str:
    """The short commit, marked ``+`` when the working tree differs from it."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ("git", *arguments), cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
