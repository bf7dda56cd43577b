"""Nothing leaks: memory, files and threads are flat over thousands of calls, whether they succeed or fail."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import paramkit
from tests.error_paths import CASES, fails
from tests.leaks import growth, quick_collections

Once = Callable[[], object]


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def tensors(n: int) -> list[Tensor]:
    return [torch.zeros(4) for _ in range(n)]


# What is done again and again, each with objects that live on, so that a lost reference would free them.


def operators(tmp_path: Path) -> Once:
    dsts, srcs, subclass = tensors(5), tensors(5), torch.zeros(4).as_subclass(Plain)
    numbers = [1, 2.5, True, torch.tensor(3.0), 1 << 40]
    dsts[3] = torch.zeros(4, dtype=torch.bfloat16)

    def once() -> None:
        paramkit.copy_(dsts[0], srcs[0])
        paramkit.copy_(subclass, srcs[0])
        paramkit.fill_(dsts[1], 0.25)
        paramkit.foreach_copy_(dsts, srcs)
        paramkit.foreach_fill_(dsts, numbers)
        paramkit.foreach_fill_(dsts, 3)

    return once


class Plain(Tensor):
    pass


def list_plans(tmp_path: Path) -> Once:
    dsts, srcs = tensors(3), tensors(3)

    def once() -> None:
        paramkit.plan(dsts, srcs).apply()

    return once


def list_replays(tmp_path: Path) -> Once:
    dsts, srcs = tensors(3), tensors(3)
    plan = paramkit.plan(dsts, srcs)

    def once() -> None:
        assert len(dsts) == 3  # or only the plan would hold them
        plan.apply()
        plan.apply(srcs)
        plan.verify()

    return once


def model_plans(tmp_path: Path) -> Once:
    ours, theirs = model(), model()

    def once() -> None:
        paramkit.plan(ours, theirs).apply()

    return once


def model_replays(tmp_path: Path) -> Once:
    ours, sources = model(), [model().state_dict() for _ in range(2)]
    plan = paramkit.plan(ours, sources[0])

    def once() -> None:
        assert ours.training  # or nothing would hold it
        for source in sources:
            plan.apply(source)
        plan.apply(atomic=True)
        with plan.swapped():
            pass
        plan.verify()

    return once


def refreshed(tmp_path: Path) -> Once:
    ours, source = model(), model().state_dict()
    plan = paramkit.plan(ours, source)

    def once() -> None:
        ours[0].weight = nn.Parameter(torch.zeros(3, 2))
        plan.refresh()
        plan.apply()
        plan.release()
        plan.refresh(source)

    return once


def models_that_come_and_go(tmp_path: Path) -> Once:
    def once() -> None:
        ours = model()
        plan = paramkit.plan(ours, model())
        plan.apply()
        # Held by a part of itself: a cycle, which the garbage collector sees.
        ours.plan = ours[0].plan = plan  # type: ignore[assignment]

    return once


def recorded_writes(tmp_path: Path) -> Once:
    ours, value = model(), torch.ones(3)

    def once() -> None:
        with paramkit.writes(ours) as w:
            w["0.weight"][0, 0] = 0.125
            w[ours[0].bias][...] = value
            w["1.bias"][::2] = 7
        assert w.plan is not None
        w.plan.apply()

    return once


def state_dicts(tmp_path: Path) -> Once:
    ours, hooked, state = model(), model(), model().state_dict()
    hooked.register_load_state_dict_post_hook(lambda module, keys: None)

    def once() -> None:
        paramkit.load_state_dict(ours, state)
        paramkit.load_state_dict(hooked, state)

    return once


def patched(tmp_path: Path) -> Once:
    """torch's own calls while they take the kernels, and those that fail."""
    a, b, wrong = torch.zeros(200, 200), torch.rand(200, 200).t(), torch.zeros(3)
    ours, state = model(), model().state_dict()
    other = {**state, "0.bias": torch.zeros(9)}

    def once() -> None:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # without the extension it says so
            with paramkit.patch_torch():
                a.copy_(b)
                a[1:50] = b[1:50]
                a.fill_(0.5)
                torch._foreach_copy_([a, a[3:90]], [b, b[4:91]])
                torch._foreach_zero_([a])
                ours.load_state_dict(state)
                for call in (
                    lambda: a.copy_(wrong),
                    lambda: torch._foreach_copy_([a, a], [b, wrong]),
                    lambda: ours.load_state_dict(other),
                ):
                    try:
                        call()
                    except RuntimeError as error:
                        error.__traceback__ = None

    return once


