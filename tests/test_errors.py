"""Errors: folding by layer number, one line for each group, findings kept as data."""

from __future__ import annotations

import pickle
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramkit.errors import (
    Finding,
    PlanError,
    SourceError,
    Suggester,
    UnknownNameError,
    fold_names,
    suggest,
)


def test_fold_contiguous_gaps_and_singles() -> None:
    names = [f"h.{i}.w" for i in (0, 1, 2, 5, 7, 8)] + ["tok.w", "ln.3.w"]
    assert [folded for folded, _ in fold_names(names)] == ["h.{0..2,5,7..8}.w", "tok.w", "ln.3.w"]


def test_fold_two_numbers_only_where_every_pair_is_there() -> None:
    full = [f"l.{i}.e.{e}.w" for i in range(3) for e in range(4)]
    assert [f for f, _ in fold_names(full)] == ["l.{0..2}.e.{0..3}.w"]
    holed = [n for n in full if n != "l.1.e.2.w"]
    assert [f for f, _ in fold_names(holed)] == ["l.{0,2}.e.{0..3}.w", "l.1.e.{0..1,3}.w"]


def test_fold_subscripts() -> None:
    assert [f for f, _ in fold_names(["dsts[0]", "dsts[1]", "x[a]"])] == ["dsts[{0..1}]", "x[a]"]


def test_fold_leaves_what_is_no_layer_number() -> None:
    names = ["conv1.w", "conv2.w", "a.01.w", "a.02.w", "b.²"]
    assert [f for f, _ in fold_names(names)] == names


def test_fold_abbreviates_many_gaps() -> None:
    ((folded, members),) = fold_names([f"h.{i}" for i in range(0, 100, 2)])
    assert folded == "h.{0,2,4,..,98 (50)}"
    assert len(members) == 50


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from("ab")), unique=True)
)
def test_fold_is_a_partition(rows: list[tuple[int, int, str]]) -> None:
    names = [f"l.{i}.{kind}.{e}" for i, e, kind in rows]
    folded = fold_names(names)
    assert sorted(n for _, members in folded for n in members) == sorted(names)
    assert len({text for text, _ in folded}) == len(folded)


def test_fold_of_many_names_is_quick() -> None:
    names = [f"l.{i}.e.{e}.w{k}" for i in range(80) for e in range(128) for k in range(3)]
    random.Random(0).shuffle(names)
    start = time.perf_counter()
    assert len(fold_names(names)) == 3
    assert time.perf_counter() - start < 3


def test_plan_error_folds_lines_and_keeps_findings() -> None:
    findings = [
        Finding(f"layers.{i}.mlp.up", "shape", "(4, 8)", "(8, 4)", 'did you mean "i o -> o i"?')
        for i in range(48)
    ]
    error = PlanError("48 problems.", findings)
    assert str(error).splitlines() == [
        "48 problems.",
        '  layers.{0..47}.mlp.up | shape | got (4, 8) | expected (8, 4) | did you mean "i o -> o i"?',
    ]
    assert error.findings == tuple(findings)
    assert isinstance(error, RuntimeError)


def test_hints_that_name_the_same_layer_fold_too() -> None:
    findings = [
        Finding(f"layers.{i}.ln", "missing", hint=f"did you mean layers.{i}.norm?")
        for i in range(4)
    ]
    assert "layers.{0..3}.ln | missing | did you mean layers.{0..3}.norm?" in str(
        PlanError("x", findings)
    )


def test_different_shapes_do_not_fold() -> None:
    findings = [Finding(f"l.{i}", "shape", f"({i},)", "(9,)") for i in range(3)]
    assert len(str(PlanError("x", findings)).splitlines()) == 4


def test_kinds_stand_together_and_long_lists_are_cut() -> None:
    findings = [Finding("a", "missing"), Finding("b", "shape"), Finding("c", "missing")]
    assert [line.split()[0] for line in str(PlanError("x", findings)).splitlines()[1:]] == [
        "a",
        "c",
        "b",
    ]
    many = [Finding(f"name{chr(97 + k // 26)}{chr(97 + k % 26)}", "missing") for k in range(80)]
    lines = str(PlanError("x", many)).splitlines()
    assert len(lines) == 52
    assert "30 more" in lines[-1]


def test_unknown_name_reads_well_and_is_a_key_error() -> None:
    error = UnknownNameError("no parameter of that name.", [Finding("fc.wieght", "unknown")])
    assert isinstance(error, KeyError)
    assert str(error) == "no parameter of that name.\n  fc.wieght | unknown"


@pytest.mark.parametrize("kind", [PlanError, UnknownNameError, SourceError])
def test_errors_survive_pickling(kind: type[PlanError]) -> None:
    error = kind("two.", [Finding("a", "missing"), Finding("b", "shape", "1", "2", "h")])
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.findings) == (str(error), error.findings)


@pytest.mark.parametrize(
    ("name", "candidates", "expected"),
    [
        ("fc.wieght", ["fc.weight", "fc.bias"], "fc.weight"),
        ("module.fc.weight", ["fc.weight", "other.weight"], "fc.weight"),
        ("layers.3.lnn.weight", ["layers.3.ln.weight", "layers.4.ln.weight"], "layers.3.ln.weight"),
        ("completely.different", ["fc.weight"], None),
        ("x", [], None),
    ],
)
def test_suggest(name: str, candidates: list[str], expected: str | None) -> None:
    assert suggest(name, candidates) == expected


def test_a_layer_that_does_not_exist_is_no_misspelling() -> None:
    assert suggest("h.12.w", [f"h.{i}.w" for i in range(12)]) is None


def test_suggester_answers_for_a_whole_range_at_once() -> None:
    near = Suggester((f"l.{i}.e.{e}.weight" for i in range(60) for e in range(500)), budget=2)
    start = time.perf_counter()
    answers = [near(f"l.{i}.e.{e}.wieght") for i in range(60) for e in range(500)]
    assert answers[-1] == "l.59.e.499.weight"
    assert None not in answers
    assert time.perf_counter() - start < 3
