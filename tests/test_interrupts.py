"""Interrupts at random moments and at every point, one and two: nothing is left half done, locked or untold."""

from __future__ import annotations

import inspect
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paramkit
from paramkit.swap import Exchange
from tests.filled import COUNT, eight, eight_values, held, plan_of
from tests.guards import watch
from tests.threads import Paused


class Interrupt(KeyboardInterrupt):
    """As Ctrl-C, from a timer."""


class Storm:
    """Calls interrupted at random moments, by a signal, as the interpreter handles one.

    Args:
        most: interrupts of one call: with two, the second comes while what is done about the first is.

    Attributes:
        hits: calls that were interrupted.
        places: where the last one was.
    """

    def __init__(self, seed: int, most: int = 1) -> None:
        self.hits = 0
        self.places: list[str] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._most = most
        self._left = 0
        self._next = 0.0

    def __enter__(self) -> Storm:
        def interrupt(number: int, frame: FrameType | None) -> None:
            if not self._left:
                return  # the call is over
            self._left -= 1
            if frame is not None:
                self.places.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            if self._left:
                signal.setitimer(signal.ITIMER_REAL, self._next)
            raise Interrupt

        self._before = signal.signal(signal.SIGALRM, interrupt)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)

    def call(self, call: Callable[[], object], longest: float) -> bool:
        """Whether it was interrupted."""
        delays = torch.rand(2, generator=self._generator) * longest
        delay, self._next = (max(x, 2e-6) for x in delays.tolist())
        self._next /= 4  # while what is done about the first is
        self.places, self._left = [], self._most
        try:
            signal.setitimer(signal.ITIMER_REAL, delay)
            call()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupt:
            self.hits += 1
            return True
        finally:
            self._left = 0
            signal.setitimer(signal.ITIMER_REAL, 0)
        return False


