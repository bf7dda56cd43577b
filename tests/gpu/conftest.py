"""Where these tests run: `cuda` is a GPU, `device` the same or, without one, the kernels compiled for the host.

What holds for the kernels alone asks for `device` and runs everywhere; streams, graphs and transfers need
`cuda`, and are skipped without one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import paramkit
from tests.conftest import emulated, must_have_extension, need_extension
from tests.gpu.needs import NO_GPU


def need_library() -> None:
    """Skip the test if the kernels cannot be had, or fail it where they must be there."""
    try:
        with paramkit.backend.force("cuda"):
            return
    except paramkit.backend.BackendError as error:
        if must_have_extension() or os.environ.get("PARAMKIT_CUDA") == "require":
            pytest.fail(f"the CUDA library must be there: {error}", pytrace=False)
        pytest.skip(str(error).splitlines()[0])


@contextmanager
def on_gpu(test: str) -> Iterator[torch.device]:
    """CUDA tensors as the kernels', on a GPU that is idle again when the test is over."""
    need_library()
    with paramkit.backend.force("cuda") as extension:
        staging = extension.staging_bytes()
        try:
            yield torch.device("cuda", torch.cuda.current_device())
        finally:
            extension.set_staging_bytes(staging)
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        # Every later test would fail of the same.
        pytest.exit(f"{test} left the GPU unusable: {error}", returncode=1)


@pytest.fixture
def cuda(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The current GPU; skips the test where there is none."""
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    with on_gpu(request.node.nodeid) as device:
        yield device


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The current GPU; where there is none the CPU, whose tensors stand for a GPU's."""
    if torch.cuda.is_available():
        with on_gpu(request.node.nodeid) as gpu:
            yield gpu
        return
    need_extension()
    torch.set_num_threads(1)  # for tensors this small threads wait more than they work
    with emulated(request.getfixturevalue("emulator"), "kernels"):
        yield torch.device("cpu")
