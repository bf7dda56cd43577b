"""Writes from several Python threads: exact apart, in some order on the same tensors, never a mix.

A write that is stopped in its middle makes the races certain. Tests marked `[without]` show that each of them does
make a mix where writes do not wait for each other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import paramkit
from paramkit import PlanError
from tests import filled
from tests.filled import held
from tests.guards import Layout, assert_same_bits, place, watch
from tests.routes import routes_of
from tests.threads import LIMIT, Paused, Work, claims, hasty, together, until_it_waits

COUNT, NUMEL = 12, 1500
STAGING = 16384  # bytes: a few tensors of a file at a time
TRIES = 1000  # a mix by chance comes within the first hundred
MOMENT = 0.15  # seconds: a write that is not kept waiting is over long before


def model_of(count: int = COUNT, numel: int = NUMEL) -> nn.ParameterDict:
    return filled.model_of(count, numel)


def values_of(
    value: float, count: int = COUNT, numel: int = NUMEL, prefix: str = ""
) -> dict[str, Tensor]:
    return filled.values_of(value, count, numel, prefix)


# Apart.


@pytest.mark.parametrize("numel", [64, 30_000])  # the GIL is kept, and is given up
def test_disjoint_models_are_exact(route: str, numel: int) -> None:
    def work(number: int) -> Callable[[], None]:
        model = model_of(COUNT, numel)
        seen = watch(*model.parameters())
        sources = [{n: torch.randn(numel) for n in model} for _ in range(2)]
        plan = paramkit.plan(model, sources[0])

        def rounds() -> None:
            for turn in range(8):
                with paramkit.backend.trace() as trace:
                    plan.apply(sources[turn % 2])
                assert trace.routes == routes_of(route, copy=COUNT)
                for name, tensor in model.items():
                    assert_same_bits(tensor.detach(), sources[turn % 2][name])
            seen.assert_only_inside()

        return rounds

    calls = [work(k) for k in range(6)]
    with hasty():
        together(calls)


def test_what_other_threads_set_does_not_matter(route: str) -> None:
    """`torch.set_num_threads` between runs, during runs, and in another thread."""
    model, over = model_of(4, 300_000), threading.Event()
    sources = [values_of(float(k), 4, 300_000) for k in range(2)]
    plan = paramkit.plan(model, sources[0])

    def change() -> None:
        while not over.is_set():
            for n in (1, 3, 2):
                torch.set_num_threads(n)

    other = Work(change)
    try:
        for turn in range(12):
            torch.set_num_threads(turn % 5 + 1)
            plan.apply(sources[turn % 2], progress=lambda *_: torch.set_num_threads(2))
            assert held(model) == {float(turn % 2)}
            assert plan.verify() == []
    finally:
        over.set()
        other.result()


# The same tensors: writes that are stopped in the middle.


Begin = Callable[[nn.Module, Path], Callable[[Any], object]]
"""Of a model and a folder: a write of 1.0 that takes `progress`."""


def from_file(value: float, folder: Path) -> Path:
    path = folder / f"{value}.safetensors"
    save_file(values_of(value), path)
    return path


def begin_memory(model: nn.Module, folder: Path) -> Callable[[Any], object]:
    numel = next(model.parameters()).numel()
    plan = paramkit.plan(model, values_of(1.0, numel=numel))
    return lambda progress: plan.apply(progress=progress)


def begin_file(model: nn.Module, folder: Path) -> Callable[[Any], object]:
    plan = paramkit.plan(model, from_file(1.0, folder), staging=STAGING)
    return lambda progress: plan.apply(progress=progress)


def begin_atomic(model: nn.Module, folder: Path) -> Callable[[Any], object]:
    plan = paramkit.plan(model, from_file(1.0, folder), staging=STAGING)
    return lambda progress: plan.apply(progress=progress, atomic=True)


def begin_items(model: nn.Module, folder: Path) -> Callable[[Any], object]:
    items = values_of(1.0).items()
    return lambda progress: paramkit.transplant(model, iter(items), progress=progress)


FIRST: dict[str, Begin] = {
    "memory": begin_memory,
    "file": begin_file,
    "atomic": begin_atomic,
    "items": begin_items,
}


def plan_again(model: nn.Module, folder: Path, numel: int) -> Callable[[], object]:
    return paramkit.plan(model, values_of(2.0, numel=numel)).apply


def list_again(model: nn.Module, folder: Path, numel: int) -> Callable[[], object]:
    return paramkit.plan([p.detach() for p in model.parameters()], 2.0).apply


def file_again(model: nn.Module, folder: Path, numel: int) -> Callable[[], object]:
    path = folder / "second.safetensors"
    save_file(values_of(2.0, numel=numel), path)
    return paramkit.plan(model, path, staging=STAGING).apply


def writes_again(model: nn.Module, folder: Path, numel: int) -> Callable[[], object]:
    def call() -> None:
        with paramkit.writes(model) as w:
            for name, _ in model.named_parameters():
                w[name][...] = 2.0

    return call


def load_again(model: nn.Module, folder: Path, numel: int) -> Callable[[], object]:
    state = values_of(2.0, numel=numel)
    return lambda: paramkit.load_state_dict(model, state)


class _OwnWay(nn.Module):
    """Loaded by torch's own code: it has a hook."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, p in model.named_parameters():
            self.register_parameter(name, p)
        self.register_load_state_dict_post_hook(lambda module, keys: None)


