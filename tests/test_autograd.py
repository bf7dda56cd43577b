"""Autograd must notice every write: version counters, leaves, graphs, forward mode, inference mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import paramkit
from tests.guards import nothing_written, outcome

pytestmark = pytest.mark.usefixtures("backend")

Write = Callable[[Tensor], object]

WRITES: dict[str, Write] = {
    "copy_": lambda t: paramkit.copy_(t, torch.full_like(t, 2.0, requires_grad=False)),
    "copy_ cast": lambda t: paramkit.copy_(t, torch.full(t.shape, 2, dtype=torch.int64)),
    "copy_ broadcast": lambda t: paramkit.copy_(t, torch.tensor(2.0)),
    "fill_": lambda t: paramkit.fill_(t, 2.0),
    "fill_ tensor": lambda t: paramkit.fill_(t, torch.tensor(2.0)),
    "foreach_copy_": lambda t: paramkit.foreach_copy_([t], [torch.full(t.shape, 2.0)]),
    "foreach_copy_ of two": lambda t: paramkit.foreach_copy_(
        [torch.zeros(2), t], [torch.ones(2), torch.full(t.shape, 2.0)]
    ),
    "foreach_fill_": lambda t: paramkit.foreach_fill_([t], 2.0),
    "foreach_fill_ list": lambda t: paramkit.foreach_fill_([t, torch.zeros(3)], [2.0, 1]),
    "plan": lambda t: paramkit.plan([t], [torch.full(t.shape, 2.0)]).apply(),
    "plan of scalars": lambda t: paramkit.plan([t], [2.0]).apply(),
}
"""Every way to write the value 2 over a tensor with an operator or a replay."""

OPERATORS = sorted(name for name in WRITES if not name.startswith("plan"))


@pytest.mark.parametrize("name", sorted(WRITES))
def test_versions_rise(name: str) -> None:
    for make in (
        lambda: torch.zeros(3, 4),
        lambda: torch.zeros(3, 8)[:, ::2],
        lambda: torch.zeros(3, 4).t(),
        lambda: torch.zeros(()),
    ):
        tensor = make()
        before = tensor._version
        WRITES[name](tensor)
        assert tensor._version > before
        assert bool((tensor == 2).all())


def test_versions_rise_on_every_apply() -> None:
    dsts = [torch.zeros(64) for _ in range(5)]
    plan = paramkit.plan(dsts, [torch.ones(64)] * 5)
    seen = [dst._version for dst in dsts]
    for _ in range(3):
        plan.apply()
        now = [dst._version for dst in dsts]
        assert all(new > old for new, old in zip(now, seen, strict=True))
        seen = now


@pytest.mark.parametrize("name", sorted(WRITES))
def test_view_and_base_share_the_version(name: str) -> None:
    base = torch.zeros(4, 6)
    view = base[1:3, ::2]
    before = base._version
    WRITES[name](view)
    assert base._version > before
    assert base._version == view._version
    before = view._version
    WRITES[name](base)
    assert view._version > before


@pytest.mark.parametrize("name", sorted(WRITES))
def test_saved_tensor_written_makes_backward_raise(name: str) -> None:
    """The point of it all: a value saved for backward and overwritten must not go unnoticed."""
    x = torch.ones(3, requires_grad=True)
    saved = torch.full((3,), 5.0)
    loss = (x * saved).sum()
    WRITES[name](saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", sorted(WRITES))
def test_weight_written_under_no_grad_makes_backward_raise(name: str) -> None:
    layer = torch.nn.Linear(3, 3)
    x = torch.ones(2, 3, requires_grad=True)
    loss = layer(x).sum()
    with torch.no_grad():
        WRITES[name](layer.weight)
    assert layer.weight.requires_grad
    assert bool((layer.weight == 2).all())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_data_writes_corrupt_silently() -> None:
    """What the versions protect from: ``.data`` bypasses them, and the gradient is wrong."""
    x = torch.ones(3, requires_grad=True)
    saved = torch.full((3,), 5.0)
    loss = (x * saved).sum()
    saved.data.fill_(2.0)
    loss.backward()  # no error
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 2]  # the gradient of the forward pass was 5

    x = torch.ones(3, requires_grad=True)
    saved = torch.full((3,), 5.0)
    loss = (x * saved).sum()
    paramkit.fill_(saved.detach(), 2.0)  # detach shares the counter: noticed
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", sorted(WRITES))
def test_leaf_that_requires_grad_raises(name: str) -> None:
    leaf = torch.nn.Parameter(torch.zeros(4))
    with nothing_written(leaf), pytest.raises(RuntimeError, match="leaf"):
        WRITES[name](leaf)
    view_source = torch.nn.Parameter(torch.zeros(4, 2))
    with nothing_written(view_source), pytest.raises(RuntimeError, match="leaf"):
        WRITES[name](view_source[:, 1])
    with torch.no_grad():
        WRITES[name](leaf)
    assert leaf.tolist() == [2, 2, 2, 2]
    assert leaf.requires_grad
    assert leaf.is_leaf


def test_one_bad_pair_writes_nothing() -> None:
    """Each kind of bad pair, last in the list: the good ones before it stay untouched."""
    leaf = torch.nn.Parameter(torch.zeros(2))
    with torch.inference_mode():
        frozen = torch.zeros(2)
    for bad in (leaf, leaf[:1], frozen):
        good = [torch.zeros(3), torch.zeros(6)[::2]]
        one = torch.ones(1)
        with nothing_written(*good, bad), pytest.raises(RuntimeError):
            paramkit.foreach_copy_([*good, bad], [one, one, one])
        with nothing_written(*good, bad), pytest.raises(RuntimeError):
            paramkit.foreach_fill_([*good, bad], 1.0)


def test_differentiable_source_keeps_its_graph() -> None:
    def gradients(copy: Callable[[Tensor, Tensor], object]) -> tuple[list[float], bool]:
        x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        buffer = torch.zeros(2, 3)
        copy(buffer, x * x)
        (buffer * torch.tensor([[1.0], [10.0]])).sum().backward()
        assert x.grad is not None
        return x.grad.tolist(), buffer.requires_grad

    expected = gradients(lambda d, s: d.copy_(s))
    assert gradients(paramkit.copy_) == expected
    assert (
        gradients(lambda d, s: paramkit.foreach_copy_([torch.zeros(1), d], [torch.ones(1), s]))
        == expected
    )
    assert gradients(lambda d, s: paramkit.foreach_copy_([d], [s])) == expected


def test_leaf_source_keeps_its_graph() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    buffer = torch.zeros(2)
    paramkit.copy_(buffer, x)
    buffer.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1]


def test_list_plan_follows_autograd() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    buffer, other = torch.zeros(2), torch.zeros(2)
    plan = paramkit.plan([buffer, other], [x, torch.ones(2)])
    with torch.no_grad():
        plan.apply()
    assert not buffer.requires_grad
    plan.apply()  # judged anew: now autograd records
    assert buffer.requires_grad
    buffer.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1]
    assert other.tolist() == [1, 1]


def test_differentiable_destination_keeps_its_graph() -> None:
    """A write into part of a computed tensor: the gradient of the overwritten part is zero."""

    def gradients(fill: Callable[[Tensor, float], object]) -> list[float]:
        x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        y = x * 2
        fill(y[1:2], 7.0)
        y.sum().backward()
        assert x.grad is not None
        return x.grad.tolist()

    expected = gradients(Tensor.fill_)
    assert expected == [2, 0, 2]
    assert gradients(paramkit.fill_) == expected
    assert gradients(lambda d, v: paramkit.foreach_fill_([d], v)) == expected
    assert gradients(lambda d, v: paramkit.copy_(d, torch.tensor(v))) == expected
    assert gradients(lambda d, v: paramkit.foreach_copy_([d], [torch.tensor(v)])) == expected


def test_fill_with_a_differentiable_value() -> None:
    def gradient(fill: Callable[[Tensor, Tensor], object]) -> float:
        value = torch.tensor(2.0, requires_grad=True)
        buffer = torch.zeros(5)
        fill(buffer, value)
        buffer.sum().backward()
        assert value.grad is not None
        return value.grad.item()

    assert gradient(Tensor.fill_) == 5
    assert gradient(paramkit.fill_) == 5
    assert gradient(lambda d, v: paramkit.foreach_fill_([d], v)) == 5
    assert gradient(lambda d, v: paramkit.foreach_fill_([d, torch.zeros(1)], [v, 1])) == 5


def test_no_grad_and_requires_grad_are_kept() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    source = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        paramkit.copy_(parameter, source)
        paramkit.foreach_copy_([parameter], [source * 2])
    assert parameter.requires_grad
    assert parameter.grad_fn is None
    assert parameter.tolist() == [2, 2, 2]
    plain = torch.zeros(3)
    with torch.no_grad():
        paramkit.copy_(plain, source)
    assert not plain.requires_grad


def test_view_made_under_no_grad_as_torch() -> None:
    """torch forbids writing such a view with grad mode on once its base requires grad."""

    def error(fill: Callable[[Tensor, float], object]) -> type[Exception] | None:
        leaf = torch.nn.Parameter(torch.zeros(4))
        with torch.no_grad():
            view = leaf[:2]
        return outcome(lambda: fill(view, 1.0))

    assert error(paramkit.fill_) is error(Tensor.fill_)
    assert error(lambda d, v: paramkit.copy_(d, torch.tensor(v))) is error(
        lambda d, v: d.copy_(torch.tensor(v))
    )


def test_views_of_custom_and_multi_output_functions_as_torch() -> None:
    def error(fill: Callable[[Tensor, float], object]) -> type[Exception] | None:
        y = torch.ones(4, requires_grad=True) * 2
        first, _ = y.unbind()[:2]
        return outcome(lambda: fill(first, 1.0))

    assert error(paramkit.fill_) is error(Tensor.fill_)
    assert error(lambda d, v: paramkit.foreach_fill_([d], v)) is error(Tensor.fill_)


def test_forward_mode_tangents() -> None:
    def tangents(copy: Callable[[Tensor, Tensor], object]) -> tuple[list[float], list[float]]:
        with forward_ad.dual_level():
            source = forward_ad.make_dual(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0]))
            buffer = torch.zeros(2)
            copy(buffer, source)
            primal, tangent = forward_ad.unpack_dual(buffer)
            assert tangent is not None
            return primal.tolist(), tangent.tolist()

    expected = tangents(lambda d, s: d.copy_(s))
    assert tangents(paramkit.copy_) == expected
    assert (
        tangents(lambda d, s: paramkit.foreach_copy_([torch.zeros(1), d], [torch.ones(1), s]))
        == expected
    )


def test_writing_over_a_dual_tensor_drops_its_tangent_as_torch() -> None:
    def tangent(fill: Callable[[Tensor, float], object]) -> list[float] | None:
        with forward_ad.dual_level(), torch.no_grad():
            dual = forward_ad.make_dual(torch.ones(2), torch.tensor([5.0, 6.0]))
            fill(dual, 3.0)
            left = forward_ad.unpack_dual(dual).tangent
            return None if left is None else left.tolist()

    expected = tangent(Tensor.fill_)
    assert tangent(paramkit.fill_) == expected
    assert tangent(lambda d, v: paramkit.foreach_fill_([d], v)) == expected
    assert tangent(lambda d, v: paramkit.copy_(d, torch.full((2,), v))) == expected


@pytest.mark.parametrize("name", sorted(WRITES))
def test_inference_tensors(name: str) -> None:
    with torch.inference_mode():
        tensor = torch.zeros(4)
        WRITES[name](tensor)
        assert tensor.tolist() == [2, 2, 2, 2]
    frozen = tensor
    with nothing_written(frozen), pytest.raises(RuntimeError, match=r"(?i)inference"):
        WRITES[name](frozen)


@pytest.mark.parametrize("name", OPERATORS)
def test_normal_tensors_in_inference_mode(name: str) -> None:
    """Writes inside inference mode into normal tensors count too: they may be saved elsewhere."""
    tensor = torch.zeros(4)
    before = tensor._version
    with torch.inference_mode():
        WRITES[name](tensor)
    assert tensor.tolist() == [2, 2, 2, 2]
    assert tensor._version > before


def test_inference_source_as_torch() -> None:
    with torch.inference_mode():
        source = torch.ones(3)
    dst = torch.zeros(3)
    paramkit.copy_(dst, source)
    assert dst.tolist() == [1, 1, 1]
    requires = torch.zeros(3, requires_grad=True) * 1
    twin = torch.zeros(3, requires_grad=True) * 1
    expected = outcome(lambda: twin.copy_(source))
    assert outcome(lambda: paramkit.copy_(requires, source)) is expected


def test_gradcheck_through_copy() -> None:
    def function(x: Tensor) -> Tensor:
        first, second = torch.zeros(3, dtype=x.dtype), torch.zeros(2, 3, dtype=x.dtype)
        paramkit.foreach_copy_([first, second[1]], [x, x * x])
        return first.sin() + second.sum(0)

    x = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x,))


def test_hooks_and_grad_survive() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    calls: list[Tensor] = []
    parameter.register_hook(lambda grad: calls.append(grad))
    parameter.grad = torch.full((3,), 9.0)
    with torch.no_grad():
        paramkit.copy_(parameter, torch.zeros(3))
        paramkit.foreach_fill_([parameter], 4.0)
    assert parameter.grad.tolist() == [9, 9, 9]
    (parameter * 2).sum().backward()
    assert len(calls) == 1
    assert parameter.grad.tolist() == [11, 11, 11]
