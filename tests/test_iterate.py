"""Sources that are iterators: any order, memory that is used again, and what is known when something is wrong."""

from __future__ import annotations

import itertools
import random
import sys
import types
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import paramkit
from paramkit import PlanError, Rule, TornError
from tests.guards import Layout, assert_same_bits, nothing_written, place, watch

Items = Iterable[tuple[str, Tensor]]


class Net(nn.Module):
    """A fused projection, a tied embedding, a norm with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 12) for _ in range(3))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 9, bias=False)
        self.register_buffer("angles", torch.ones(3), persistent=False)


def guarded() -> Net:
    net = Net()
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data = place(Layout.dense(tensor.shape), tensor.dtype)
    net.head.weight = net.embed.weight
    return net


RULES = [
    *(
        Rule(f"h.{{i}}.{n}.{p}", f"layers.{{i}}.{p}", f"h{e} -> (s h){e}", at={"s": k})
        for k, n in enumerate("qkv")
        for p, e in (("weight", " e"), ("bias", ""))
    ),
    Rule("tok", "embed.weight", rows="overlap", fill="mean"),
    Rule("pooler.*", None),
    Rule(None, "norm.num_batches_tracked", fill=7),
]


def checkpoint(seed: int = 0) -> dict[str, Tensor]:
    seeded = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=seeded)

    out = {"tok": some(6, 4), "pooler.x": some(3), "pooler.deep.y": some(2)}
    for i in range(3):
        for n in "qkv":
            out[f"h.{i}.{n}.weight"], out[f"h.{i}.{n}.bias"] = some(4, 4), some(4)
    for n in ("weight", "bias", "running_mean", "running_var"):
        out[f"norm.{n}"] = some(4)
    return out


def tensors(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]


def assert_filled(net: Net, values: dict[str, Tensor]) -> None:
    for i, layer in enumerate(net.layers):
        for p in ("weight", "bias"):
            fused = torch.cat([values[f"h.{i}.{n}.{p}"] for n in "qkv"])
            assert_same_bits(getattr(layer, p).detach(), fused)
    tok = values["tok"]
    mean = tok.double().mean(0).float().expand(3, 4)
    assert_same_bits(net.embed.weight.detach(), torch.cat([tok, mean]))
    assert net.head.weight is net.embed.weight
    for n in ("weight", "bias", "running_mean", "running_var"):
        assert_same_bits(getattr(net.norm, n).detach(), values[f"norm.{n}"])
    assert net.norm.num_batches_tracked == 7


@pytest.mark.usefixtures("backend")
def test_any_order() -> None:
    values, rng = checkpoint(), random.Random(1)
    for _ in range(4):
        names = list(values)
        rng.shuffle(names)
        net = guarded()
        seen = watch(*tensors(net))
        calls: list[tuple[int, int]] = []
        report = paramkit.transplant(
            net,
            ((n, values[n]) for n in names),
            RULES,
            progress=lambda *c, calls=calls: calls.append(c),
        )
        assert_filled(net, values)
        seen.assert_only_inside()
        assert set(report.summary.dropped) >= {"pooler.x", "pooler.deep.y"}
        assert "embed.weight" in report.summary.names
        assert "angles" not in report.summary.names
        assert calls[-1] == (sum(t.nbytes for t in net.state_dict().values()) - 9 * 4 * 4, 0)
        assert calls == sorted(calls)


@pytest.mark.parametrize("kind", ["items", "map", "generator", "Lazy"])
def test_what_counts_as_an_iterator(kind: str, tmp_path: Path) -> None:
    values = checkpoint()
    items: Any = values.items()
    if kind == "map":
        items = map(tuple, [list(pair) for pair in values.items()])
    elif kind == "generator":
        items = ((n, t.requires_grad_()) for n, t in values.items())
    elif kind == "Lazy":
        save_file(values, tmp_path / "m.safetensors")
        items = iter(paramkit.open_source(tmp_path / "m.safetensors", mmap=False).items())
    net = guarded()
    paramkit.transplant(net, items, RULES)
    assert_filled(net, {n: t.detach() for n, t in values.items()})
    assert all(p.requires_grad and p.is_leaf for p in net.parameters())


def test_one_buffer_for_every_tensor() -> None:
    """The memory may be used again as soon as the next tensor is asked for."""
    values = checkpoint()
    buffer = torch.empty(64)

    def items() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in values.items():
            view = buffer[: tensor.numel()].view(tensor.shape)
            view.copy_(tensor)
            yield name, view
            buffer.fill_(float("nan"))

    net = guarded()
    paramkit.transplant(net, items(), RULES)
    assert_filled(net, values)


def test_no_tensor_is_held() -> None:
    values, alive = checkpoint(), []

    def items() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in values.items():
            assert [n for n, ref in alive if ref() is not None] == []
            made = tensor.clone()
            alive.append((name, weakref.ref(made)))
            yield name, made
            del made

    def tied() -> Iterator[tuple[str, Tensor]]:
        yield from items()

    net = guarded()
    paramkit.transplant(net, tied(), RULES)
    assert len(alive) == len(values)
    assert_filled(net, values)


def test_ties_by_value() -> None:
    net, table = guarded(), torch.randn(9, 4)
    items = [("embed.weight", table), ("head.weight", table.clone())]
    kept = {"allow_missing": ["layers.*", "norm.*"]}
    paramkit.transplant(net, iter(items), **kept)
    assert_same_bits(net.head.weight.detach(), table)
    net = guarded()
    with pytest.raises(TornError, match="two different values") as caught:
        paramkit.transplant(net, iter([items[0], ("head.weight", table + 1)]), **kept)
    assert caught.value.findings[0].kind == "conflict"
    assert_same_bits(net.embed.weight.detach(), table)  # the first one
    snapshot = guarded()
    with nothing_written(*tensors(snapshot)), pytest.raises(PlanError, match="two different"):
        paramkit.transplant(
            snapshot, iter([items[0], ("head.weight", table + 1)]), atomic=True, **kept
        )
    half = [("embed.weight", table), ("head.weight", table.double())]
    paramkit.transplant(guarded(), iter(half), **kept)  # equal as the destination's dtype


def bad_items() -> dict[str, tuple[list[Any], str]]:
    ok = list(checkpoint().items())
    return {
        "no pair": ([*ok[:5], "surprise"], "item 5"),
        "a list": ([*ok[:5], ["tok", torch.ones(6, 4)]], "item 5"),
        "no name": ([*ok[:5], (3, torch.ones(1))], "item 5"),
        "no tensor": ([*ok[:5], ("h.1.q.bias", [1.0])], "item 5"),
        "twice": ([*ok[:5], ok[4]], ok[4][0]),
        "unknown": ([*ok, ("stranger", torch.ones(2))], "stranger"),
        "target unknown": ([*ok[:5], ("h.9.q.bias", torch.ones(4))], "layers.9.bias"),
        "shape": ([*ok[:5], ("norm.weight", torch.ones(5))], "norm.weight"),
        "part's shape": ([*ok[:5], ("h.2.v.weight", torch.ones(5, 4))], "layers.2.weight"),
        "dtype": ([*ok[:5], ("norm.weight", torch.ones(4, dtype=torch.complex64))], "norm.weight"),
        "missing": (ok[:-1], "norm.running_var"),
        "part missing": ([i for i in ok if i[0] != "h.1.k.bias"], "layers.1.bias"),
        "meta": ([*ok[:5], ("norm.weight", torch.ones(4, device="meta"))], "norm.weight"),
        "sparse": ([*ok[:5], ("norm.weight", torch.ones(4).to_sparse())], "norm.weight"),
    }


@pytest.mark.parametrize("bad", list(bad_items()))
def test_what_shows_on_the_way(bad: str) -> None:
    items, name = bad_items()[bad]
    net = guarded()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    values = checkpoint()
    with pytest.raises(TornError, match="the model is torn") as caught:
        paramkit.transplant(net, iter(items), RULES)
    assert name in {f.name for f in caught.value.findings}
    state = caught.value.state
    assert state is not None
    assert paramkit.torn(net) is state
    good = guarded()
    paramkit.transplant(good, values, RULES)
    want, now = good.state_dict(), net.state_dict()
    for n in state.written:
        assert_same_bits(now[n], want[n], what=n)
    fused = {f"layers.{i}.{p}" for i in range(3) for p in ("weight", "bias")}
    for n in set(state.unwritten) - fused:
        assert_same_bits(now[n], before[n], what=n)
    assert {*state.written, *state.unwritten} == {*want} - {"head.weight"}
    whole = {n for n in want if torch.equal(now[n], want[n])}
    assert set(state.written) == whole - {"head.weight"}

    net = guarded()
    with nothing_written(*tensors(net)), pytest.raises(PlanError) as kept:
        paramkit.transplant(net, iter(items), RULES, atomic=True)
    assert not isinstance(kept.value, TornError)
    assert paramkit.torn(net) is None


def test_a_later_success_clears_the_mark() -> None:
    """What is left alone on purpose need not be written for that."""
    values, net = checkpoint(), guarded()
    some = {n: t for n, t in values.items() if not n.startswith("norm.")}
    kept = {"allow_missing": ["norm.*"]}
    broken = {**some, "h.2.v.bias": torch.ones(9)}
    rules = RULES[:-1]
    with pytest.raises(TornError):
        paramkit.transplant(net, iter(broken.items()), rules, **kept)
    assert paramkit.torn(net) is not None
    paramkit.transplant(net, iter(some.items()), rules, **kept)
    assert paramkit.torn(net) is None


def test_the_first_item_is_wrong_and_nothing_was_written() -> None:
    net = guarded()
    rules = RULES[:-1]  # without the fill, which is done at once
    for items in ([("stranger", torch.ones(2))], [("tok", torch.ones(6, 5))], [7], []):
        with nothing_written(*tensors(net)), pytest.raises(PlanError) as caught:
            paramkit.transplant(net, iter(items), rules)
        assert not isinstance(caught.value, TornError)
    assert paramkit.torn(net) is None


def never() -> Iterator[tuple[str, Tensor]]:
    """Items that are not asked for."""
    pytest.fail("it was asked for an item")
    yield "", torch.ones(1)


@pytest.mark.parametrize("option", ["progress", "requires_grad"])
def test_options_of_another_type(option: str) -> None:
    with pytest.raises(TypeError, match=f"{option} must be"):
        paramkit.transplant(nn.Linear(3, 2), never(), **{option: "yes"})


def test_a_model_of_inference_tensors_is_told_before_the_first_item() -> None:
    with torch.inference_mode():
        net = nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match="weight, bias: Inplace update to inference tensor"):
        paramkit.transplant(net, never())
    with torch.inference_mode():
        paramkit.transplant(net, iter({"weight": torch.ones(2, 3), "bias": torch.ones(2)}.items()))
        assert net.weight.sum() == 6


def test_what_is_no_leaf_is_told_before_the_first_item() -> None:
    model = {"leaf": torch.ones(3), "inner": torch.ones(3, requires_grad=True) * 2}
    with pytest.raises(PlanError, match="only be set on leaves") as caught:
        paramkit.transplant(model, never(), requires_grad=False)
    assert [f.name for f in caught.value.findings] == ["inner"]


def test_a_gathered_module_is_told_before_the_first_item(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FSDP's are between a forward and the next reshard: tests/test_sharded_plans.py has real ones."""
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", types.ModuleType("fsdp"))
    net = nn.Linear(3, 2)
    group = types.SimpleNamespace(is_unsharded=True)
    net._get_fsdp_state = lambda: types.SimpleNamespace(_fsdp_param_group=group)
    with pytest.raises(PlanError, match="gathered now"):
        paramkit.transplant(net, never())
    group.is_unsharded = False
    paramkit.transplant(net, iter({"weight": torch.ones(2, 3), "bias": torch.ones(2)}.items()))


