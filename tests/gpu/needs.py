"""What needs a GPU is skipped without one, a module at a time: a line for all of them, not for each test."""

from __future__ import annotations

import pytest
import torch

NO_GPU = "torch has no CUDA device here"


def need_gpu() -> None:
    """Skip the module that calls this at its top."""
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU, allow_module_level=True)
