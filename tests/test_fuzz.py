"""Random lists of writes on every backend, byte for byte as torch; and that defects in a backend are found."""

from __future__ import annotations

import math
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from paramkit.backend import native
from tests.cases import DTYPES
from tests.conftest import EMULATED, must_have_extension
from tests.emulation import ROOT
from tests.fuzz import generate
from tests.fuzz.reference import Arena, conflict, prepare, reach
from tests.fuzz.run import (
    EVERY_SIZE,
    PARALLEL_BYTES,
    PATCHED,
    Failure,
    Result,
    available,
    every_size,
)
from tests.fuzz.shards import Job, run_shards, work

LISTS = 200_000
EMULATE_EVERY = 61
SEED = int(os.environ.get("PARAMKIT_TEST_SEED", "0"))
FAMILIES = ("copy", "rows", "transpose", "general", "fill")
SIDES = (operator.attrgetter("dst"), operator.attrgetter("src"))


def assert_none_failed(result: Result) -> None:
    found = "\n\n".join(f"{f.name} on {f.backend}: {f.what}\n{f.program}" for f in result.failures)
    assert not result.failures, found


def test_lists_on_every_backend(emulator: Path) -> None:
    """Each list on each backend of the processor; one block in 61 on the emulated GPU too."""
    backends = available()
    assert len(backends) > 1 or not must_have_extension()
    if len(backends) > 1:
        backends += EMULATED
    job = Job(SEED, LISTS // 2, tuple(backends), 0, 2, str(emulator), emulate_every=EMULATE_EVERY)
    result = run_shards([job, replace(job, shard=1)])
    assert_none_failed(result)
    assert result.lists >= LISTS and len(result.kinds) == 7
    assert result.errors > LISTS // 200 and result.refused > LISTS // 400
    assert result.parallel > LISTS // 400
    for backend in backends:
        routes, runs = result.routes[backend], result.runs[backend].total()
        assert result.runs[backend].keys() == generate.SCALES.keys()  # each at least once
        if backend not in EMULATED:
            assert runs == result.lists and result.runs[backend]["large"] > LISTS // 60
        if backend == "native":
            assert set(routes) <= {"native", "cast"} and routes["cast"] == 0
        elif backend == PATCHED:  # which leaves small writes to torch, uncounted
            assert all(routes[family] > 0 for family in FAMILIES) and routes["cast"] > 100
            every = result.routes[EVERY_SIZE]  # in the other half of the blocks
            assert every["fill"] > 1.5 * routes["fill"], (every, routes)
        elif backend in ("cuda:to device", "cuda:to host"):
            assert routes["staged"] > runs > LISTS // 500
        else:
            # What shares memory, or has complex numbers to convert, is torch's.
            assert all(routes[family] > runs // 50 for family in FAMILIES), routes
            assert routes["cast"] > runs // 4


# --- what is generated ------------------------------------------------------------------------


def test_a_seed_is_one_set_of_lists() -> None:
    first, again, other = generate.block(5, 3), generate.block(5, 3), generate.block(6, 3)
    assert first == again and first != other
    assert [each.name for each in first[:2]] == ["5:3:0", "5:3:1"]


def test_views_stay_inside_their_arena() -> None:
    """In the guard bytes before the first zone and behind the last nothing is ever written."""
    for number in (0, 3, 6):
        for each in generate.block(1, number):
            for write in each.writes:
                for view in (write.dst, write.src):
                    if not isinstance(view, generate.View) or 0 in view.shape:
                        continue
                    size = view.dtype.itemsize
                    last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.strides))
                    assert view.offset * size >= generate.GUARD
                    assert (last + 1) * size <= len(each.start) - generate.GUARD


