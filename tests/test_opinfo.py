"""torch's own samples through our operators: bits, strides, versions, autograd and errors as torch's.

Some operators by default, each with a few dtypes; with ``make slow`` every operator with every dtype.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import paramkit
from tests import opinfo_calls
from tests.cases import DTYPES
from tests.known_differences import DIFFERENCES
from tests.opinfo_calls import COPIES, FILLS, SCATTERS, Build, apart
from tests.opinfo_samples import (
    QUANTIZED,
    Sample,
    error_samples,
    foreach_operators,
    operators,
    samples,
    sparse_samples,
)
from tests.parity import OURS, Side, Tally, compare
from tests.routes import TRANSFERS
from tests.twins import Twins

DIFFERENTIABLE = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
SHELLS = (torch.bits8, torch.uint4, torch.float4_e2m1fn_x2, torch.bits16)
SHARDS = 24
"""Parts of torch's list of operators, so that the slow tests can be run in parts."""

few = pytest.mark.parametrize("backend", ["native", "cpu"], indirect=True)
compiled_only = pytest.mark.parametrize("backend", ["cpu"], indirect=True)


@pytest.fixture
def tally(backend: str, record_property: Callable[[str, object], None]) -> Iterator[Tally]:
    """Counts what a test does; one that did nothing, or not on the kernels, proves nothing.

    ``--junitxml`` has the counts: docs/trust.md says how many writes were compared.
    """
    tally = Tally()
    with paramkit.backend.trace() as trace:
        yield tally
    record_property("calls", tally.calls)
    assert tally.calls > 0
    kernels = sum(trace.routes.values()) - trace.routes.get("native", 0)
    assert (kernels > 0) == (backend != "native" and tally.kernels), trace.routes


def run(
    build: Build,
    operator: Any,
    drawn: Iterator[Sample],
    tally: Tally,
    *,
    side: Side = OURS,
    most: int | None = None,
) -> None:
    """Samples of an operator, done by torch and by us."""
    for number, sample in enumerate(drawn):
        if number == most:
            return
        theirs, mine = Twins(), Twins()
        torchs = build(operator, theirs.of(sample), theirs)
        ours = build(operator, mine.of(sample), mine)
        compare(
            side, (theirs, torchs), (mine, ours), tally, f"{operator.full_name}, sample {number}"
        )


def rotated(number: int, count: int) -> Sequence[torch.dtype]:
    """float32 and a few dtypes more, others for each number, so that all turn up."""
    return (torch.float32, *(DTYPES[(number * count + k) % len(DTYPES)] for k in range(count)))


def named(names: Sequence[str]) -> list[Any]:
    """The operators of these names, variants included."""
    found = [one for one in operators().values() if one.name in names]
    unknown = set(names) - {one.name for one in found}
    assert not unknown, f"torch has no such operators: {unknown}"
    return found


# Copies, fills and slices, as torch has them under other names.

KINDS: dict[str, tuple[Build, Sequence[str]]] = {
    "copies": (opinfo_calls.copies, COPIES),
    "fills": (opinfo_calls.fills, FILLS),
    "scatters": (opinfo_calls.scatters, SCATTERS),
    "joins": (opinfo_calls.joins, ("cat", "stack")),
    "assignments": (opinfo_calls.assignments, ("__getitem__", "select_scatter", "slice_scatter")),
    "views": (
        opinfo_calls.views,
        ("as_strided", "diagonal", "expand", "permute", "unfold", "mH", "imag", "real", "conj"),
    ),
    "pairs": (
        opinfo_calls.pairs,
        ("where", "addmm", "index_put", "nn.functional.max_pool2d", "lerp"),
    ),
}


@few
@pytest.mark.parametrize("kind", KINDS)
def test_samples(kind: str, tally: Tally) -> None:
    build, names = KINDS[kind]
    for number, operator in enumerate(named(names)):
        for dtype in dict.fromkeys(rotated(number, 2)):
            run(build, operator, samples(operator, dtype), tally, most=12)


@few
def test_foreach(tally: Tally) -> None:
    for number, name in enumerate(("_foreach_copy", "_foreach_zero", "_foreach_add")):
        operator = foreach_operators()[name]
        for dtype in dict.fromkeys(rotated(number, 7)):
            run(opinfo_calls.lists, operator, samples(operator, dtype), tally)


@few
@pytest.mark.parametrize("kind", ["copies", "scatters", "views", "pairs"])
def test_autograd(kind: str, tally: Tally) -> None:
    """Leaves, views of leaves, and what flows back."""
    build, names = KINDS[kind]
    tally.kernels = kind == "pairs"  # autograd records all of the others
    for number, operator in enumerate(named(names)):
        dtype = DIFFERENTIABLE[number % len(DIFFERENTIABLE)]
        if dtype in operator.dtypes:
            drawn = samples(operator, dtype, requires_grad=True)
            run(build, operator, drawn, tally, most=8)
    assert tally.recorded > 0
    assert tally.errors > 0 or kind == "copies"