@pytest.mark.parametrize(
    ("item", "found"),
    [
        (7, ("item 0", "int", "a pair (name, tensor)")),
        (("weight", 7), ("item 0", "(str, int)", "a name (str) and a tensor")),
        ((7, torch.ones(2, 3)), ("item 0", "(int, Tensor)", "a name (str) and a tensor")),
    ],
)
def test_items_that_are_none(item: Any, found: tuple[str, str, str]) -> None:
    net = nn.Linear(3, 2)
    with nothing_written(*net.parameters()), pytest.raises(PlanError) as caught:
        paramkit.transplant(net, iter([item]))
    (finding,) = caught.value.findings
    assert (finding.name, finding.got, finding.expected) == found


def test_a_name_that_comes_twice() -> None:
    net = nn.Linear(3, 2)
    items = [("weight", torch.ones(2, 3)), ("weight", torch.ones(2, 3))]
    with nothing_written(*net.parameters()), pytest.raises(PlanError) as caught:
        paramkit.transplant(net, iter(items), atomic=True)
    (finding,) = caught.value.findings
    assert (finding.name, finding.got) == ("weight", "the same name again")


@pytest.mark.parametrize("value", [torch.ones(2, 5), torch.ones(2, 3).to_sparse()])
def test_after_a_wrong_item_no_other_is_asked_for(value: Tensor) -> None:
    net = nn.Linear(3, 2)
    with nothing_written(*net.parameters()), pytest.raises(PlanError) as caught:
        paramkit.transplant(net, itertools.chain([("weight", value)], never()))
    assert [f.name for f in caught.value.findings] == ["weight"]


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("error", [OSError("the socket is gone"), KeyboardInterrupt()])
def test_the_generator_fails(error: BaseException, atomic: bool) -> None:
    values, net = checkpoint(), guarded()

    def items() -> Iterator[tuple[str, Tensor]]:
        for k, pair in enumerate(values.items()):
            if k == 6:
                raise error
            yield pair

    snapshot = watch(*tensors(net))
    wanted = type(error) if atomic or not isinstance(error, Exception) else TornError
    with pytest.raises(wanted) as caught:
        paramkit.transplant(net, items(), RULES, atomic=atomic)
    if atomic:
        assert caught.value is error
        snapshot.assert_unwritten()
        assert paramkit.torn(net) is None
        return
    state = paramkit.torn(net)
    assert state is not None
    assert "embed.weight" in state.written
    assert type(error).__name__ in state.reason
    snapshot.assert_only_inside()


