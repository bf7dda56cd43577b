"""Plans: worked out once, applied again and again, and never for a model that is another one by now."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections import UserDict
from collections.abc import Callable, Mapping
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import paramkit
from paramkit import PlanError, Rule
from paramkit.backend import native
from tests.calls import python_calls
from tests.guards import (
    Layout,
    assert_same_bits,
    bits,
    nothing_written,
    place,
    storage_bytes,
    watch,
)
from tests.routes import routes_of

pytestmark = pytest.mark.usefixtures("backend")


class Net(nn.Module):
    """Modules in modules, a tied weight, buffers of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(6).reshape(2, 3))


NAMES = tuple(Net().state_dict())
FLOATS = tuple(n for n, t in Net().state_dict().items() if t.is_floating_point())


def tensors(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]


def random_net(seed: int) -> Net:
    """A net with its own values everywhere, buffers included."""
    generator = torch.Generator().manual_seed(seed)
    net = Net()
    for tensor in tensors(net):
        tensor.detach().copy_(torch.randint(-99, 99, tensor.shape, generator=generator))
    return net


def guarded(net: Net) -> Net:
    """The same net, every tensor of it a view inside a patterned storage."""
    for tensor in tensors(net):
        tensor.data = place(Layout.dense(tensor.shape), tensor.dtype)
    return net


def current(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def assert_holds(net: nn.Module, source: Mapping[str, Tensor]) -> None:
    for name, tensor in net.state_dict().items():
        assert_same_bits(tensor, source[name].to(tensor.dtype), what=name)


def scramble(net: nn.Module) -> None:
    for tensor in tensors(net):
        tensor.detach().fill_(1)


def named(error: pytest.ExceptionInfo[PlanError]) -> dict[str, str]:
    return {finding.name: finding.kind for finding in error.value.findings}


# Models, from every kind of source.


def as_module(net: Net, folder: Path) -> object:
    return net


def as_mapping(net: Net, folder: Path) -> object:
    return net.state_dict()


def as_file(net: Net, folder: Path) -> object:
    path = folder / f"{id(net)}.safetensors"
    save_file(current(net), path)
    return path


def as_path_text(net: Net, folder: Path) -> object:
    return str(as_file(net, folder))


KINDS = [as_module, as_mapping, as_file, as_path_text]
Kind = Callable[[Net, Path], object]


@pytest.mark.parametrize("kind", KINDS)
def test_model_from_any_source(kind: Kind, tmp_path: Path) -> None:
    net, trained = guarded(random_net(0)), random_net(1)
    identity = [(id(t), t.data_ptr(), t.requires_grad) for t in tensors(net)]
    options = {"rules": [Rule("head.weight", None)]} if kind in (as_file, as_path_text) else {}
    plan = paramkit.plan(net, kind(trained, tmp_path), **options)
    seen = watch(*tensors(net))
    seen.assert_unwritten()  # planning writes nothing
    versions = [t._version for t in tensors(net)]

    report = plan.apply()

    assert_holds(net, trained.state_dict())
    seen.assert_only_inside()
    assert identity == [(id(t), t.data_ptr(), t.requires_grad) for t in tensors(net)]
    assert all(t._version > v for t, v in zip(tensors(net), versions, strict=True))
    assert plan.verify() == []
    assert set(report.summary.names) == set(NAMES) - {"head.weight"}

    scramble(net)
    plan.apply()
    assert_holds(net, trained.state_dict())
    seen.assert_only_inside()


def test_mapping_is_a_model_too() -> None:
    table = {
        "a": place(Layout.dense((3, 4), (1, 7)), torch.float32),
        "b": place(Layout.dense((5,), (2,)), torch.int64),
    }
    values = {"b": torch.arange(5), "a": torch.rand(3, 4)}
    seen = watch(*table.values())
    paramkit.plan(table, values).apply()
    seen.assert_only_inside()
    for name, tensor in table.items():
        assert_same_bits(tensor, values[name])


def test_two_lists() -> None:
    dsts = [
        place(Layout.dense((3, 4)), torch.float32),
        place(Layout.dense((3, 4), (1, 5)), torch.float32),
        place(Layout.dense((2, 3), (9, 2)), torch.bfloat16),
        place(Layout.dense(()), torch.int64),
        place(Layout.dense((0, 2)), torch.float32),
    ]
    srcs = [
        torch.rand(3, 4),
        torch.rand(4),
        torch.rand(3, 2).t(),
        torch.tensor(7),
        torch.rand(0, 2),
    ]
    seen = watch(*dsts)
    plan = paramkit.plan(dsts, srcs)
    for _ in range(2):
        plan.apply()
        for dst, src in zip(dsts, srcs, strict=True):
            assert_same_bits(dst, src.to(dst.dtype).expand(dst.shape))
        seen.assert_only_inside()
        for dst in dsts:
            dst.zero_()
    assert plan.verify() == ["dsts[0]", "dsts[1]", "dsts[2]", "dsts[3]"]


def test_a_list_and_numbers() -> None:
    dsts = [place(Layout.dense((2, 3), (5, 1)), d) for d in (torch.float32, torch.int8, torch.bool)]
    seen = watch(*dsts)
    plan = paramkit.plan(dsts, 1)
    plan.apply()
    assert all(bool((d == 1).all()) for d in dsts)
    paramkit.plan(tuple(dsts), [2.5, -7, torch.tensor(False)]).apply()
    assert [d[0, 0].item() for d in dsts] == [2.5, -7, False]
    plan.apply(0)
    assert not any(bool(d.any()) for d in dsts)
    plan.apply([0.5, 3, True])
    assert [d[1, 2].item() for d in dsts] == [0.5, 3, True]
    seen.assert_only_inside()


def test_numbers_keep_their_sign_and_their_type() -> None:
    dsts = [torch.ones(2), torch.ones(2), torch.ones(2, dtype=torch.int64)]
    paramkit.plan(dsts, [0.0, -0.0, True]).apply()
    assert dsts[0].signbit().tolist() == [False, False]
    assert dsts[1].signbit().tolist() == [True, True]
    assert dsts[2].tolist() == [1, 1]


def test_nothing_to_do() -> None:
    empty = nn.Module()
    for plan in (paramkit.plan([], []), paramkit.plan({}, {}), paramkit.plan(empty, {})):
        report = plan.apply()
        assert report.summary.writes == 0
        assert plan.verify() == []
        assert isinstance(plan.explain(), str)


# explain, verify, Report, progress.


def test_explain_shows_rows_totals_and_routes(backend: str) -> None:
    net = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
    rules = [Rule("{i}.weight", "{i}.weight", "i o -> o i")]
    text = paramkit.plan(net, nn.ModuleList(nn.Linear(4, 4) for _ in range(5)), rules).explain()
    assert "{0..4}.weight" in text
    assert "i o -> o i" in text
    assert "10 writes into 10 of 10 tensors" in text
    routes = routes_of(backend, transpose=5, copy=5)
    kinds = [
        ", ".join(f"{n} {name}" for name, n in order) for order in permutations(routes.items())
    ]
    assert any(f"kernels: {each}" in text for each in kinds)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "head.weight"])
