"""Rules: name templates, construction checks, matching that does not depend on the number of rules."""

from __future__ import annotations

import pickle
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramkit import Rule, invert
from paramkit.templates import NameFilter, Template, TemplateIndex


def test_template_binds_runs_without_dots() -> None:
    template = Template("h.{i}.attn_{part}.weight")
    assert template.placeholders == ("i", "part")
    assert template.match("h.3.attn_q.weight") == {"i": "3", "part": "q"}
    assert template.match("h.3.x.attn_q.weight") is None
    assert template.match("h.3.attn_.weight") is None
    assert template.format({"i": "7", "part": "k"}) == "h.7.attn_k.weight"


def test_template_used_twice_binds_the_same_text() -> None:
    template = Template("a.{i}.b.{i}")
    assert template.match("a.1.b.1") == {"i": "1"}
    assert template.match("a.1.b.2") is None


def test_template_takes_other_characters_literally() -> None:
    assert Template("a+b.(c).[d]").match("a+b.(c).[d]") == {}
    assert Template("a*b").match("axb") is None
    assert Template("a*b", wildcards=True).match("a.x.y.b") == {}


@pytest.mark.parametrize(
    "text", ["a.{", "a.}", "a.{i", "a.{1}", "a.{}", "a.{i j}", "a.{{i}}", "a.{i}{j}"]
)
def test_unreadable_templates(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        Rule(text, "x", "a -> a")


def test_repr_is_the_call() -> None:
    rule = Rule("a.{i}", "b.{i}", "(g r d) e -> (g s d) e", at={"s": slice(0, 4)}, g=8, d=128)
    assert repr(rule) == (
        "Rule('a.{i}', 'b.{i}', '(g r d) e -> (g s d) e', at={'s': '0:4'}, g=8, d=128)"
    )
    assert eval(repr(rule)) == rule
    assert repr(Rule("pooler.*", None)) == "Rule('pooler.*', None)"


def test_rules_are_frozen_hashable_and_picklable() -> None:
    rule = Rule("a", "b", "i o -> o i")
    with pytest.raises(AttributeError):
        rule.src = "c"  # type: ignore[misc]
    assert len({rule, Rule("a", "b", "i o -> o i"), Rule("a", "c", "i o -> o i")}) == 2
    assert pickle.loads(pickle.dumps(rule)) == rule


WRONG = {
    "src type": (lambda: Rule(3, "b"), TypeError, "src must be a name or None, got int"),
    "dst type": (lambda: Rule("a", 3), TypeError, "dst must be a name or None, got int"),
    "pattern type": (lambda: Rule("a", "b", 3), TypeError, "pattern must be text"),
    "at type": (lambda: Rule("a", "b", "a -> a", at=[0]), TypeError, "at must be a mapping"),
    "at value": (lambda: Rule("a", "b", "a -> b a", at={"b": 1.5}), TypeError, "got float"),
    "at bool": (lambda: Rule("a", "b", "a -> b a", at={"b": True}), TypeError, "got bool"),
    "at step": (lambda: Rule("a", "b", "a -> b a", at={"b": slice(0, 4, 2)}), ValueError, "no step"),
    "at axis": (lambda: Rule("a", "b", "a -> a", at={"z": 0}), ValueError, "axis z"),
    "at both": (lambda: Rule("a", "b", "a -> a", at={"a": 0}), ValueError, "both sides have"),
    "at name": (lambda: Rule("a", "b", "a -> b a", at={"b": "r"}), ValueError, "uses r"),
    "at alone": (lambda: Rule("a", "b", at={"b": 0}), ValueError, "need an axis pattern"),
    "size axis": (lambda: Rule("a", "b", "a -> a", z=3), ValueError, "size given for axis z"),
    "size type": (lambda: Rule("a", "b", "a -> a", a="x"), TypeError, "must be an int, got str"),
    "size sign": (lambda: Rule("a", "b", "a -> a", a=-1), ValueError, "negative"),
    "placeholder": (lambda: Rule("a.{i}", "b"), ValueError, "{i} on one side only"),
    "placeholder dst": (lambda: Rule("a", "b.{i}"), ValueError, "{i} on one side only"),
    "placeholder no axis": (lambda: Rule("a.{e}", "b", "o i -> o i"), ValueError, "must then be an axis"),
    "placeholder own side": (lambda: Rule("a.{e}", "b", "e i -> i"), ValueError, "must then be an axis"),
    "placeholder twice": (
        lambda: Rule("a.{e}", "b", "i -> e i", at={"e": 0}), ValueError, "bound by the name and by at",
    ),
    "drop to axes": (lambda: Rule("a", None, "a -> a"), ValueError, "no destination axes"),
    "fill from axes": (lambda: Rule(None, "a", "a -> a", fill=0), ValueError, "no source axes"),
    "no side": (lambda: Rule(None, None), ValueError, "both None"),
    "wildcard": (lambda: Rule("a.*", "b.{i}"), ValueError, '"*" stands only in rules with one side'),
    "span part": (lambda: Rule("a{*p}.x", "b"), ValueError, "stands for whole components"),
    "span one side": (lambda: Rule("{*p}.x", "b", "a -> p a"), ValueError, "must then be an axis"),
    "span mixed": (lambda: Rule("{*p}.x", "{p}.y"), ValueError, "the same way on both sides"),
    "rows": (lambda: Rule("a", "b", rows="all"), ValueError, 'rows must be "overlap"'),
    "rows pattern": (lambda: Rule("a", "b", "a -> a", rows="overlap"), ValueError, "without a pattern"),
    "fill copy": (lambda: Rule("a", "b", fill=0), ValueError, "fill is for"),
    "fill mean": (lambda: Rule(None, "b", fill="mean"), ValueError, "needs rows"),
    "fill text": (lambda: Rule(None, "b", fill="ones"), ValueError, "fill must be"),
    "fill type": (lambda: Rule(None, "b", fill=[0]), TypeError, "fill must be"),
    "fill normal": (lambda: Rule(None, "b", fill={"normal": -1}), ValueError, "must be >= 0"),
    "fill key": (lambda: Rule(None, "b", fill={"std": 1}), ValueError, 'must have "normal"'),
    "pattern": (lambda: Rule("a", "b", "a a -> a"), ValueError, "stands twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_are_refused_when_made(name: str) -> None:
    make, kind, message = WRONG[name]
    with pytest.raises(kind) as caught:
        make()
    assert message in str(caught.value)


parts = st.sampled_from(["h", "w", "0", "1", "w0"])
name_texts = st.lists(parts, min_size=1, max_size=4).map(".".join)
template_texts = st.lists(
    st.one_of(parts, st.sampled_from(["{i}", "{j}", "w{i}", "{i}0", "{*p}", "{*q}"])),
    min_size=1,
    max_size=4,
).map(".".join)


@given(st.lists(template_texts, max_size=8), st.lists(name_texts, max_size=8))
def test_the_tree_finds_what_trying_every_rule_finds(
    templates: list[str], names: list[str]
) -> None:
    index = TemplateIndex([Template(text) for text in templates])
    for name in names:
        expected = [
            (k, bindings)
            for k, text in enumerate(templates)
            if (bindings := Template(text).match(name)) is not None
        ]
        assert index.match(name) == expected


def test_matching_does_not_depend_on_the_number_of_rules() -> None:
    rules = [Rule(f"l.{{i}}.m.{{e}}.p{k}.w", f"x.{{i}}.{{e}}.p{k}") for k in range(400)]
    names = [f"l.{i}.m.{e}.p{(i + e) % 400}.w" for i in range(60) for e in range(400)]
    index = TemplateIndex([rule.source_template() for rule in rules])
    start = time.perf_counter()
    assert all(len(index.match(name)) == 1 for name in names)
    assert time.perf_counter() - start < 2


def test_spans_bind_whole_components() -> None:
    template = Template("{*p}.q_proj.{w}")
    assert template.match("model.layers.0.attn.q_proj.weight") == {
        "p": "model.layers.0.attn",
        "w": "weight",
    }
    assert template.match("q_proj.weight") is None
    assert template.match(".q_proj.weight") is None
    assert Template("{*p}.x.{*p}").match("a.b.x.a.b") == {"p": "a.b"}
    assert Template("{*p}.x.{*p}").match("a.b.x.a.c") is None


def test_invert_twice_is_the_same() -> None:
    rules = [
        Rule("a.{i}", "b.{i}", "(g r d) e -> (g s d) e", at={"s": "0:r"}, g=8, d=128),
        Rule("x.{e}.w", "experts.w", "o i -> e o i"),
        Rule("k", "k", "h e -> (h r) e", at={"r": "*"}, r=2),
        Rule("t", "t", rows="overlap"),
        Rule("pooler.*", None),
        Rule("qkv.bias", None, "(s h) ->", at={"s": 1}, s=3),
        Rule(None, "head.{i}"),
    ]
    assert invert(invert(rules)) == rules
    assert invert([Rule(None, "b", "-> (s h)", at={"s": 1}, s=3, fill=0.5)]) == [
        Rule("b", None, "(s h) ->", at={"s": 1}, s=3)
    ]
    with pytest.raises(TypeError, match=r"rules\[0\] must be"):
        invert(["a"])  # type: ignore[list-item]


def test_name_filter() -> None:
    names = ["a.bias", "a.weight", "b.0.w", "b.1.w", "b.1.x.w", "ab"]
    chosen, idle = NameFilter(["a.*", "b.{i}.w", "nope", "ab"], "allow").select(names)
    assert chosen == {"a.bias": 0, "a.weight": 0, "b.0.w": 1, "b.1.w": 1, "ab": 3}
    assert idle == ["nope"]
    assert set(NameFilter(["*"], "allow").select(names)[0]) == set(names)
    assert set(NameFilter(["*.w"], "allow").select(names)[0]) == {"b.0.w", "b.1.w", "b.1.x.w"}


def test_name_filter_refuses_wrong_types() -> None:
    with pytest.raises(TypeError, match="allow_missing must be a list"):
        NameFilter("abc", "allow_missing")
    with pytest.raises(TypeError, match=r"allow_missing\[1\] must be a name, got int"):
        NameFilter(["a", 3], "allow_missing")  # type: ignore[list-item]
