"""torch.compile, torch.export and fake tensors: one graph, and what eager gives, bit for bit.

Every program is written once and run in torch's own operators, in paramkit eagerly, and compiled. They
are about memory that is seen twice: views, returned inputs, inputs that are one storage, what is read
before and after it is written, and intermediates whose memory a compiler may use again.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchRuntimeError, Unsupported
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import paramkit
from tests.conftest import PATCHED
from tests.guards import (
    Layout,
    assert_same_bits,
    assert_same_storage,
    nothing_written,
    outcome,
    place,
)
from tests.torch_ops import TorchOps


@pytest.fixture(autouse=True)
def _no_compiled_code_stays() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- programs: `f(ops, a, s)` with a [4, 6] and s [6], both inside guarded storages ---------------

Program = Callable[..., Any]


def views_of_an_input(ops: Any, a: Tensor, s: Tensor) -> Tensor:
    ops.copy_(a[1:3, ::2], s[:3])
    ops.fill_(a.t()[4:, 1:], 7.0)
    return a * 2


def returned_input(ops: Any, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    ops.copy_(a, s * 2)
    return a, s


def returned_views(ops: Any, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    view = a[1:, 2:]
    ops.foreach_copy_([view, s[:2]], [s[2:] + 1, s[4:]])
    return view, s[1:3]


def read_and_written(ops: Any, a: Tensor, s: Tensor) -> Tensor:
    before = a * 2
    ops.copy_(a, s)
    between = a * 3
    ops.fill_(a[:, :2], 5.0)
    return before + between + a


def rows_exchanged(ops: Any, a: Tensor, s: Tensor) -> Tensor:
    """As the loop: the second write reads what the first one has written."""
    ops.foreach_copy_([a[0], a[1], a[2]], [a[1], a[0], s])
    return a


def writes_that_overlap(ops: Any, a: Tensor, s: Tensor) -> Tensor:
    ops.foreach_copy_([a[0:3], a[2:4, 1:]], [s, s[:5] * 2])
    ops.foreach_fill_([a[:, 0:3], a[:, 2:4]], [1.0, 2.0])
    return a + s


def memory_used_again(ops: Any, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """An intermediate is read, then overwritten: its memory must not become that of the first read."""
    made = s + 1
    ops.copy_(a, made)
    ops.fill_(made, 0.0)
    other = s * 3
    ops.copy_(made[1:], other[:5])
    return made, other * 0.5


def dead_writes(ops: Any, a: Tensor, s: Tensor) -> Tensor:
    ops.fill_(a, 1.0)
    ops.fill_(a, 2.0)
    ops.copy_(a[0], s)
    ops.fill_(a[0, :3], 3.0)
    return a.sum(0)


def base_of_a_written_view(ops: Any, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    made = a.clone()
    flat = made.view(-1)
    ops.foreach_fill_([flat[::2], flat[1:5:3]], [0.0, 9.0])
    return made, flat[3:8]


def detached(ops: Any, a: Tensor, s: Tensor) -> Tensor:
    ops.copy_(a.detach()[1], s)
    return a + 1


def conversions(ops: Any, a: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    small = torch.zeros(6, dtype=torch.bfloat16)
    whole = torch.zeros(2, 6, dtype=torch.int32)
    ops.foreach_copy_([small, whole, a[0]], [s / 3, s, torch.arange(6)])
    ops.copy_(a[1], small)
    return small, whole, small.float() + whole


def broadcasts(ops: Any, a: Tensor, s: Tensor) -> Tensor:
    ops.copy_(a, s.expand(4, 6))
    ops.copy_(a.view(2, 2, 6), s[:1])
    ops.foreach_copy_([a[:2]], [torch.tensor([[1.0], [2.0]])])
    return a


def numbers(ops: Any, a: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    mask = torch.zeros(4, dtype=torch.bool)
    count = torch.zeros(3, dtype=torch.int64)
    ops.foreach_fill_([mask[::2], count[1:], a[0], a[1]], [True, 7, -0.0, float("inf")])
    return mask, count, a.clone()


def a_scratch_buffer(ops: Any, a: Tensor, s: Tensor) -> Tensor:
    scratch = torch.empty(3, 6)
    ops.foreach_copy_([scratch[0], scratch[1:]], [s, a[:2]])
    ops.copy_(a[:2], scratch[1:] * 2)
    return scratch.sum(0)


def products(ops: Any, a: Tensor, s: Tensor) -> Tensor:
    """No compiler fuses these, so each has memory; the third gets that of the first. All numbers are exact."""
    first = a.sign() @ a.sign().t()
    ops.copy_(first[0], s[:4])
    second = first @ first
    ops.fill_(second[:, 1], 0.5)
    third = second @ second
    ops.foreach_copy_([a[:, :4], a[0, 4:]], [third, s[4:]])
    return third.sum(0)


PROGRAMS: dict[str, Program] = {
    f.__name__: f
    for f in (
        views_of_an_input,
        returned_input,
        returned_views,
        read_and_written,
        rows_exchanged,
        writes_that_overlap,
        memory_used_again,
        dead_writes,
        base_of_a_written_view,
        detached,
        conversions,
        broadcasts,
        numbers,
        a_scratch_buffer,
        products,
    )
}


def inputs() -> tuple[Tensor, Tensor]:
    """a [4, 6] and s [6] of small numbers, each inside a storage of pattern bytes."""
    a = place(Layout.dense((4, 6)), torch.float32)
    s = place(Layout.dense((6,)), torch.float32)
    a.copy_(torch.arange(24.0).reshape(4, 6) - 11)
    s.copy_(torch.arange(6.0) + 0.5)
    return a, s


def flat(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_as_torch(
    function: Program, compiled: Callable[..., Any], ops: Any, make: Any = inputs
) -> None:
    """Results, inputs, guard bytes, what shares memory with what, and versions, on two calls."""
    mine, eager, theirs = make(), make(), make()
    for _ in range(2):
        versions = [(a._version, c._version) for a, c in zip(mine, theirs, strict=True)]
        got, expected = flat(compiled(*mine)), flat(function(TorchOps, *theirs))
        between = flat(function(ops, *eager))
        assert len(got) == len(between) == len(expected)
        for each in (got, between):
            for k, (result, wanted) in enumerate(zip(each, expected, strict=True)):
                assert_same_bits(result.detach(), wanted.detach(), what=f"result {k}")
        for a, b, c, version in zip(mine, eager, theirs, versions, strict=True):
            assert_same_storage(a, c, "compiled")
            assert_same_storage(b, c, "eager")
            assert (a._version > version[0]) == (c._version > version[1])
        for k, result in enumerate(got):
            shares = [_one_storage(result, t) for t in mine]
            assert shares == [_one_storage(expected[k], t) for t in theirs], f"result {k}"
            same = [result is t for t in mine]
            assert same == [expected[k] is t for t in theirs], f"result {k}"


def _one_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def operators_of(kind: str) -> Any:
    return paramkit if kind == "public" else torch.ops.paramkit


def compile_whole(function: Callable[..., Any], backend: Any, **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend, **options)


KINDS = [
    ("public", "cpu"),
    ("dispatcher", "cpu"),  # they come with the extension
    pytest.param("public", "native", marks=pytest.mark.slow),
    *(pytest.param("public", name, marks=pytest.mark.slow) for name in PATCHED[2:]),
]
"""Which operators, on which backend. In compiled code the public ones know no backend."""

kinds = pytest.mark.parametrize(("kind", "patched"), KINDS, indirect=["patched"])


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("name", PROGRAMS)
def test_one_graph_as_eager(name: str, kind: str, patched: str) -> None:
    ops, function = operators_of(kind), PROGRAMS[name]
    compiled = compile_whole(lambda a, s: function(ops, a, s), "aot_eager")
    assert_as_torch(function, compiled, ops)


def all_programs(ops: Any, *pairs: Tensor) -> tuple[Tensor, ...]:
    results: list[Tensor] = []
    for k, function in enumerate(PROGRAMS.values()):
        results += flat(function(ops, pairs[2 * k], pairs[2 * k + 1]))
    return tuple(results)


def all_inputs() -> list[Tensor]:
    return [tensor for _ in PROGRAMS for tensor in inputs()]


@kinds
def test_all_in_one_graph(kind: str, patched: str) -> None:
    """One graph of everything: the most chances to use memory again."""
    ops = operators_of(kind)
    compiled = compile_whole(lambda *pairs: all_programs(ops, *pairs), "aot_eager")
    assert_as_torch(all_programs, compiled, ops, all_inputs)


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own
@pytest.mark.parametrize(("kind", "patched"), KINDS[:2], indirect=["patched"])
def test_all_in_one_graph_of_inductor(kind: str, patched: str) -> None:
    """aot_eager plans no memory. This does: the code that it makes gives a buffer to a later one."""
    ops = operators_of(kind)
    compiled = compile_whole(lambda *pairs: all_programs(ops, *pairs), "inductor")
    _, code = run_and_get_code(compiled, *all_inputs())
    assert any(line.endswith("# reuse") for text in code for line in text.splitlines())
    assert_as_torch(all_programs, compiled, ops, all_inputs)


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("options", [{}, {"dynamic": True}], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_each_graph_of_inductor(name: str, options: Any, kind: str, patched: str) -> None:
    ops, function = operators_of(kind), PROGRAMS[name]
    compiled = compile_whole(lambda a, s: function(ops, a, s), "inductor", **options)
    assert_as_torch(function, compiled, ops)


# --- inputs that share memory --------------------------------------------------------------------


def writes_one_reads_both(ops: Any, x: Tensor, y: Tensor) -> Tensor:
    before = y * 2
    ops.copy_(x, before[:1] + 1)
    ops.foreach_fill_([y[1:2]], [9.0])
    return before + y + x.sum()


def overlapping_inputs() -> tuple[Tensor, Tensor]:
    base = torch.arange(
        8.0
    )  # torch 2.13 cannot compile this where the base has an offset of its own
    return base[:5], base[2:6]


def one_input_twice() -> tuple[Tensor, Tensor]:
    base = torch.arange(8.0)
    return base[:4], base[:4]


def interleaved_inputs() -> tuple[Tensor, Tensor]:
    base = torch.arange(8.0).reshape(4, 2)
    return base[:, 0], base[:, 1]


@kinds
@pytest.mark.parametrize("make", [overlapping_inputs, one_input_twice, interleaved_inputs])
def test_inputs_of_one_storage(make: Any, kind: str, patched: str) -> None:
    ops = operators_of(kind)
    compiled = compile_whole(lambda x, y: writes_one_reads_both(ops, x, y), "aot_eager")
    assert_as_torch(writes_one_reads_both, compiled, ops, make)


@kinds
def test_the_same_tensor_as_two_arguments(kind: str, patched: str) -> None:
    ops = operators_of(kind)
    compiled = compile_whole(lambda x, y: writes_one_reads_both(ops, x, y), "aot_eager")
    mine, theirs = torch.arange(5.0), torch.arange(5.0)
    got, expected = compiled(mine, mine), writes_one_reads_both(TorchOps, theirs, theirs)
    assert_same_bits(got, expected)
    assert_same_bits(mine, theirs)


# --- autograd, modules, shapes -------------------------------------------------------------------


def through_a_buffer(ops: Any, x: Tensor, w: Tensor) -> Tensor:
    first, second = torch.zeros(2, 3), torch.zeros(3)
    ops.foreach_copy_([first[0], second[1:]], [x * w, (x * x)[:2]])
    ops.fill_(first[0, :1], 4.0)
    return (first.sin() * w + second.exp()).sum()


@kinds
def test_gradients(kind: str, patched: str) -> None:
    ops = operators_of(kind)
    results = []
    for function in (
        lambda x, w: through_a_buffer(TorchOps, x, w),
        lambda x, w: through_a_buffer(ops, x, w),
        compile_whole(lambda x, w: through_a_buffer(ops, x, w), "aot_eager"),
    ):
        x = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
        w = torch.tensor([1.0, -1.0, 3.0], requires_grad=True)
        function(x, w).backward()
        assert x.grad is not None and w.grad is not None
        results.append((x.grad, w.grad))
    for grads in results[1:]:
        for got, expected in zip(grads, results[0], strict=True):
            assert_same_bits(got, expected)


@kinds
def test_a_leaf_is_refused_in_compiled_code(kind: str, patched: str) -> None:
    ops = operators_of(kind)
    compiled = torch.compile(lambda t: ops.copy_(t, torch.ones(3)), backend="aot_eager")
    leaf = torch.zeros(3, requires_grad=True)
    with nothing_written(leaf), pytest.raises(RuntimeError, match="leaf"):
        compiled(leaf)
    with torch.no_grad():
        compiled(leaf)
    assert leaf.tolist() == [1, 1, 1]
    assert leaf.requires_grad


WIDTH = 160  # floats: more than what `patch_torch` leaves to torch


class Running(nn.Module):
    """A layer that keeps a running mean, as batch norm does."""

    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.ops = ops
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        mean = self.mean * 0.9 + y.detach().mean(0) * 0.1
        self.ops.foreach_copy_([self.mean, self.count], [mean, self.count + 1])
        return y - self.mean


def modules(ops: Any) -> tuple[Running, Running]:
    mine, theirs = Running(ops), Running(TorchOps)
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


@kinds
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_module_with_buffers(context: Any, kind: str, patched: str) -> None:
    mine, theirs = modules(operators_of(kind))
    compiled = compile_whole(mine, "aot_eager")
    x = torch.rand(4, WIDTH)
    with context(), paramkit.backend.trace() as trace:
        for _ in range(3):
            assert_same_bits(compiled(x).detach(), theirs(x).detach())
    # In compiled code all operators are torch's.
    assert bool(trace.routes) == (patched == "patched"), trace.routes
    for name, buffer in theirs.named_buffers():
        assert_same_bits(getattr(mine, name), buffer)
    assert mine.count.item() == 3


@kinds
def test_dynamic_shapes(kind: str, patched: str) -> None:
    ops = operators_of(kind)

    def function(ops: Any, a: Tensor, s: Tensor) -> Tensor:
        ops.foreach_copy_([a[1:], a[0]], [s, s * 2])
        ops.fill_(a[:, : s.shape[0] // 2], 1.0)
        return a + s

    counter = CompileCounter()
    compiled = compile_whole(lambda a, s: function(ops, a, s), counter, dynamic=True)
    for rows, columns in ((4, 6), (7, 3), (5, 9)):
        mine = torch.rand(rows, columns), torch.rand(columns)
        theirs = tuple(t.clone() for t in mine)
        assert_same_bits(compiled(*mine), function(TorchOps, *theirs))
        for got, expected in zip(mine, theirs, strict=True):
            assert_same_bits(got, expected)
    assert counter.frame_count == 1


def test_parameters_of_a_compiled_model_are_written_in_place(patched: str) -> None:
    """What is compiled reads the parameters where they lie: no compiling again after a transplant."""
    counter = CompileCounter()
    model, sources = nn.Linear(WIDTH, 2), [nn.Linear(WIDTH, 2) for _ in range(3)]
    compiled = torch.compile(model, backend=counter)
    plan = paramkit.plan(model, sources[0])
    x = torch.rand(2, WIDTH)
    for source in sources:
        plan.apply(source)
        assert_same_bits(compiled(x), source(x))
    with paramkit.writes(model) as w:
        w["bias"][...] = 0.0
    paramkit.load_state_dict(model, sources[0].state_dict())
    assert_same_bits(compiled(x), sources[0](x))
    with paramkit.backend.trace() as trace:
        model.load_state_dict(sources[1].state_dict())
    assert bool(trace.routes) == (patched == "patched"), trace.routes
    assert_same_bits(compiled(x), sources[1](x))
    assert counter.frame_count == 1
    # `torch.compile` of a module is another module, which has the names behind a prefix.
    rules = [paramkit.Rule("{*p}", "_orig_mod.{*p}")]
    paramkit.transplant(compiled, sources[1], rules)
    paramkit.transplant(compiled._orig_mod, sources[1])
    assert_same_bits(compiled(x), sources[1](x))


# --- errors --------------------------------------------------------------------------------------

BAD: dict[str, Callable[[Any, Tensor, Tensor], object]] = {
    "no tensors": lambda ops, a, s: ops.foreach_copy_([], []),
    "nothing to fill": lambda ops, a, s: ops.foreach_fill_([], []),
    "two lengths": lambda ops, a, s: ops.foreach_copy_([a, s], [s]),
    "two lengths of a fill": lambda ops, a, s: ops.foreach_fill_([a, s], [1.0]),
    "shapes": lambda ops, a, s: ops.copy_(a, torch.ones(5)),
    "the second pair": lambda ops, a, s: ops.foreach_copy_([s, a], [a[0], torch.ones(5)]),
}


@kinds
@pytest.mark.parametrize("name", BAD)
def test_errors_are_those_of_eager(name: str, kind: str, patched: str) -> None:
    ops, call = operators_of(kind), BAD[name]
    a, s = inputs()
    with nothing_written(a, s):
        expected = outcome(lambda: call(ops, a, s))
        assert expected is not None and issubclass(expected, RuntimeError)
        compiled = torch.compile(lambda a, s: call(ops, a, s), backend="aot_eager")
        with pytest.raises(RuntimeError):  # the compiler's own error for a shape is one, too
            compiled(a, s)
        torch._dynamo.reset()
        with pytest.raises((Unsupported, TorchRuntimeError, expected)):
            compile_whole(lambda a, s: call(ops, a, s), "aot_eager")(a, s)


@pytest.mark.parametrize("call", [
    lambda a: paramkit.foreach_copy_((t for t in [a]), [a]),
    lambda a: paramkit.foreach_fill_((t for t in [a]), 1.0),
])  # fmt: skip
def test_what_is_no_list_is_refused_in_compiled_code(call: Any, patched: str) -> None:
    a = torch.zeros(3)
    with nothing_written(a):
        for function in (call, torch.compile(call, backend="aot_eager")):
            with pytest.raises(TypeError, match="list or tuple"):
                function(a)


def test_a_source_that_overlaps_partly(patched: str) -> None:
    """Eager refuses it, as torch does; compiled, both copy as if the source were read first."""
    x, y = torch.arange(6.0), torch.arange(6.0)
    with nothing_written(x), pytest.raises(RuntimeError, match="single memory location"):
        paramkit.copy_(x[1:], x[:-1])
    compile_whole(lambda t: paramkit.copy_(t[1:], t[:-1]), "aot_eager")(x)
    compile_whole(lambda t: t[1:].copy_(t[:-1]), "aot_eager")(y)
    assert_same_bits(x, y)
    assert x.tolist() == [0, 0, 1, 2, 3, 4]


# --- what is no part of a graph ------------------------------------------------------------------


def between_graphs(model: nn.Module, source: nn.Module) -> dict[str, Callable[[], object]]:
    plan = paramkit.plan(model, source)
    values = source.state_dict()
    lists = paramkit.plan([p.detach() for p in model.parameters()], list(source.parameters()))

    def recorded() -> None:
        with paramkit.writes(model) as w:
            for name, tensor in values.items():
                w[name][...] = tensor

    def swapped() -> None:
        with plan.swapped():
            pass
        plan.apply()

    return {
        "Plan.apply": plan.apply,
        "plan of lists": lists.apply,
        "plan": lambda: paramkit.plan(model, source).apply(),
        "transplant": lambda: paramkit.transplant(model, source),
        "load_state_dict": lambda: paramkit.load_state_dict(model, values),
        "writes": recorded,
        "swapped": swapped,
    }


@pytest.mark.parametrize(
    "patched",
    ["cpu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("native", *PATCHED[2:]))],
    indirect=True,
)
@pytest.mark.parametrize(
    "how",
    ["Plan.apply", "plan of lists", "plan", "transplant", "load_state_dict", "writes", "swapped"],
)
def test_plans_run_between_graphs(how: str, patched: str) -> None:
    """They end the graph, and nothing in them is compiled: no warnings, no frames of ours."""
    model, source = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2)
    call = between_graphs(model, source)[how]
    nodes: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nodes.extend(n.stack_trace or "" for n in graph.graph.nodes if n.op.startswith("call"))
        return graph.forward

    def function(x: Tensor) -> Tensor:
        y = x * 2
        call()
        return model(y)

    compiled = torch.compile(function, backend=backend)
    x = torch.rand(2, WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_bits(compiled(x).detach(), source(x * 2).detach())
    assert not [node for node in nodes if "/paramkit/" in node]
    if how not in ("writes", "swapped"):  # a frame with such a block is not compiled at all
        assert len(nodes) == 2
    for name, tensor in source.state_dict().items():
        assert_same_bits(model.state_dict()[name], tensor)
    if how == "swapped":
        return
    with nothing_written(*model.state_dict().values()), pytest.raises(Unsupported) as error:
        torch._dynamo.reset()
        compile_whole(function, "eager")(x)
    assert "paramkit." in str(error.value)


# --- torch.export and make_fx --------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, kind: str, patched: str) -> None:
    mine, theirs = modules(operators_of(kind))
    x = torch.rand(4, WIDTH)
    with nothing_written(*mine.state_dict().values()):
        program = torch.export.export(mine, (x,), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    own = {name for name in targets if name.startswith("paramkit.")}
    assert own == ({"paramkit.foreach_copy_.default"} if kind == "dispatcher" else set())
    stored = io.BytesIO()
    torch.export.save(program, stored)

    def loaded() -> Any:
        return torch.export.load(io.BytesIO(stored.getvalue()))

    for each in (loaded(), loaded().run_decompositions(), program):
        module = each.module()
        fresh = Running(TorchOps)
        fresh.load_state_dict(theirs.state_dict())
        for _ in range(2):
            assert_same_bits(module(x).detach(), fresh(x).detach())
        for name, buffer in fresh.named_buffers():
            assert_same_bits(dict(module.named_buffers())[name], buffer)


def test_exporting_what_applies_a_plan(patched: str) -> None:
    """A plan writes its own tensors, of which the exported program knows nothing."""
    model, source = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2)
    plan = paramkit.plan(model, source)

    class Applies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            plan.apply()
            return self.model(x)

    with nothing_written(*model.state_dict().values()):
        for strict in (False, True):
            with pytest.raises(Exception, match=r"plan"):
                torch.export.export(Applies(), (torch.rand(2, WIDTH),), strict=strict)


@kinds
@pytest.mark.parametrize("name", PROGRAMS)
def test_make_fx(name: str, kind: str, patched: str) -> None:
    ops, function = operators_of(kind), PROGRAMS[name]
    traced = make_fx(lambda a, s: function(ops, a, s))(*inputs())
    mine, theirs = inputs(), inputs()
    got, expected = flat(traced(*mine)), flat(function(TorchOps, *theirs))
    for result, wanted in zip(got, expected, strict=True):
        assert_same_bits(result, wanted)
    for a, b in zip(mine, theirs, strict=True):
        assert_same_storage(a, b)


# --- fake tensors --------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_fake_tensors(name: str, kind: str, patched: str) -> None:
    ops, function = operators_of(kind), PROGRAMS[name]
    real = inputs()
    expected = flat(function(TorchOps, *inputs()))
    with nothing_written(*real), FakeTensorMode(allow_non_fake_inputs=False) as mode:
        got = flat(function(ops, *(mode.from_tensor(t) for t in real)))
    for result, wanted in zip(got, expected, strict=True):
        assert isinstance(result, FakeTensor)
        assert (result.shape, result.stride(), result.dtype) == (
            wanted.shape,
            wanted.stride(),
            wanted.dtype,
        )


@kinds
@pytest.mark.parametrize("name", BAD)
def test_errors_of_fake_tensors(name: str, kind: str, patched: str) -> None:
    ops = operators_of(kind)
    with FakeTensorMode() as mode:
        a, s = (mode.from_tensor(t) for t in inputs())
        with pytest.raises(RuntimeError):
            BAD[name](ops, a, s)


def test_fake_models(patched: str) -> None:
    """They can be loaded, which does nothing, and are refused by what knows addresses."""
    real = nn.Linear(3, 2)
    with FakeTensorMode():
        fake, other = nn.Linear(3, 2), nn.Linear(3, 2)
        keys = paramkit.load_state_dict(fake, other.state_dict())
        assert list(keys.missing_keys) == list(keys.unexpected_keys) == []

    def recorded(model: nn.Module, source: nn.Module) -> None:
        with paramkit.writes(model) as w:
            w["bias"][...] = source.bias

    with warnings.catch_warnings(), nothing_written(*real.state_dict().values()):
        warnings.simplefilter("error")  # asking a fake tensor for its address warns
        for model, source in ((fake, real), (real, fake), (fake, other)):
            for call in (
                lambda m=model, s=source: paramkit.transplant(m, s),
                lambda m=model, s=source: paramkit.plan(m, s),
                lambda m=model, s=source: recorded(m, s),
                lambda m=model, s=source: paramkit.plan([m.bias], [s.bias]),
            ):
                with pytest.raises(paramkit.PlanError, match="fake"):
                    call()
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            pytest.raises(paramkit.PlanError, match="fake"),
        ):
            paramkit.transplant(fake, other)


def test_the_shapes_of_a_fake_load_are_checked(patched: str) -> None:
    with FakeTensorMode():
        fake, other = nn.Linear(3, 2), nn.Linear(4, 2)
        with pytest.raises(RuntimeError, match="size mismatch"):
            paramkit.load_state_dict(fake, other.state_dict())
