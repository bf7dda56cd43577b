"""Resolving: the right writes, and every problem in one error with nothing written."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from paramkit import PlanError, Rule
from paramkit.destinations import destinations_of
from paramkit.resolve import Resolved, resolve


def run(resolved: Resolved) -> None:
    """Perform the writes by torch alone."""
    with torch.no_grad():
        for w in resolved.writes:
            dst, src = resolved.destinations[w.dst].tensor, resolved.source_tensors[w.src]
            target = dst.as_strided(w.sizes, w.dst_strides, dst.storage_offset() + w.dst_offset)
            target.copy_(
                src.as_strided(w.sizes, w.src_strides, src.storage_offset() + w.src_offset)
            )


def problems(model: object, source: object, rules: object = (), **options: object) -> PlanError:
    """The error of a resolve that must fail, after checking that no byte of the model changed."""
    tensors = dict(model.state_dict()) if isinstance(model, nn.Module) else dict(model)  # type: ignore[call-overload]
    before = {
        n: t.clone() for n, t in tensors.items() if not t.is_meta and t.layout is torch.strided
    }
    with pytest.raises(PlanError) as caught:
        resolve(model, source, rules, **options)  # type: ignore[arg-type]
    for name, value in before.items():
        assert torch.equal(tensors[name], value)
    assert "nothing was written" in str(caught.value)
    return caught.value


def kinds(error: PlanError) -> dict[str, str]:
    return {f.name: f.kind for f in error.findings}


# ---- names ---------------------------------------------------------------------------------------


def test_identity_between_modules() -> None:
    a, b = (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
    )
    with torch.no_grad():
        b[1].running_mean.add_(3)
        b[1].num_batches_tracked.add_(5)
    resolved = resolve(a, b)
    run(resolved)
    for name, value in b.state_dict().items():
        assert torch.equal(a.state_dict()[name], value)
    assert resolved.kept == resolved.dropped == resolved.partial == []
    first = resolved.destinations[0]
    assert (first.name, first.key, first.kind, first.owner) == (
        "0.weight",
        "weight",
        "parameter",
        a[0],
    )
    assert first.tensor is a[0].weight
    assert first.path == ((a, "0", a[0]),)
    assert {d.kind for d in resolved.destinations} == {"parameter", "buffer"}


def test_fuse_split_stack_and_unstack() -> None:
    q, k, v = (torch.randn(4, 3) for _ in range(3))
    fused = {"qkv": torch.zeros(12, 3)}
    rules = [Rule(n, "qkv", "h e -> (s h) e", at={"s": j}) for j, n in enumerate("qkv")]
    run(resolve(fused, {"q": q, "k": k, "v": v}, rules))
    assert torch.equal(fused["qkv"], torch.cat([q, k, v]))

    parts = {n: torch.zeros(4, 3) for n in "qkv"}
    rules = [Rule("qkv", n, "(s h) e -> h e", at={"s": j}) for j, n in enumerate("qkv")]
    run(resolve(parts, fused, rules))
    assert torch.equal(parts["k"], k)

    experts = {f"experts.{e}.w1": torch.randn(2, 3) for e in range(12)}
    stacked = {"experts.w1": torch.zeros(12, 3, 2)}
    run(resolve(stacked, experts, [Rule("experts.{e}.w1", "experts.w1", "o i -> e i o")]))
    for e in range(12):
        assert torch.equal(stacked["experts.w1"][e], experts[f"experts.{e}.w1"].T)

    back = {name: torch.zeros(2, 3) for name in experts}
    run(resolve(back, stacked, [Rule("experts.w1", "experts.{e}.w1", "e i o -> o i")]))
    for name, value in experts.items():
        assert torch.equal(back[name], value)


def test_strided_source_and_destination() -> None:
    base = torch.zeros(6, 10)
    dst, src = {"w": base[1::2, ::3]}, {"w": torch.randn(4, 3, 2)[:, :, 1]}
    run(resolve(dst, src, [Rule("w", "w", "i o -> o i")]))
    assert torch.equal(base[1::2, ::3], src["w"].T)
    assert base.count_nonzero() == 12


def test_rules_take_names_away_from_the_identity() -> None:
    dst, src = (
        {"a": torch.zeros(1), "b": torch.zeros(1)},
        {"a": torch.ones(1), "b": torch.full((1,), 2.0)},
    )
    run(resolve(dst, src, [Rule("a", "b"), Rule("b", "a")]))
    assert (dst["a"], dst["b"]) == (torch.tensor([2.0]), torch.tensor([1.0]))
    error = problems(dst, src, [Rule("a", "b")])
    assert kinds(error) == {"a": "missing", "b": "unexpected"}


def test_identity_off() -> None:
    error = problems({"a": torch.zeros(1)}, {"a": torch.zeros(1)}, identity=False)
    assert {f.kind for f in error.findings} == {"missing", "unexpected"}


def test_drop_on_purpose() -> None:
    src = {
        "a": torch.zeros(1),
        "pooler.w": torch.zeros(1),
        "pooler.x.b": torch.zeros(1),
        "h.3.ids": torch.zeros(1),
    }
    resolved = resolve(
        {"a": torch.zeros(1)}, src, [Rule("pooler.*", None), Rule("h.{i}.ids", None)]
    )
    assert resolved.dropped == ["pooler.w", "pooler.x.b", "h.3.ids"]
    assert resolved.source_names == ["a"]


def test_a_wildcard_drops_only_what_nothing_else_reads() -> None:
    src = {"p.a": torch.ones(1), "p.b": torch.zeros(1)}
    dst = {"x": torch.zeros(1)}
    resolved = resolve(dst, src, [Rule("p.a", "x"), Rule("p.*", None)])
    assert resolved.dropped == ["p.b"]
    error = problems(dst, src, [Rule("p.a", "x"), Rule("p.{n}", None)])
    assert "dropped by Rule('p.{n}', None) and read by another rule" in str(error)


def test_missing_and_unexpected_with_near_misses() -> None:
    model = {f"layers.{i}.norm": torch.zeros(1) for i in range(5)} | {"tok": torch.zeros(1)}
    source = {f"layers.{i}.nrom": torch.zeros(1) for i in range(5)} | {
        "unrelated.name": torch.zeros(1)
    }
    error = problems(model, source)
    assert len(error.findings) == 12
    text = str(error)
    assert "layers.{0..4}.norm | missing | did you mean layers.{0..4}.nrom?" in text
    assert "layers.{0..4}.nrom | unexpected | did you mean layers.{0..4}.norm?" in text
    assert "tok | missing | did you mean unrelated.name, of the same shape?" in text


def test_allow_lists() -> None:
    model = {"a": torch.zeros(1), "head.w": torch.zeros(1), "h.0.b": torch.zeros(1)}
    source = {"a": torch.ones(1), "old.x.y": torch.zeros(1)}
    resolved = resolve(
        model, source, allow_missing=["head.*", "h.{i}.b", "a"], allow_unexpected=["old.*"]
    )
    assert resolved.kept == ["head.w", "h.0.b"]
    assert resolved.dropped == ["old.x.y"]


def test_an_allow_list_entry_that_matches_nothing_is_an_error() -> None:
    error = problems(
        {"a": torch.zeros(1)},
        {"a": torch.zeros(1)},
        allow_missing=["haed.*"],
        allow_unexpected=["zz"],
    )
    assert 'allow_missing "haed.*" | rule | got no match' in str(error)
    assert 'allow_unexpected "zz" | rule | got no match' in str(error)


def test_rules_that_match_nothing_or_lead_nowhere() -> None:
    source = {"h.0.w": torch.zeros(1), "h.1.w": torch.zeros(1)}
    model = {"l.0.weight": torch.zeros(1), "l.1.weight": torch.zeros(1)}
    error = problems(
        model, source, [Rule("h.{i}.w", "l.{i}.wieght"), Rule("h.{i}.ww", "l.{i}.weight")]
    )
    text = str(error)
    assert (
        "l.{0..1}.wieght | unknown | expected a destination name | did you mean l.{0..1}.weight?"
        in text
    )
    assert "Rule('h.{i}.ww', 'l.{i}.weight') | rule | got no match" in text


def test_bound_text_that_is_no_index() -> None:
    source = {"e.zero.w": torch.zeros(2), "e.01.w": torch.zeros(2)}
    error = problems(
        {"w": torch.zeros(4, 2)}, source, [Rule("e.{e}.w", "w", "i -> e i")], allow_missing=["w"]
    )
    assert '{e} = "zero"' in str(error)
    assert '{e} = "01"' in str(error)


def test_bound_index_out_of_range_and_gaps() -> None:
    source = {f"e.{k}.w": torch.zeros(2) for k in (0, 1, 5)}
    rule = Rule("e.{e}.w", "w", "i -> e i")
    assert "index 5 for axis e" in str(problems({"w": torch.zeros(4, 2)}, source, [rule]))
    del source["e.5.w"]
    error = problems({"w": torch.zeros(4, 2)}, source, [rule])
    assert "w | kept | got 4 of 8 elements written, not [2:4, :] | expected all of them" in str(
        error
    )
    assert resolve({"w": torch.zeros(4, 2)}, source, [rule], allow_missing=["w"]).partial == ["w"]


def test_unstacking_needs_every_destination() -> None:
    model = {f"e.{k}": torch.zeros(2) for k in range(3)}
    error = problems(model, {"w": torch.zeros(4, 2)}, [Rule("w", "e.{e}", "e i -> i")])
    assert kinds(error) == {"e.3": "unknown"}


# ---- shapes and layouts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("src", "dst", "hint"),
    [
        ((4, 8), (8, 4), 'did you mean "i o -> o i"?'),
        ((2, 3, 4), (3, 4, 2), 'did you mean "a b c -> b c a"?'),
        ((4, 3), (12, 3), 'to fuse 3 of them: "a b -> (s a) b"'),
        ((12, 3), (4, 3), 'to take one part of 3: "(s a) b -> a b"'),
        ((12,), (3, 4), "as many elements"),
        ((2,), (3,), ""),
        ((1,), (3,), "to fuse 3"),  # and no broadcasting of a whole parameter
        ((), (1,), "as many elements"),
    ],
)
def test_shape_mismatch(src: tuple[int, ...], dst: tuple[int, ...], hint: str) -> None:
    error = problems({"w": torch.zeros(dst)}, {"w": torch.zeros(src)})
    (finding,) = error.findings
    assert (finding.kind, finding.got, finding.expected) == ("shape", str(src), str(dst))
    assert hint in finding.hint


def test_pattern_mismatch_names_rule_shapes_and_axis() -> None:
    error = problems(
        {"l.0.w": torch.zeros(9, 2), "l.1.w": torch.zeros(9, 2)},
        {"h.0.q": torch.zeros(4, 2), "h.1.q": torch.zeros(4, 2)},
        [Rule("h.{i}.q", "l.{i}.w", "h e -> (s h) e", at={"s": 0})],
    )
    lines = str(error).splitlines()
    assert len(lines) == 2
    for part in (
        "l.{0..1}.w | shape",
        "size 9 for (s h)",
        "axis s",
        "(4, 2)",
        "h.{0..1}.q",
        "Rule(",
    ):
        assert part in lines[1]


def test_meta_expanded_sparse_and_lazy_are_refused_together() -> None:
    model = {
        "meta": torch.zeros(2, device="meta"),
        "expanded": torch.zeros(1).expand(3),
        "sparse": torch.zeros(2, 2).to_sparse(),
        "meta_source": torch.zeros(2),
        "fine": torch.zeros(2),
    }
    source = {n: torch.zeros(t.shape) for n, t in model.items()} | {
        "meta_source": torch.zeros(2, device="meta")
    }
    assert kinds(problems(model, source)) == {
        "meta": "meta",
        "expanded": "expanded",
        "sparse": "layout",
        "meta_source": "meta",
    }
    lazy = nn.LazyLinear(3)
    error = problems_without_reading(lazy, {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)})
    assert kinds(error) == {"weight": "meta", "bias": "meta"}
    assert "run the module once" in str(error)


def problems_without_reading(model: object, source: object) -> PlanError:
    with pytest.raises(PlanError) as caught:
        resolve(model, source)  # type: ignore[arg-type]
    return caught.value


def test_an_expanded_source_is_fine() -> None:
    dst = {"w": torch.zeros(3, 2)}
    run(resolve(dst, {"w": torch.ones(1, 2).expand(3, 2)}))
    assert torch.equal(dst["w"], torch.ones(3, 2))


# ---- ties and conflicts --------------------------------------------------------------------------


def tied() -> nn.Module:
    model = nn.ModuleDict({"tok": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["tok"].weight
    return model


def test_aliases_are_one_destination() -> None:
    model = tied()
    (destination,) = destinations_of(model)
    assert (destination.name, destination.aliases) == ("tok.weight", ("head.weight",))
    ((owner, key, path),) = destination.alias_places
    assert (owner, key, path) == (model["head"], "weight", ((model, "head", model["head"]),))


@pytest.mark.parametrize(
    "names", [("tok.weight",), ("head.weight",), ("tok.weight", "head.weight")]
)
def test_ties_from_one_name_or_from_one_memory(names: tuple[str, ...]) -> None:
    model, value = tied(), torch.randn(4, 3)
    resolved = resolve(model, dict.fromkeys(names, value))
    assert len(resolved.writes) == 1
    run(resolved)
    assert torch.equal(model["head"].weight, value)
    # A state dict holds tied weights as two tensor objects of one memory.
    assert len(resolve(tied(), model.state_dict()).writes) == 1
    assert len(destinations_of(model.state_dict())) == 1


def test_ties_from_two_memories_are_compared_later() -> None:
    source = {"tok.weight": torch.zeros(4, 3), "head.weight": torch.zeros(4, 3)}
    resolved = resolve(tied(), source)
    assert len(resolved.writes) == 1
    [(first, other)] = resolved.ties
    names = [resolved.source_names[w.src] for w in (first, other)]
    assert names == ["tok.weight", "head.weight"]


def test_left_twice_and_right_never() -> None:
    dst = {"w": torch.zeros(4, 2)}
    src = {"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}
    twice = [Rule(n, "w", "h e -> (s h) e", at={"s": 0}) for n in "ab"]
    assert "got 4 of 8 elements written, not [2:4, :]" in str(problems(dst, src, twice))
    # The number of elements written is right here; that does not make it so.
    across = [
        Rule("a", "w", "h e -> (s h) e", at={"s": 0}),
        Rule("b", "w", "h e -> (h s) e", at={"s": 0}),
    ]
    error = problems(dst, src, across)
    assert kinds(error) == {"w": "conflict"}
    assert "write one element" in str(error) and "by none" in str(error)


def test_a_part_of_a_source_that_nobody_reads() -> None:
    dst, src = {"q": torch.zeros(2, 2)}, {"qkv": torch.zeros(6, 2)}
    rule = Rule("qkv", "q", "(s h) e -> h e", at={"s": 1}, s=3)
    error = problems(dst, src, [rule])
    assert kinds(error) == {"qkv": "unread"}
    assert "4 of 12 elements read" in str(error)
    assert resolve(dst, src, [rule], allow_unexpected=["qkv"]).writes
    rest = [Rule("qkv", None, "(s h) e ->", at={"s": k}, s=3) for k in (0, 2)]
    assert resolve(dst, src, [rule, *rest]).dropped == ["qkv (in part)"]
    error = problems(dst, src, [rule, rest[0]])
    assert "not [4:6, :]" in str(error)


def test_tensors_shared_through_one_module_twice() -> None:
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, layer)
    resolved = resolve(model, nn.Sequential(layer, layer).state_dict())
    assert len(resolved.writes) == 2
    assert resolved.destinations[0].aliases == ("1.weight",)


# ---- arguments -----------------------------------------------------------------------------------


def test_wrong_arguments() -> None:
    model = {"a": torch.zeros(1)}
    with pytest.raises(TypeError, match=r"rules\[1\] must be a paramkit.Rule, got tuple"):
        resolve(model, model, [Rule("a", "a"), ("a", "a")])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"rules must be a list of rules, got one Rule"):
        resolve(model, model, Rule("a", "a"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be an nn\.Module or a mapping"):
        resolve(3, model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="allow_missing must be a list"):
        resolve(model, model, allow_missing="a")
    with pytest.raises(PlanError, match=r"a \| type \| got int \| expected a tensor"):
        resolve({"a": 3}, model)  # type: ignore[dict-item]


def test_all_kinds_of_problems_come_in_one_error() -> None:
    model: Mapping[str, Tensor] = {
        "shape": torch.zeros(2, 3),
        "missing": torch.zeros(1),
        "meta": torch.zeros(1, device="meta"),
        "half": torch.zeros(4),
        "twice": torch.zeros(2),
    }
    source = {
        "shape": torch.zeros(3, 2),
        "extra.thing": torch.zeros(1),
        "meta": torch.zeros(1),
        "x": torch.zeros(2),
        "y": torch.zeros(1),
    }
    rules = [
        Rule("x", "half", "h -> (s h)", at={"s": 0}),
        Rule("x", "twice"),
        Rule("y", "twice", "h -> (s h)", at={"s": 1}),
        Rule("q", "missing"),
    ]
    error = problems(model, source, rules, allow_missing=["none.such"])
    assert {f.kind for f in error.findings} == {
        "shape", "missing", "meta", "kept", "conflict", "rule", "unexpected",
    }  # fmt: skip
    assert "8 problems" in str(error)


@pytest.mark.parametrize("good", [True, False])
def test_linear_in_the_number_of_names(good: bool) -> None:
    """Tens of thousands of names and hundreds of rules, right or all wrong."""
    count, kinds_of = 31_337, 400
    names = [f"{i // 400}.e.{i % 400}.p{i % kinds_of}.w" for i in range(count)]
    source = {f"m.{n}": torch.empty(2, 3) for n in names}
    model = {f"{'x' if good else 'y'}.{n}": torch.empty(2, 3) for n in names}
    rules = [Rule(f"m.{{i}}.e.{{e}}.p{k}.w", f"x.{{i}}.e.{{e}}.p{k}.w") for k in range(kinds_of)]
    start = time.perf_counter()
    if good:
        assert len(resolve(model, source, rules).writes) == count
    else:
        with pytest.raises(PlanError) as caught:
            resolve(model, source, rules)
        assert len(caught.value.findings) == 2 * count
    assert time.perf_counter() - start < 10
