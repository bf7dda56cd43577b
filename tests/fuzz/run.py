"""Lists on the backends, compared with torch byte by byte; what differs, made small and put into a program."""

from __future__ import annotations

import base64
import json
import math
import mmap
import os
import signal
import struct
import textwrap
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import paramkit
from paramkit import PlanError
from tests.conftest import CAPABILITIES, EMULATED, emulated
from tests.fuzz import generate
from tests.fuzz.generate import View, WriteList
from tests.fuzz.reference import Arena, Prepared, conflict, prepare

__all__ = ["Failure", "Result", "Runner", "available", "every_size", "program_of"]

NATIVE = "native"
PATCHED = "patched torch"
EVERY_SIZE = "patched torch, writes of every size"  # a name in Result.routes alone
THREADS = 3
"""Of torch and the kernels, on every machine. With three, parts are not all alike."""
PARALLEL_BYTES = 256 << 10
"""What a program has to write for several threads: kParallelBytes in csrc/cpu/run.h."""

CRASHES = int(os.environ.get("PARAMKIT_FUZZ_CRASH", "0"))
"""A planted crash: lists whose first destination has so many elements end the process. For a test."""


def available() -> list[str]:
    """The backends of this machine, but for the emulated ones, which need a library built first."""
    try:
        with paramkit.backend.force("cpu") as extension:
            names = [f"cpu:{name}" for name in CAPABILITIES if name in extension.capabilities()]
    except paramkit.backend.BackendError:
        return [NATIVE]
    return [NATIVE, *names, PATCHED]


@dataclass
class Failure:
    """One list on which a backend and torch differ."""

    name: str
    backend: str
    what: str
    program: str = ""


