"""Checks that no other test reaches: each is here with what it refuses."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import paramkit
from paramkit import PlanError, Rule
from paramkit.patterns import Mismatch, compile_side, infer, parse_at
from paramkit.patterns import compile as compile_pattern
from paramkit.shapes import infer_destinations
from paramkit.stacking import bound_pins
from tests.conftest import need_extension
from tests.guards import nothing_written


def findings(call: Callable[[], object]) -> list[tuple[str, str]]:
    """Name and kind of what a PlanError lists."""
    with pytest.raises(PlanError) as caught:
        call()
    return [(finding.name, finding.kind) for finding in caught.value.findings]


# Arguments.


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"normal": "x"}, "normal must be a number"),
        ({"normal": 1.0, "mean": "x"}, "mean must be a number"),
        ({"normal": 1.0, "seed": 1.5}, "seed must be an int"),
        ({"normal": 1.0, "seed": True}, "seed must be an int"),
    ],
)
def test_fills_of_other_types(given: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        Rule(None, "x", fill=given)


def test_at_names_an_axis() -> None:
    with pytest.raises(TypeError, match="at must map axis names"):
        Rule("x", "y", "i -> s i", at={0: 1})  # type: ignore[dict-item]


def test_at_is_short() -> None:
    assert parse_at("a" * 150).text
    with pytest.raises(ValueError, match="at most 200"):
        parse_at("a" * 201)


@pytest.mark.parametrize("overflow", ["warn", None, 1])
def test_overflow_is_one_of_two(overflow: Any) -> None:
    with pytest.raises(ValueError, match="overflow must be"):
        paramkit.plan({"x": torch.zeros(1)}, {"x": torch.ones(1)}, overflow=overflow)


def test_two_placeholders_side_by_side() -> None:
    with pytest.raises(ValueError, match="two placeholders side by side"):
        Rule("x.{a}{b}.w", "y.{a}.{b}.w")


def test_at_names_an_axis_that_is_not_there() -> None:
    with pytest.raises(ValueError, match='at names axis s, which "i -> i" does not have'):
        Rule("x", "y", "i -> i", at={"s": 0})


@pytest.mark.parametrize("value", [None, "1", [1.0], object()])
def test_recorded_values_of_another_type(backend: str, value: Any) -> None:
    model = {"x": torch.zeros(2)}
    with (
        nothing_written(model["x"]),
        pytest.raises(TypeError, match="expected a number or a tensor"),
        paramkit.writes(model) as w,
    ):
        w["x"][0] = value


def test_handles_delete_nothing(backend: str) -> None:
    model = {"x": torch.zeros(2)}
    recorder = paramkit.writes(model)
    with (
        nothing_written(model["x"]),
        recorder as w,
        pytest.raises(TypeError, match="support item deletion"),
    ):
        del w["x"][0]


# Patterns and shapes.


def test_one_side_of_another_rank() -> None:
    with pytest.raises(Mismatch, match=r"dim|axes|axis"):
        compile_side("-> a b", {}, {}, (12,), (1,))


def test_a_source_of_another_rank() -> None:
    with pytest.raises(Mismatch, match="source"):
        infer("a b -> (a b)", {}, {}, (12,))


def test_a_range_in_terms_of_an_unknown_size() -> None:
    got = findings(
        lambda: paramkit.plan(
            {"x": torch.zeros(6, 2)},
            {"y": torch.ones(3, 2)},
            [Rule("y", "x", "a i -> s i", at={"s": "0:unknown"}, unknown=9)],
        )
    )
    assert got == [("x", "shape")]


def test_an_axis_that_no_source_tells() -> None:
    with pytest.raises(Mismatch, match="cannot be worked out"):
        infer("i -> s i", {"s": "1:"}, {}, (3,))


def test_a_pattern_that_gives_another_shape(backend: str) -> None:
    model = {"x": torch.zeros(2, 3)}
    with nothing_written(model["x"]):
        got = findings(
            lambda: paramkit.plan(model, {"y": torch.ones(2, 4)}, [Rule("y", "x", "a b -> b a")])
        )
    assert got == [("x", "shape")]


def test_a_name_that_is_no_index() -> None:
    rule = Rule("x.{e}.w", "w", "i -> e i")
    finding = bound_pins("x.first.w", rule, {"e": "first"}, ["e"])
    assert isinstance(finding, paramkit.Finding)
    assert finding.kind == "rule"
    with_target = [Rule("x.{e}.w", "w", "i -> e i")]
    assert ("x.first.w", "rule") in findings(
        lambda: paramkit.plan({"w": torch.zeros(1, 2)}, {"x.first.w": torch.ones(2)}, with_target)
    )


# Destinations that are worked out from rules.


@pytest.mark.parametrize(
    ("sources", "rules", "expected"),
    [
        ({"y": (4, 2)}, [Rule("y", "x", rows="overlap")], ("y", "shape")),
        ({"x.a.w": (2,)}, [Rule("x.{e}.w", "w", "i -> e i")], ("x.a.w", "rule")),
        ({"w": (4,)}, [Rule("w", "x.{e}.w", "(e i) -> i")], ("w", "shape")),
        ({"w": (2,)}, [Rule("w", "x.{e}.w", "(e i) -> i", e=5)], ("w", "shape")),
        ({"y": (12,)}, [Rule("y", "x", "a b -> b a")], ("x", "shape")),
        ({}, [Rule(None, "x", fill=0)], ("x", "shape")),
        (
            {"a": (2, 3), "b": (2, 4)},
            [
                Rule("a", "x", "i j -> (s i) j", at={"s": 0}),
                Rule("b", "x", "i j -> (s i) j", at={"s": 1}),
            ],
            ("x", "shape"),
        ),
    ],
)
def test_shapes_that_cannot_be_worked_out(
    sources: dict[str, tuple[int, ...]], rules: list[Rule], expected: tuple[str, str]
) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in sources.items()}
    assert expected in findings(lambda: infer_destinations(tensors, rules))


def test_dtypes_that_contradict_each_other() -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3, dtype=torch.int32)}
    rules = [Rule(n, "x", "i j -> (s i) j", at={"s": k}) for k, n in enumerate("ab")]
    assert findings(lambda: infer_destinations(tensors, rules)) == [("x", "dtype")]
    made = infer_destinations(tensors, rules, dtype=torch.float16)
    assert made["x"].dtype is torch.float16


# Plans whose model or source is not what it was.


def test_swapping_in_a_plan_that_is_stale(backend: str) -> None:
    model = nn.Linear(2, 2)
    plan = paramkit.plan(model, {k: torch.ones_like(v) for k, v in model.state_dict().items()})
    model.weight = nn.Parameter(torch.zeros(2, 2))
    with (
        nothing_written(model.weight, model.bias),
        pytest.raises(PlanError, match="weight"),
        plan.swapped(),
    ):
        pytest.fail("swapped in")


def test_a_new_source_for_a_plan_that_is_stale(backend: str) -> None:
    model = nn.Linear(2, 2)
    source = {k: torch.ones_like(v) for k, v in model.state_dict().items()}
    plan = paramkit.plan(model, source)
    model.weight = nn.Parameter(torch.zeros(2, 2))
    with nothing_written(model.weight, model.bias), pytest.raises(PlanError, match="weight"):
        plan.apply({k: 2 * v for k, v in source.items()})


def test_a_plan_of_writes_has_its_values(backend: str) -> None:
    model = {"x": torch.zeros(3)}
    with paramkit.writes(model) as w:
        w["x"][0] = 1.0
    plan = w.plan
    for call in (
        lambda: plan.apply({"x": torch.ones(3)}),
        lambda: plan.refresh({"x": torch.ones(3)}),
    ):
        with nothing_written(model["x"]), pytest.raises(TypeError, match="takes no source"):
            call()


def test_the_model_of_a_plan_of_writes_is_gone(backend: str) -> None:
    model = nn.Linear(2, 2)
    with paramkit.writes(model) as w:
        w["weight"][0, 0] = 1.0
    plan = w.plan
    del model, w
    gc.collect()
    with pytest.raises(PlanError, match="no longer exists"):
        plan.refresh()


# What other checks would raise as well, later or under another name.


def test_a_conversion_that_torch_does_not_have(backend: str) -> None:
    """In a list it is known before the first write; in a plan it is a finding."""
    good, bad, shell = torch.zeros(3), torch.zeros(3), torch.empty(3, dtype=torch.bits8)
    with nothing_written(good, bad), pytest.raises(NotImplementedError):
        paramkit.foreach_copy_([good, bad], [torch.ones(3), shell])
    with nothing_written(good, bad):
        got = findings(lambda: paramkit.plan([good, bad], [torch.ones(3), shell]).apply())
    assert [kind for _, kind in got] == ["dtype"]
    with nothing_written(good):
        assert findings(lambda: paramkit.plan({"x": good}, {"x": shell}, casting="unsafe")) == [
            ("x", "dtype")
        ]


def test_a_new_source_of_other_names_and_types(backend: str) -> None:
    model = {"x": torch.zeros(2)}
    plan = paramkit.plan(model, {"x": torch.ones(2)})
    for source, expected in (
        ({}, ("x", "missing")),
        ({"x": torch.ones(2), "y": torch.ones(2)}, ("y", "unexpected")),
        ({"x": 3}, ("x", "type")),
    ):
        with nothing_written(model["x"]):
            assert findings(lambda s=source: plan.apply(s)) == [expected]


def test_a_module_whose_values_come_from_a_hook(backend: str) -> None:
    """As accelerate leaves one that it offloads, without accelerate."""
    model = nn.Linear(2, 2)
    model._hf_hook = SimpleNamespace(offload=True)  # type: ignore[assignment]
    source = {k: torch.ones_like(v) for k, v in model.state_dict().items()}
    with nothing_written(model.weight, model.bias):
        got = findings(lambda: paramkit.transplant(model, source))
    assert got == [("weight", "hook"), ("bias", "hook")]


def test_a_model_with_what_is_no_tensor(backend: str) -> None:
    assert findings(lambda: paramkit.plan({"x": 3, 4: torch.zeros(1)}, {})) == [  # type: ignore[dict-item]
        ("x", "type"),
        ("4", "type"),
    ]


def test_loading_into_what_is_no_module(backend: str) -> None:
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got dict"):
        paramkit.load_state_dict({}, {})  # type: ignore[arg-type]


def test_fake_destinations(backend: str) -> None:
    with FakeTensorMode():
        fake = torch.zeros(2)
    assert findings(lambda: paramkit.plan({"x": fake}, {"x": torch.ones(2)})) == [("x", "meta")]


def test_a_range_that_needs_a_size_that_nothing_tells() -> None:
    with pytest.raises(Mismatch, match="needs the size of r"):
        compile_pattern("i -> s i", {"s": "0:r"}, {}, (3,), (1,), (4, 3), (3, 1))


# The extension itself, called as no front-end does.


def test_inference_tensors_are_named(backend: str) -> None:
    with torch.inference_mode():
        made = torch.zeros(2)
    good = torch.zeros(2)
    with (
        nothing_written(good, made),
        pytest.raises(RuntimeError, match=r"dsts\[1\] is an inference"),
    ):
        paramkit.foreach_copy_([good, made], [torch.ones(2), torch.ones(2)])


def test_lists_of_the_dispatchers_operators(compiled: str) -> None:
    for dsts, srcs in (([torch.zeros(1)], []), ([], [torch.zeros(1)])):
        with pytest.raises(RuntimeError, match="same length"):
            torch.ops.paramkit.foreach_copy_(dsts, srcs)


@pytest.mark.parametrize("name", ["copy_", "fill_", "foreach_copy_", "foreach_fill_"])
def test_the_extension_counts_its_arguments(name: str) -> None:
    need_extension()
    expected = pytest.raises(TypeError, match=rf"{name}: expected \d arguments, got 0")
    with paramkit.backend.force("cpu") as extension, expected:
        getattr(extension, name)()


def test_the_extensions_plan_counts_its_names(compiled: str) -> None:
    plan = paramkit.plan({"x": torch.zeros(2)}, {"x": torch.ones(2)})
    with pytest.raises(RuntimeError, match="rebind: expected 1 names, got 0"):
        plan._compiled.rebind({}, [])  # type: ignore[union-attr]


def test_the_extensions_recorder_counts_its_arguments(compiled: str) -> None:
    recorder = paramkit.writes({"x": torch.zeros(2)})
    with pytest.raises(TypeError, match="_open: expected 2 arguments, got 0"):
        recorder._open()  # type: ignore[attr-defined]


def test_the_extensions_claim_looks_at_its_arguments(compiled: str) -> None:
    claim: Any = paramkit.backend.active().Claim
    with pytest.raises(TypeError, match="Claim: srcs: expected a list of tensors, got str"):
        claim([torch.zeros(2)], "text")
    plan: Any = paramkit.plan({"x": torch.zeros(2)}, {"x": torch.ones(2)})
    with pytest.raises(ValueError, match="expected 'write', 'compare' or 'exchange'"):
        plan._compiled.claim("read")


LATE = """
import os, sys, threading
import torch, paramkit

