"""What is said beside a problem: the counterpart that would fit, layers of one kind in one line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import paramkit
from paramkit import Finding, PlanError, Rule
from tests.guards import nothing_written

LAYERS = 48


def wrong(
    model: dict[str, Tensor], source: dict[str, Tensor], *rules: Rule
) -> tuple[list[Finding], list[str]]:
    """The findings and the lines of the text below its summary."""
    with nothing_written(*model.values()), pytest.raises(PlanError) as caught:
        paramkit.transplant(model, source, rules)
    assert "nothing was written" in caught.value.summary
    return list(caught.value.findings), str(caught.value).splitlines()[1:]


def layers(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {
        f"layers.{i}.{name.replace('__', '.')}": torch.zeros(shape)
        for i in range(LAYERS)
        for name, shape in shapes.items()
    }


def line(lines: list[str], start: str) -> str:
    (found,) = [text.strip() for text in lines if text.strip().startswith(start)]
    return found


def test_transposed() -> None:
    found, lines = wrong(layers(mlp__up=(4, 6)), layers(mlp__up=(6, 4)))
    assert lines == [
        '  layers.{0..47}.mlp.up | shape | got (6, 4) | expected (4, 6) | did you mean "i o -> o i"?'
    ]
    assert [f.name for f in found] == [f"layers.{i}.mlp.up" for i in range(LAYERS)]
    assert {(f.kind, f.got, f.expected) for f in found} == {("shape", "(6, 4)", "(4, 6)")}


def test_the_suggested_pattern_is_right() -> None:
    model, source = layers(w=(3, 5, 2)), layers(w=(2, 3, 5))
    found, _ = wrong(model, source)
    (hint,) = {f.hint for f in found}
    pattern = hint.split('"')[1]
    source = {n: torch.randn(t.shape) for n, t in source.items()}
    paramkit.transplant(model, source, [Rule("layers.{i}.w", "layers.{i}.w", pattern)])
    for name, tensor in model.items():
        assert torch.equal(tensor, source[name].permute(1, 2, 0))


def test_permuted_beside_transposed() -> None:
    found, lines = wrong(layers(a=(4, 6), b=(1, 2, 3, 4)), layers(a=(6, 4), b=(4, 3, 2, 1)))
    assert len(found) == 2 * LAYERS
    assert len(lines) == 2
    assert 'did you mean "i o -> o i"?' in line(lines, "layers.{0..47}.a")
    assert 'did you mean "a b c d -> d c b a"?' in line(lines, "layers.{0..47}.b")


def test_fused_from_parts() -> None:
    model = layers(attn__qkv=(12, 4), norm=(4,))
    source = layers(attn__q=(4, 4), attn__k=(4, 4), attn__v=(4, 4), norm=(4,))
    found, lines = wrong(model, source)
    missing = [f for f in found if f.kind == "missing"]
    assert [f.name for f in missing] == [f"layers.{i}.attn.qkv" for i in range(LAYERS)]
    assert missing[7].hint == ("fused from layers.7.attn.q, layers.7.attn.k, layers.7.attn.v?")
    assert "fused from" in line(lines, "layers.{0..47}.attn.qkv")
    unexpected = [f for f in found if f.kind == "unexpected"]
    assert {f.name for f in unexpected} == {
        f"layers.{i}.attn.{n}" for i in range(LAYERS) for n in "qkv"
    }
    assert all(f.hint == f"a part of {f.name[:-1]}qkv?" for f in unexpected)
    assert len(lines) == 4


def test_a_part_of_what_is_fused() -> None:
    model = layers(q_proj=(8, 4), k_proj=(2, 4), v_proj=(2, 4))
    found, lines = wrong(model, layers(c_attn=(12, 4)))
    missing = [f for f in found if f.kind == "missing"]
    assert len(missing) == 3 * LAYERS
    assert all(f.hint == f"a part of {f.name.rsplit('.', 1)[0]}.c_attn?" for f in missing)
    assert len(lines) == 4


def test_renamed() -> None:
    found, lines = wrong(layers(mlp__down_proj=(3, 2)), layers(mlp__donw_proj=(3, 2)))
    assert {f.kind for f in found} == {"missing", "unexpected"}
    assert "did you mean" in line(lines, "layers.{0..47}.mlp.down_proj")
    for f in found:
        other = "donw" if f.kind == "missing" else "down"
        assert f.hint == f"did you mean {f.name.rsplit('.', 1)[0]}.{other}_proj?"
    assert len(lines) == 2


def test_another_name_of_the_same_or_the_transposed_shape() -> None:
    model, source = layers(wi=(5, 2), ffn__norm=(7,)), layers(c_fc=(2, 5), ln_2=(7,))
    found, lines = wrong(model, source)
    hints = {f.name: f.hint for f in found}
    for i in range(LAYERS):
        assert hints[f"layers.{i}.wi"] == f"did you mean layers.{i}.c_fc, transposed?"
        assert hints[f"layers.{i}.ffn.norm"] == f"did you mean layers.{i}.ln_2, of the same shape?"
        assert hints[f"layers.{i}.c_fc"] == f"did you mean layers.{i}.wi, transposed?"
    assert len(lines) == 4


def test_regions_that_nothing_writes() -> None:
    """`left` twice and `right` never: as many elements as there should be."""
    model, source = layers(fused=(6, 4)), layers(left=(3, 4), right=(3, 4))
    rules = [
        Rule("layers.{i}.left", "layers.{i}.fused", "o i -> (s o) i", at={"s": 0}),
        Rule("layers.{i}.right", "layers.{i}.fused", "o i -> (s o) i", at={"s": 0}),
    ]
    # The same elements from two sources are compared by value before anything is written; the rest is missing.
    found, lines = wrong(model, source, *rules)
    assert {f.kind for f in found} == {"kept"}
    assert len(found) == LAYERS
    assert len(lines) == 1
    assert "12 of 24 elements" in lines[0]
    assert "not [3:6, :]" in lines[0]


def test_regions_that_nothing_reads() -> None:
    model, source = layers(gate=(3, 4)), layers(gate_up=(6, 4))
    rule = Rule("layers.{i}.gate_up", "layers.{i}.gate", "(s o) i -> o i", at={"s": 0})
    found, lines = wrong(model, source, rule)
    assert {f.kind for f in found} == {"unread"}
    assert [f.name for f in found] == [f"layers.{i}.gate_up" for i in range(LAYERS)]
    assert len(lines) == 1
    assert "12 of 24 elements read" in lines[0]
    assert "Rule(name, None, pattern, at)" in lines[0]


def test_everything_at_once_in_few_lines() -> None:
    shapes = {"up": (4, 6), "qkv": (12, 4), "norm": (4,), "extra": (3,), "half": (8,)}
    model = layers(**shapes) | {"head": torch.zeros(9, 4, dtype=torch.int64)}
    source = layers(up=(6, 4), q=(4, 4), k=(4, 4), v=(4, 4), nrom=(4,), h=(4,))
    source |= {"head": torch.zeros(9, 4), "stray": torch.zeros(2)}
    rules = [
        Rule("layers.{i}.h", "layers.{i}.half", "a -> (s a)", at={"s": 1}),
        Rule("blocks.{i}.h", "layers.{i}.half"),
    ]
    found, lines = wrong(model, source, *rules)
    assert {f.kind for f in found} == {
        "shape",
        "missing",
        "unexpected",
        "kept",
        "dtype",
        "rule",
    }
    assert len(found) == LAYERS * 9 + 3
    assert len(lines) < 16
    for part in (
        '"i o -> o i"',
        "fused from",
        "a part of",
        "norm",
        "same_kind",
        "stray",
        "no match",
    ):
        assert any(part in text for text in lines), part


def test_a_layer_that_is_unlike_the_others_stands_alone() -> None:
    model, source = layers(w=(4, 6)), layers(w=(4, 6))
    source["layers.31.w"] = torch.zeros(6, 4)
    del source["layers.7.w"], source["layers.8.w"], source["layers.9.w"]
    found, lines = wrong(model, source)
    assert len(found) == 4
    assert sorted(text.split("|")[0].strip() for text in lines) == [
        "layers.31.w",
        "layers.{7..9}.w",
    ]