def test_everything_meets_everything() -> None:
    """Each scale comes at each address, at both settings, in both processes, and on the emulated GPU."""
    numbers = range(LISTS // 250)
    scale = lambda n: generate.scale_of(n).name  # noqa: E731
    met = {(scale(n), generate.shift_of(n), every_size(n), n % 2) for n in numbers}
    assert len(met) == len(generate.SCALES) * len(set(generate.SHIFTS)) * 2 * 2
    emulated = {scale(n) for n in numbers if n % EMULATE_EVERY == 0}
    assert emulated == generate.SCALES.keys()
    assert f"kParallelBytes = {PARALLEL_BYTES >> 10} << 10" in (ROOT / "csrc/cpu/run.h").read_text()


def test_views_begin_at_every_address() -> None:
    """Both sides, of each dtype, at most multiples of the element: few are aligned to a vector."""
    begins: dict[tuple[bool, torch.dtype], set[int]] = {}
    for number in range(len(generate.SHIFTS)):
        for each in generate.block(1, number):
            base = Arena(each.scale, each.shift).bytes.ctypes.data
            assert base % 64 == each.shift == generate.shift_of(number)
            for write in each.writes:
                for view in (write.dst, write.src):
                    if isinstance(view, generate.View):
                        address = base + view.offset * view.dtype.itemsize
                        begins.setdefault((view is write.dst, view.dtype), set()).add(address % 64)
    assert len(begins) == 2 * len(DTYPES)
    for (_, dtype), found in begins.items():
        assert len(found) > 40 // dtype.itemsize


def _moved() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The sides of copies that move bytes, with what the sources hold first."""
    for each in (each for number in (3, 6) for each in generate.block(1, number)):
        arena = Arena(each.scale, each.shift)
        arena.set(each.start)
        for write in each.writes:
            if each.kind == "moves" and isinstance(write.src, generate.View) and not write.fill:
                yield arena.view(write.dst), arena.view(write.src)


@pytest.mark.parametrize(
    ("dtype", "bits", "quiet"),
    [
        (torch.float64, torch.int64, 1 << 51),
        (torch.float32, torch.int32, 1 << 22),
        (torch.float16, torch.int16, 1 << 9),
        (torch.bfloat16, torch.int16, 1 << 6),
    ],
)
def test_nans_of_many_payloads_are_moved(dtype: torch.dtype, bits: torch.dtype, quiet: int) -> None:
    sources = [src for dst, src in _moved() if src.dtype == dst.dtype == dtype]
    nans = {int(n) for src in sources for n in src[src.isnan()].view(bits)}
    assert len(nans) > 10 and len({n & quiet for n in nans}) == 2  # signalling ones too


@pytest.mark.filterwarnings("ignore")
def test_what_threads_share_does_not_overlap_itself() -> None:
    """Torch has one answer for it. The writes of a list overlap one another in large arenas as well."""
    large = conflicts = 0
    for each in generate.block(1, 6):
        prepared = prepare(Arena(each.scale, each.shift), each)
        assert prepared is not None
        many = [w for w in prepared.writes if math.prod(w.dst.shape) > generate.SERIAL]
        prepared.writes = many
        for write, dst, src in zip(many, *(reach(prepared, side) for side in SIDES)):
            assert dst.sum() == math.prod(write.dst.shape) * write.dst.dtype.itemsize
            assert not (dst & src).any()
        large += len(many)
        conflicts += conflict(prepared)
    assert large > 20 and conflicts > 0


# --- defects ----------------------------------------------------------------------------------


def _last(dsts: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The last destination that has elements, as flat memory, and where its last element is in it."""
    dst = next(d for d in reversed(dsts) if d.numel())
    last = sum((n - 1) * step for n, step in zip(dst.shape, dst.stride()))
    return dst.as_strided((last + 2,), (1,)), last


def _loses_an_element(dsts: list[torch.Tensor], srcs: list[Any]) -> None:
    if any(d.numel() for d in dsts):
        flat, last = _last(dsts)
        before = flat[last].clone()
        ORIGINAL(dsts, srcs)
        flat[last] = before


def _writes_one_past_the_end(dsts: list[torch.Tensor], srcs: list[Any]) -> None:
    ORIGINAL(dsts, srcs)
    if any(d.numel() for d in dsts):
        flat, last = _last(dsts)
        flat[last + 1] = flat[last]


def _writes_in_another_order(dsts: list[torch.Tensor], srcs: list[Any]) -> None:
    ORIGINAL(dsts[::-1], srcs[::-1])


def _checks_while_it_writes(dsts: list[torch.Tensor], srcs: list[Any]) -> None:
    for dst, src in zip(dsts, srcs):
        ORIGINAL([dst], [src])


def _raises_something_else(dsts: list[torch.Tensor], srcs: list[Any]) -> None:
    try:
        ORIGINAL(dsts, srcs)
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _refuses_what_touches(dsts: list[torch.Tensor], srcs: list[Any]) -> None:
    spans = sorted((d.data_ptr(), d.data_ptr() + d.nbytes) for d in dsts if d.numel())
    if any(a[1] > b[0] for a, b in pairwise(spans)):
        raise RuntimeError("they touch")
    ORIGINAL(dsts, srcs)


ORIGINAL = native.foreach_copy_
DEFECTS = [
    _loses_an_element,
    _writes_one_past_the_end,
    _writes_in_another_order,
    _checks_while_it_writes,
    _raises_something_else,
    _refuses_what_touches,
]


def run_program(program: str) -> None:
    exec(compile(program, "program", "exec"), {"__name__": "program"})


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.filterwarnings("ignore")
def test_defects_of_a_backend_are_found(
    defect: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a program that fails as long as the defect is there, and passes once it is gone."""
    monkeypatch.setattr(native, "foreach_copy_", lambda d, s, non_blocking=False: defect(d, s))
    result = work(Job(SEED, 1500, ("native",)))
    assert result.failures
    for failure in result.failures[:3]:
        with pytest.raises(AssertionError):
            run_program(failure.program)
    monkeypatch.undo()
    for failure in result.failures[:3]:
        run_program(failure.program)


@pytest.mark.filterwarnings("ignore")
def test_a_failure_is_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails whatever the writes are is shown with one of them."""
    monkeypatch.setattr(
        native, "foreach_copy_", lambda d, s, non_blocking=False: _writes_one_past_the_end(d, s)
    )
    result = work(Job(SEED, 1000, ("native",)))
    assert result.failures and all(f.program.count("    (view(") == 1 for f in result.failures[:3])


def test_a_crash_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list at which a process ended, with the write that ended it."""
    monkeypatch.setenv("PARAMKIT_FUZZ_CRASH", "6")
    result = run_shards([Job(SEED, 2000, ("native",))])
    (failure,) = result.failures
    assert failure.what == "ended by SIGSEGV" and failure.backend == "native"
    assert failure.program.count("    (view(") == 1 and "(6,)" in failure.program


@pytest.mark.filterwarnings("ignore")
def test_conflicts_by_bytes() -> None:
    """What plans are held to: two lists of which one has a write over another's source."""
    scale = generate.SCALES["small"]
    view = lambda first, n: generate.View(torch.uint8, (n,), (1,), first)  # noqa: E731
    apart = [generate.Write(view(64, 8), view(80, 8), False)]
    meets = [*apart, generate.Write(view(87, 4), view(100, 4), False)]
    beside = [*apart, generate.Write(view(88, 4), view(100, 4), False)]
    for writes, expected in ((apart, False), (meets, True), (beside, False)):
        each = generate.WriteList(
            "", scale, bytes(scale.bytes), writes, "plan", False, False, "moves"
        )
        prepared = prepare(Arena(scale), each)
        assert prepared is not None and conflict(prepared) is expected


def test_failures_and_counts_travel_between_processes() -> None:
    result = Result(lists=3, failures=[Failure("1:2:3", "native", "what", "program")])
    result.runs["native"] = Counter(small=2)
    total = Result.from_json(result.to_json())
    total.add(result)
    assert (total.lists, total.runs, len(total.failures)) == (6, {"native": {"small": 4}}, 2)
    assert total.failures[0] == result.failures[0]
