"""On every error path each object has as many references afterwards as before, and dies when it is let go of."""

from __future__ import annotations

import ctypes
import gc
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import paramkit
from tests.conftest import need_extension
from tests.error_paths import CASES, EXTENSION, Case, fails
from tests.leaks import quick_collections

REPEATS = 20


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with quick_collections():
        yield


def counts(watched: list[Any]) -> dict[str, int]:
    """References to each object; of a tensor those of its C++ side, too."""
    found = {}
    for k in range(len(watched)):
        name = f"watched[{k}], {type(watched[k]).__name__}"
        found[name] = sys.getrefcount(watched[k])
        if isinstance(watched[k], torch.Tensor):
            found[f"{name}, in C++"] = watched[k]._use_count()
    return found


def assert_balanced(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fails(case)  # fills what is kept for the process
        gc.collect()
        before = counts(case.watched)
        for _ in range(REPEATS):
            fails(case)
        gc.collect()
        after = counts(case.watched)
    off = {name: after[name] - n for name, n in before.items() if after[name] != n}
    assert off == {}


@pytest.fixture
def backend(request: pytest.FixtureRequest, name: str) -> Iterator[str]:
    backend: str = request.param
    if backend == "cpu" or name.startswith("patch"):
        need_extension()
    with paramkit.backend.force(backend):
        yield backend


everywhere = pytest.mark.parametrize(
    ("name", "backend"),
    [(n, b) for n in CASES for b in ("native", "cpu") if b == "cpu" or n not in EXTENSION],
    indirect=["backend"],
)


@everywhere
def test_references_are_exact(name: str, backend: str) -> None:
    assert_balanced(CASES[name]())


@everywhere
def test_nothing_is_kept_alive(name: str, backend: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = CASES[name]()
        for _ in range(2):
            fails(case)
    alive = []
    for thing in case.watched:
        # What belongs to a module or class of the tests lives on.
        if callable(thing) and not isinstance(thing, torch.nn.Module):
            continue
        try:
            alive.append((type(thing).__name__, weakref.ref(thing)))
        except TypeError:  # a list, a number
            continue
    del case, thing
    gc.collect()
    assert [name for name, ref in alive if ref() is not None] == []


def test_a_lost_reference_would_be_seen(compiled: str) -> None:
    """The same with one reference too many, and one too few."""
    thing = object()
    held = [thing] * 100
    for change in (ctypes.pythonapi.Py_IncRef, ctypes.pythonapi.Py_DecRef):

        def call(change: Callable[[Any], object] = change) -> None:
            change(ctypes.py_object(thing))

        # After a tensor, which has two counts.
        with pytest.raises(AssertionError, match=r"watched\[1\], object"):
            assert_balanced(Case(call, None, [torch.zeros(1), thing]))
    assert len(held) == 100