def own_way_again(model: nn.Module, folder: Path, numel: int) -> Callable[[], object]:
    state, other = values_of(2.0, numel=numel), _OwnWay(model)
    return lambda: paramkit.load_state_dict(other, state)


def items_again(model: nn.Module, folder: Path, numel: int) -> Callable[[], object]:
    items = values_of(2.0, numel=numel).items()
    return lambda: paramkit.transplant(model, iter(items))


SECOND = {
    "plan": plan_again,
    "lists": list_again,
    "file": file_again,
    "writes": writes_again,
    "load_state_dict": load_again,
    "load with hooks": own_way_again,
    "items": items_again,
}


def race(
    model: nn.Module,
    first: Callable[[Any], object],
    second: Callable[[], object],
    moment: float = MOMENT,
) -> bool:
    """Begin one write, and the other one in its middle. Whether the second was kept waiting."""
    seen = watch(*model.parameters())
    paused = Paused(first)
    other = Work(second)
    waits = not other.finishes(moment)
    paused.go_on()
    other.result()
    seen.assert_only_inside()
    return waits


@pytest.mark.parametrize("second", SECOND)
def test_the_second_write_waits(route: str, tmp_path: Path, second: str) -> None:
    model = model_of()
    again = SECOND[second](model, tmp_path, NUMEL)
    assert race(model, begin_file(model, tmp_path), again)
    assert held(model) == {2.0}
    assert paramkit.torn(model) is None


@pytest.mark.parametrize("first", FIRST)
def test_every_kind_of_write_is_waited_for(route: str, tmp_path: Path, first: str) -> None:
    numel = (10 << 20) // COUNT if first == "memory" else NUMEL  # progress is told every 32 MiB
    model = model_of(numel=numel)
    again = plan_again(model, tmp_path, numel)
    assert race(model, FIRST[first](model, tmp_path), again)
    assert held(model) == {2.0}


@pytest.mark.parametrize("second", SECOND)
def test_without_waiting_it_is_a_mix(route: str, tmp_path: Path, second: str) -> None:
    """The canary: what the tests above provoke is a mix where nobody waits."""
    model = model_of()
    again = SECOND[second](model, tmp_path, NUMEL)
    with claims(False):
        assert not race(model, begin_file(model, tmp_path), again, LIMIT)
    assert held(model) == {1.0, 2.0}


