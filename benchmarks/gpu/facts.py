"""What the figures were measured on: the machine's facts and the GPU's, nothing that names a person or host."""

from __future__ import annotations

import os
import re
import subprocess

import torch

from benchmarks import machine

__all__ = ["ASKED", "describe", "short_name"]

# What nvidia-smi is asked for, and the names under which the answers are kept.
ASKED = {
    "driver_version": "driver",
    "clocks.max.sm": "max_sm_mhz",
    "clocks.max.mem": "max_memory_mhz",
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.limit": "power_limit_w",
    "pcie.link.gen.max": "pcie_generation",
    "pcie.link.width.max": "pcie_width",
    "ecc.mode.current": "ecc",
}


def describe() -> dict[str, object]:
    """Machine, versions and GPU as plain data for the JSON file."""
    facts = machine.describe()
    if facts["commit"] == "unknown":  # a copy of the tree without its history
        facts["commit"] = os.environ.get("PARAMKIT_COMMIT") or "unknown"
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    return {
        **facts,
        "gpu": properties.name,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory": properties.total_memory,
        "gpu_cache": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        **_from_nvidia_smi(properties),
    }


def _from_nvidia_smi(properties: object) -> dict[str, object]:
    """Driver and clock rates; nothing where nvidia-smi does not answer."""
    identity = getattr(properties, "uuid", None)
    for chosen in ([f"--id=GPU-{identity}"] if identity else []), ["--id=0"]:
        answers = _ask([*chosen, f"--query-gpu={','.join(ASKED)}"])
        if len(answers) == len(ASKED):
            known = dict(zip(ASKED.values(), answers, strict=True))
            return {name: answer for name, answer in known.items() if answer[:1] not in ("", "[")}
    return {}


def _ask(options: list[str]) -> list[str]:
    try:
        done = subprocess.run(
            ["nvidia-smi", *options, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return [answer.strip() for answer in done.stdout.splitlines()[0].split(",")]
    except (OSError, subprocess.SubprocessError, IndexError):
        return []


def short_name(gpu: str) -> str:
    """The name of a GPU, fit for a file.

    >>> short_name("NVIDIA H100 80GB HBM3")
    'h100-80gb-hbm3'
    """
    words = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return words.removeprefix("nvidia-") or "gpu"
