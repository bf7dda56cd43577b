"""Transplants end to end: rules on small models, against the same done by hand with torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import paramkit
from paramkit import PlanError, Rule, SourceError
from tests.guards import Layout, assert_same_bits, nothing_written, place, watch

pytestmark = pytest.mark.usefixtures("backend")

WIDTH, LAYERS, EXPERTS = 8, 3, 2


def tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def guarded(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Every tensor of the model a view inside a storage of its own; every other one strided."""
    for k, tensor in enumerate(tensors(model)):
        kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        strides = None
        if k % 2 and tensor.dim() == 2:
            strides = (1, tensor.shape[0] + 3)
        tensor.data = place(Layout.dense(tensor.shape, strides), kind)
    return model


def randomized(model: nn.Module) -> nn.Module:
    for tensor in tensors(model):
        tensor.detach().copy_(torch.randint(-64, 64, tensor.shape))
    return model


class Separate(nn.Module):
    """Query, key and value apart, experts apart, one projection stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.Module() for _ in range(LAYERS))
        for layer in self.h:
            for name in ("q", "k", "v"):
                setattr(layer, name, nn.Linear(WIDTH, WIDTH))
            layer.up = nn.Module()
            layer.up.weight = nn.Parameter(torch.zeros(WIDTH, 2 * WIDTH))  # in x out
            layer.experts = nn.ModuleList(nn.Linear(WIDTH, 4, bias=False) for _ in range(EXPERTS))
            layer.gate_up = nn.Linear(WIDTH, 2 * 6, bias=False)
        self.norm = nn.BatchNorm1d(WIDTH)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in range(LAYERS))
        for layer in self.layers:
            layer.qkv = nn.Linear(WIDTH, 3 * WIDTH)
            layer.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
            layer.experts = nn.Parameter(torch.zeros(EXPERTS, 4, WIDTH))
            layer.gate = nn.Linear(WIDTH, 6, bias=False)
            layer.down = nn.Linear(WIDTH, 6, bias=False)
        self.norm = nn.BatchNorm1d(WIDTH)


RULES = [
    *(
        Rule(f"h.{{i}}.{n}.weight", "layers.{i}.qkv.weight", "h e -> (s h) e", at={"s": k})
        for k, n in enumerate("qkv")
    ),
    *(
        Rule(f"h.{{i}}.{n}.bias", "layers.{i}.qkv.bias", "h -> (s h)", at={"s": k})
        for k, n in enumerate("qkv")
    ),
    Rule("h.{i}.up.weight", "layers.{i}.up.weight", "i o -> o i"),
    Rule("h.{i}.experts.{e}.weight", "layers.{i}.experts", "o i -> e o i"),
    Rule("h.{i}.gate_up.weight", "layers.{i}.gate.weight", "(s o) i -> o i", at={"s": 0}),
    Rule("h.{i}.gate_up.weight", "layers.{i}.down.weight", "(s o) i -> o i", at={"s": 1}),
]


def by_hand(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The fused state dict, made the usual way."""
    out = {n: t for n, t in source.items() if n.startswith("norm.")}
    for i in range(LAYERS):
        h, layer = f"h.{i}", f"layers.{i}"
        for part in ("weight", "bias"):
            out[f"{layer}.qkv.{part}"] = torch.cat([source[f"{h}.{n}.{part}"] for n in "qkv"])
        out[f"{layer}.up.weight"] = source[f"{h}.up.weight"].t()
        out[f"{layer}.experts"] = torch.stack(
            [source[f"{h}.experts.{e}.weight"] for e in range(EXPERTS)]
        )
        gate, down = source[f"{h}.gate_up.weight"].chunk(2)
        out[f"{layer}.gate.weight"], out[f"{layer}.down.weight"] = gate, down
    return out