def test_verify_names_a_single_flipped_bit(name: str) -> None:
    net = random_net(0)
    plan = paramkit.plan(net, random_net(1))
    plan.apply()
    raw = storage_bytes(net.state_dict()[name])
    for byte, bit in ((0, 0), (raw.numel() - 1, 7), (raw.numel() // 2, 3)):
        raw[byte] ^= 1 << bit
        assert plan.verify() == [name]
        raw[byte] ^= 1 << bit
    assert plan.verify() == []


def test_verify_in_strided_destinations_and_against_a_new_source() -> None:
    base = torch.zeros(6, 8)
    names = ["left", "right"]
    table = {"left": base[::2, :3], "right": base[:, 4:].t()}
    values = {n: torch.rand(table[n].shape) for n in names}
    plan = paramkit.plan(table, values)
    assert plan.verify() == names
    plan.apply()
    assert plan.verify() == []
    base[1, 0] = 9.0  # between the rows of one, in nobody's
    assert plan.verify() == []
    base[5, 7] += 1.0
    assert plan.verify() == ["right"]
    changed = {**values, "left": values["left"] + 1}
    assert plan.verify(changed) == names


def test_verify_and_nan() -> None:
    """After a cast any NaN is as good as any other; without one the bits are what counts."""
    cast, same = torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3)
    src = torch.tensor([1.0, float("nan"), -0.0])
    plan = paramkit.plan([cast, same], [src, src])
    plan.apply()
    assert plan.verify() == []
    for payload in (0x7FC0, -1, 0x7F81):
        cast.view(torch.int16)[1] = payload
        assert bool(cast[1].isnan())
        assert plan.verify() == []
    cast[1] = 1.0
    assert plan.verify() == ["dsts[0]"]
    plan.apply()
    cast[2] = 0.0  # not the sign that was copied
    assert plan.verify() == ["dsts[0]"]
    plan.apply()
    same.view(torch.int32)[1] ^= 1
    assert bool(same[1].isnan())
    assert plan.verify() == ["dsts[1]"]


def test_verify_with_the_last_of_overlapping_writes() -> None:
    layer = nn.Linear(2, 3)
    with paramkit.writes(layer, overlap="last") as w:
        w["bias"][:] = 1.0
        w["bias"][0] = 2.0
    assert layer.bias.tolist() == [2, 1, 1]
    assert w.plan is not None
    assert w.plan.verify() == []


def test_report(backend: str) -> None:
    model = {
        "a.0.w": torch.zeros(4, 4),
        "a.1.w": torch.zeros(4, 4),
        "b": torch.zeros(4, dtype=torch.bfloat16),
        "stays": torch.zeros(2),
        "part": torch.zeros(4),
    }
    source = {
        "a.0.w": torch.ones(4, 4),
        "a.1.w": torch.ones(4, 4),
        "b": torch.ones(4),
        "unused": torch.zeros(1),
        "part": torch.ones(2),
    }
    rules = [
        Rule("unused", None),
        Rule("part", "part", "a -> (s a)", at={"s": 1}),
    ]
    report = paramkit.plan(model, source, rules, allow_missing=["stays", "part"]).apply()
    s = report.summary
    assert set(s.names) == {"a.0.w", "a.1.w", "b", "part"}
    assert (s.writes, s.elements, s.bytes) == (4, 38, 2 * 64 + 8 + 8)
    assert s.bytes_moved == 2 * 128 + (8 + 16) + 16
    assert [(c.name, c.source, c.src_dtype, c.dst_dtype) for c in s.casts] == [
        ("b", "b", "float32", "bfloat16")
    ]
    assert set(s.kept) == {"stays", "part (in part)"}
    assert s.dropped == ("unused",)
    assert sum(s.routes.values()) == 4
    assert s.backend == ("native" if backend == "native" else "cpu")
    assert report.seconds > 0
    assert report.gbps > 0
    text = str(report)
    for part in (
        "4 tensors written by 4 writes",
        "38 elements",
        "144 bytes",
        "GB/s",
        f"backend {s.backend}",
        "b: float32 -> bfloat16",
        "left alone: ",
        "dropped: unused",
    ):
        assert part in text
    assert model["part"].tolist() == [0, 0, 1, 1]


def test_progress(backend: str) -> None:
    large = [torch.zeros(9_000_000) for _ in range(3)]  # 108 MB: more than one piece
    small = [torch.zeros(10, dtype=torch.bfloat16), torch.zeros(0)]
    calls: list[tuple[int, int]] = []
    plan = paramkit.plan([*large, *small], 1.0)
    plan.apply(progress=lambda done, total: calls.append((done, total)))
    total = sum(t.nbytes for t in (*large, *small))
    assert {t for _, t in calls} == {total}
    done = [d for d, _ in calls]
    assert done == sorted(done)
    if backend != "cuda:kernels":  # there all of it is one launch
        assert len(done) >= 2
        assert 0 < done[0] < total
    assert done[-1] == total
    assert plan.verify() == []


def test_progress_of_a_cast_and_a_copy_ends_at_the_total() -> None:
    calls: list[tuple[int, int]] = []
    dsts = [torch.zeros(5), torch.zeros(5, dtype=torch.float16), torch.zeros(4)[::2]]
    paramkit.plan(dsts, [torch.ones(5), torch.ones(5), torch.ones(2)]).apply(
        progress=lambda *call: calls.append(call)
    )
    assert calls[-1] == (38, 38)
    assert [d[0].item() for d in dsts] == [1, 1, 1]


def test_progress_when_autograd_records(backend: str) -> None:
    dst, calls = torch.zeros(2), []
    paramkit.plan([dst], [torch.ones(2, requires_grad=True)]).apply(
        progress=lambda *call: calls.append(call)
    )
    assert dst.requires_grad
    assert calls[-1] == (8, 8)


def test_progress_that_raises_is_heard() -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    dst = torch.zeros(4)
    plan = paramkit.plan([dst], 1.0)
    with pytest.raises(KeyboardInterrupt):
        plan.apply(progress=stop)
    plan.apply()
    assert plan.verify() == []


# A new source.


@pytest.mark.parametrize("kind", [as_module, as_mapping])
def test_apply_with_a_new_source(kind: Kind, tmp_path: Path) -> None:
    net = guarded(random_net(0))
    seen = watch(*tensors(net))
    plan = paramkit.plan(net, kind(random_net(1), tmp_path))
    for seed in (2, 3):
        trained = random_net(seed)
        plan.apply(kind(trained, tmp_path))
        assert_holds(net, trained.state_dict())
        assert plan.verify() == []
        scramble(net)
        plan.apply()  # bound from now on
        assert_holds(net, trained.state_dict())
    seen.assert_only_inside()


def test_apply_with_a_new_file_and_back(tmp_path: Path) -> None:
    net = guarded(random_net(0))
    plan = paramkit.plan(net, as_file(random_net(1), tmp_path), [Rule("head.weight", None)])
    second, third = random_net(2), random_net(3)
    plan.apply(as_file(second, tmp_path))
    assert_holds(net, second.state_dict())
    plan.apply(current(third))  # a file, then a mapping: only names, shapes, dtypes count
    assert_holds(net, third.state_dict())
    plan.apply(as_path_text(second, tmp_path))
    assert_holds(net, second.state_dict())


def test_a_new_source_in_another_order_and_layout() -> None:
    net = guarded(random_net(0))
    seen = watch(*tensors(net))
    plan = paramkit.plan(net, random_net(1).state_dict(), [Rule("head.weight", None)])
    for seed, strided in ((2, True), (3, True), (4, False)):
        trained = current(random_net(seed))
        new = dict(reversed(list(trained.items())))
        if strided:
            for name, tensor in new.items():
                wide = torch.zeros((*tensor.shape[::-1], 3), dtype=tensor.dtype)
                new[name] = (
                    wide.select(-1, 1).permute(tuple(reversed(range(tensor.dim())))).copy_(tensor)
                )
            assert not new["table"].is_contiguous()
        plan.apply(new)
        assert_holds(net, trained)
        scramble(net)
        plan.apply()
        assert_holds(net, trained)
        assert plan.verify() == []
    seen.assert_only_inside()


def test_a_new_source_in_another_layout_through_a_rule() -> None:
    dst = {"fused": place(Layout.dense((6, 4)), torch.float32)}
    rules = [
        Rule("a", "fused", "i o -> (s o) i", at={"s": 0}),
        Rule("b", "fused", "o i -> (s o) i", at={"s": 1}),
    ]
    source = {"a": torch.rand(4, 3), "b": torch.rand(3, 4)}
    plan = paramkit.plan(dst, source, rules)
    seen = watch(*dst.values())
    for new in (source, {"a": torch.rand(3, 4).t(), "b": torch.rand(4, 3).t()}, source):
        plan.apply(new)
        assert_same_bits(dst["fused"], torch.cat([new["a"].t(), new["b"]]))
    seen.assert_only_inside()


def test_the_old_source_is_let_go() -> None:
    old = torch.ones(3)
    gone = weakref.ref(old)
    plan = paramkit.plan({"w": torch.zeros(3)}, {"w": old})
    del old
    assert gone() is not None  # the plan holds it
    plan.apply({"w": torch.zeros(3)})
    gc.collect()
    assert gone() is None


def test_lists_take_a_new_list() -> None:
    dsts = [place(Layout.dense((3, 4), (9, 2)), torch.float32), torch.zeros(2, dtype=torch.int64)]
    seen = watch(*dsts)
    plan = paramkit.plan(dsts, [torch.rand(3, 4), torch.ones(2, dtype=torch.int64)])
    plan.apply()
    for first in (torch.rand(3, 4), torch.rand(4, 3).t(), torch.rand(1, 4).expand(3, 4)):
        srcs = [first, torch.randint(9, (2,))]
        plan.apply(srcs)
        for dst, src in zip(dsts, srcs, strict=True):
            assert_same_bits(dst, src.expand(dst.shape))
        dsts[0].zero_()
        plan.apply()
        assert_same_bits(dsts[0], first.expand(3, 4))
    seen.assert_only_inside()


DIFFERENCES: dict[str, tuple[Callable[[dict[str, Any]], object], dict[str, str]]] = {
    "missing": (lambda s: s.pop("body.0.weight"), {"body.0.weight": "missing"}),
    "unexpected": (lambda s: s.update(more=torch.zeros(1)), {"more": "unexpected"}),
    "shape": (lambda s: s.update(table=torch.zeros(3, 2, dtype=torch.int64)), {"table": "shape"}),
    "dtype": (lambda s: s.update({"body.0.bias": torch.zeros(4).half()}), {"body.0.bias": "dtype"}),
    "not a tensor": (lambda s: s.update(table=[[1, 2, 3]]), {"table": "type"}),
    "None": (lambda s: s.update(table=None), {"table": "type"}),
    "renamed": (
        lambda s: s.update({"body.0.wieght": s.pop("body.0.weight")}),
        {"body.0.weight": "missing", "body.0.wieght": "unexpected"},
    ),
    "all": (
        lambda s: (
            s.pop("body.0.weight"),
            s.update(more=torch.zeros(1), table=torch.zeros(1), nothing=3),
            s.update({"body.0.bias": torch.zeros(4).double()}),
        ),
        {
            "body.0.weight": "missing",
            "more": "unexpected",
            "nothing": "unexpected",
            "table": "shape",
            "body.0.bias": "dtype",
        },
    ),
}


@pytest.mark.parametrize("difference", sorted(DIFFERENCES))
def test_a_new_source_that_differs(difference: str) -> None:
    change, expected = DIFFERENCES[difference]
    net, trained = guarded(random_net(0)), random_net(1)
    plan = paramkit.plan(net, trained.state_dict())
    new = current(random_net(2))
    new["head.weight"] = new["embed.weight"]
    change(new)
    for call in (plan.apply, plan.verify):
        with (
            nothing_written(*tensors(net), *trained.state_dict().values()),
            pytest.raises(PlanError, match="nothing was written") as caught,
        ):
            call(new)
        found = named(caught)
        for name, kind in expected.items():
            assert found[name] == kind
            assert name in str(caught.value)
    plan.apply()  # the old binding is as it was
    assert_holds(net, trained.state_dict())
    plan.apply(random_net(3))
    assert_holds(net, random_net(3).state_dict())


def test_a_new_source_that_cannot_be_read(tmp_path: Path) -> None:
    net = guarded(random_net(0))
    trained = random_net(1)
    plan = paramkit.plan(net, trained)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for source in (7, "nowhere.safetensors", tmp_path, broken, [torch.zeros(1)]):
        with nothing_written(*tensors(net)), pytest.raises(PlanError):
            plan.apply(source)
    plan.apply()
    assert_holds(net, trained.state_dict())


@pytest.mark.parametrize(
    ("new", "kind", "name"),
    [
        ([torch.ones(2), torch.ones(3), torch.ones(3)], PlanError, "got 2 dsts and 3 srcs"),
        ([torch.ones(2)], PlanError, "got 2 dsts and 1 srcs"),
        ([], PlanError, "got 2 dsts and 0 srcs"),
        ([torch.ones(2), torch.ones(1)], PlanError, "srcs[1]"),
        ([torch.ones(2), torch.ones(4)], PlanError, "srcs[1]"),
        ([torch.ones(2).double(), torch.ones(3)], PlanError, "srcs[0]"),
        ([torch.ones(2), "three"], (PlanError, TypeError), "srcs[1]"),
        ([None, torch.ones(3)], (PlanError, TypeError), "srcs[0]"),
        ([torch.ones(2), torch.ones(3, device="meta")], PlanError, "srcs[1]"),
    ],
    ids=str,
)
def test_a_new_list_that_differs(new: list[Any], kind: Any, name: str) -> None:
    dsts = [place(Layout.dense((2,)), torch.float32), place(Layout.dense((3,)), torch.float32)]
    plan = paramkit.plan(dsts, [torch.full((2,), 5.0), torch.full((3,), 6.0)])
    with nothing_written(*dsts), pytest.raises(kind) as caught:
        plan.apply(new)
    assert name in str(caught.value)
    plan.apply()
    assert [d.tolist() for d in dsts] == [[5, 5], [6, 6, 6]]


def test_a_new_source_that_reads_what_is_written() -> None:
    a, b = torch.zeros(2), torch.ones(2)
    with pytest.raises(PlanError, match="reads memory"):
        paramkit.plan([a, b], [b, a])
    plan = paramkit.plan([a, b], [torch.full((2,), 2.0), torch.full((2,), 3.0)])
    with nothing_written(a, b), pytest.raises(PlanError, match="reads memory"):
        plan.apply([b, a])


def test_the_model_as_its_own_new_source() -> None:
    net = random_net(0)
    plan = paramkit.plan(net, random_net(1))
    before = current(net)
    plan.apply(net.state_dict())
    assert_holds(net, before)


# What the plan was made for is no longer there.


def replace_by_assignment(net: Net) -> None:
    net.load_state_dict({n: t.clone() for n, t in net.state_dict().items()}, assign=True)


def set_storage(net: Net) -> None:
    with torch.no_grad():
        net.body[0].weight.set_(torch.zeros(4, 4))  # type: ignore[call-overload]


def empty_storage_and_back(net: Net) -> None:
    storage = net.body[0].weight.untyped_storage()
    kept = torch.zeros(5000)  # another block, so that the new one is elsewhere
    storage.resize_(0)
    keep = torch.empty(4, 4)
    storage.resize_(64)
    del keep, kept


CHANGES: dict[str, tuple[Callable[[Net], object], tuple[str, ...]]] = {
    "load_state_dict(assign=True)": (replace_by_assignment, tuple(set(NAMES) - {"head.weight"})),
    "a new Parameter": (
        lambda net: setattr(net.body[0], "weight", nn.Parameter(torch.zeros(4, 4))),
        ("body.0.weight",),
    ),
    "a Parameter of the same memory": (
        lambda net: setattr(net.body[0], "bias", nn.Parameter(net.body[0].bias.detach())),
        ("body.0.bias",),
    ),
    "a new buffer": (lambda net: setattr(net, "table", net.table.clone()), ("table",)),
    "a new buffer below": (
        lambda net: setattr(net.body[1], "running_mean", torch.zeros(4)),
        ("body.1.running_mean",),
    ),
    "a new submodule": (
        lambda net: net.body.__setitem__(0, nn.Linear(4, 4)),
        ("body.0.weight",),
    ),
    "a new subtree": (
        lambda net: setattr(net, "body", nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))),
        ("body.0.weight",),
    ),
    "a tie cut at its first name": (
        lambda net: setattr(net.embed, "weight", nn.Parameter(torch.zeros(6, 4))),
        ("embed.weight",),
    ),
    "a tie cut at its second name": (
        lambda net: setattr(net.head, "weight", nn.Parameter(torch.zeros(6, 4))),
        ("head.weight",),
    ),
    "double()": (lambda net: net.double(), FLOATS[:1]),
    "to(bfloat16)": (lambda net: net.to(torch.bfloat16), FLOATS[:1]),
    "data of a parameter": (
        lambda net: setattr(net.body[0].weight, "data", torch.zeros(4, 4)),
        ("body.0.weight",),
    ),
    "data in another layout": (
        lambda net: setattr(net.body[0].weight, "data", net.body[0].weight.data.t()),
        ("body.0.weight",),
    ),
    "data of a buffer": (
        lambda net: setattr(net.table, "data", net.table.clone()),
        ("table",),
    ),
    "set_": (set_storage, ("body.0.weight",)),
    "a storage emptied and filled again": (empty_storage_and_back, ("body.0.weight",)),
    "a larger storage": (
        lambda net: net.body[0].weight.untyped_storage().resize_(1 << 16),
        ("body.0.weight",),
    ),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_changed_model_is_refused_and_refresh_repairs(change: str) -> None:
    act, expected = CHANGES[change]
    net, trained = random_net(0), random_net(1)
    plan = paramkit.plan(net, trained)
    old = tensors(net)
    act(net)
    with (
        nothing_written(*tensors(net), *old),
        pytest.raises(PlanError, match="nothing was written") as caught,
    ):
        plan.apply()
    assert set(expected) <= set(named(caught))
    for name in set(expected) - {"head.weight"}:
        assert name.split(".")[-1] in str(caught.value)
    assert "refresh" in str(caught.value)
    with pytest.raises(PlanError):
        plan.verify()
    with nothing_written(*tensors(net), *old), pytest.raises(PlanError):
        plan.apply(random_net(2))

    with nothing_written(*tensors(net)):
        plan.refresh(trained)
    plan.apply()
    assert plan.verify() == []
    assert_holds(net, trained.state_dict())