def transplants(tmp_path: Path) -> Once:
    ours, source = {"w": torch.zeros(3, 2)}, {"w": torch.zeros(2, 3)}
    rules = [paramkit.Rule("w", "w", "a b -> b a")]

    def once() -> None:
        paramkit.transplant(ours, source, rules)

    return once


def files(tmp_path: Path) -> Once:
    values = {f"w.{k}": torch.zeros(40) for k in range(3)}
    save_file(values, tmp_path / "m.safetensors")
    torch.save(values, tmp_path / "m.pt")
    ours = {name: torch.zeros(40) for name in values}

    def once() -> None:
        paramkit.transplant(ours, tmp_path / "m.safetensors")
        paramkit.transplant(ours, tmp_path / "m.pt")

    return once


def files_that_fail(tmp_path: Path) -> Once:
    for name, content in (
        ("a.safetensors", b"\x08\0\0\0\0\0\0\0{}      x"),
        ("b.pt", b"PK\x03\x04 no zip"),
    ):
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.pt", tmp_path / "absent.pt"]
    ours = {"w": torch.zeros(3)}

    def once() -> None:
        for path in paths:
            with pytest.raises(paramkit.PlanError):
                paramkit.transplant(ours, path)

    return once


# name -> (what, cycles; among the slow tests 10,000)
SUCCESS = {
    "operators": (operators, 10_000),
    "list plans": (list_plans, 10_000),
    "list replays": (list_replays, 3000),
    "model plans": (model_plans, 1000),
    "model replays": (model_replays, 500),
    "refreshed": (refreshed, 300),
    "models that come and go": (models_that_come_and_go, 300),
    "writes": (recorded_writes, 2000),
    "state dicts": (state_dicts, 2000),
    "patched": (patched, 300),
    "transplants": (transplants, 1000),
    "files": (files, 200),
    "files that fail": (files_that_fail, 200),
}


@pytest.fixture(autouse=True)
def _measured() -> Iterator[None]:
    """One thread: their stacks are memory, and threads are not what is measured here."""
    torch.set_num_threads(1)
    with quick_collections():
        yield


@pytest.mark.parametrize("name", SUCCESS)
def test_memory_is_flat(name: str, compiled: str, tmp_path: Path) -> None:
    make, cycles = SUCCESS[name]
    growth(make(tmp_path), cycles).assert_flat()


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["native", "cpu:scalar", "cuda:kernels", "cuda:to device"], indirect=True
)
@pytest.mark.parametrize("name", SUCCESS)
def test_memory_is_flat_for_long(name: str, backend: str, tmp_path: Path) -> None:
    """10,000 cycles of each, also without the extension and on the CUDA route."""
    growth(SUCCESS[name][0](tmp_path), 10_000).assert_flat()


def errors_of(which: list[str]) -> Once:
    cases = [CASES[name]() for name in which]

    def once() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for case in cases:
                fails(case)

    return once


# A thing of their own are the long lists and a thread for each call: that takes as long as 100 others.
SHORT = [name for name in CASES if not {"long", "deadlock", "interrupted"} & set(name.split())]


def test_every_error_leaves_memory_flat(compiled: str) -> None:
    """All error paths in turn: a leak in one of them is one object a cycle. Their caches fill more slowly."""
    growth(errors_of(SHORT), 60, least=0.8).assert_flat(0.8)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_error_leaves_memory_flat_for_long(name: str, compiled: str) -> None:
    growth(errors_of([name]), 10_000 if name in SHORT else 100).assert_flat()


# That the measure measures.


def test_a_planted_leak_is_found(compiled: str, tmp_path: Path) -> None:
    kept: list[object] = []
    dsts, srcs = tensors(3), tensors(3)
    planted: dict[str, Callable[[], object]] = {
        "a tuple": lambda: (1.5, kept),
        "a tensor": lambda: torch.empty(1),
        "a plan": lambda: paramkit.plan(dsts, srcs),
    }
    for what, make in planted.items():
        kept.clear()

        def once(make: Callable[[], object] = make) -> None:
            kept.append(make())

        cycles = 1000 if what == "a plan" else 10_000
        found = growth(once, cycles, tries=2)
        with pytest.raises(AssertionError):
            found.assert_flat()
        assert found.blocks > cycles / 2 or found.malloc > 16 * cycles, (what, found)
    kept.clear()
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(AssertionError, match="files"):
        growth(lambda: kept.append(file.open()), 3, tries=1).assert_flat()
    kept.clear()