@dataclass
class Result:
    """What was run."""

    lists: int = 0
    writes: int = 0
    runs: dict[str, Counter[str]] = field(default_factory=dict)  # lists by scale, by backend
    routes: dict[str, Counter[str]] = field(
        default_factory=dict
    )  # writes by kernel family, by backend
    kinds: Counter[str] = field(default_factory=Counter)
    errors: int = 0  # lists that torch refuses
    parallel: int = 0  # lists with a program that several threads share
    plans: int = 0
    refused: int = 0  # plans, because of a conflict
    failures: list[Failure] = field(default_factory=list)

    def add(self, other: Result) -> None:
        for name in ("lists", "writes", "errors", "parallel", "plans", "refused"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.kinds.update(other.kinds)
        for mine, others in ((self.runs, other.runs), (self.routes, other.routes)):
            for backend, counts in others.items():
                mine.setdefault(backend, Counter()).update(counts)
        self.failures += other.failures

    def to_json(self) -> str:
        return json.dumps({**self.__dict__, "failures": [f.__dict__ for f in self.failures]})

    @classmethod
    def from_json(cls, text: str) -> Result:
        data = json.loads(text)
        data["kinds"] = Counter(data["kinds"])
        for name in ("runs", "routes"):
            data[name] = {backend: Counter(counts) for backend, counts in data[name].items()}
        data["failures"] = [Failure(**each) for each in data["failures"]]
        return cls(**data)


@contextmanager
def on_backend(name: str, emulator: Path | None) -> Iterator[None]:
    """Writes go to a backend inside the block."""
    if name in EMULATED:
        assert emulator is not None
        with emulated(emulator, EMULATED[name]):
            yield
    elif name == PATCHED:
        with paramkit.backend.force("cpu"), paramkit.patch_torch():
            yield
    else:
        with paramkit.backend.force(name):
            yield


def suits(backend: str, prepared: Prepared) -> bool:
    """Whether a list means anything there: host and device memory have nothing in common."""
    one_memory = backend not in ("cuda:to device", "cuda:to host")
    return one_memory or (prepared.list.apart and prepared.list.how == "copy")


def every_size(number: int) -> bool:
    """Whether a block gives writes of every size to what large ones alone would reach."""
    return number // 8 % 2 == 1  # see generate.scale_of


@contextmanager
def settings(backend: str, number: int) -> Iterator[None]:
    """What a block is run with, on the backend that is active.

    Stores of the CPU's kernels bypass the cache in every write that they can, or in very large ones alone; patched
    torch gives writes of every size to the kernels, or those that it always does.
    """
    extension: Any = paramkit.backend.active()
    if backend.startswith("cpu"):
        change, value = extension.set_stream_bytes, 0 if every_size(number) else -1
    elif backend == PATCHED and every_size(number):
        change, value = extension.set_patch_least_bytes, 0
    else:
        yield
        return
    before = change(value)
    try:
        yield
    finally:
        change(before)


def largest_program(prepared: Prepared) -> int:
    """Bytes of the most that a list writes at once."""
    counts = [write.dst.dtype.itemsize * math.prod(write.dst.shape) for write in prepared.writes]
    return max(counts) if prepared.list.how == "each" else sum(counts)


def write_list(prepared: Prepared) -> None:
    """All writes of a list, by paramkit."""
    if CRASHES and prepared.writes[0].dst.shape == (CRASHES,):
        os.kill(os.getpid(), signal.SIGSEGV)
    how, dsts, srcs = prepared.list.how, prepared.dsts, prepared.srcs
    if how == "copy":
        paramkit.foreach_copy_(dsts, srcs)
    elif how == "fill":
        paramkit.foreach_fill_(dsts, srcs)
    elif how == "plan":
        paramkit.plan(dsts, srcs).apply()
    else:
        for write, dst, src in zip(prepared.writes, dsts, srcs):
            if write.fill:
                paramkit.fill_(dst, src)
            else:
                paramkit.copy_(dst, src)


def write_patched(prepared: Prepared) -> None:
    """All writes of a list, by torch's own functions."""
    if prepared.list.how == "copy":
        torch._foreach_copy_(prepared.dsts, prepared.srcs)
        return
    for at, (write, dst, src) in enumerate(zip(prepared.writes, prepared.dsts, prepared.srcs)):
        if write.fill:
            dst.fill_(src)
        elif at % 2 and prepared.error is None and dst.shape == src.shape:
            dst[...] = (
                src  # for other shapes, and in what it refuses, not quite copy_ in torch either
            )
        else:
            dst.copy_(src)


class Runner:
    """Runs blocks of lists on some backends."""

    def __init__(
        self,
        backends: Sequence[str],
        emulator: Path | None = None,
        emulate_every: int = 1,
        progress: Path | None = None,
    ) -> None:
        self.backends, self.emulator, self.emulate_every = list(backends), emulator, emulate_every
        self._arenas: dict[tuple[str, int], Arena] = {}
        torch.set_num_threads(THREADS)
        self._progress = None
        if progress is not None:
            progress.write_bytes(bytes(24))
            with progress.open("r+b") as file:
                self._progress = mmap.mmap(file.fileno(), 24)

    def arena(self, each: WriteList) -> Arena:
        key = each.scale.name, each.shift
        if key not in self._arenas:
            self._arenas[key] = Arena(each.scale, each.shift)
        return self._arenas[key]

    def run_block(self, seed: int, number: int) -> Result:
        result = Result()
        lists = generate.block(seed, number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch, of complex numbers that become real
            self._note(number, -1, -1)
            prepared = [p for each in lists if (p := prepare(self.arena(each), each)) is not None]
            result.lists = len(prepared)
            result.writes = sum(len(p.writes) for p in prepared)
            result.kinds.update(p.list.kind for p in prepared)
            result.errors = sum(p.error is not None for p in prepared)
            result.parallel = sum(largest_program(p) >= PARALLEL_BYTES for p in prepared)
            for at, backend in enumerate(self.backends):
                if backend in EMULATED and number % self.emulate_every:
                    continue
                self._run_backend(result, number, at, backend, prepared)
        return result

    def _run_backend(
        self, result: Result, number: int, at: int, backend: str, prepared: list[Prepared]
    ) -> None:
        runs = result.runs.setdefault(backend, Counter())
        with (
            on_backend(backend, self.emulator),
            settings(backend, number),
            paramkit.backend.trace() as trace,
        ):
            for each in prepared:
                if not suits(backend, each):
                    continue
                index = int(each.list.name.rsplit(":", 1)[1])
                self._note(number, at, index)
                runs[each.list.scale.name] += 1
                what = self.differs(each, backend, result)
                if what:
                    result.failures.append(Failure(each.list.name, backend, what))
        name = EVERY_SIZE if backend == PATCHED and every_size(number) else backend
        result.routes[name] = Counter({**trace.routes, "cast": trace.casts})

    def differs(self, each: Prepared, backend: str, result: Result | None = None) -> str:
        """What the backend does other than torch, or nothing."""
        arena = self.arena(each.list)
        arena.set(each.list.start)
        error: type[Exception] | None = None
        raised: Exception | None = None
        try:
            if backend == PATCHED:
                write_patched(each)
            else:
                write_list(each)
        except Exception as problem:
            raised, error = problem, type(problem)
        if each.list.how == "plan" and backend != PATCHED:
            return self._plan_differs(each, raised, arena.get(), result)
        if error is not each.error:
            return f"raised {raised!r}, where torch raises {each.error}"
        want = each.torch if backend == PATCHED else each.want
        got = arena.get()
        return "" if got == want else first_difference(got, want)

    def _plan_differs(
        self, each: Prepared, raised: Exception | None, got: bytes, result: Result | None
    ) -> str:
        if result is not None:
            result.plans += 1
        if raised is None:
            if each.error is not None:
                return f"a plan of what torch refuses ({each.error}) was applied"
            return "" if got == each.want else first_difference(got, each.want)
        if got != each.list.start:
            return f"refused with {raised!r}, but something was written"
        if each.error is not None:
            return ""
        if not isinstance(raised, PlanError):
            return f"raised {raised!r}, torch nothing"
        if result is not None:
            result.refused += 1
        return "" if conflict(each) else f"refused without a conflict: {raised}"

    def _note(self, number: int, backend: int, index: int) -> None:
        if self._progress is not None:
            struct.pack_into("<qqq", self._progress, 0, number, backend, index)

    # --- one list ----------------------------------------------------------------------------

    def one(self, each: WriteList, backend: str, block: int) -> str:
        """What differs in a single list, run as in its block."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepared = prepare(self.arena(each), each)
            if prepared is None or not suits(backend, prepared):
                return ""
            with on_backend(backend, self.emulator), settings(backend, block):
                return self.differs(prepared, backend)

    def shrink(self, failure: Failure) -> tuple[WriteList, str]:
        """The list of a failure with as few writes as still fail, and what differs then."""
        seed, number, index = map(int, failure.name.split(":"))
        smallest = generate.block(seed, number)[index]
        what = failure.what
        at = 0
        while at < len(smallest.writes) and len(smallest.writes) > 1:
            writes = smallest.writes[:at] + smallest.writes[at + 1 :]
            fewer = replace(smallest, writes=writes)
            still = self.one(fewer, failure.backend, number)
            if still:
                smallest, what = fewer, still
            else:
                at += 1
        plain = bytes(i * 7 % 251 + 1 for i in range(len(smallest.start)))
        if smallest.kind == "moves":  # what converts needs its numbers
            still = self.one(replace(smallest, start=plain), failure.backend, number)
            if still:
                smallest, what = replace(smallest, start=plain), still
        return smallest, what

    def explain(self, failure: Failure) -> None:
        """Shrink it, and put a program into it."""
        smallest, failure.what = self.shrink(failure)
        failure.program = program_of(smallest, failure)


def first_difference(got: bytes, want: bytes) -> str:
    at = next(i for i, (a, b) in enumerate(zip(got, want)) if a != b)
    count = sum(a != b for a, b in zip(got, want))
    return f"{count} bytes differ, first byte {at}: got {got[at]}, torch {want[at]}"


def _view(view: View | int | float | complex) -> str:
    if not isinstance(view, View):
        return f"float({str(view)!r})" if view in (float("inf"),) or view != view else repr(view)
    return f"view({view.dtype}, {view.offset}, {view.shape}, {view.strides})"


def program_of(each: WriteList, failure: Failure) -> str:
    """A program that does the writes of a list, by torch and by a backend, and compares."""
    count = len(each.start)
    plain = f"bytes(i * 7 % 251 + 1 for i in range({count}))"
    start = base64.b85encode(zlib.compress(each.start, 9)).decode()
    memory = plain if eval(plain) == each.start else f"zlib.decompress(base64.b85decode({start!r}))"
    number = int(failure.name.split(":")[1])
    calls = {
        "copy": "paramkit.foreach_copy_(dsts, srcs)",
        "fill": "paramkit.foreach_fill_(dsts, srcs)",
        "plan": "paramkit.plan(dsts, srcs).apply()",
    }
    loop = "for (dst, src), fill in zip(zip(dsts, srcs), fills):\n    {}.fill_({}) if fill else {}.copy_({})"
    ours = calls.get(each.how, loop.format("paramkit", "dst, src", "paramkit", "dst, src"))
    if failure.backend in EMULATED:
        inside = (
            f"emulated(emulation.build(Path(tempfile.mkdtemp())), {EMULATED[failure.backend]!r})"
        )
        more = "import tempfile\nfrom pathlib import Path\nfrom tests import emulation\n"
        more += "from tests.conftest import emulated\n"
    elif failure.backend == PATCHED:
        inside, more = "paramkit.patch_torch()", ""
        ours = loop.format("dst", "src", "dst", "src")
        ours = "torch._foreach_copy_(dsts, srcs)" if each.how == "copy" else ours
    else:
        inside, more = f"paramkit.backend.force({failure.backend!r})", ""
    setting = ""
    if failure.backend.startswith("cpu") and every_size(number):
        setting = "paramkit.backend.active().set_stream_bytes(0)\n"
    elif failure.backend == PATCHED and every_size(number):
        setting = "paramkit.backend.active().set_patch_least_bytes(0)\n"
    # One by one, and in torch itself, what comes before an error is written.
    partly = each.how == "each" or failure.backend == PATCHED
    pairs = "".join(f"    ({_view(write.dst)}, {_view(write.src)}),\n" for write in each.writes)
    return f'''\
# {failure.name} on {failure.backend}: {failure.what}
# From the repository's root; again, all of it: python -m tests.fuzz --one {failure.name} --backend "{failure.backend}"
import base64, zlib
import numpy as np
import torch
import paramkit
{more}
torch.set_num_threads({THREADS})
start = {memory}
memory = np.zeros({count} + 128, np.uint8)
memory = memory[-memory.ctypes.data % 64 + {each.shift} :][:{count}]
raw = torch.from_numpy(memory)  # one storage: of several, torch does not see what overlaps
def view(dtype, offset, shape, strides):
    return raw.view(dtype).as_strided(shape, strides, offset)
pairs = [
{pairs}]
dsts, srcs = map(list, zip(*pairs))
fills = {[write.fill for write in each.writes]}
memory[:] = bytearray(start)
error = None
try:
{textwrap.indent(loop.format("dst", "src", "dst", "src"), "    ")}
except Exception as problem:
    error = problem
want = memory.tobytes() if error is None or {partly} else start  # a list that is refused writes nothing
memory[:] = bytearray(start)
mine = None
try:
    with {inside}:
{textwrap.indent(setting + ours, "        ")}
except Exception as problem:
    mine = problem
assert type(mine) is type(error), f"raised {{mine!r}}, torch {{error!r}}"
wrong = np.flatnonzero(memory != np.frombuffer(want, np.uint8))
assert len(wrong) == 0, f"{{len(wrong)}} bytes differ, first {{wrong[0]}}"
'''
