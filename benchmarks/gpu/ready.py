"""What a GPU benchmark needs and this machine lacks: ``python -m benchmarks.gpu.ready NEED...``.

Prints a line for each thing that is missing, and ends with 1; otherwise what a script wants to know of
the GPU, as ``name=...`` and ``capability=...``. Needs are "gpu" (torch with CUDA, and a device), "nvcc"
and "pytest". Imports nothing that may be missing itself.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

NEEDS = ("gpu", "nvcc", "pytest")


def missing(needs: Sequence[str]) -> list[str]:
    """One line for each requirement that is not there, with what to do."""
    found = []
    if "gpu" in needs:
        found += _gpu()
    if "nvcc" in needs:
        found += _nvcc()
    if "pytest" in needs and importlib.util.find_spec("pytest") is None:
        found.append("pytest is not installed: python -m pip install pytest")
    return found


def _gpu() -> list[str]:
    found = [
        f"{name} is not installed in this Python: name another with PYTHON=..."
        for name in ("torch", "numpy", "safetensors")
        if importlib.util.find_spec(name) is None
    ]
    if found:
        return found
    import torch

    if torch.version.cuda is None:
        return [f"this torch ({torch.__version__}) is built without CUDA: install one that has it"]
    if not torch.cuda.is_available():
        return ["torch has no CUDA device: see nvidia-smi and CUDA_VISIBLE_DEVICES"]
    return []


def _nvcc() -> list[str]:
    found = []
    if importlib.util.find_spec("setuptools") is None:
        found.append("setuptools is not installed: python -m pip install setuptools")
    try:
        from paramkit.backend import toolkit
    except ImportError:  # no torch, which has been said
        return found
    if toolkit.find_nvcc() is None:
        found.append(f"there is no nvcc (looked in {toolkit.PLACES}): install the CUDA toolkit")
    return found


def main(needs: Sequence[str]) -> int:
    """Print what is missing, or the facts."""
    lines = missing(needs)
    if lines:
        print(*lines, sep="\n")
        return 1
    if "gpu" in needs:
        import torch

        from .facts import short_name

        print(f"name={short_name(torch.cuda.get_device_name())}")
        print("capability={}.{}".format(*torch.cuda.get_device_capability()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