def test_a_read_error_rolls_back_before_others_write(
    route: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An atomic write that fails puts back what was there, and not over what another thread wrote since."""
    model = model_of()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(-1.0)
    plan = paramkit.plan(model, from_file(1.0, tmp_path), staging=STAGING)
    other = paramkit.plan(model, values_of(2.0))

    def first(progress: Any) -> None:
        def failing(written: int, total: int) -> None:
            progress(written, total)
            raise ValueError("no more")

        with pytest.raises(ValueError, match="no more"):
            plan.apply(atomic=True, progress=failing)

    assert race(model, first, other.apply)
    assert held(model) == {2.0}


def test_a_source_that_is_being_written(route: str, tmp_path: Path) -> None:
    """A plan reads a model as it was before a write, or after it."""
    model, copy = model_of(), model_of()
    read = paramkit.plan(copy, model)
    assert race(model, begin_file(model, tmp_path), read.apply)
    assert held(model) == held(copy) == {1.0}


def test_verify_looks_before_or_after(route: str, tmp_path: Path) -> None:
    model = model_of()
    plan = paramkit.plan(model, values_of(1.0))
    plan.apply()
    found: list[list[str]] = []
    first = begin_file(model, tmp_path)
    paramkit.plan(model, values_of(3.0)).apply()
    assert race(model, first, lambda: found.append(plan.verify()))
    assert found == [[]]


def test_a_source_that_is_swapped_in_meanwhile(route: str, tmp_path: Path) -> None:
    model = model_of()
    average = values_of(2.0)
    plan = paramkit.plan(model, average)
    inside: list[set[float]] = []

    def swap() -> None:
        with plan.swapped():
            inside.append(held(model))

    assert race(model, begin_file(model, tmp_path), swap)
    assert inside == [{2.0}]
    assert held(model) == {1.0}
    assert {x for t in average.values() for x in t.unique().tolist()} == {2.0}


def test_readers_do_not_wait_for_each_other(route: str, tmp_path: Path) -> None:
    numel = (10 << 20) // COUNT
    shared = values_of(5.0, numel=numel)
    models = [model_of(numel=numel) for _ in range(2)]
    plans = [paramkit.plan(model, shared) for model in models]
    paused = Paused(lambda progress: plans[0].apply(progress=progress))
    second = Work(plans[1].apply)
    second.result()
    assert held(models[1]) == {5.0}
    # But who writes what they read does.
    writer = Work(paramkit.plan([*shared.values()], 6.0).apply)
    assert not writer.finishes(MOMENT)
    paused.go_on()
    writer.result()
    assert held(models[0]) == {5.0}
    assert shared["w0"].unique().tolist() == [6.0]


def test_other_tensors_do_not_wait(route: str, tmp_path: Path) -> None:
    model, other = model_of(), model_of()
    paused = Paused(begin_file(model, tmp_path))
    Work(paramkit.plan(other, values_of(2.0)).apply).result()
    assert held(other) == {2.0}
    paused.go_on()
    assert held(model) == {1.0}


def test_two_plans_that_share_one_tensor(route: str, tmp_path: Path) -> None:
    model = model_of()
    alone = nn.Parameter(place(Layout.dense((NUMEL,)), torch.float32))
    both = nn.ParameterDict({"x": model["w3"], "y": alone})
    plan = paramkit.plan(both, {"x": torch.full((NUMEL,), 2.0), "y": torch.full((NUMEL,), 2.0)})
    assert race(model, begin_file(model, tmp_path), plan.apply)
    assert held(both) == {2.0}
    assert held(model) == {1.0, 2.0}
    assert {n for n, p in model.items() if p[0] == 2.0} == {"w3"}


def test_writers_come_in_their_order(route: str, tmp_path: Path) -> None:
    """The last to come is the last to write."""
    model = model_of()
    paused = Paused(begin_file(model, tmp_path))
    waiting = []
    for k in range(4):
        waiting.append(until_it_waits(paramkit.plan(model, values_of(float(k + 2))).apply))
    assert not any(work.finishes(0) for work in waiting)
    paused.go_on()
    for work in waiting:
        work.result()
    assert held(model) == {5.0}


# One thread inside itself.


def test_a_callback_may_write_the_same_tensors(route: str, tmp_path: Path) -> None:
    """That is an order, too: its own."""
    model = model_of()
    inner = paramkit.plan(model, values_of(2.0))
    plan = paramkit.plan(model, from_file(1.0, tmp_path), staging=STAGING)
    calls: list[int] = []

    def progress(written: int, total: int) -> None:
        calls.append(written)
        inner.apply()

    plan.apply(progress=progress)
    assert len(calls) > 1
    assert held(model) == {2.0}


def test_threads_that_would_wait_for_each_other_are_told(route: str, tmp_path: Path) -> None:
    first, second = model_of(), model_of()
    inner = [paramkit.plan(m, values_of(3.0)) for m in (second, first)]
    barrier = threading.Barrier(2)
    refused: list[PlanError] = []

    def work(number: int, model: nn.Module) -> Callable[[], object]:
        plan = paramkit.plan(model, from_file(1.0 + number, tmp_path), staging=STAGING)
        met = False

        def progress(written: int, total: int) -> None:
            nonlocal met
            if not met:
                met = True
                barrier.wait(30)
                with pytest.raises(PlanError, match="cannot be waited for") as caught:
                    inner[number].apply()
                refused.append(caught.value)
                barrier.wait(30)

        return lambda: plan.apply(progress=progress)

    together([work(0, first), work(1, second)])
    assert len(refused) == 2
    assert held(first) == {1.0}
    assert held(second) == {2.0}


# The same plan.


def test_one_plan_in_two_threads(route: str, tmp_path: Path) -> None:
    model = model_of()
    plan = paramkit.plan(model, from_file(1.0, tmp_path), staging=STAGING)
    paused = Paused(lambda progress: plan.apply(progress=progress))
    for call in (plan.apply, plan.verify, plan.refresh):
        with pytest.raises(PlanError, match="in use already"):
            call()
    paused.go_on()
    plan.apply()
    assert plan.verify() == []


def test_a_plan_that_waits_is_in_use(route: str, tmp_path: Path) -> None:
    model = model_of()
    plan = paramkit.plan(model, values_of(2.0))
    paused = Paused(begin_file(model, tmp_path))
    waiting = Work(plan.apply)
    assert not waiting.finishes(MOMENT)
    with pytest.raises(PlanError, match="in use already"):
        plan.apply()
    paused.go_on()
    waiting.result()
    assert held(model) == {2.0}


# What changed while a write waited.


def test_what_changed_while_it_waited_is_seen(route: str, tmp_path: Path) -> None:
    model = model_of()
    plan = paramkit.plan(model, values_of(2.0))
    paused = Paused(begin_items(model, tmp_path))
    waiting = Work(plan.apply)
    assert not waiting.finishes(MOMENT)
    model["w5"] = nn.Parameter(torch.zeros(NUMEL))
    paused.go_on()
    with pytest.raises(PlanError, match="no longer fits"):
        waiting.result()
    assert held(model) == {0.0, 1.0}
    plan.refresh()
    plan.apply()
    assert held(model) == {2.0}


@pytest.mark.parametrize("kind", ["writes", "load_state_dict"])
def test_what_was_replaced_while_a_block_waited(route: str, tmp_path: Path, kind: str) -> None:
    """These have no plan before: what the names stand for afterwards is written, or refused; not what is gone."""
    model = model_of()
    paused = Paused(begin_items(model, tmp_path))
    waiting = Work(SECOND[kind](model, tmp_path, NUMEL))
    assert not waiting.finishes(MOMENT)
    model["w5"] = nn.Parameter(torch.zeros(NUMEL))
    paused.go_on()
    try:
        waiting.result()
    except PlanError:
        assert held(model) == {0.0, 1.0}
    else:
        assert held(model) in ({2.0}, {0.0, 2.0})


# By chance.


@pytest.mark.parametrize("numel", [64, 600_000])
@pytest.mark.parametrize("wait", [True, False], ids=["waiting", "without"])
def test_many_threads_at_one_model(route: str, numel: int, wait: bool) -> None:
    """No stop in the middle: the threads of the machine, and of the interpreter, as they come."""
    count = 40 if numel == 64 else 8
    model = model_of(count, numel)
    plans = [paramkit.plan(model, values_of(float(k), count, numel)) for k in range(4)]
    # Short writes of the extension keep the GIL, and need not wait.
    mixes = not wait and (route == "native" or numel > 64)
    with hasty(), claims(wait):
        until = time.monotonic() + 0.7
        for _ in range(TRIES):
            together([plan.apply for plan in plans])
            mixed = len(held(model)) > 1
            assert mixes or not mixed
            if mixed or (not mixes and time.monotonic() > until):
                return
    if mixes:  # chance owes nothing; test_without_waiting_it_is_a_mix makes one for certain
        pytest.skip(f"no mix in {TRIES} tries")