def test_another_dtype_in_the_same_memory(backend: str) -> None:
    layer = nn.Linear(2, 2, bias=False).half()
    plan = paramkit.plan(layer, {"weight": torch.ones(2, 2).half()})
    layer.weight.data = layer.weight.data.view(torch.bfloat16)
    with nothing_written(layer.weight), pytest.raises(PlanError, match="weight"):
        plan.apply()


def test_a_destination_that_became_its_conjugate(backend: str) -> None:
    dst = torch.zeros(2, dtype=torch.complex64)
    plan = paramkit.plan([dst], [torch.full((2,), 1 + 1j)])
    dst.data = dst.data.conj()
    try:
        plan.apply()
    except PlanError:
        return
    assert dst.resolve_conj().tolist() == [1 + 1j] * 2


def test_a_source_that_became_its_conjugate(backend: str) -> None:
    dst, src = torch.zeros(2, dtype=torch.complex64), torch.full((2,), 1 + 1j)
    plan = paramkit.plan([dst], [src])
    src.data = src.data.conj()
    try:
        plan.apply()
    except PlanError:
        return
    assert dst.tolist() == [1 - 1j] * 2


@pytest.mark.parametrize("name", ["body.0.bias", "embed.weight", "table", "body"])
def test_what_was_deleted(name: str) -> None:
    net, trained = random_net(0), random_net(1)
    plan = paramkit.plan(net, trained)
    old = tensors(net)
    owner, _, key = name.rpartition(".")
    delattr(net.get_submodule(owner), key)
    with nothing_written(*old), pytest.raises(PlanError) as caught:
        plan.apply()
    assert any(found.startswith(name) for found in named(caught))
    if name == "embed.weight":  # its other name is left
        plan.refresh({n: t for n, t in trained.state_dict().items() if n != name})
        plan.apply()
        assert_same_bits(net.head.weight, trained.head.weight)
        return
    with nothing_written(*old), pytest.raises(PlanError, match="unexpected"):
        plan.refresh()
    plan.refresh({n: t for n, t in trained.state_dict().items() if not n.startswith(name)})
    plan.apply()
    assert_holds(net, trained.state_dict())