def assert_holds(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert_same_bits(tensor, expected[name].to(tensor.dtype), what=name)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["module", "mapping", "strided", "file"])
def test_fuse_split_stack_and_transpose(
    kind: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    separate, model = randomized(Separate()), guarded(Fused(), dtype)
    identity = [(id(t), t.data_ptr(), t.dtype, t.requires_grad) for t in tensors(model)]
    source: Any = separate
    if kind == "mapping":
        source = separate.state_dict()
    elif kind == "strided":
        source = {}
        for name, tensor in separate.state_dict().items():
            wide = torch.zeros((*tensor.shape[::-1], 2), dtype=tensor.dtype)
            view = wide.select(-1, 1).permute(tuple(reversed(range(tensor.dim()))))
            source[name] = view.copy_(tensor)
    elif kind == "file":
        source = tmp_path / "model.safetensors"
        save_file(separate.state_dict(), source)
    expected = by_hand(separate.state_dict())
    seen = watch(*tensors(model))
    versions = [t._version for t in tensors(model)]

    with paramkit.backend.trace() as trace:
        report = paramkit.transplant(model, source, RULES)

    assert_holds(model, expected)
    seen.assert_only_inside()
    assert identity == [(id(t), t.data_ptr(), t.dtype, t.requires_grad) for t in tensors(model)]
    assert all(t._version > v for t, v in zip(tensors(model), versions, strict=True))
    assert report.summary.writes == LAYERS * (6 + 1 + EXPERTS + 2) + 5
    assert report.summary.elements == sum(t.numel() for t in tensors(model))
    assert len(report.summary.casts) == (0 if dtype is None else report.summary.writes - 1)
    assert sum(trace.routes.values()) == report.summary.writes
    if report.summary.backend == "cpu" and dtype is None:
        assert "native" not in trace.routes


def test_back_again() -> None:
    """Split what was fused, unstack what was stacked: the way back gives the first model."""
    fused, first = guarded(Fused()), randomized(Separate())
    paramkit.transplant(fused, first, RULES)
    back = [
        *(
            Rule(f"layers.{{i}}.qkv.{p}", f"h.{{i}}.{n}.{p}", f"(s h){e} -> h{e}", at={"s": k})
            for k, n in enumerate("qkv")
            for p, e in (("weight", " e"), ("bias", ""))
        ),
        Rule("layers.{i}.up.weight", "h.{i}.up.weight", "o i -> i o"),
        Rule("layers.{i}.experts", "h.{i}.experts.{e}.weight", "e o i -> o i"),
        Rule("layers.{i}.gate.weight", "h.{i}.gate_up.weight", "o i -> (s o) i", at={"s": 0}),
        Rule("layers.{i}.down.weight", "h.{i}.gate_up.weight", "o i -> (s o) i", at={"s": 1}),
    ]
    second = guarded(Separate())
    seen = watch(*tensors(second))
    paramkit.transplant(second, fused, back)
    assert_holds(second, first.state_dict())
    seen.assert_only_inside()


def test_permuted_heads() -> None:
    """Rotary layout: pairs side by side become halves."""
    heads, dim = 4, 6
    model = {"q": place(Layout.dense((heads * dim, 5)), torch.float32)}
    source = {"q": torch.rand(heads * dim, 5)}
    seen = watch(model["q"])
    rule = Rule("q", "q", "(h d two) e -> (h two d) e", two=2, h=heads)
    paramkit.transplant(model, source, [rule])
    view = source["q"].view(heads, dim // 2, 2, 5)
    assert_same_bits(model["q"], view.transpose(1, 2).reshape(heads * dim, 5))
    seen.assert_only_inside()


def test_grouped_query_interleave() -> None:
    """A range on a one-sided axis: r queries, then one key and one value for each group."""
    g, r, d, e = 2, 3, 4, 5
    source = {"q": torch.rand(g * r * d, e), "k": torch.rand(g * d, e), "v": torch.rand(g * d, e)}
    model = {"qkv": place(Layout.dense((g * (r + 2) * d, e)), torch.float32)}
    seen = watch(model["qkv"])
    rules = [
        Rule("q", "qkv", "(g r d) e -> (g s d) e", at={"s": "0:r"}, g=g, d=d),
        Rule("k", "qkv", "(g d) e -> (g s d) e", at={"s": r}, g=g, d=d),
        Rule("v", "qkv", "(g d) e -> (g s d) e", at={"s": -1}, g=g, d=d),
    ]
    paramkit.transplant(model, source, rules)
    expected = torch.cat(
        [
            source["q"].view(g, r, d, e),
            source["k"].view(g, 1, d, e),
            source["v"].view(g, 1, d, e),
        ],
        dim=1,
    ).reshape(-1, e)
    assert_same_bits(model["qkv"], expected)
    seen.assert_only_inside()


def test_the_outputs_are_the_same() -> None:
    """Three linear layers and the fused attention compute the same."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    parts = nn.ModuleDict({n: nn.Linear(8, 8) for n in ("q", "k", "v", "o")})
    rules = [
        *(
            Rule(f"{n}.{p}", f"in_proj_{p}", f"h{e} -> (s h){e}", at={"s": k})
            for k, n in enumerate("qkv")
            for p, e in (("weight", " e"), ("bias", ""))
        ),
        Rule("o.{p}", "out_proj.{p}"),
    ]
    paramkit.transplant(attention, parts, rules)
    x = torch.rand(2, 3, 8)
    q, k, v = (parts[n](x).view(2, 3, 2, 4).transpose(1, 2) for n in "qkv")
    mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 3, 8)
    torch.testing.assert_close(attention(x, x, x)[0], parts["o"](mixed))


def test_tied_weights_are_written_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

    model, source = Tied(), Tied()
    report = paramkit.transplant(model, source)
    assert model.head.weight is model.embed.weight
    assert report.summary.writes == 1
    assert_same_bits(model.embed.weight, source.head.weight)
    values = {"head.weight": torch.ones(6, 4)}
    paramkit.transplant(model, values)
    assert bool((model.embed.weight == 1).all())
    two = {"head.weight": torch.ones(6, 4), "embed.weight": torch.zeros(6, 4)}
    with nothing_written(model.embed.weight), pytest.raises(PlanError, match="tied"):
        paramkit.transplant(model, two)


def test_allow_lists_and_drops() -> None:
    model = {"a": torch.zeros(2), "b": torch.full((2,), 9.0), "c.0": torch.full((1,), 9.0)}
    source = {
        "a": torch.ones(2),
        "old.x": torch.ones(1),
        "old.y": torch.ones(1),
        "z": torch.ones(1),
    }
    report = paramkit.transplant(
        model,
        source,
        [Rule("z", None)],
        allow_missing=["b", "c.{i}"],
        allow_unexpected=["old.*"],
    )
    assert model["a"].tolist() == [1, 1]
    assert model["b"].tolist() == [9, 9]
    assert model["c.0"].tolist() == [9]
    assert set(report.summary.kept) == {"b", "c.0"}
    assert set(report.summary.dropped) == {"old.x", "old.y", "z"}


def test_progress_ends_at_the_total() -> None:
    calls: list[tuple[int, int]] = []
    model = guarded(Fused())
    paramkit.transplant(
        model, randomized(Separate()), RULES, progress=lambda *call: calls.append(call)
    )
    total = sum(t.nbytes for t in tensors(model))
    assert calls[-1] == (total, total)


# requires_grad.


def test_freezing_freezes_only_what_was_written() -> None:
    model, source = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Linear(2, 2)
    source.bias.requires_grad_(False)
    report = paramkit.transplant(
        model, source, [Rule("{p}", "0.{p}")], allow_missing=["1.*"], requires_grad=False
    )
    assert set(report.summary.names) == {"0.weight", "0.bias"}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        "0.weight": False,
        "0.bias": False,
        "1.weight": True,
        "1.bias": True,
    }
    paramkit.transplant(
        model, {"0.weight": torch.ones(2, 2)}, allow_missing=["*"], requires_grad=True
    )
    assert [p.requires_grad for p in model[0].parameters()] == [True, False]


def test_requires_grad_stays_as_it_is_by_default() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    paramkit.transplant(model, nn.Linear(2, 2))
    assert [p.requires_grad for p in model.parameters()] == [True, False]
    assert all(p.is_leaf and p.grad_fn is None for p in model.parameters())


def test_integer_parameters_can_be_frozen_along() -> None:
    model = nn.Linear(2, 2)
    model.register_parameter("table", nn.Parameter(torch.zeros(2).long(), requires_grad=False))
    source = {n: torch.ones_like(t) for n, t in model.state_dict().items()}
    paramkit.transplant(model, source, requires_grad=True)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        "weight": True,
        "bias": True,
        "table": False,
    }


def test_buffers_never_require_grad() -> None:
    model = nn.BatchNorm1d(2)
    paramkit.transplant(model, nn.BatchNorm1d(2), requires_grad=True)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(b.requires_grad for b in model.buffers())


def test_nothing_is_frozen_on_an_error() -> None:
    model = nn.Linear(2, 2)
    with nothing_written(*model.parameters()), pytest.raises(PlanError):
        paramkit.transplant(model, {"weight": torch.ones(2, 2)}, requires_grad=False)
    assert all(p.requires_grad for p in model.parameters())


def test_a_transplant_under_a_graph_is_noticed() -> None:
    model = nn.Linear(2, 2)
    loss = model(torch.ones(1, 2, requires_grad=True)).sum()
    paramkit.transplant(model, nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# All or nothing.


class Troubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 6, bias=False) for _ in range(48))
        self.fused = nn.Linear(4, 8)
        self.good = nn.Linear(4, 4)
        self.lost = nn.Parameter(torch.zeros(3))
        self.nowhere = nn.Parameter(torch.zeros(3, device="meta"))
        self.register_buffer("wide", torch.zeros(1, 4).expand(3, 4))
        self.register_buffer("holes", torch.zeros(3, 4).to_sparse())
        self.twice = nn.Parameter(torch.zeros(4))


def test_every_problem_in_one_error() -> None:
    model = Troubled()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in ("nowhere", "wide", "holes"):
            tensor.data = place(Layout.dense(tensor.shape), tensor.dtype)
    source = {f"layers.{i}.weight": torch.ones(4, 6) for i in range(48)}
    source |= {
        "f": torch.ones(4, 4),
        "fused.bias": torch.ones(8),
        "good.weight": torch.ones(4, 4),
        "good.bais": torch.ones(4),
        "nowhere": torch.ones(3),
        "wide": torch.ones(3, 4),
        "holes": torch.ones(3, 4),
        "more": torch.ones(1),
        "x": torch.ones(4),
        "y": torch.ones(2),
        "away": torch.ones(1, device="meta"),
    }
    rules = [
        Rule("f", "fused.weight", "o i -> (s o) i", at={"s": 0}),
        Rule("nothing.like.this", "good.weight"),
        Rule("x", "twice"),
        Rule("y", "twice", "h -> (s h)", at={"s": 1}),
        Rule("away", "fused.wieght"),
    ]
    written = [t for n, t in model.state_dict().items() if n not in ("nowhere", "holes")]
    with (
        nothing_written(*written),
        pytest.raises(PlanError, match="nothing was written") as caught,
    ):
        paramkit.transplant(model, source, rules, allow_missing=["mispelt"])
    found = {(f.name, f.kind) for f in caught.value.findings}
    assert {(f"layers.{i}.weight", "shape") for i in range(48)} <= found
    assert {
        ("fused.weight", "kept"),
        ("good.bias", "missing"),
        ("good.bais", "unexpected"),
        ("lost", "missing"),
        ("nowhere", "meta"),
        ("wide", "expanded"),
        ("holes", "layout"),
        ("more", "unexpected"),
        ("twice", "conflict"),
        ("fused.wieght", "unknown"),
    } <= found
    assert sum(kind == "rule" for _, kind in found) == 2
    text = str(caught.value)
    for part in (
        "layers.{0..47}.weight",
        "(4, 6)",
        "(6, 4)",
        'did you mean "i o -> o i"?',
        "did you mean good.bias?",
        "nothing.like.this",
        'allow_missing "mispelt"',
        "did you mean fused.weight?",
    ):
        assert part in text
    assert len(text.splitlines()) < 40  # the layers are one line


@pytest.mark.parametrize("bad", ["missing", "unexpected", "shape", "meta", "conflict", "type"])
def test_one_problem_among_many_good_names(bad: str) -> None:
    model = guarded(Fused())
    source: dict[str, Any] = by_hand(randomized(Separate()).state_dict())
    name = "layers.2.qkv.weight"
    rules: list[Rule] = []
    if bad == "missing":
        del source[name]
    elif bad == "unexpected":
        source["layers.2.qkv.wieght"] = source[name].clone()
    elif bad == "shape":
        source[name] = source[name][:-1]
    elif bad == "meta":
        source[name] = source[name].to("meta")
    elif bad == "conflict":
        source["again"] = source[name] + 1
        rules = [Rule(name, name), Rule("again", name)]
    else:
        source[name] = source[name].numpy()
    with nothing_written(*tensors(model)), pytest.raises(PlanError, match=r"layers\.2\.qkv"):
        paramkit.transplant(model, source, rules)


def test_overlapping_rules_are_refused_with_both_named() -> None:
    model = {"w": place(Layout.dense((6, 2)), torch.float32)}
    source = {"a": torch.ones(4, 2), "b": torch.ones(2, 2)}
    rules = [
        Rule("a", "w", "(s o) i -> (t o) i", at={"t": "0:s"}, o=1),
        Rule("b", "w", "(s o) i -> (t o) i", at={"t": "3:5"}, o=1),
    ]
    with nothing_written(model["w"]), pytest.raises(PlanError) as caught:
        paramkit.transplant(model, source, rules, allow_missing=["w"])
    assert "w <- a" in str(caught.value)
    assert "w <- b" in str(caught.value)


def test_a_source_that_is_the_destination_transposed() -> None:
    model = nn.Linear(4, 4, bias=False)
    with nothing_written(model.weight), pytest.raises(PlanError, match="reads memory"):
        paramkit.transplant(model, model.state_dict(), [Rule("weight", "weight", "i o -> o i")])
    before = model.weight.detach().clone()
    paramkit.transplant(model, model)  # onto itself: nothing changes
    assert_same_bits(model.weight.detach(), before)


@pytest.mark.parametrize("call", [paramkit.transplant, paramkit.plan])
def test_none_is_named(call: Any) -> None:
    with pytest.raises(SourceError, match=r"source \| type \| got None \| expected an nn.Module"):
        call(nn.Linear(2, 2), None)
    with pytest.raises(
        TypeError, match=r"model must be an nn\.Module or a mapping.*, got NoneType"
    ):
        call(None, nn.Linear(2, 2))
