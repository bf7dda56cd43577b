"""Exchanging both sides of a plan in place, and `swapped`, which does it for a block."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import paramkit
from paramkit import PlanError, Rule
from tests.guards import Layout, place, watch

WIDTHS = [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128]


def sides(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    for shape in ((5,), (3, 7), (33, 65), (4, 9, 5), (0, 3), (300, 700)):
        yield place(Layout.dense(shape), dtype), place(Layout.dense(shape), dtype)
        if len(shape) > 1:
            turned = shape[::-1]
            back = list(range(len(shape)))[::-1]
            yield (
                place(Layout.dense(turned), dtype).permute(back),
                place(Layout.dense(shape), dtype),
            )
            yield (
                place(Layout.dense((*shape, 2)), dtype)[..., 1],
                place(Layout.dense(turned), dtype).permute(back),
            )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_both_sides_change_places_bit_for_bit(dtype: torch.dtype) -> None:
    pairs = list(sides(dtype))
    for k, (dst, src) in enumerate(pairs):
        seeded = torch.Generator().manual_seed(k)
        for t in (dst, src):
            t.copy_(torch.randint(0, 100, t.shape, generator=seeded).to(torch.float32).to(dtype))
    before = [(dst.clone(), src.clone()) for dst, src in pairs]
    snapshot = watch(*(t for pair in pairs for t in pair))
    compiled = paramkit.backend.active().Plan(
        [d for d, _ in pairs],
        [s for _, s in pairs],
        [(i, i, tuple(d.shape), d.stride(), 0, s.stride(), 0) for i, (d, s) in enumerate(pairs)],
        [],
        False,
        False,
    )
    versions = [(d._version, s._version) for d, s in pairs]
    assert compiled.exchanges() == 0
    assert compiled.exchange()
    assert compiled.exchanges() == 1
    snapshot.assert_only_inside()
    for (dst, src), (was_dst, was_src), (vd, vs) in zip(pairs, before, versions, strict=True):
        assert torch.equal(dst, was_src) and torch.equal(src, was_dst)
        if dst.numel():
            assert dst._version > vd and src._version > vs
    assert compiled.exchange()
    for (dst, src), (was_dst, was_src) in zip(pairs, before, strict=True):
        assert torch.equal(dst, was_dst) and torch.equal(src, was_src)
    snapshot.assert_only_inside()


@pytest.mark.usefixtures("backend")
def test_what_cannot_be_turned_round_is_refused() -> None:
    active = paramkit.backend.active()
    dst, src = torch.zeros(4), torch.ones(4, dtype=torch.float64)
    plan = active.Plan([dst], [src], [(0, 0, (4,), (1,), 0, (1,), 0)], [], False, False)
    with pytest.raises(ValueError, match="converts"):
        plan.exchange()
    plan = active.Plan([dst], [dst + 1], [(0, 0, (4,), (1,), 0, (0,), 0)], [], False, False)
    with pytest.raises(ValueError, match="repeats"):
        plan.exchange()
    assert dst.tolist() == [0] * 4


# ---- swapped -------------------------------------------------------------------------------------


def bits(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(20, 30), nn.LayerNorm(30), nn.Linear(30, 5))
        for p in self.parameters():
            nn.init.normal_(p)


@pytest.mark.usefixtures("backend")
def test_in_place_without_a_copy_and_back() -> None:
    model, average = Net(), Net()
    mine, theirs = bits(model), bits(average)
    places = [p.data_ptr() for p in model.parameters()]
    plan = paramkit.plan(model, average)
    for _ in range(3):
        with plan.swapped() as report:
            assert report.summary.writes == 6
            assert plan._exchange is not None and plan._exchange.in_place
            assert same(bits(model), theirs) and same(bits(average), mine)
        assert same(bits(model), mine) and same(bits(average), theirs)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert plan.apply().summary.writes == 6


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", ["cast", "file", "twice", "pattern"])
def test_with_a_copy_where_it_is_not_one_to_one(kind: str, tmp_path: Path) -> None:
    model = {"a": torch.rand(3, 4), "b": torch.rand(3, 4)}
    source: object = {"a": torch.rand(3, 4), "b": torch.rand(3, 4)}
    rules: list[Rule] = []
    if kind == "cast":
        source = {n: t.double() for n, t in source.items()}  # type: ignore[attr-defined]
    elif kind == "file":
        save_file(source, tmp_path / "s.safetensors")  # type: ignore[arg-type]
        source = tmp_path / "s.safetensors"
    elif kind == "twice":
        source, rules = {"x": torch.rand(3, 4)}, [Rule("x", "a"), Rule("x", "b")]
    else:
        source = {"a": torch.rand(4, 3), "b": torch.rand(3, 4)}
        rules = [Rule("a", "a", "i o -> o i")]
    before = {n: t.clone() for n, t in model.items()}
    given = {n: t.clone() for n, t in source.items()} if isinstance(source, dict) else {}
    plan = paramkit.plan(model, source, rules)
    with plan.swapped():
        assert plan._exchange is not None and plan._exchange.in_place == (kind == "pattern")
        assert all(not torch.equal(model[n], before[n]) for n in model)
    assert all(torch.equal(model[n], before[n]) for n in model)
    assert all(torch.equal(source[n], t) for n, t in given.items())  # type: ignore[index]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_restored_when_the_block_raises(error: type[BaseException]) -> None:
    model, average = Net(), Net()
    mine, theirs = bits(model), bits(average)
    plan = paramkit.plan(model, average)
    with pytest.raises(error), plan.swapped():
        raise error
    assert same(bits(model), mine) and same(bits(average), theirs)


@pytest.mark.usefixtures("backend")
def test_inside_the_block_the_plan_is_refused() -> None:
    model, average = Net(), Net()
    mine = bits(model)
    plan = paramkit.plan(model, average)
    with plan.swapped():
        for call in (plan.apply, plan.verify, plan.refresh, plan.release, plan.swapped().__enter__):
            with pytest.raises(PlanError, match="swapped in"):
                call()
    assert same(bits(model), mine)
    plan.apply()


@pytest.mark.usefixtures("backend")
def test_a_parameter_replaced_meanwhile_is_told() -> None:
    model, average = Net(), Net()
    held, was = model[0].weight, model[0].weight.clone()
    theirs = average[0].weight.clone()
    plan = paramkit.plan(model, average)
    with pytest.raises(PlanError, match="replaced or moved"), plan.swapped():
        model[0].weight = nn.Parameter(torch.zeros(30, 20))
    assert torch.equal(held, was) and torch.equal(average[0].weight, theirs)


@pytest.mark.parametrize("error", [RuntimeError, TimeoutError, SystemExit])
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_an_exchange_that_fails_is_turned_round(
    done: bool, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the fallback, at each of its copies; and it is interrupted while it does that, at each of those."""
    model, average = Net(), Net()
    mine, theirs = bits(model), bits(average)
    copies = 0
    at: dict[int, type[BaseException]] = {}

    def failing(copy: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal copies
            copies += 1
            raised = at.get(copies)
            if raised is not None and raised is not KeyboardInterrupt and not done:
                raise raised
            result = copy(*args, **kwargs)
            if raised is not None:
                raise raised
            return result

        return call

    with paramkit.backend.force("native"):
        plan = paramkit.plan(model, average)
        monkeypatch.setattr(Tensor, "clone", failing(Tensor.clone))
        monkeypatch.setattr(Tensor, "copy_", failing(Tensor.copy_))
        for first in range(1, 3 * 6 + 1):
            for second in (*range(first + 1, first + 20), 0):
                for again in {error, KeyboardInterrupt}:
                    copies, at = 0, {first: error, second: again}
                    with pytest.raises((error, KeyboardInterrupt)), plan.swapped():
                        pytest.fail("not reached")
                    at = {}
                    assert same(bits(model), mine) and same(bits(average), theirs), (first, second)


def test_a_block_is_entered_once() -> None:
    model, average = Net(), Net()
    mine, theirs = bits(model), bits(average)
    block = paramkit.plan(model, average).swapped()
    with pytest.raises(RuntimeError, match="not entered"):
        block.__exit__(None, None, None)
    with block:
        with pytest.raises(RuntimeError, match="entered before"), block:
            pytest.fail("not reached")
        assert same(bits(model), theirs)
    with pytest.raises(RuntimeError, match="entered before"), block:
        pytest.fail("not reached")
    assert same(bits(model), mine)


@pytest.mark.usefixtures("backend")
def test_an_interrupt_right_behind_the_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    from paramkit.swap import Exchange

    model, average = Net(), Net()
    mine, theirs = bits(model), bits(average)
    plan = paramkit.plan(model, average)
    enter = Exchange.enter

    def interrupted(self: Exchange) -> bool:
        enter(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Exchange, "enter", interrupted)
    with pytest.raises(KeyboardInterrupt), plan.swapped():
        pytest.fail("not reached")
    assert same(bits(model), mine) and same(bits(average), theirs)
