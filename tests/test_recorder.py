"""The compiled recorder of ``writes()``: plain blocks never reach Python, and nobody can tell but by the time.

What a block does is in test_writes.py; here is what the recorder decides by itself: indices, names,
whether writes meet, and when to leave all of it to Python.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import paramkit
from tests.guards import (
    assert_same_bits,
    nothing_written,
    place,
    random_layout,
    random_shape,
    random_source,
    storage_bytes,
)

BACKENDS = ("native", "cpu")

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.uint16,
)  # fmt: skip


def is_compiled(backend: str) -> bool:
    return backend != "native"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(4), persistent=False)
        self.register_parameter("absent", None)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(4, 2, bias=False)
        self.nothing: nn.Module | None = None
        self.scale = nn.Parameter(torch.ones(2))


# Indices.


def random_index(rng: random.Random, shape: tuple[int, ...]) -> Any:
    """A basic index into the shape, as odd as torch allows."""
    items: list[Any] = []
    for size in shape[: rng.randint(0, len(shape))]:
        kind = rng.random()
        if kind < 0.3 and size:
            items.append(rng.randint(-size, size - 1))
        else:
            bound = lambda n=size: rng.choice((None, rng.randint(-n - 2, n + 2)))  # noqa: E731
            items.append(slice(bound(), bound(), rng.choice((None, None, 1, 2, 3, 1 << 40))))
    if rng.random() < 0.4:
        items.insert(rng.randint(0, len(items)), ...)
    if rng.random() < 0.3:
        items.insert(rng.randint(0, len(items)), None)
    if len(items) == 1 and rng.random() < 0.5:
        return items[0]
    return tuple(items)


def at_the_end(index: Any, shape: tuple[int, ...]) -> Any:
    """An ellipsis in front moves the index to the last dimensions; only some of those fit."""
    try:
        torch.empty(shape)[index]
    except IndexError:
        return ...
    return index


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_assignments_as_torch(backend: str, dtype: torch.dtype) -> None:
    rng = random.Random(str(dtype))
    for trial in range(60):
        shape = random_shape(rng, 5)
        layout = random_layout(rng, shape)
        ours, theirs = place(layout, dtype, seed=trial), place(layout, dtype, seed=trial)
        index = at_the_end(random_index(rng, shape), shape)
        part = tuple(ours[index].shape)
        value: Any
        if rng.random() < 0.4:
            value = rng.choice((0, 1, True, False, 0.5, 1.0, 3))
        elif rng.random() < 0.2:
            value = place(random_layout(rng, ()), dtype, seed=trial + 1000)
        else:
            value = place(random_source(rng, part), dtype, seed=trial + 1000)
            if rng.random() < 0.3:
                value = value[None, None]
        theirs[index] = value
        with paramkit.writes({"x": ours}) as w:
            w["x"][index] = value
        what = f"{shape} {layout.strides} [{index}] = {value}"
        assert torch.equal(storage_bytes(ours), storage_bytes(theirs)), what
        assert w._direct == is_compiled(backend), what
        assert w.plan is not None and w.plan.verify() == [], what


@pytest.mark.parametrize(
    "value",
    [0.1, -0.0, 1e300, float("nan"), float("inf"), 70000.0, 255, -1, 2**40, 2**63, 2**64, True],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_as_torch(backend: str, dtype: torch.dtype, value: Any) -> None:
    ours, theirs = torch.zeros(2, 3).to(dtype), torch.zeros(2, 3).to(dtype)
    try:
        theirs[1:, 0] = value
    except Exception as error:
        with nothing_written(ours), pytest.raises(type(error)), paramkit.writes({"x": ours}) as w:
            w["x"][1:, 0] = value
        return
    with paramkit.writes({"x": ours}) as w:
        w["x"][1:, 0] = value
    assert torch.equal(storage_bytes(ours), storage_bytes(theirs))
    assert w._direct == (is_compiled(backend) and value not in (2**63, 2**64))


@pytest.mark.parametrize(
    "index",
    [(), ..., (0,), (-1, None), (slice(1, -1, 2), ..., 0), slice(None), 5, (None,)],
    ids=repr,
)
def test_the_index_is_kept(compiled: str, index: Any) -> None:
    """The plan is made of the indices that were recorded, and says them in the same words."""
    texts = []
    for name in BACKENDS:
        with paramkit.backend.force(name):
            with paramkit.writes({"x": torch.zeros(6, 4)}) as w:
                w["x"][index] = 1.0
            w._take_over()
            assert w.plan is not None
            texts.append([(r.name, r.index, r.text) for r in w.plan._recorded])
    assert texts[0] == texts[1] == [("x", index, texts[0][0][2])]


# Errors.

BAD: dict[str, Callable[[Any, dict[str, Tensor]], object]] = {
    "integer out of range": lambda w, t: w["a"].__setitem__(4, 1.0),
    "negative out of range": lambda w, t: w["a"].__setitem__((0, -4), 1.0),
    "too many": lambda w, t: w["a"].__setitem__((0, 0, 0), 1.0),
    "step 0": lambda w, t: w["a"].__setitem__(slice(None, None, 0), 1.0),
    "step -1": lambda w, t: w["a"].__setitem__(slice(None, None, -1), 1.0),
    "huge integer": lambda w, t: w["a"].__setitem__(2**70, 1.0),
    "bool": lambda w, t: w["a"].__setitem__(True, 1.0),
    "mask": lambda w, t: w["a"].__setitem__(t["a"] > 0, 1.0),
    "list": lambda w, t: w["a"].__setitem__([0], 1.0),
    "value shape": lambda w, t: w["a"].__setitem__(0, torch.zeros(2)),
    "value rank": lambda w, t: w["a"].__setitem__(0, torch.zeros(2, 3)),
    "value type": lambda w, t: w["a"].__setitem__(0, "1"),
    "value meta": lambda w, t: w["a"].__setitem__(0, torch.zeros(3, device="meta")),
    "value sparse": lambda w, t: w["a"].__setitem__(..., torch.zeros(4, 3).to_sparse()),
    "number too large": lambda w, t: w["i"].__setitem__(0, 2**70),
    "nan of int": lambda w, t: w["i"].__setitem__(0, float("nan")),
    "name": lambda w, t: w["aa"],
    "name of another type": lambda w, t: w[3],
    "no name at all": lambda w, t: w[[]],
    "tensor": lambda w, t: w[torch.zeros(4, 3)],
    "read": lambda w, t: w["a"][0],
    "read and write": lambda w, t: w["a"].__setitem__(0, w["a"]),
    "whole": lambda w, t: w.__setitem__("a", 1.0),
    "overlap": lambda w, t: (w["a"].__setitem__(0, 1.0), w["a"].__setitem__((..., 0), 1.0)),
    "overlap of views": lambda w, t: (w["a"].__setitem__(0, 1.0), w["v"].__setitem__(..., 1.0)),
    "source written": lambda w, t: (w["a"].__setitem__(0, t["a"][1]), w["a"].__setitem__(1, 1.0)),
    "source onto itself": lambda w, t: w["a"].__setitem__(slice(1, None), t["a"][:-1]),
    "expanded": lambda w, t: w["e"].__setitem__(0, 1.0),
    "meta": lambda w, t: w["m"].__setitem__(0, 1.0),
    "changed": lambda w, t: (w["a"].__setitem__(0, t["s"]), t["s"].zero_()),
    "no memory": lambda w, t: (w["a"].__setitem__(0, 1.0), t["a"].untyped_storage().resize_(0)),
    "value without memory": lambda w, t: (w["a"].__setitem__(0, t["s"]), t["s"].untyped_storage().resize_(0)),
    "resized": lambda w, t: (w["i"].__setitem__(4, 1), t["i"].resize_(3)),
}  # fmt: skip


@pytest.mark.parametrize("what", sorted(BAD))
@pytest.mark.parametrize("late", [False, True])
def test_errors_are_those_of_python(compiled: str, what: str, late: bool) -> None:
    def attempt(backend: str) -> tuple[type[BaseException], str]:
        a = torch.ones(4, 3)
        tensors = {
            "a": a, "i": torch.ones(5, dtype=torch.int64), "v": a[:, 1], "e": torch.ones(2, 1).expand(2, 3),
            "m": torch.ones(2, device="meta"), "o": torch.ones(6),
        }  # fmt: skip
        extra = {**tensors, "s": torch.ones(3)}
        with (
            paramkit.backend.force(backend),
            nothing_written(tensors["o"]),
            pytest.raises(BaseException) as caught,
            paramkit.writes(tensors) as w,
        ):
            if late:
                w["o"][::2] = 5.0
            BAD[what](w, extra)
            w["o"][1] = 6.0
        assert w.plan is None
        return caught.type, str(caught.value)

    assert attempt("native") == attempt("cpu")


def test_an_error_caught_in_the_block(backend: str) -> None:
    x = torch.zeros(4)
    with paramkit.writes({"x": x}) as w:
        w["x"][0] = 1.0
        with pytest.raises(TypeError):
            w["x"][[1]] = 2.0
        with pytest.raises(KeyError):
            w["y"][0] = 2.0
        w["x"][2] = 3.0
    assert x.tolist() == [1, 0, 3, 0]


def test_only_assignments(backend: str) -> None:
    with paramkit.writes({"x": torch.zeros(4)}) as w:
        handle = w["x"]
        with pytest.raises((TypeError, AttributeError)):
            del handle[0]
        assert repr(handle) == "<handle of x, for assignments only>"
        assert isinstance(handle, paramkit.writes.__globals__["Handle"])
    with pytest.raises(paramkit.PlanError, match="has ended"):
        handle[0] = 1.0
    with pytest.raises(paramkit.PlanError, match="used already"), w:
        pass
    with pytest.raises(paramkit.PlanError, match="has ended"):
        paramkit.writes({"x": torch.zeros(4)})["x"][0] = 1.0


# What is left to Python.


def test_order_where_python_takes_over(backend: str) -> None:
    """Plain writes before, between and after one that is not plain: the later one wins all the same."""
    x, expected = torch.zeros(8), torch.zeros(8)
    values = (1.0, torch.arange(8), 3.0, torch.tensor(4), 5.0)
    with paramkit.writes({"x": x}, overlap="last") as w:
        for i, value in enumerate(values):
            index = slice(i, None, i + 1)
            value = value[index] if isinstance(value, Tensor) and value.dim() else value
            w["x"][index] = value
            expected[index] = value
    assert torch.equal(x, expected)
    assert not w._direct


def test_a_mode_sees_the_writes(backend: str) -> None:
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.zeros(3)
    with Mode(), paramkit.writes({"x": x}) as w:
        w["x"][1] = 2.0
    assert x.tolist() == [0, 2, 0]
    assert any("copy_" in name or "fill_" in name for name in seen)
    assert not w._direct


def test_inference_tensors(backend: str) -> None:
    with torch.inference_mode():
        x = torch.zeros(3)
        with paramkit.writes({"x": x}) as w:
            w["x"][1] = 2.0
    assert x.tolist() == [0, 2, 0]
    with (
        nothing_written(x),
        pytest.raises(RuntimeError, match="InferenceMode"),
        paramkit.writes({"x": x}) as w,
    ):
        w["x"][1] = 3.0


def test_mappings_of_any_type(backend: str) -> None:
    class Odd(dict):  # type: ignore[type-arg]
        pass

    for kind, direct in ((dict, True), (OrderedDict, True), (Odd, False)):
        model = kind(a=torch.zeros(2), b=torch.zeros(2))
        with paramkit.writes(model) as w:
            w["b"][0] = 1.0
        assert model["b"].tolist() == [1, 0]
        assert w._direct == (direct and is_compiled(backend))
    with pytest.raises(paramkit.PlanError, match="named tensors"):
        paramkit.writes({"a": torch.zeros(2), "b": 1})  # type: ignore[dict-item]


# Whether writes meet.


def test_random_writes_meet_as_python_says(compiled: str) -> None:
    rng = random.Random(5)
    refused = direct = 0
    for _ in range(300):
        shape = (rng.randint(1, 6), rng.randint(1, 6), rng.randint(1, 4))
        indices = [at_the_end(random_index(rng, shape), shape) for _ in range(rng.randint(2, 4))]
        results = []
        for backend in BACKENDS:
            x = torch.zeros(shape).permute(2, 0, 1).permute(1, 2, 0)
            error = ""
            with paramkit.backend.force(backend):
                w = paramkit.writes({"x": x})
                try:
                    with w:
                        for i, index in enumerate(indices):
                            w["x"][index] = float(i + 1)
                except paramkit.PlanError as caught:
                    error = str(caught)
            results.append((error, x.tolist()))
        assert results[0] == results[1], (shape, indices)
        assert w._direct == (not results[0][0]), (shape, indices)
        refused += bool(results[0][0])
        direct += w._direct
    assert refused > 50 and direct > 50


def test_interleaved_slices_are_direct(backend: str) -> None:
    x = torch.zeros(6, 8)
    with paramkit.writes({"x": x}) as w:
        for i in range(8):
            w["x"][:, i] = torch.full((6,), float(i))
    assert torch.equal(x, torch.arange(8.0).expand(6, 8))
    assert w._direct == is_compiled(backend)


def test_windows_over_one_storage(backend: str) -> None:
    """Two tensors interleaved in one storage: their ranges meet, their elements do not."""
    storage = torch.zeros(10)
    with paramkit.writes({"a": storage[::2], "b": storage[1::2]}) as w:
        w["a"][...] = 1.0
        w["b"][...] = 2.0
    assert storage.tolist() == [1, 2] * 5
    window = storage.as_strided((4, 4), (2, 1))
    with (
        nothing_written(storage),
        pytest.raises(paramkit.PlanError),
        paramkit.writes({"x": window}) as w,
    ):
        w["x"][0] = 1.0
        w["x"][1] = 2.0


def test_a_view_onto_itself(backend: str) -> None:
    x = torch.arange(6.0)
    with paramkit.writes({"x": x}) as w:
        w["x"][:3] = x[:3]
    assert x.tolist() == [0, 1, 2, 3, 4, 5]


# Versions and routes.


def test_versions_rise_once(backend: str) -> None:
    model = {"a": torch.zeros(4, 4), "b": torch.zeros(4), "c": torch.zeros(4), "d": torch.zeros(4)}
    with paramkit.writes(model) as w:
        for i in range(4):
            w["a"][i] = 1.0
        w["b"][2:2] = 1.0
        w["c"][:] = 1.0
    assert [t._version for t in model.values()] == [1 if is_compiled(backend) else 4, 1, 1, 0]


def test_routes_of_many(backend: str) -> None:
    model = {f"t{i}": torch.zeros(4, 4, 3, 3) for i in range(50)}
    rows = torch.rand(4, 3, 3)
    with paramkit.backend.trace() as trace, paramkit.writes(model) as w:
        for i, name in enumerate(model):
            if i % 2:
                w[name][:, :, 1:2, 1:2] = 0.5
            else:
                w[name][0] = rows
    assert trace.routes == ({"fill": 25, "copy": 25} if is_compiled(backend) else {"native": 50})
    assert all(torch.equal(t[0], rows) for t in list(model.values())[::2])


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64], ids=str
)
def test_conversions_are_direct(backend: str, dtype: torch.dtype) -> None:
    values = (torch.randn(5, 3, 7) * 50).to(dtype)
    ours, theirs = torch.zeros(3, 5, 9), torch.zeros(3, 5, 9)
    theirs[:, :, 2::1][..., :7] = values.transpose(0, 1)
    theirs[1, :, 0] = values[0, 0, 0]
    with paramkit.backend.trace() as trace, paramkit.writes({"x": ours}) as w:
        w["x"][:, :, 2:] = values.transpose(0, 1)
        w["x"][1, :, 0] = values[0, 0, 0]
    assert_same_bits(ours, theirs)
    assert w._direct == (is_compiled(backend) and trace.casts == 2)
    assert w._direct or dtype not in (torch.bfloat16, torch.float16) or not is_compiled(backend)


def test_what_the_kernels_do_not_convert(backend: str) -> None:
    x = torch.zeros(3, dtype=torch.complex64)
    with paramkit.writes({"x": x}) as w:
        w["x"][1:] = torch.tensor([1, 2], dtype=torch.int16)
    assert x.tolist() == [0, 1, 2]


def test_large_tensors(backend: str) -> None:
    model = {name: torch.zeros(700, 900) for name in "abc"}
    value = torch.rand(350, 900)
    with paramkit.writes(model) as w:
        w["a"][::2] = value
        w["b"][:, 100:] = 2.0
        w["c"][350:] = value
    assert torch.equal(model["a"][::2], value) and not model["a"][1::2].any()
    assert (model["b"][:, 100:] == 2).all() and not model["b"][:, :100].any()
    assert torch.equal(model["c"][350:], value) and not model["c"][:350].any()
    assert w._direct == is_compiled(backend)


# Names.


def test_every_name(backend: str) -> None:
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    names = [name for name, t in net.state_dict().items()]
    random.Random(0).shuffle(names)
    with paramkit.writes(net) as w:
        for i, name in enumerate(names):
            w[name][...] = i
    for i, name in enumerate(names):
        value = net.state_dict()[name]
        assert torch.equal(value, torch.full_like(value, i)), name
    assert w._direct == is_compiled(backend)
    held = dict(net.named_parameters()) | dict(net.named_buffers())
    with paramkit.writes(net) as w:
        for i, name in enumerate(names):
            w[held[name]][...] = -i
    assert all(torch.equal(held[n], torch.full_like(held[n], -i)) for i, n in enumerate(names))
    assert w._direct == is_compiled(backend)


@pytest.mark.parametrize(
    "name",
    ["", ".", "blocks", "blocks.0", "blocks.0.", ".scale", "blocks.0.absent", "blocks.0.seen", "nothing", "nothing.x",
     "blocks..fc.weight", "blocks.0.fc.weight.", "blocks.3.fc.weight", "out.bias", "blocks.0.fc.weïght"],
)  # fmt: skip
def test_names_that_are_none(backend: str, name: str) -> None:
    net = Net()
    w = paramkit.writes(net)
    with pytest.raises(KeyError), w:
        w["blocks.0.fc.weight"][...] = 0.0
        w[name][...] = 0.0
    with paramkit.writes(net) as w:  # what was looked up in vain leads nobody astray
        w["blocks.1.fc.bias"][...] = 1.0
        with pytest.raises(KeyError):
            w[name]
        w["blocks.2.fc.bias"][...] = 2.0
        w["blocks.0.norm.bias"][...] = 3.0
    got = [net.blocks[1].fc.bias, net.blocks[2].fc.bias, net.blocks[0].norm.bias]
    assert [t.tolist() for t in got] == [[1.0] * 4, [2.0] * 4, [3.0] * 4]


def test_tied_and_shared(backend: str) -> None:
    net = Net()
    net.blocks[1] = net.blocks[0]  # one module under two names
    net.blocks[2].fc.weight = net.blocks[0].fc.weight
    net.blocks[2].fc.bias = nn.Parameter(net.blocks[0].fc.bias.data)  # two objects, one memory
    with paramkit.writes(net) as w:
        w["blocks.1.fc.weight"][0] = 1.0
        w["blocks.2.fc.weight"][1] = 2.0
        w[net.blocks[2].fc.bias][0] = 3.0
        w["blocks.0.fc.bias"][1] = 4.0
    assert net.blocks[0].fc.weight[:2].tolist() == [[1.0] * 3, [2.0] * 3]
    assert net.blocks[0].fc.bias[:2].tolist() == [3.0, 4.0]
    assert w._direct == is_compiled(backend)
    with (
        nothing_written(*net.parameters()),
        pytest.raises(paramkit.PlanError, match="overlap"),
        paramkit.writes(net) as w,
    ):
        w["blocks.0.fc.bias"][0] = 1.0
        w["blocks.2.fc.bias"][...] = 1.0


def test_a_module_inside_itself(backend: str) -> None:
    net = Net()
    net.blocks[0].add_module("parent", net)
    with paramkit.writes(net) as w:
        w["blocks.0.fc.bias"][...] = 1.0
        with pytest.raises(KeyError):
            w["blocks.0.parent.scale"]
        w[net.scale][...] = 2.0
    assert net.scale.tolist() == [2, 2]
    assert net.blocks[0].fc.bias.tolist() == [1] * 4


def test_names_that_are_not_ascii(backend: str) -> None:
    net = nn.Module()
    net.register_parameter("größe", nn.Parameter(torch.zeros(2)))
    with paramkit.writes(net) as w:
        w["größe"][0] = 1.0
        w[net._parameters["größe"]][1] = 2.0
    assert net._parameters["größe"].tolist() == [1, 2]


def test_a_class_with_tables_of_its_own(backend: str) -> None:
    class Odd(nn.Module):
        def __getattribute__(self, name: str) -> Any:
            return {} if name == "_parameters" else super().__getattribute__(name)

    net = nn.Sequential(nn.Linear(2, 2))
    net.add_module("odd", Odd())
    dict.__getitem__(net[1].__dict__, "_parameters")["p"] = nn.Parameter(torch.zeros(2))
    with paramkit.writes(net) as w:
        w["0.bias"][...] = 1.0
        with pytest.raises(KeyError):
            w["odd.p"]
    assert net[0].bias.tolist() == [1, 1]


def test_lazy_parameters(backend: str) -> None:
    net = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))
    with paramkit.writes(net) as w:
        w["1.bias"][...] = 1.0
    assert net[1].bias.tolist() == [1, 1]
    with (
        nothing_written(net[1].bias),
        pytest.raises(paramkit.PlanError, match="lazy"),
        paramkit.writes(net) as w,
    ):
        w["1.bias"][...] = 2.0
        w["0.weight"][...] = 2.0


# The model changes inside the block.


def test_a_parameter_replaced_inside_the_block(backend: str) -> None:
    for at_start in (False, True):
        net = Net()
        old = net.blocks[0].fc.bias
        with nothing_written(old), paramkit.writes(net) as w:
            if at_start:
                w["blocks.0.fc.bias"][0] = 1.0
            net.blocks[0].fc.bias = nn.Parameter(torch.zeros(4))
            w["blocks.0.fc.bias"][1] = 2.0
        assert net.blocks[0].fc.bias.tolist() == [float(at_start), 2, 0, 0]
        assert not (w._direct and at_start)


def test_a_module_replaced_inside_the_block(backend: str) -> None:
    net = Net()
    with paramkit.writes(net) as w:
        w["blocks.0.fc.weight"][0] = 1.0
        net.blocks[0] = Block()
        w["blocks.0.fc.bias"][...] = 2.0
    assert net.blocks[0].fc.weight[0].tolist() == [1] * 3
    assert net.blocks[0].fc.bias.tolist() == [2] * 4


def test_tables_replaced_inside_the_block(backend: str) -> None:
    net = Net()
    fc = net.blocks[0].fc
    with paramkit.writes(net) as w:
        w["blocks.0.fc.weight"][0] = 1.0
        fc._parameters = {
            "weight": nn.Parameter(torch.zeros(4, 3)),
            "bias": nn.Parameter(torch.zeros(4)),
        }
        gc.collect()
        w["blocks.0.fc.bias"][...] = 2.0
    assert fc.weight[0].tolist() == [1] * 3
    assert fc.bias.tolist() == [2] * 4


def test_a_tensor_that_goes_inside_the_block(backend: str) -> None:
    net = Net()
    with (
        nothing_written(*net.parameters()),
        pytest.raises(paramkit.PlanError, match="missing"),
        paramkit.writes(net) as w,
    ):
        w["scale"][...] = 3.0
        w["out.weight"][...] = 3.0
        del net.out
    table = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with (
        nothing_written(*table.values()),
        pytest.raises(paramkit.PlanError, match="missing"),
        paramkit.writes(table) as w,
    ):
        w["a"][...] = 3.0
        w["b"][...] = 3.0
        del table["b"]
    with paramkit.writes(table) as w:
        w["a"][...] = 3.0
        table["a"], table["c"] = torch.zeros(3), torch.zeros(1)
    assert table["a"].tolist() == [3] * 3


def test_memory_replaced_inside_the_block(backend: str) -> None:
    x = torch.zeros(2, 2)
    with paramkit.writes({"x": x}) as w:
        w["x"][-1] = 1.0
        x.data = torch.zeros(3, 4, dtype=torch.float64)
    assert x.tolist() == [[0] * 4, [0] * 4, [1] * 4]


# The plan, made when it is asked for.


def test_the_plan_is_made_later(backend: str) -> None:
    net, value = Net(), torch.ones(4)
    w = paramkit.writes(net)
    assert w.plan is None
    with w:
        w["blocks.0.fc.bias"][...] = value
        w["scale"][0] = 5.0
        assert w.plan is None
    assert (w._plan is None) == is_compiled(backend)
    value.fill_(2)
    plan = w.plan
    assert plan is not None and plan is w.plan
    assert plan.verify() == ["blocks.0.fc.bias"]
    plan.apply()
    assert net.blocks[0].fc.bias.tolist() == [2] * 4  # as the value is now
    assert "scale" in plan.explain()


def test_no_plan_after_an_error(backend: str) -> None:
    x = torch.zeros(2)
    w = paramkit.writes({"x": x})
    with nothing_written(x), pytest.raises(ZeroDivisionError), w:
        w["x"][0] = 1.0
        raise ZeroDivisionError
    assert w.plan is None


@pytest.mark.parametrize("kind", ["module", "mapping"])
def test_replaced_before_the_plan_was_made(backend: str, kind: str) -> None:
    net: Any = (
        nn.Linear(2, 2)
        if kind == "module"
        else {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
    )
    with paramkit.writes(net) as w:
        w["weight"][0] = 1.0
        w["bias"][...] = 1.0
    new = nn.Parameter(torch.zeros(2))
    if kind == "module":
        net.bias = new
    else:
        net["bias"] = new
    assert w.plan is not None
    with nothing_written(new), pytest.raises(paramkit.PlanError, match=r"bias \| replaced"):
        w.plan.apply()
    with pytest.raises(paramkit.PlanError, match=r"bias \| replaced"):
        w.plan.verify()
    w.plan.refresh()
    w.plan.apply()
    assert new.tolist() == [1, 1]


def test_a_plan_that_cannot_be_made_any_more(compiled: str) -> None:
    net = nn.Linear(2, 2)
    with paramkit.writes(net) as w:
        w["weight"][:, 1] = 1.0
    good = net.weight
    net.weight = nn.Parameter(torch.zeros(2))
    for _ in range(2):
        with pytest.raises(paramkit.PlanError, match="index"):
            _ = w.plan
    net.weight = good
    assert w.plan is not None
    w.plan.apply()


# Nothing leaks.


def test_cycles_are_collected(backend: str) -> None:
    class Value(Tensor):
        pass

    def once() -> list[weakref.ref[Any]]:
        net, value = Net(), torch.ones(4)
        with paramkit.writes(net) as w:
            w["blocks.0.fc.bias"][...] = value
            w[net.scale][0] = 7.5
            handle = w["scale"]
        w.itself, w.handle, net.recorder = w, handle, w  # type: ignore[attr-defined]
        value.recorder = w  # type: ignore[attr-defined]
        with pytest.raises(ZeroDivisionError), paramkit.writes(net) as other:
            other["scale"][0] = 1.0
            other.itself = other  # type: ignore[attr-defined]
            raise ZeroDivisionError
        unused = paramkit.writes(net)
        unused.itself = unused  # type: ignore[attr-defined]
        return [weakref.ref(o) for o in (net, value, w, other, unused)]

    gc.collect()
    held = once()
    gc.collect()
    assert [ref() for ref in held] == [None] * 5


def test_no_references_are_lost_or_kept(compiled: str) -> None:
    import sys

    net, value, number = Net(), torch.ones(4), 0.123
    names = list(net.state_dict())
    watched = [
        value,
        number,
        net.scale,
        net.blocks[0].fc,
        net.blocks,
        net.blocks._modules,
        names[0],
    ]

    def counts() -> list[int]:
        return [sys.getrefcount(o) for o in watched]

    def block() -> None:
        with paramkit.writes(net) as w:
            for name in names:
                w[name][...] = number
            with pytest.raises(KeyError):
                w["blocks.0.none"]
        with paramkit.writes(net) as w:
            w[net.scale][...] = number
            w["blocks.0.fc.bias"][1:None:2, ...] = value[1::2]
            w["blocks.1.fc.bias"][...] = value
        assert w.plan is not None

    block()
    gc.collect()
    before, none = counts(), sys.getrefcount(None)
    times = 500
    for _ in range(times):
        block()
    gc.collect()
    # All of the process counts None: tens come and go with what a collection or another thread lets go of.
    assert counts() == before
    assert abs(sys.getrefcount(None) - none) < times // 2


def test_types_of_the_extension(compiled: str) -> None:
    extension = paramkit.backend.active()
    with pytest.raises(TypeError):
        extension.Handle()
    bare = extension.Recorder()
    bare._fast = True
    assert (
        bare._fast is False
        and bare._run() is False
        and bare._take() == []
        and bare._tensors() == {}
    )
    with pytest.raises(AttributeError):
        bare["x"]
