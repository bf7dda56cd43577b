"""The operators of torch's dispatcher, `torch.ops.paramkit.*`: for compiled graphs and other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensorMode

import paramkit
from tests.guards import Layout, assert_same_bits, nothing_written, place, watch

pytestmark = pytest.mark.usefixtures("compiled")

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
)
UTILS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
NAMES = ("copy_", "fill_", "foreach_copy_", "foreach_fill_")
WRITES: dict[str, Callable[[Tensor], object]] = {
    "copy_": lambda t: torch.ops.paramkit.copy_(t, torch.full(t.shape, 2, dtype=t.dtype)),
    "copy_ cast": lambda t: torch.ops.paramkit.copy_(t, torch.full(t.shape, 2.0).double()),
    "fill_": lambda t: torch.ops.paramkit.fill_(t, 2),
    "foreach_copy_": lambda t: torch.ops.paramkit.foreach_copy_(
        [torch.zeros(3), t], [torch.ones(3), torch.full(t.shape, 2, dtype=t.dtype)]
    ),
    "foreach_fill_": lambda t: torch.ops.paramkit.foreach_fill_([torch.zeros(3), t], [1, 2]),
}
"""Every operator, writing the value 2 over a tensor."""


def arguments(name: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Strided destinations, broadcast sources."""
    dst, other = torch.zeros(6, 4).to(dtype)[::2], torch.zeros(5).to(dtype)
    src = torch.ones(4).to(dtype)
    return {
        "copy_": (dst, src),
        "fill_": (dst, 1),
        "foreach_copy_": ([dst, other], [src, torch.ones(5)]),
        "foreach_fill_": ([dst, other], [1, 0]),
    }[name]


def operator(name: str) -> Any:
    return getattr(torch.ops.paramkit, name).default


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    # torch cannot compare float8 tensors, which the check of the schema has to.
    utils = UTILS[1:] if dtype is torch.float8_e4m3fn else UTILS
    library.opcheck(operator(name), arguments(name, dtype), test_utils=utils)


