"""Fixtures for every test: the backends of this machine, and random numbers that repeat."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import paramkit
from paramkit.backend import loader
from tests import emulation, ranks
from tests.routes import TRANSFERS

CAPABILITIES = ("scalar", "avx2", "avx512")
# The CUDA kernels compiled for the host, and the transfers around them: CPU tensors stand for a device's.
EMULATED = {"cuda:kernels": "kernels", "cuda:to device": "to device", "cuda:to host": "to host"}


# Files whose few tests take long. They are begun first, then those of many tests: otherwise one process is still at
# them when the others are done.
LONG = (
    *(
        "fuzz",
        "cuda_build",
        "types",
        "examples",
        "benchmarks_distributed",
        "fuzz_core",
        "build",
        "cli_process",
    ),
    *("wheel", "build_faults", "sanitizers", "leaks", "fork", "demo", "compile", "libraries"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    count = Counter(item.path for item in items)
    rank = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: (rank.get(item.path.stem, len(LONG)), -count[item.path]))


def must_have_extension() -> bool:
    """Whether a missing extension is a failure here: a skipped test in CI proves nothing."""
    in_ci = os.environ.get("CI", "").lower() in ("1", "true", "yes")
    return in_ci or os.environ.get("PARAMKIT_BUILD") == "require"


def lacking(what: str) -> NoReturn:
    """Skip the test for want of something that a machine for tests has, or fail it where the suite must be whole."""
    if must_have_extension():
        pytest.fail(what, pytrace=False)
    pytest.skip(what, allow_module_level=True)


def need_module(name: str) -> Any:
    """A module of the extra `test`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        lacking(f"the extra `test` is not installed: {error}")


def need_extension() -> None:
    """Skip the test if the extension cannot be had, or fail it where it must be there."""
    try:
        with paramkit.backend.force("cpu"):
            return
    except paramkit.backend.BackendError as error:
        lacking(f"the extension is not there: {error}")


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA library, compiled for the host."""
    return emulation.build(tmp_path_factory.mktemp("emulator"))


@contextmanager
def emulated(library: Path, how: str) -> Iterator[str]:
    """CPU tensors as those of a device, on both sides ("kernels") or on one."""
    with paramkit.backend.force("cpu") as extension:
        extension.open_cuda(str(library), how)
        try:
            yield how
        finally:
            extension.close_emulated_cuda()


@pytest.fixture(params=["native", *(f"cpu:{name}" for name in CAPABILITIES), *EMULATED])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once on every backend that this machine has; the value is its name.

    Tests that need no more name "cpu" instead: the best instruction set of the machine.
    """
    name: str = request.param
    if name in EMULATED:
        need_extension()
        with emulated(request.getfixturevalue("emulator"), EMULATED[name]):
            yield name
        return
    if name != "native":
        need_extension()
    route, _, capability = name.partition(":")
    if capability:
        with paramkit.backend.force(route) as extension:
            available = extension.capabilities()
        if capability not in available:
            pytest.skip(f"this machine has no {capability}: {', '.join(available)}")
    with paramkit.backend.force(name):
        yield name


@pytest.fixture
def one_memory(backend: str) -> None:
    """Skip the test where one side of a copy stands for host memory and the other for a device's."""
    if backend in TRANSFERS:
        pytest.skip("host and device memory have nothing in common")


@pytest.fixture(params=["native", "cpu"])
def route(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on torch's own calls and on the extension; the value is which."""
    name: str = request.param
    if name == "cpu":
        need_extension()
    with paramkit.backend.force(name):
        yield name


@pytest.fixture
def compiled() -> Iterator[str]:
    """Run the test on the compiled extension, on the best instruction set."""
    need_extension()
    with paramkit.backend.force("cpu"):
        yield "cpu"


@contextmanager
def every_size() -> Iterator[None]:
    """Inside the block `patch_torch` takes writes of every size: those of small models, too."""
    extension = loader.extension()
    if extension is None:
        yield
        return
    before = extension.set_patch_least_bytes(0)
    try:
        yield
    finally:
        extension.set_patch_least_bytes(before)


PATCHED = ("native", "cpu", "patched")


@pytest.fixture(params=PATCHED)
def patched(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on torch's own calls, on the extension, and with torch patched; the value is which."""
    if request.param == "native":
        with paramkit.backend.force("native"):
            yield "native"
        return
    need_extension()
    with paramkit.backend.force("cpu"):
        if request.param == "cpu":
            yield "cpu"
            return
        with paramkit.patch_torch(), every_size():
            yield "patched"


@pytest.fixture
def stream_stores() -> Callable[[bool], AbstractContextManager[None]]:
    """`with stream_stores(True):` every store of a kernel that can bypasses the cache; False: none does."""

    @contextmanager
    def forced(always: bool) -> Iterator[None]:
        extension = loader.extension()
        if extension is None:
            yield
            return
        before = extension.set_stream_bytes(0 if always else 1 << 62)
        try:
            yield
        finally:
            extension.set_stream_bytes(before)

    return forced


@pytest.fixture(scope="session", autouse=True)
def _no_process_stays() -> Iterator[None]:
    """What tests on several processes have started is gone when the last test is."""
    yield
    left = ranks.leftover()
    ranks.stop()
    assert left == [] and ranks.leftover() == []


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """Every test starts from the same random state and leaves torch's settings as they were."""
    state, threads, dtype = (
        torch.get_rng_state(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
    )
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def fresh_loader() -> Iterator[None]:
    """The loader as in a new process for the test, as before afterwards."""
    names = ("_active", "_decision", "_extension", "_warned")
    before = {name: getattr(loader, name) for name in names}
    loader.reset()
    yield
    for name, value in before.items():
        setattr(loader, name, value)