def test_a_parameter_set_to_none() -> None:
    net = random_net(0)
    plan = paramkit.plan(net, random_net(1))
    net.body[0].bias = None  # type: ignore[assignment]
    with nothing_written(*tensors(net)), pytest.raises(PlanError, match=r"body\.0\.bias"):
        plan.apply()


def test_a_resized_buffer() -> None:
    net, trained = random_net(0), random_net(1)
    plan = paramkit.plan(net, trained)
    net.table.resize_(3, 2)
    with nothing_written(*tensors(net)), pytest.raises(PlanError, match="table"):
        plan.apply()
    with nothing_written(*tensors(net)), pytest.raises(PlanError, match="table"):
        plan.refresh()  # the source has the old shape
    net.table.resize_(2, 3)
    plan.apply()  # a refused refresh changed nothing
    assert_holds(net, trained.state_dict())


def test_an_emptied_storage() -> None:
    net = random_net(0)
    plan = paramkit.plan(net, random_net(1))
    storage = net.body[0].weight.untyped_storage()
    storage.resize_(0)
    for _ in range(2):
        with pytest.raises(PlanError, match=r"body\.0\.weight"):
            plan.apply()
    storage.resize_(64)


def test_a_source_that_is_copy_on_write() -> None:
    """torch's own copy_ reads it, again and again."""
    dst, src = torch.zeros(8), torch.rand(8)
    plan = paramkit.plan([dst], [torch._lazy_clone(src)])
    for _ in range(2):
        dst.zero_()
        plan.apply()
        assert torch.equal(dst, src)