def time_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.parametrize("least", [3, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("atomic", [False, True], ids=["torn", "atomic"])
@pytest.mark.parametrize("kind", ["memory", "file", "stream"])
def test_an_interrupt_leaves_a_state_that_is_told(
    route: str, tmp_path: Path, kind: str, atomic: bool, most: int, least: int
) -> None:
    """All old or all new; or the model is marked, and the mark is right; and the plan goes on afterwards."""
    numel = 40_000 if kind == "memory" else 3000
    model = eight(numel)
    seen = watch(*model.parameters())
    plans = {
        v: plan_of(model, "file" if kind == "file" else "memory", v, tmp_path) for v in (1.0, 2.0)
    }

    def write(value: float) -> None:
        if kind == "stream":
            paramkit.transplant(model, iter(eight_values(numel, value).items()), atomic=atomic)
        else:
            plans[value].apply(atomic=atomic)

    both = [partial(write, v) for v in (2.0, 1.0)]
    old, longest = 1.0, 1.1 * min(time_of(call) for call in both * 3)
    with Storm(1, most) as storm:
        while storm.hits < least:
            new = 3.0 - old
            if not storm.call(both[new == 1.0], longest):
                assert held(model) == {new}
            state = paramkit.torn(model)
            assert not (atomic and state), storm.places
            if state is None:
                assert held(model) in ({old}, {new}), storm.places
            else:
                assert {*state.written, *state.unwritten} == {*model}
                for name in state.written:
                    assert model[name].unique().tolist() == [new]
            for value in (old, new):  # nothing is locked
                plans[value].apply()
                assert held(model) == {value}
                assert paramkit.torn(model) is None
            old = new
    seen.assert_only_inside()


@pytest.mark.parametrize("least", [150, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("most", [1, 2])
def test_an_interrupt_does_not_lock_a_plan(route: str, most: int, least: int) -> None:
    """Also one that comes just as a call begins or ends."""
    model = eight(4)
    plan = paramkit.plan(model, eight_values(4, 1.0))
    longest = 1.2 * min(time_of(plan.apply) for _ in range(20))
    with Storm(2, most) as storm:
        while storm.hits < least:
            storm.call(plan.apply, longest)
    plan.apply()
    plan.refresh()
    assert plan.verify() == []


@pytest.mark.parametrize("least", [80, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("kind", ["exchange", "copy"])
def test_an_interrupt_leaves_nothing_swapped_in(
    route: str, kind: str, most: int, least: int
) -> None:
    plan, swap, is_whole = swapping(kind)
    longest = 1.2 * min(time_of(swap) for _ in range(20))
    with Storm(3, most) as storm:
        while storm.hits < least:
            storm.call(swap, longest)
            assert is_whole(), storm.places
    plan.apply()
    assert not is_whole()


def swapping(
    kind: str,
) -> tuple[paramkit.Plan, Callable[..., None], Callable[[], bool]]:
    """A plan, a block in which its source is swapped in, and whether everything is where it was."""
    model, average = eight(4, 1.0), eight(4, 2.0)
    source: nn.Module = average.double() if kind == "copy" else average
    plan = paramkit.plan(model, source)

    def swap(then: Callable[[], None] = lambda: None) -> None:
        with plan.swapped():
            assert held(model) == {2.0}
            assert plan._exchange is not None and plan._exchange.in_place == (kind == "exchange")
            then()

    return plan, swap, lambda: (held(model), held(average)) == ({1.0}, {2.0})


class Points:
    """Interrupts a call once, at each of the places in turn where the interpreter looks for an interrupt.

    Those are every beginning of a function and every end of a call, as it tells a profiler; and jumps back, left out.

    Attributes:
        seen: of the calls of functions and their ends, in the last call.
        place: where the interrupt was; empty where there was none.
        swallowed: whether it was inside a finalizer, which raises nothing.
    """

    def __init__(self) -> None:
        self.seen = self._at = 0
        self.place = ""
        self.swallowed = False

    def __iter__(self) -> Iterator[Points]:
        self._at, self.place = 0, "none yet"
        while self.place:
            self._at += 1
            self.seen, self.place, self.swallowed = 0, "", False
            before = sys.getprofile(), sys.unraisablehook
            sys.unraisablehook = self._unraisable
            try:
                yield self
            finally:
                sys.setprofile(before[0])
                sys.unraisablehook = before[1]

    def _unraisable(self, unraisable: Any) -> None:
        assert unraisable.exc_type is Interrupt
        self.swallowed = True

    def look(self) -> None:
        """Begin to count, and to interrupt."""
        sys.setprofile(self._look)

    def ends(self, call: Callable[[], object]) -> type[BaseException] | None:
        """How a call ends that begins to look, without the error itself, which knows what was going on."""
        try:
            call()
        except BaseException as error:
            sys.setprofile(None)
            return type(error)
        sys.setprofile(None)
        return None

    def _look(self, frame: FrameType, event: str, arg: object) -> None:
        if event in ("call", "c_return", "c_exception"):
            self.seen += 1
            if self.seen == self._at:
                self.place = (
                    f"{event} {frame.f_code.co_name}, {frame.f_code.co_filename}:{frame.f_lineno}"
                )
                raise Interrupt


@pytest.mark.parametrize("kind", ["exchange", "copy"])
def test_an_interrupt_at_every_point_of_swapped(route: str, kind: str) -> None:
    plan, swap, is_whole = swapping(kind)
    late = set()
    for point in Points():
        try:
            point.look()
            swap()
        except Interrupt:
            sys.setprofile(None)
            if not is_whole():  # what puts it back had not begun
                late.add(point.place.rpartition(":")[0])
        sys.setprofile(None)
        assert is_whole() and torch.is_grad_enabled(), point.place
    assert point.seen > 150
    assert late == {f"call __exit__, {inspect.getfile(paramkit.Plan)}"}
    plan.apply()
    assert not is_whole()


@pytest.mark.parametrize("kind", ["exchange", "copy"])
@pytest.mark.parametrize("first", ["in the block", "in its end"])
def test_a_second_interrupt_at_every_point(
    route: str, kind: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, swap, is_whole = swapping(kind)
    hits = 0

    def interrupted(point: Points) -> None:
        point.look()
        raise Interrupt

    leave = Exchange.leave
    for point in Points():
        waits = [True]

        def once(self: Exchange, point: Points = point, waits: list[bool] = waits) -> list[int]:
            lost = leave(self)
            if first == "in its end" and waits:
                waits.clear()
                interrupted(point)
            return lost

        monkeypatch.setattr(Exchange, "leave", once)
        then = partial(interrupted, point) if first == "in the block" else lambda: None
        assert point.ends(partial(swap, then)) is Interrupt, point.place
        hits += bool(point.place)
        assert is_whole() and torch.is_grad_enabled(), point.place
    assert hits > 5
    plan.apply()
    assert not is_whole()


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("atomic", [False, True], ids=["torn", "atomic"])
@pytest.mark.parametrize("first", [Interrupt, OSError])
def test_a_second_interrupt_after_a_failure(
    route: str, tmp_path: Path, kind: str, atomic: bool, first: type[BaseException]
) -> None:
    """Of the first, or of an error, the model knows; and the interrupt is raised."""
    model = eight(3000)
    plan, new = plan_of(model, "file", 2.0, tmp_path), eight_values(3000, 2.0)
    hits = 0
    for point in Points():

        def fail(point: Points = point) -> None:
            point.look()
            raise first

        def progress(done: int, total: int, fail: Callable[[], None] = fail) -> None:
            if done > total // 2:
                fail()

        def stream(fail: Callable[[], None] = fail) -> Iterator[tuple[str, Tensor]]:
            for k, item in enumerate(new.items()):
                if k == COUNT // 2:
                    fail()
                yield item

        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0)
        if kind == "file":
            end = point.ends(partial(plan.apply, atomic=atomic, progress=progress))
        else:
            write = partial(paramkit.transplant, model, stream(), atomic=atomic)
            end = point.ends(write)
        hits += bool(point.place)
        if point.place:
            assert end is Interrupt or point.swallowed, point.place
        assert torch.is_grad_enabled(), point.place
        state = paramkit.torn(model)
        if atomic:
            assert (held(model), state) == ({1.0}, None), point.place
        else:
            assert state is not None, point.place
            assert {*state.written, *state.unwritten} == {*model}
            for name in state.written:
                assert model[name].unique().tolist() == [2.0], point.place
        plan.apply()
        assert paramkit.torn(model) is None
    assert hits > 5


class Own(nn.Linear):
    """Loads in a way of its own."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.bias = nn.Parameter(state_dict[prefix + "bias"].clone())


@pytest.mark.parametrize("kind", ["recorded", "rolled back", "assigned"])
def test_an_interrupt_at_every_point_of_load_state_dict(route: str, kind: str) -> None:
    """Gradients are on, no mode is, and a model that is put back is put back whole."""
    model = nn.Sequential(nn.Linear(2, 2), Own(2, 2) if kind == "rolled back" else nn.Linear(2, 2))
    fill, new = partial(nn.init.constant_, val=1.0), torch.full((2, 2), 2.0)
    for point in Points():
        for p in model.parameters():
            fill(p)
        state_dict = {n: torch.full(p.shape, 2.0) for n, p in model.named_parameters()}
        load = partial(paramkit.load_state_dict, model, state_dict, assign=kind == "assigned")
        objects = list(model.parameters())
        end = point.ends(partial(looking, point, load))
        assert torch.is_grad_enabled(), point.place
        assert torch._C._len_torch_function_stack() == 0, point.place
        if end is not None and kind != "recorded":
            assert held(model) in ({1.0}, {2.0}), point.place
            if held(model) == {1.0}:
                assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))
        assert torch.equal(model[0].weight.detach().copy_(new), new)
        assert held(model[0]) != {1.0}
    assert point.seen > 10


def looking(point: Points, call: Callable[[], object]) -> None:
    point.look()
    call()


def test_an_interrupt_of_a_write_that_waits(route: str, tmp_path: Path) -> None:
    """It stops waiting, soon, and has written nothing; the tensors are not kept from others."""
    model = eight(1500)
    first, second = plan_of(model, "file", 1.0, tmp_path), plan_of(model, "memory", 2.0, tmp_path)
    paused = Paused(lambda progress: first.apply(progress=progress))
    with Storm(4) as storm:
        for _ in range(3):
            assert storm.call(second.apply, 0.1)
    paused.go_on()
    assert held(model) == {1.0}
    second.apply()
    assert held(model) == {2.0}
