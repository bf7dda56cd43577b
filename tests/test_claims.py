"""Claims of memory in several threads: who waits for whom, and what a call knows once it waited."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import paramkit
from paramkit import PlanError
from tests.conftest import need_extension
from tests.threads import LIMIT, Work


class Held:
    """A claim that a thread holds until it is told to let go; inside it `then` may be called."""

    def __init__(
        self, dsts: list[Tensor], then: Callable[[], object] = lambda: None, doing: str = "write"
    ) -> None:
        self._there, self._on = threading.Event(), threading.Event()
        self._then = then
        self._claim = paramkit.backend.active().Claim(dsts, [], doing)
        self._work = Work(self._hold)

    def _hold(self) -> None:
        with self._claim:
            self._there.set()
            assert self._on.wait(LIMIT)
            self._then()

    def is_in(self, seconds: float = LIMIT) -> bool:
        return self._there.wait(seconds)

    def let_go(self) -> None:
        self._on.set()
        self._work.result()


MOMENT = 0.2  # seconds: longer than a thread waits between two looks


def test_what_waits_sees_who_passed_it(route: str) -> None:
    """A thread that holds a claim passes by one that waits, which then has to wait for it too."""
    x, y, z = (torch.zeros(8) for _ in range(3))
    third = Held([z])
    assert third.is_in()
    second = Held([z, y])
    assert not second.is_in(MOMENT)
    with paramkit.backend.active().Claim([x], []), paramkit.backend.active().Claim([y], []):
        third.let_go()
        assert not second.is_in(2 * MOMENT), "two at the same memory"
    assert second.is_in()
    second.let_go()


def test_those_that_read_do_not_wait_for_each_other(route: str) -> None:
    x = torch.zeros(8)
    first = Held([x], doing="compare")
    assert first.is_in()
    with paramkit.backend.active().Claim([x], [], "compare"):
        pass
    first.let_go()


def test_a_claim_is_of_a_purpose(route: str) -> None:
    with pytest.raises(ValueError, match="got 'wrote', expected 'write'"):
        paramkit.backend.active().Claim([], [], "wrote")


def test_a_claim_is_held_once() -> None:
    need_extension()
    with paramkit.backend.force("cpu"):
        compiled = paramkit.backend.active()
        with pytest.raises(TypeError, match="srcs: expected a list of tensors, got int"):
            compiled.Claim([], 3)
        claim = compiled.Claim([torch.zeros(2)], [])
        with claim as inside:
            assert inside is claim
            with pytest.raises(RuntimeError, match="held already"):
                claim.__enter__()
        with claim:
            pass


# What a call that waited, or could not wait, says and does.


def test_a_refused_call_tears_nothing(route: str) -> None:
    """Inside another write it cannot wait: that some values are the same already does not matter."""
    model = nn.Linear(8, 8)
    nn.init.zeros_(model.bias)
    before = model.weight.detach().clone()
    plan = paramkit.plan(model, {"weight": torch.ones(8, 8), "bias": torch.zeros(8)})
    other = Held([model.weight.detach()])
    assert other.is_in()
    with (
        paramkit.backend.active().Claim([torch.zeros(2)], []),
        pytest.raises(PlanError, match="nothing was written") as caught,
    ):
        plan.apply()
    assert type(caught.value) is PlanError
    assert paramkit.torn(model) is None and torch.equal(model.weight, before)
    other.let_go()
    plan.apply()
    assert model.weight.sum() == 64


def test_values_are_looked_at_after_waiting(route: str) -> None:
    model, source = {"w": torch.zeros(64, dtype=torch.float16)}, {"w": torch.ones(64)}
    plan = paramkit.plan(model, source, overflow="error", casting="unsafe")
    other = Held([source["w"]], lambda: source["w"].fill_(1e6))
    assert other.is_in()
    work = Work(plan.apply)
    assert not work.finishes(MOMENT)
    other.let_go()
    with pytest.raises(PlanError, match="float16"):
        work.result()
    assert not model["w"].any()


def test_swapped_looks_and_exchanges_in_one_claim(route: str) -> None:
    model = {"w": torch.zeros(64, dtype=torch.float16)}
    source = {"w": torch.ones(64)}
    plan = paramkit.plan(model, source, overflow="error", casting="unsafe")
    other = Held([source["w"]], lambda: source["w"].fill_(1e6))
    assert other.is_in()

    def swap() -> None:
        with plan.swapped():
            pass

    work = Work(swap)
    assert not work.finishes(MOMENT)
    other.let_go()
    with pytest.raises(PlanError, match="float16"):
        work.result()
    assert not model["w"].any()
    source["w"].fill_(2.0)
    with plan.swapped():
        assert model["w"].sum() == 128
    assert not model["w"].any()


# load_state_dict.


class Nested(nn.Module):
    """A buffer without a shape of its own, and a hook: torch's own way."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4))
        parts = [torch.ones(2), torch.ones(3)]
        self.register_buffer("n", torch.nested.nested_tensor(parts, layout=torch.strided))
        self.register_load_state_dict_post_hook(lambda module, keys: None)


def test_a_tensor_without_a_shape_is_no_memory(route: str) -> None:
    model = Nested()
    keys = paramkit.load_state_dict(model, {"w": torch.ones(4)}, strict=False)
    assert keys.missing_keys == ["n"] and model.w.sum() == 4


def test_a_parameter_without_a_shape_is_no_memory(route: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    new = nn.Linear(2, 2).state_dict()
    items = ((f"0.{name}", tensor) for name, tensor in new.items())
    paramkit.transplant(model, items, allow_missing=["1.*"])
    assert torch.equal(model[0].weight, new["weight"])


@pytest.mark.parametrize("load", ["paramkit", "patched torch"])
def test_tangents_are_carried(load: str) -> None:
    need_extension()
    with forward_ad.dual_level(), paramkit.backend.force("cpu"):
        model = nn.Linear(20, 20)
        state: dict[str, Any] = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
        state["weight"] = forward_ad.make_dual(torch.ones(20, 20), torch.full((20, 20), 4.0))
        if load == "paramkit":
            paramkit.load_state_dict(model, state)
        else:
            with paramkit.patch_torch():
                model.load_state_dict(state)
        tangent = forward_ad.unpack_dual(model.weight).tangent
        assert tangent is not None and tangent.sum() == 1600


def test_patched_load_state_dict_waits_for_nobody() -> None:
    need_extension()
    model, new = nn.Linear(20, 20), nn.Linear(20, 20).state_dict()
    other = Held([model.weight.detach()])
    assert other.is_in()
    with paramkit.patch_torch():
        work = Work(lambda: model.load_state_dict(new))
        assert work.finishes(LIMIT)
    work.result()
    assert torch.equal(model.weight, new["weight"])
    other.let_go()