def test_a_storage_shrunk_in_place() -> None:
    """The new block may lie where the old one lay: the address alone does not tell."""
    for role in (0, 1):
        pair = [torch.zeros(64), torch.ones(64)]
        plan = paramkit.plan([pair[0]], [pair[1]])
        storage = pair[role].untyped_storage()
        before = storage.data_ptr()
        storage.resize_(0)
        for _ in range(200):  # until the allocator gives the same block again
            storage.resize_(128)
            if storage.data_ptr() == before:
                break
            storage.resize_(0)
        with pytest.raises(PlanError, match=("dsts", "srcs")[role]):
            plan.apply()
        storage.resize_(256)


def test_long_lists_are_all_looked_at() -> None:
    """Beyond 4096 tensors several threads look at them: a change anywhere is found, every version rises."""
    count = 5000
    rows, values = torch.zeros(count, 3), torch.rand(count, 3)
    dsts = [row.data for row in rows.unbind()]  # each with a version of its own
    srcs = list(values.unbind())
    plan = paramkit.plan(dsts, srcs)
    before = [dst._version for dst in dsts]
    plan.apply()
    assert torch.equal(rows, values)
    assert all(dst._version > version for dst, version in zip(dsts, before, strict=True))
    for index in (0, 2499, 2500, count - 1):
        for tensors, name in ((dsts, "dsts"), (srcs, "srcs")):
            values.add_(1)  # so that a write would be seen
            old = tensors[index].data
            tensors[index].data = old.clone()
            with (
                nothing_written(rows, dsts[index]),
                pytest.raises(PlanError, match=rf"{name}\[{index}\]"),
            ):
                plan.apply()
            tensors[index].data = old
    plan.apply()
    assert torch.equal(rows, values)


@pytest.mark.parametrize("role", ["source", "destination", "new source"])
def test_a_tensor_without_memory(backend: str, role: str) -> None:
    """In a process of its own: torch itself crashes on such a tensor."""
    if backend not in ("native", "cpu:avx2"):
        pytest.skip("the instruction set does not matter")
    code = f"""
import torch, paramkit
empty, other = torch.ones(4), torch.ones(4)
empty.untyped_storage().resize_(0)
with paramkit.backend.force({backend!r}):
    try:
        if {role!r} == "source":
            paramkit.plan([other], [empty]).apply()
        elif {role!r} == "destination":
            paramkit.plan([empty], [other]).apply()
        else:
            paramkit.plan([other], [torch.ones(4)]).apply([empty])
    except (paramkit.PlanError, RuntimeError) as error:
        print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == "refused\n"


def test_a_moved_source_is_named() -> None:
    net, trained = random_net(0), random_net(1)
    plan = paramkit.plan(net, trained)
    trained.body[0].weight.data = torch.zeros(4, 4)
    with (
        nothing_written(*tensors(net)),
        pytest.raises(PlanError, match=r"body\.0\.weight.*source"),
    ):
        plan.apply()
    plan.refresh()
    plan.apply()
    assert_holds(net, trained.state_dict())


def test_swap_tensors_under_a_plan(backend: str) -> None:
    """torch refuses the swap where a plan holds the tensors in C++; a plan in Python notices it.

    Either way `release()` comes first when a model is to be swapped.
    """
    layer, source = nn.Linear(2, 2, bias=False), {"weight": torch.ones(2, 2)}
    plan = paramkit.plan(layer, source)
    other = nn.Parameter(torch.zeros(2, 2))
    if backend == "native":
        torch.utils.swap_tensors(layer.weight, other)
        with nothing_written(layer.weight, other), pytest.raises(PlanError, match="weight"):
            plan.apply()
        plan.refresh()
    else:
        with pytest.raises(RuntimeError, match="use_count"):
            torch.utils.swap_tensors(layer.weight, other)
        plan.apply()
        plan.release()
        torch.utils.swap_tensors(layer.weight, other)
        plan.refresh(source)
    with torch.no_grad():
        layer.weight.zero_()
    plan.apply()
    assert layer.weight.tolist() == [[1, 1], [1, 1]]


def test_conversion_with_swapped_parameters(backend: str) -> None:
    """`module.to()` in torch's swapping mode, with `release()` around it."""
    layer, source = nn.Linear(2, 2, bias=False), {"weight": torch.ones(2, 2)}
    plan = paramkit.plan(layer, source)
    plan.release()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    with nothing_written(layer.weight), pytest.raises(PlanError, match="released"):
        plan.apply()
    plan.refresh(source)
    plan.apply()
    assert layer.weight.dtype is torch.bfloat16
    assert layer.weight.tolist() == [[1, 1], [1, 1]]


# Mappings as models.


def test_a_replaced_value_of_a_mapping() -> None:
    table = {"a": torch.zeros(2), "b": torch.zeros(2)}
    plan = paramkit.plan(table, {"a": torch.ones(2), "b": torch.ones(2)})
    old = table["b"]
    table["b"] = torch.zeros(2)
    with nothing_written(old, *table.values()), pytest.raises(PlanError) as caught:
        plan.apply()
    assert set(named(caught)) == {"b"}
    plan.refresh()
    plan.apply()
    assert table["b"].tolist() == [1, 1]
    del table["a"]
    with nothing_written(table["b"]), pytest.raises(PlanError, match="a "):
        plan.apply()


def test_a_replaced_alias_in_a_mapping() -> None:
    tensor = torch.zeros(2)
    table = {"a": tensor, "b": tensor}
    plan = paramkit.plan(table, {"a": torch.ones(2)})
    table["b"] = torch.zeros(2)
    with nothing_written(*table.values()), pytest.raises(PlanError, match="b"):
        plan.apply()


def test_a_replaced_value_of_a_mapping_that_is_no_dict() -> None:
    table: UserDict[str, Tensor] = UserDict(a=torch.zeros(2))
    plan = paramkit.plan(table, {"a": torch.ones(2)})
    old = table["a"]
    table["a"] = torch.zeros(2)
    with nothing_written(old, table["a"]), pytest.raises(PlanError, match="a "):
        plan.apply()


# Lists: what only the plan keeps alive.


def test_list_of_tensors_that_nobody_else_holds(backend: str) -> None:
    kept = torch.zeros(2)
    dsts = [kept, torch.zeros(3)]
    plan = paramkit.plan(dsts, 1.0)
    plan.apply()
    del dsts
    gc.collect()
    with nothing_written(kept), pytest.raises(PlanError) as caught:
        plan.apply()
    assert set(named(caught)) == {"dsts[1]"}