def test_nothing_at_all() -> None:
    assert paramkit.transplant(nn.Module(), iter(())).summary.writes == 0
    net = guarded()
    with nothing_written(*tensors(net)), pytest.raises(PlanError) as caught:
        paramkit.transplant(net, iter(()))
    assert {f.kind for f in caught.value.findings} == {"missing"}
    assert len(caught.value.findings) == len(net.state_dict()) - 1  # a tie counts once


def test_a_source_in_the_memory_of_the_model() -> None:
    net = guarded()
    own = net.norm.weight.detach()
    for view in (own, own.flip(0)[:0].new_tensor([]), own[1:], net.embed.weight[:, 0]):
        if view.numel() == 0:
            continue
        with nothing_written(*tensors(net)), pytest.raises(PlanError, match="memory of a dest"):
            paramkit.transplant(
                net,
                iter([("x", view)]),
                [Rule("x", "norm.bias")][: view.numel() == 4],
                allow_missing=["*"],
                allow_unexpected=["*"],
            )


def test_destinations_that_share_memory() -> None:
    flat = torch.zeros(8)
    model = {"a": flat[:5], "b": flat[3:]}
    items = [("a", torch.ones(5)), ("b", torch.ones(5) * 2)]
    for atomic in (True, False):
        with pytest.raises(PlanError, match="write one element") as caught:
            paramkit.transplant(model, iter(items), atomic=atomic)
        assert {f.kind for f in caught.value.findings} == {"conflict"}
        if atomic:
            assert not flat.any()