@pytest.mark.parametrize("name", ["copy_", "foreach_copy_"])
def test_opcheck_of_a_differentiable_source(name: str) -> None:
    src = torch.rand(2, requires_grad=True)
    args = (torch.zeros(2), src) if name == "copy_" else ([torch.zeros(2)], [src])
    library.opcheck(operator(name), args, test_utils=UTILS[:3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_as_torch(dtype: torch.dtype) -> None:
    for name in NAMES:
        layouts = [Layout.dense((3, 4), (9, 2)), Layout.dense((5,))]
        dsts = [place(layout, dtype) for layout in layouts]
        twins = [place(layout, dtype) for layout in layouts]
        srcs = [torch.tensor([0, 1, 1, 0]), torch.ones(1, dtype=torch.float32)]
        seen = watch(*dsts)
        if name == "copy_":
            torch.ops.paramkit.copy_(dsts[0], srcs[0])
            twins[0].copy_(srcs[0])
        elif name == "fill_":
            torch.ops.paramkit.fill_(dsts[0], 1)
            twins[0].fill_(1)
        elif name == "foreach_copy_":
            torch.ops.paramkit.foreach_copy_(dsts, srcs)
            for twin, src in zip(twins, srcs, strict=True):
                twin.copy_(src)
        else:
            torch.ops.paramkit.foreach_fill_(dsts, [1, 0])
            twins[0].fill_(1)
            twins[1].fill_(0)
        seen.assert_only_inside()
        for dst, twin in zip(dsts, twins, strict=True):
            assert_same_bits(dst, twin)


@pytest.mark.parametrize("name", sorted(WRITES))
def test_versions_rise(name: str) -> None:
    base = torch.zeros(4, 6)
    for tensor in (torch.zeros(3), base[1:3, ::2], torch.zeros(()), torch.zeros(2).long()):
        before = tensor._version
        WRITES[name](tensor)
        assert tensor._version > before
        assert bool((tensor == 2).all())
    assert base._version > 0


@pytest.mark.parametrize("name", sorted(WRITES))
def test_a_saved_tensor_makes_backward_raise(name: str) -> None:
    x, saved = torch.ones(3, requires_grad=True), torch.full((3,), 5.0)
    loss = (x * saved).sum()
    WRITES[name](saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", sorted(WRITES))
def test_a_leaf_raises_and_nothing_is_written(name: str) -> None:
    leaf = torch.zeros(3, requires_grad=True)
    for tensor in (leaf, leaf[:2]):
        with nothing_written(leaf), pytest.raises(RuntimeError, match="leaf"):
            WRITES[name](tensor)
    with torch.no_grad():
        WRITES[name](leaf)
    assert leaf.tolist() == [2, 2, 2]
    assert leaf.requires_grad


def test_a_leaf_at_the_end_of_a_list() -> None:
    first, leaf = torch.zeros(2), torch.zeros(2, requires_grad=True)
    source = torch.ones(2, requires_grad=True)  # recorded: the pairs go one by one
    for call in (
        lambda: torch.ops.paramkit.foreach_copy_([first, leaf], [torch.ones(2)] * 2),
        lambda: torch.ops.paramkit.foreach_copy_([first, leaf], [source, source]),
        lambda: torch.ops.paramkit.foreach_fill_([first, leaf], [1, 1]),
    ):
        with nothing_written(first, leaf), pytest.raises(RuntimeError, match="leaf"):
            call()
        assert not first.requires_grad


def test_gradients_through_a_differentiable_source() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    for write in (
        lambda d, s: torch.ops.paramkit.copy_(d, s),
        lambda d, s: torch.ops.paramkit.foreach_copy_([torch.zeros(1), d], [torch.ones(1), s]),
    ):
        dst = torch.zeros(3, 2)
        write(dst, x * x)
        (dst * torch.tensor([[1.0], [2.0], [3.0]])).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [12, 24]
        x.grad = None


def test_gradients_of_what_was_overwritten() -> None:
    for write in (
        lambda d: torch.ops.paramkit.fill_(d, 7.0),
        lambda d: torch.ops.paramkit.foreach_fill_([d], [7.0]),
        lambda d: torch.ops.paramkit.copy_(d, torch.tensor(7.0)),
    ):
        x = torch.ones(3, requires_grad=True)
        y = x * 2
        write(y[1:2])
        y.sum().backward()
        assert y[1].item() == 7
        assert x.grad is not None
        assert x.grad.tolist() == [2, 0, 2]


def test_gradcheck() -> None:
    def function(x: Tensor) -> Tensor:
        first, second = torch.zeros(3, dtype=x.dtype), torch.zeros(2, 3, dtype=x.dtype)
        torch.ops.paramkit.foreach_copy_([first, second[1]], [x, x * x])
        return first.sin() + second.sum(0)

    x = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x,))


@pytest.mark.parametrize("name", sorted(WRITES))
def test_inference_mode(name: str) -> None:
    with torch.inference_mode():
        tensor = torch.zeros(3)
        WRITES[name](tensor)
        assert tensor.tolist() == [2, 2, 2]
    with nothing_written(tensor), pytest.raises(RuntimeError, match=r"(?i)inference"):
        WRITES[name](tensor)
    normal = torch.zeros(3)
    before = normal._version
    with torch.inference_mode():
        WRITES[name](normal)
    assert normal.tolist() == [2, 2, 2]
    assert normal._version > before


def test_bad_arguments_write_nothing() -> None:
    good, other = place(Layout.dense((2,)), torch.float32), place(Layout.dense((3,)), torch.float32)
    ops = torch.ops.paramkit
    for call, text in (
        (lambda: ops.copy_(good, torch.ones(3)), "broadcast"),
        (lambda: ops.foreach_copy_([good, other], [torch.ones(2), torch.ones(2)]), r"dsts\[1\]"),
        (lambda: ops.foreach_copy_([good, other], [torch.ones(2)]), "length|number"),
        (lambda: ops.foreach_fill_([good, other], [1.0]), "length|number"),
        (lambda: ops.foreach_fill_([good, torch.zeros(2, dtype=torch.uint8)], [1, 1j]), "uint8"),
        (lambda: ops.copy_(torch.zeros(1).expand(2), good), "single memory location"),
    ):
        with nothing_written(good, other), pytest.raises((RuntimeError, ValueError), match=text):
            call()


@pytest.mark.parametrize("mixed", ["source", "list of sources", "list of destinations"])
def test_meta_beside_tensors_with_memory(mixed: str) -> None:
    """torch raises where a source has no data, and writes what has memory in a mixed list."""
    dst, meta, ones = torch.zeros(2), torch.ones(2, device="meta"), torch.ones(2)
    if mixed == "list of destinations":
        torch.ops.paramkit.foreach_fill_([dst, meta], [1.0, 1.0])
        torch.ops.paramkit.foreach_copy_([dst, meta], [ones * 2, ones])
        assert dst.tolist() == [2, 2]
        return
    with nothing_written(dst), pytest.raises(NotImplementedError, match=r"(?i)meta"):
        if mixed == "source":
            torch.ops.paramkit.copy_(dst, meta)
        else:
            torch.ops.paramkit.foreach_copy_([dst, torch.zeros(2)], [ones, meta])


def test_a_bad_pair_after_one_that_autograd_records() -> None:
    first, second = torch.zeros(2), torch.zeros(2)
    source = torch.ones(2, requires_grad=True)
    with nothing_written(first, second), pytest.raises(RuntimeError, match="broadcast"):
        torch.ops.paramkit.foreach_copy_([first, second], [source, torch.ones(3)])


def test_conjugate_tensors() -> None:
    values = torch.tensor([1 + 2j, 3 - 4j])
    dst = torch.zeros(2, dtype=torch.complex64)
    torch.ops.paramkit.copy_(dst, values.conj())
    assert dst.tolist() == [1 - 2j, 3 + 4j]
    torch.ops.paramkit.foreach_copy_([torch.zeros(1), dst], [torch.ones(1), values.conj()])
    assert dst.tolist() == [1 - 2j, 3 + 4j]
    torch.ops.paramkit.copy_(dst.conj(), values)
    assert dst.tolist() == [1 - 2j, 3 + 4j]


def test_a_list_with_a_conjugate_destination() -> None:
    dst = torch.zeros(2, dtype=torch.complex64)
    torch.ops.paramkit.foreach_copy_([dst.conj()], [torch.full((2,), 1 + 1j)])
    assert dst.tolist() == [1 - 1j] * 2


# Shapes without data.


def test_meta_tensors() -> None:
    ops = torch.ops.paramkit
    dst, other = torch.empty(2, 3, device="meta"), torch.empty(4, device="meta")
    src = torch.empty(3, device="meta")
    ops.copy_(dst, src)
    ops.fill_(dst, 1.0)
    ops.foreach_copy_([dst, other], [src, torch.empty((), device="meta")])
    ops.foreach_fill_([dst, other], [1.0, 2])
    with pytest.raises(RuntimeError, match="expand"):
        ops.copy_(dst, other)
    with pytest.raises(RuntimeError, match="expand"):
        ops.foreach_copy_([other, dst], [other, other])
    with pytest.raises(RuntimeError, match=r"length|number"):
        ops.foreach_copy_([dst], [src, src])
    with pytest.raises(RuntimeError, match=r"length|number"):
        ops.foreach_fill_([dst], [1.0, 2.0])


def test_fake_tensors() -> None:
    real = torch.zeros(3)
    with nothing_written(real), FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = mode.from_tensor(real)
        ones = torch.ones(3)
        torch.ops.paramkit.copy_(fake, ones)
        torch.ops.paramkit.fill_(fake, 2.0)
        torch.ops.paramkit.foreach_copy_([fake], [ones])
        torch.ops.paramkit.foreach_fill_([fake], [2.0])
        with pytest.raises(RuntimeError):
            torch.ops.paramkit.copy_(fake, torch.ones(4))


# torch.compile.


def compile_whole(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def all_operators(a: Tensor, b: Tensor, s: Tensor, t: Tensor) -> Tensor:
    torch.ops.paramkit.copy_(a, s)
    torch.ops.paramkit.fill_(b, 2.5)
    torch.ops.paramkit.foreach_copy_([a[1:], b], [t[:2], s + 1])
    torch.ops.paramkit.foreach_fill_([a[:1], b[2:]], [4.0, 6])
    return a * 2 + b


def python_foreach(a: Tensor, b: Tensor, s: Tensor, t: Tensor) -> Tensor:
    paramkit.foreach_copy_([a, b], [s, t * 2])
    return a + b


def python_all(a: Tensor, b: Tensor, s: Tensor, t: Tensor) -> Tensor:
    paramkit.copy_(a, s)
    paramkit.fill_(b, 2.5)
    paramkit.foreach_copy_([a[1:]], [t[:2]])
    paramkit.foreach_fill_([a[:1], b[2:]], [4.0, 6])
    return a + b


def run_compiled(function: Callable[..., Any]) -> None:
    def inputs() -> list[Tensor]:
        return [torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16), torch.ones(3), torch.rand(3)]

    torch.manual_seed(1)
    eager = inputs()
    torch.manual_seed(1)
    compiled = inputs()
    expected = function(*eager)
    call = compile_whole(function)
    assert_same_bits(call(*compiled), expected)
    for got, want in zip(compiled, eager, strict=True):
        assert_same_bits(got, want)
    before = compiled[0]._version
    call(*compiled)
    assert compiled[0]._version > before


def test_compiled_operators() -> None:
    run_compiled(all_operators)


@pytest.mark.parametrize("function", [python_foreach, python_all])
def test_compiled_python_functions(function: Callable[..., Any]) -> None:
    run_compiled(function)


def test_compiled_gradients() -> None:
    def function(x: Tensor) -> Tensor:
        buffer = torch.zeros(2, 3)
        torch.ops.paramkit.foreach_copy_([buffer[1]], [x * x])
        return buffer.sum()

    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    function(x).backward()
    assert x.grad is not None
    expected, x.grad = x.grad, None
    compile_whole(function)(x).backward()
    assert x.grad is not None
    assert_same_bits(x.grad, expected)


# Modes and subclasses: the Python functions step aside for them.


def test_python_functions_under_a_dispatch_mode() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    a, b = torch.zeros(2), torch.zeros(2)
    with Recorder():
        paramkit.copy_(a, torch.tensor([1.0, 2.0]))
        paramkit.foreach_copy_([a, b], [torch.ones(2), torch.ones(2)])
        paramkit.foreach_fill_([b], 3.0)
    assert a.tolist() == [1, 1]
    assert b.tolist() == [3, 3]
    assert any("copy_" in name for name in seen)
    assert any("fill_" in name for name in seen)