def test_list_of_parameters_that_the_model_replaced(backend: str) -> None:
    net = random_net(0)
    with torch.no_grad():
        plan = paramkit.plan(list(net.parameters()), 1.0)
        plan.apply()
        replace_by_assignment(net)
        with nothing_written(*tensors(net)), pytest.raises(PlanError, match=r"dsts"):
            plan.apply()


def test_list_of_detached_parameters_that_the_model_replaced(backend: str) -> None:
    layer = nn.Linear(2, 2)
    plan = paramkit.plan(list(layer.state_dict().values()), 1.0)
    plan.apply()
    assert layer.bias.tolist() == [1, 1]
    layer.bias = nn.Parameter(torch.zeros(2))
    with nothing_written(layer.weight, layer.bias), pytest.raises(PlanError, match=r"dsts\[1\]"):
        plan.apply()


@pytest.mark.parametrize("first_asked_in_inference_mode", [False, True])
def test_list_of_views_of_what_the_model_replaced(first_asked_in_inference_mode: bool) -> None:
    if first_asked_in_inference_mode:
        native._orphan_counts.cache_clear()
        with torch.inference_mode():
            held = torch.zeros(2)
            paramkit.plan([held], 1.0).apply()
    layers = [nn.Linear(2, 2) for _ in range(2)]
    with torch.no_grad():
        plan = paramkit.plan([layer.weight[:1] for layer in layers], 1.0)
        plan.apply()
        layers[0].weight = nn.Parameter(torch.zeros(2, 2))
        with pytest.raises(PlanError, match=r"dsts\[0\]"):
            plan.apply()


def test_list_of_views_that_nobody_else_holds() -> None:
    weights = [torch.zeros(2), torch.zeros(3), torch.zeros(2, 2)]
    plan = paramkit.plan([w[:1] for w in weights], 0.5)
    for _ in range(3):
        gc.collect()
        plan.apply()
        assert [w.flatten()[0].item() for w in weights] == [0.5] * 3
        assert [w.flatten()[-1].item() for w in weights[:2]] == [0, 0]
        paramkit.foreach_fill_(weights, 0.0)
    plan = paramkit.plan([w.detach() for w in weights], 2.0)
    plan.apply()
    assert all(bool((w == 2).all()) for w in weights)


def test_list_tensors_held_anywhere_else_are_fine() -> None:
    class Holder:
        pass

    holder, saved = Holder(), torch.zeros(2)
    holder.tensor = torch.zeros(2)  # type: ignore[attr-defined]
    x = torch.ones(2, requires_grad=True)
    loss = (x * saved).sum()  # the graph holds it
    plan = paramkit.plan([holder.tensor, saved], 1.0)  # type: ignore[attr-defined]
    del saved
    plan.apply()
    assert holder.tensor.tolist() == [1, 1]  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("change", ["data", "resize", "set", "storage"])
def test_list_of_moved_tensors(change: str) -> None:
    dsts = [torch.zeros(2), torch.zeros(4)]
    plan = paramkit.plan(dsts, [torch.ones(2), torch.tensor(1.0)])
    if change == "data":
        dsts[1].data = torch.zeros(4)
    elif change == "resize":
        dsts[1].resize_(3)
    elif change == "set":
        dsts[1].set_(torch.zeros(2, 2))
    else:
        dsts[1].untyped_storage().resize_(1 << 16)
    with nothing_written(*dsts), pytest.raises(PlanError) as caught:
        plan.apply()
    assert set(named(caught)) == {"dsts[1]"}
    plan.refresh()
    plan.apply()
    assert all(bool((d == 1).all()) for d in dsts)


# refresh, release, and the model itself.


def test_release_and_refresh() -> None:
    net, trained = random_net(0), random_net(1)
    parameter = weakref.ref(trained.body[0].weight)
    plan = paramkit.plan(net, trained)
    plan.apply()
    del trained
    gc.collect()
    assert parameter() is not None
    plan.release()
    gc.collect()
    assert parameter() is None  # sources, and destinations
    assert "released" in repr(plan)
    for call in (plan.apply, plan.verify, plan.explain, plan.refresh):
        with (
            nothing_written(*tensors(net)),
            pytest.raises(PlanError, match=r"released.*refresh|refresh"),
        ):
            call()
    plan.release()  # again
    trained = random_net(2)
    plan.refresh(trained)
    plan.apply()
    assert_holds(net, trained.state_dict())


def test_release_lets_go_of_destinations() -> None:
    dst = torch.zeros(2)
    gone = weakref.ref(dst)
    plan = paramkit.plan([dst], 1.0)
    plan.release()
    del dst
    assert gone() is None
    with pytest.raises(PlanError, match="released"):
        plan.apply()


def test_refresh_of_a_released_list_plan_says_what_to_do() -> None:
    plan = paramkit.plan([torch.zeros(2)], 1.0)
    plan.release()
    with pytest.raises(PlanError) as caught:
        plan.refresh([torch.ones(2)])
    assert "new plan" in str(caught.value)


def test_a_refused_refresh_leaves_the_plan_as_it_was() -> None:
    net, trained = random_net(0), random_net(1)
    plan = paramkit.plan(net, trained)
    with nothing_written(*tensors(net)), pytest.raises(PlanError, match="missing"):
        plan.refresh({"table": torch.zeros(2, 3, dtype=torch.int64)})
    plan.apply()
    assert_holds(net, trained.state_dict())


@pytest.mark.parametrize("nested", [False, True])
def test_a_plan_does_not_keep_a_model_alive(nested: bool) -> None:
    model: nn.Module = nn.Sequential(nn.Linear(2, 2)) if nested else nn.Linear(2, 2)
    source = model.state_dict()
    plan = paramkit.plan(model, {n: t.clone() for n, t in source.items()})
    gone = weakref.ref(model)
    del model, source
    gc.collect()
    assert gone() is None
    with pytest.raises(PlanError, match="no longer exists"):
        plan.refresh()


def test_a_released_plan_does_not_keep_a_model_alive() -> None:
    model = nn.Linear(2, 2)
    plan = paramkit.plan(model, nn.Linear(2, 2))
    gone = weakref.ref(model)
    plan.release()
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(PlanError, match="no longer exists"):
        plan.refresh(nn.Linear(2, 2))


# A replay runs no Python code per tensor.


class Many(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 2, bias=i % 2 == 0) for i in range(n))


def test_a_replay_runs_no_python_for_a_tensor(backend: str) -> None:
    if backend == "native":
        pytest.skip("about the extension alone")
    model_calls, list_calls = [], []
    for n in (10, 1000):
        model, first, second = Many(n), Many(n).state_dict(), Many(n).state_dict()
        plan = paramkit.plan(model, first)
        plan.apply()
        with paramkit.backend.trace() as trace:
            model_calls.append(
                [python_calls(plan.apply), python_calls(partial(plan.apply, second))]
            )
        assert trace.routes == routes_of(backend, copy=2 * len(first))
        assert_holds(model, second)
        dsts = [torch.zeros(3) for _ in range(n)]
        plan = paramkit.plan(dsts, [torch.ones(3, dtype=torch.float16)] * n)
        plan.apply()
        list_calls.append(python_calls(plan.apply))
    assert model_calls[0] == model_calls[1]
    assert list_calls[0] == list_calls[1]
    assert model_calls[0][0] < 40