def test_overflow() -> None:
    net = nn.Linear(3, 2, dtype=torch.float16)
    values = {"weight": torch.ones(2, 3), "bias": torch.tensor([1.0, 1e6])}
    paramkit.transplant(net, iter(values.items()))
    assert net.bias[1].isinf()
    net = nn.Linear(3, 2, dtype=torch.float16)
    with pytest.raises(TornError, match=r"1e\+06|1000000") as caught:
        paramkit.transplant(net, iter(values.items()), overflow="error")
    assert [f.name for f in caught.value.findings] == ["bias"]
    assert caught.value.state is not None
    assert caught.value.state.written == ("weight",)
    assert not net.bias.isinf().any()
    with nothing_written(net.weight, net.bias), pytest.raises(PlanError):
        paramkit.transplant(net, iter(values.items()), overflow="error", atomic=True)


def test_requires_grad_and_the_cast_policy() -> None:
    net = nn.Linear(3, 2)
    values = {"weight": torch.ones(2, 3, dtype=torch.float64), "bias": torch.ones(2)}
    report = paramkit.transplant(net, iter(values.items()), requires_grad=False)
    assert not any(p.requires_grad for p in net.parameters())
    assert [str(c) for c in report.summary.casts] == ["weight: float64 -> float32"]
    with nothing_written(net.weight), pytest.raises(PlanError) as caught:
        paramkit.transplant(net, iter(values.items()), casting="safe")
    assert [(f.name, f.kind) for f in caught.value.findings] == [("weight", "dtype")]


def test_dropped_tensors_need_no_memory_or_layout() -> None:
    net = nn.Linear(3, 2)
    items = [
        ("old.sparse", torch.eye(3).to_sparse()),
        ("old.meta", torch.ones(3, device="meta")),
        ("weight", torch.ones(2, 3)),
        ("bias", torch.ones(2)),
    ]
    report = paramkit.transplant(net, iter(items), [Rule("old.*", None)])
    assert set(report.summary.dropped) == {"old.sparse", "old.meta"}
    assert bool(net.weight.all())


@pytest.mark.usefixtures("backend")
def test_what_no_item_reaches_can_be_filled_or_kept() -> None:
    values = {n: t for n, t in checkpoint().items() if not n.startswith("norm.")}
    for rule in (Rule(None, "norm.*", fill=3), Rule(None, "norm.*")):
        net = guarded()
        before = net.norm.running_var.clone()
        seen = watch(*tensors(net))
        report = paramkit.transplant(net, iter(values.items()), [*RULES[:-1], rule])
        assert_same_bits(net.norm.running_var, before if rule.fill is None else before * 0 + 3)
        assert ("norm.running_var" in report.summary.kept) == (rule.fill is None)
        seen.assert_only_inside()


def test_no_device_for_iterators() -> None:
    with torch.device("meta"):
        net = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="to_empty"):
        paramkit.transplant(net, iter(()), device="cpu")
    assert net.weight.is_meta
    with pytest.raises(PlanError) as caught:
        paramkit.transplant(net, iter([("weight", torch.ones(2, 3))]))
    assert "meta" in {f.kind for f in caught.value.findings}