@few
def test_quantized(tally: Tally) -> None:
    for number, operator in enumerate(named(("where", "expand", "permute"))):
        for build in (opinfo_calls.pairs, opinfo_calls.views):
            drawn = samples(operator, QUANTIZED[number % 3])
            run(build, operator, drawn, tally, most=6)


@few
def test_dtypes_without_arithmetic(tally: Tally) -> None:
    """Those that torch can only move: as destination, as source, and refused where converted."""
    for number, operator in enumerate(named(("expand", "permute", "as_strided", "unfold"))):
        for build in (opinfo_calls.pairs, opinfo_calls.views):
            drawn = samples(operator, SHELLS[number % len(SHELLS)])
            run(build, operator, drawn, tally, most=6)
    assert tally.errors > 0


@few
def test_sparse(tally: Tally) -> None:
    tally.kernels = False
    for layout in SPARSE:
        for operator in named(("abs", "sum")):
            run(opinfo_calls.pairs, operator, sparse_samples(operator, layout), tally, most=4)


@few
def test_errors(tally: Tally) -> None:
    """What torch's operators must refuse is as odd for ours: tensors that do not fit each other."""
    for operator in named(("where", "index_put", "cat", "as_strided_scatter", "masked_scatter")):
        drawn = (sample for sample, _ in error_samples(operator))
        run(opinfo_calls.pairs, operator, drawn, tally)
    assert tally.errors > 0


# Every operator.


def shard(number: int, all_of_them: Sequence[Any]) -> Sequence[Any]:
    return all_of_them[number::SHARDS]


def possible(build: Build, backend: str) -> Build:
    """What a backend can be asked: host and device memory have nothing in common."""
    return apart(build) if backend in TRANSFERS else build


@pytest.mark.slow
@pytest.mark.parametrize("number", range(SHARDS))
@compiled_only
def test_every_operator_and_dtype(number: int, tally: Tally) -> None:
    everything = shard(number, list(operators().values()))
    for operator in everything:
        for dtype in (*DTYPES, *QUANTIZED, *SHELLS):
            for build in (opinfo_calls.pairs, opinfo_calls.views):
                run(build, operator, samples(operator, dtype), tally, most=20)
            if dtype in DIFFERENTIABLE and dtype in operator.dtypes and operator.supports_autograd:
                drawn = samples(operator, dtype, requires_grad=True)
                run(opinfo_calls.views, operator, drawn, tally, most=20)
        for layout in SPARSE:
            run(opinfo_calls.pairs, operator, sparse_samples(operator, layout), tally, most=20)
        drawn = (sample for sample, _ in error_samples(operator))
        run(opinfo_calls.pairs, operator, drawn, tally)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_sample(kind: str, backend: str, tally: Tally) -> None:
    """The operators that are writes, on every backend, with torch's longer lists of samples."""
    build, names = KINDS[kind]
    build = possible(build, backend)
    for operator in named(names):
        for dtype in DTYPES:
            run(build, operator, samples(operator, dtype, reference=True), tally)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(SHARDS))
def test_every_list(number: int, backend: str, tally: Tally) -> None:
    lists = possible(opinfo_calls.lists, backend)
    for operator in shard(number, list(foreach_operators().values())):
        for dtype in DTYPES:
            run(lists, operator, samples(operator, dtype), tally)


# The list of differences.


def test_differences_are_still_there(compiled: str) -> None:
    gone = [one.name for one in DIFFERENCES if not one.shows()]
    assert not gone, f"no longer different: take them out of known_differences.py: {gone}"


def test_samples_show_the_differences(compiled: str) -> None:
    """The comparison sees each of them, so that it would see others."""
    tally = Tally()
    for build, operator, dtype in (
        (opinfo_calls.lists, foreach_operators()["_foreach_copy"], torch.float32),
        (opinfo_calls.copies, operators()["float"], torch.float8_e5m2),
        (opinfo_calls.pairs, operators()["mm"], torch.float8_e4m3fnuz),
        (opinfo_calls.pairs, operators()["addmm"], torch.complex64),
        (opinfo_calls.assignments, operators()["__getitem__"], torch.float32),
        (opinfo_calls.assignments, operators()["__getitem__"], torch.complex64),
    ):
        run(build, operator, samples(operator, dtype), tally)
    assert set(tally.differences) == {one.name for one in DIFFERENCES if one.sampled}


def test_document_has_the_same_list() -> None:
    text = (Path(__file__).parent.parent / "docs" / "semantics.md").read_text(encoding="utf-8")
    section = text.split("## Known differences from torch", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", section, re.MULTILINE)
    rows = [row for row in rows if row[0] != "where"]
    assert rows == [(one.name, one.torch, one.paramkit, one.why) for one in DIFFERENCES]