@pytest.mark.usefixtures("backend")
def test_a_plan_in_use_is_refused() -> None:
    """Another thread, or the progress callback, may not change what is being written."""
    dsts = [torch.zeros(2)]
    plan = paramkit.plan(dsts, [torch.ones(2)])
    refused = []

    def progress(done: int, total: int) -> None:
        for call in (plan.apply, plan.verify, plan.refresh, lambda: plan.apply([torch.zeros(2)])):
            with pytest.raises(PlanError, match="in use"):
                call()
            refused.append(call)

    plan.apply(progress=progress)
    assert len(refused) == 4
    assert dsts[0].tolist() == [1, 1]
    assert plan.verify() == []


# Autograd.


def test_list_plan_of_a_leaf() -> None:
    plain, leaf = torch.zeros(2), nn.Parameter(torch.zeros(2))
    plan = paramkit.plan([plain, leaf], [torch.ones(2), torch.ones(2)])
    for _ in range(2):
        with nothing_written(plain, leaf), pytest.raises(RuntimeError, match="leaf"):
            plan.apply()
    with torch.no_grad():
        plan.apply()
    assert leaf.requires_grad
    assert leaf.is_leaf
    assert plain.tolist() == leaf.tolist() == [1, 1]
    with nothing_written(plain, leaf), pytest.raises(RuntimeError, match="leaf"):
        plan.apply()
    leaf.requires_grad_(False)  # judged anew each time
    plan.apply()


def test_list_plan_of_a_leaf_names_it() -> None:
    plain, leaf = torch.zeros(2), nn.Parameter(torch.zeros(2))
    plan = paramkit.plan([plain, leaf], 1.0)
    with pytest.raises(RuntimeError, match=r"dsts\[1\]"):
        plan.apply()


def test_list_plan_of_differentiable_sources() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = x * x
    dst, cast, plain = torch.zeros(2, 2), torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    plan = paramkit.plan([dst, cast, plain], [y, x, torch.ones(2)])
    plan.apply()
    (dst.sum() + cast.sum()).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [5, 9]
    assert not plain.requires_grad
    fresh = torch.zeros(2)
    plan = paramkit.plan([fresh], [y])
    with torch.no_grad():
        plan.apply()
    assert not fresh.requires_grad


def test_list_plan_into_part_of_a_graph() -> None:
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    paramkit.plan([y[1:2]], 7.0).apply()
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 0, 2]


def test_every_version_rises_at_every_apply() -> None:
    net = random_net(0)
    model_plan = paramkit.plan(net, random_net(1))
    base = torch.zeros(4, 4)
    dsts = [base[0], base[1:3].t(), torch.zeros(0), torch.zeros(2, dtype=torch.bfloat16)]
    list_plan = paramkit.plan(
        dsts, [torch.ones(4), torch.tensor(1.0), torch.ones(0), torch.ones(2)]
    )
    for plan, written in ((model_plan, tensors(net)), (list_plan, dsts)):
        for call in (plan.apply, plan.apply, lambda p=plan: p.apply(progress=lambda *_: None)):
            before = [t._version for t in written]
            call()
            assert all(t._version > v for t, v in zip(written, before, strict=True))
        before = [t._version for t in written]
        plan.verify()
        plan.explain()
        assert [t._version for t in written] == before


def test_a_refused_apply_raises_no_version() -> None:
    net = random_net(0)
    plan = paramkit.plan(net, random_net(1))
    net.table = net.table.clone()
    before = [t._version for t in tensors(net)]
    with pytest.raises(PlanError):
        plan.apply()
    assert [t._version for t in tensors(net)] == before


def test_model_plan_acts_under_no_grad() -> None:
    layer, source = nn.Linear(2, 2), nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    plan = paramkit.plan(layer, source)
    for _ in range(2):
        plan.apply()
        assert torch.is_grad_enabled()
        assert [p.requires_grad for p in layer.parameters()] == [True, False]
        assert all(p.is_leaf and p.grad_fn is None for p in layer.parameters())
    plan.apply({"weight": source.weight * 2, "bias": source.bias * 2})
    assert layer.weight.grad_fn is None
    assert_same_bits(layer.weight, source.weight.detach() * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_weight_makes_backward_raise(dtype: torch.dtype) -> None:
    layer = nn.Linear(2, 2)
    plan = paramkit.plan(layer, nn.Linear(2, 2, dtype=dtype))
    loss = layer(torch.ones(1, 2, requires_grad=True)).sum()
    plan.apply()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors_in_a_model(backend: str) -> None:
    with torch.inference_mode():
        layer = nn.Linear(2, 2)
    plan = paramkit.plan(layer, nn.Linear(2, 2))
    with (
        nothing_written(layer.weight, layer.bias),
        pytest.raises(RuntimeError, match=r"(?i)inference"),
    ):
        plan.apply()
    with torch.inference_mode():
        plan.apply()
        assert plan.verify() == []


def test_inference_tensors_are_named() -> None:
    layer = nn.Linear(2, 2)
    with torch.inference_mode():
        layer.bias = nn.Parameter(torch.zeros(2), requires_grad=False)
    with pytest.raises(RuntimeError, match="bias"):
        paramkit.plan(layer, nn.Linear(2, 2)).apply()


def test_inference_sources_and_normal_tensors_in_inference_mode() -> None:
    with torch.inference_mode():
        source = nn.Linear(2, 2)
    layer = nn.Linear(2, 2)
    plan = paramkit.plan(layer, source)
    plan.apply()
    before = layer.weight._version
    with torch.inference_mode():
        plan.apply()
    assert layer.weight._version > before
    assert layer.weight.requires_grad


# Casts, unusual tensors, bad ones.


def test_casts_beside_copies(backend: str) -> None:
    pairs = [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float64, torch.float16),
        (torch.int64, torch.float32),
        (torch.float32, torch.int32),
        (torch.int64, torch.bool),
        (torch.float32, torch.float8_e4m3fn),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.complex64),
    ]
    dsts = [
        place(Layout.dense((3, 5), (11, 2) if i % 2 else None), d) for i, (_, d) in enumerate(pairs)
    ]
    srcs = [(torch.arange(15).reshape(3, 5) - 5).to(s) for s, _ in pairs]
    seen = watch(*dsts)
    plan = paramkit.plan(dsts, srcs)
    with paramkit.backend.trace() as trace:
        report = plan.apply()
    for dst, src in zip(dsts, srcs, strict=True):
        assert_same_bits(dst, src.to(dst.dtype))
    seen.assert_only_inside()
    assert plan.verify() == []
    assert sum(trace.routes.values()) == len(pairs)
    assert trace.routes == report.summary.routes
    assert len(report.summary.casts) == 7
    if backend != "native":
        assert {family for family in trace.routes if family != "native"}