class Late:  # the last object of the process; names of modules are gone by then
    def __init__(self, wait):
        self.wait = wait
    def __del__(self, tell=os.write, Exception=Exception):
        try:
            self.wait()
        except Exception:
            tell(1, b"refused")

with paramkit.backend.force("cpu") as extension:
    memory, there = torch.zeros(3), threading.Event()
    def hold():
        with extension.Claim([memory], []):
            there.set()
            threading.Event().wait()
    threading.Thread(target=hold, daemon=True).start()
    there.wait()
    sys.late = Late(extension.Claim([memory], []).__enter__)
"""


def test_nothing_is_waited_for_at_the_interpreters_end(compiled: str) -> None:
    """A daemon thread that is at the memory was stopped for good: an error, whose class is gone as well."""
    done = subprocess.run(
        [sys.executable, "-c", LATE], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "refused"), done.stderr


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_plans_are_not_copied(backend: str, copied: Callable[[object], object]) -> None:
    plan = paramkit.plan({"x": torch.zeros(2)}, {"x": torch.ones(2)})
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        copied(plan)


@pytest.mark.parametrize(
    ("total", "error"), [(1e6, TypeError), (True, TypeError), (3 * 4096 - 1, ValueError)]
)
def test_bytes_of_staging(total: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="staging: "), paramkit.backend.staging(total):
        pytest.fail("the block must not run")
