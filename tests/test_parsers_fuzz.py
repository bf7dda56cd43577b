"""Patterns, index expressions, names and rules from any text: read, or refused with a ValueError of ours."""

from __future__ import annotations

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from paramkit import Rule
from paramkit.patterns import Mismatch, compile, infer, parse, parse_at, reversed_text
from paramkit.templates import Template

axes = st.sampled_from(
    ["a", "b", "c", "(a b)", "(b c)", "(a", "b)", "1", "()", "->", " ", "(s a)", "é", "2", "*"]
)
near_patterns = st.lists(axes, max_size=9).map(" ".join)
near_pins = st.text(alphabet="0123456789ab+-*: r", max_size=12)
shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)


@given(st.one_of(st.text(max_size=60), near_patterns))
@settings(max_examples=400)
def test_patterns(text: str) -> None:
    try:
        pattern = parse(text)
    except ValueError as error:
        assert "pattern" in str(error)
        return
    assert parse(pattern.text) == pattern
    assert parse(reversed_text(reversed_text(text))) == pattern


@given(st.one_of(st.text(max_size=30), near_pins))
@settings(max_examples=400)
def test_index_expressions(text: str) -> None:
    try:
        at = parse_at(text)
    except ValueError as error:
        assert "at" in str(error)
        return
    assert parse_at(at.text).is_range == at.is_range


@given(near_patterns, st.dictionaries(st.sampled_from("abcs"), st.one_of(st.integers(-3, 3), near_pins), max_size=2),
       shapes, shapes)  # fmt: skip
@settings(max_examples=600)
def test_compiling(
    text: str, at: dict[str, int | str], src: tuple[int, ...], dst: tuple[int, ...]
) -> None:
    def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
        out, step = [], 1
        for n in reversed(shape):
            out.append(step)
            step *= max(n, 1)
        return tuple(reversed(out))

    with contextlib.suppress(ValueError, Mismatch):
        infer(text, at, {}, src)
    try:
        views = compile(text, at, {}, src, strides(src), dst, strides(dst))
    except (ValueError, Mismatch):
        return
    # What is compiled lies within both tensors.
    for view, shape in ((views.dst, dst), (views.src, src)):
        if 0 in views.sizes:
            continue
        last = view.offset + sum(
            (n - 1) * step for n, step in zip(view.sizes, view.strides, strict=True)
        )
        count = 1
        for n in shape:
            count *= n
        assert 0 <= view.offset <= last < count


@given(st.text(max_size=30), st.text(max_size=30), st.booleans())
@settings(max_examples=300)
def test_names(text: str, name: str, wildcards: bool) -> None:
    try:
        template = Template(text, wildcards=wildcards)
    except ValueError as error:
        assert "name" in str(error)
        return
    bindings = template.match(name)
    if bindings is not None and not template.crosses:
        assert template.format(bindings) == name


@given(
    st.one_of(st.none(), st.sampled_from(["a", "a.{i}", "{*p}.a", "{", "a.*"]), st.text(max_size=9)),
    st.one_of(st.none(), st.sampled_from(["b", "b.{i}", "{*p}.b", "}"]), st.text(max_size=9)),
    st.one_of(st.none(), near_patterns),
    st.dictionaries(st.sampled_from("abcs"), st.one_of(st.integers(-3, 3), near_pins), max_size=2),
    st.sampled_from([None, "overlap", "all"]),
    st.sampled_from([None, 0, 1.5, "zeros", "mean", "x", {"normal": 1}, {"seed": 1}, [1]]),
)  # fmt: skip
@settings(max_examples=500)
def test_rules(src, dst, pattern, at, rows, fill) -> None:  # type: ignore[no-untyped-def]
    try:
        rule = Rule(src, dst, pattern, at=at, rows=rows, fill=fill)
    except (ValueError, TypeError) as error:
        assert str(error)
        return
    assert eval(repr(rule)) == rule