def test_conjugate_and_negative_sources() -> None:
    values = torch.tensor([1 + 2j, 3 - 4j])
    dsts = [torch.zeros(2, dtype=torch.complex64), torch.zeros(2), torch.zeros(2), torch.zeros(2)]
    srcs = [values.conj(), values.conj().imag, torch._neg_view(torch.ones(2)), torch.ones(2)]
    plan = paramkit.plan(dsts, srcs)
    plan.apply()
    assert dsts[0].tolist() == [1 - 2j, 3 + 4j]
    assert dsts[1].tolist() == [-2, 4]
    assert dsts[2].tolist() == [-1, -1]
    assert plan.verify() == []
    plan.apply([values, torch.ones(2), torch.ones(2), torch.ones(2)])  # and plain ones instead
    assert dsts[0].tolist() == values.tolist()
    assert dsts[2].tolist() == [1, 1]
    plan.apply(srcs)
    assert dsts[0].tolist() == [1 - 2j, 3 + 4j]
    target = torch.zeros(2, dtype=torch.complex64)
    paramkit.plan([target.conj()], [values]).apply()
    assert target.tolist() == [1 - 2j, 3 + 4j]


BAD: dict[str, tuple[Callable[[], Tensor], str]] = {
    "meta": (lambda: torch.zeros(2, 3, device="meta"), "meta"),
    "sparse": (lambda: torch.zeros(2, 3).to_sparse(), "layout"),
    "sparse csr": (lambda: torch.eye(2, 3).to_sparse_csr(), "layout"),
    "expanded": (lambda: torch.zeros(1, 3).expand(2, 3), "expanded"),
}


@pytest.mark.parametrize("bad", sorted(BAD))
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_destinations_that_cannot_be_written(bad: str) -> None:
    make, kind = BAD[bad]
    good, wrong = place(Layout.dense((2, 3)), torch.float32), make()
    values = torch.ones(2, 3)
    with nothing_written(good), pytest.raises(PlanError, match="nothing was written") as caught:
        paramkit.plan([good, wrong], [values, values])
    assert named(caught) == {"dsts[1]": kind}
    with nothing_written(good), pytest.raises(PlanError) as caught:
        paramkit.plan({"good": good, "wrong": wrong}, {"good": values, "wrong": values})
    assert named(caught) == {"wrong": kind}


@pytest.mark.parametrize("bad", ["meta", "sparse"])
def test_sources_that_cannot_be_read(bad: str) -> None:
    make, kind = BAD[bad]
    good = place(Layout.dense((2, 3)), torch.float32)
    other = place(Layout.dense((2, 3)), torch.float32)
    with nothing_written(good, other), pytest.raises(PlanError) as caught:
        paramkit.plan([good, other], [torch.ones(2, 3), make()])
    assert named(caught) == {"srcs[1]": kind}
    with nothing_written(good, other), pytest.raises(PlanError) as caught:
        paramkit.plan({"a": good, "b": other}, {"a": torch.ones(2, 3), "b": make()})
    assert named(caught) == {"b": kind}


def test_all_problems_of_a_list_come_at_once() -> None:
    dsts = [
        place(Layout.dense((2, 3)), torch.float32),
        torch.zeros(1).expand(4),
        torch.zeros(2, device="meta"),
        place(Layout.dense((2,)), torch.float32),
    ]
    srcs = [torch.ones(3, 2), torch.ones(4), torch.ones(2), torch.ones(2)]
    with nothing_written(dsts[0], dsts[3]), pytest.raises(PlanError) as caught:
        paramkit.plan(dsts, srcs)
    assert named(caught) == {"dsts[0]": "shape", "dsts[1]": "expanded", "dsts[2]": "meta"}
    assert "(3, 2)" in str(caught.value)
    assert "(2, 3)" in str(caught.value)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_conversion_that_torch_does_not_have() -> None:
    """torch's own answer decides; here it is asked with a quantized source."""
    dst = place(Layout.dense((2,)), torch.float32)
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)
    expected = None
    try:
        torch.zeros(2).copy_(quantized)
    except RuntimeError as error:
        expected = error
    if expected is None:
        paramkit.plan([dst], [quantized]).apply()
        assert dst.tolist() == pytest.approx([1, 1])
        return
    with nothing_written(dst), pytest.raises((PlanError, RuntimeError)):
        paramkit.plan([dst], [quantized]).apply()


@pytest.mark.parametrize(
    ("dsts", "srcs", "error", "text"),
    [
        ([torch.zeros(1)], [torch.zeros(1), torch.zeros(1)], PlanError, "1 dsts and 2 srcs"),
        ([torch.zeros(1), 3], [torch.zeros(1)] * 2, TypeError, r"dsts\[1\], got int"),
        ([torch.zeros(1)] * 2, [torch.zeros(1), "x"], TypeError, r"srcs\[1\], got str"),
        ([torch.zeros(1)], {"a": 1}, TypeError, r"srcs\[0\], got dict"),
        ([torch.zeros(1, dtype=torch.uint8)], [1j], RuntimeError, r"srcs\[0\]"),
        ("weights", {}, TypeError, "got str"),
        (torch.zeros(2), {}, TypeError, "got Tensor"),
    ],
    ids=str,
)
def test_wrong_arguments(dsts: Any, srcs: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        paramkit.plan(dsts, srcs)


def test_rules_are_not_for_lists() -> None:
    for options in ({"rules": [Rule("a", "b")]}, {"identity": False}, {"allow_missing": ["a"]}):
        with pytest.raises(TypeError, match="lists are matched by position"):
            paramkit.plan([torch.zeros(1)], [torch.ones(1)], **options)  # type: ignore[arg-type]


# Routes.


def test_routes(backend: str) -> None:
    dsts = [
        torch.zeros(64),
        torch.zeros(8, 8)[:, :5],
        torch.zeros(8, 8),
        torch.zeros(9, 8)[::3, ::3],
        torch.zeros(4, 4),
        torch.zeros(8, 8)[:, 1:2],
        torch.zeros(4, dtype=torch.float16),
    ]
    srcs = [
        torch.ones(64),
        torch.rand(8, 5),
        torch.rand(8, 8).t(),
        torch.rand(6, 6)[::2, ::2],
        torch.tensor(3.0),
        torch.tensor(0.5),
        torch.ones(4),
    ]
    plan = paramkit.plan(dsts, srcs)
    families = ["copy", "rows", "transpose", "general", "fill", "fill", "copy"]
    expected = routes_of(backend, **{f: families.count(f) for f in families})
    with paramkit.backend.trace() as trace:
        report = plan.apply()
    assert trace.routes == expected
    assert trace.casts == (0 if backend == "native" else 1)
    for family in expected:
        assert family in plan.explain()
    assert report.summary.routes == trace.routes
    for dst, src in zip(dsts, srcs, strict=True):
        assert_same_bits(dst, src.to(dst.dtype).expand(dst.shape))


def test_many_kinds_in_one_plan_against_torch() -> None:
    """A thousand writes of every route together, compared with the loop."""
    torch.manual_seed(3)
    dsts, srcs = [], []
    for i in range(1000):
        layout = Layout.dense((1 + i % 5, 1 + i % 3), (1, 7) if i % 2 else (5, 1 + i % 2))
        dtype = (torch.float32, torch.bfloat16, torch.int16)[i % 7 % 3]
        dsts.append(place(layout, dtype))
        srcs.append(
            torch.randint(-50, 50, (1 + i % 5, 1 + i % 3)).to(dtype if i % 4 else torch.float32)
        )
    seen = watch(*dsts)
    plan = paramkit.plan(dsts, srcs)
    plan.apply()
    seen.assert_only_inside()
    assert all(torch.equal(bits(d), bits(s.to(d.dtype))) for d, s in zip(dsts, srcs, strict=True))
    assert plan.verify() == []
