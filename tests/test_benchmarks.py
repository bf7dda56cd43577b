"""The benchmarks' frame: cases are well-formed, every side is checked, verdicts, tables, charts.

Nothing here looks at a time. Cases run in their tiny form: the same calls on small inputs.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import paramkit
from benchmarks import (
    compare,
    matrix,
    memory,
    plain,
    publish,
    rounds,
    streaming,
    table,
    text,
    threads,
)
from benchmarks.__main__ import main
from benchmarks.cases import CASES, GROUPS, Case, Work, experts, fused, models, verify
from benchmarks.cases.casts import DTYPES, QUICK
from benchmarks.cases.transplants import DENSE
from benchmarks.limits import Limits
from benchmarks.measure import check, run_case
from benchmarks.sides import Side, sides_of
from benchmarks.targets import (
    AtLeast,
    AtMost,
    Either,
    Figure,
    Verdict,
    from_dict,
    geometric_mean,
    judge,
    judge_group,
)
from tests import cases as inputs
from tests import mixture
from tests.conftest import need_extension, need_module

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.filterwarnings("ignore:paramkit runs on torch")

needs_compiler = pytest.mark.skipif(not plain.available(), reason=plain.why_not() or "-")


# --- cases ----------------------------------------------------------------------------------------


def test_cases_have_names_groups_and_targets() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert case.group in GROUPS
        assert case.mode in ("interleaved", "hot", "memory")
        assert case.targets
        assert case.what
        assert not case.name.startswith("cast ") or case.group == "casts"
        if case.group != "memory":
            assert "ratio" in case.needs  # never slower than torch, at the least
    assert {case.group for case in CASES} == set(GROUPS)


def test_every_pair_of_dtypes_is_a_case() -> None:
    assert len(DTYPES) == 18
    names = {case.name for case in CASES}
    for source, dtype in itertools.permutations(DTYPES, 2):
        pair = f"cast {source}->{dtype}".replace("torch.", "")
        assert pair in names
    quick = [case for case in CASES if case.group == "casts" and case.quick]
    assert len(quick) == len(QUICK)


@pytest.mark.parametrize("group", [name for name in GROUPS if name != "memory"])
def test_every_case_does_what_torch_does(group: str) -> None:
    """Tiny, but the same calls: the bytes of every destination, and around it, are equal."""
    with torch.no_grad():
        for case in CASES:
            if case.group == group:
                work = case.make(True)
                try:
                    check(work, work.checked())
                except AssertionError as error:
                    raise AssertionError(f"{case.name}: {error}") from error
                assert work.bytes > 0 or work.proof is not None


def made(wrong: bool = False, mode: str = "interleaved", numpy: bool = False) -> Case:
    def make(tiny: bool) -> Work:
        dst = torch.zeros(8)
        return Work(
            ours=lambda: dst.fill_(2.0 if wrong else 1.0),
            peer=lambda: dst.fill_(1.0),
            dsts=[dst],
            bytes=32,
            numpy=(lambda: dst.fill_(3.0)) if numpy else None,
        )

    return Case("made", "small", "made for the test", (AtLeast("ratio", 1e-9),), mode, make)


@pytest.mark.parametrize("mode", ["interleaved", "hot"])
def test_a_case_is_timed(mode: str) -> None:
    outcome = run_case(made(mode=mode), tiny=True)
    assert outcome.verdict == Verdict("met")
    own = outcome.sides["paramkit"]
    assert own.samples == 4
    assert own.q1 <= own.median <= own.q3
    assert outcome.bytes == 32
    row = json.loads(json.dumps(outcome.as_dict()))
    assert row["ratio"]["q1"] <= row["ratio"]["q3"]
    assert set(row["sides"]) == {"paramkit", "torch"}


@pytest.mark.parametrize("wrong, numpy", [(True, False), (False, True)])
def test_a_wrong_result_is_no_figure(wrong: bool, numpy: bool) -> None:
    outcome = run_case(made(wrong=wrong, numpy=numpy), tiny=True)
    assert outcome.verdict.word == "error"
    assert "differs" in outcome.verdict.detail
    assert not outcome.sides


def test_bytes_around_a_view_are_checked() -> None:
    whole = torch.zeros(8)
    work = Work(
        ours=lambda: whole.fill_(1.0),
        peer=lambda: whole[2:4].fill_(1.0),
        dsts=[whole[2:4]],
        bytes=8,
    )
    with pytest.raises(AssertionError, match="differs"):
        check(work, [work.ours])


def test_a_side_follows_each_other_one_equally_often() -> None:
    for count in range(2, 7):
        orders = rounds.balanced(count)
        assert all(sorted(order) == list(range(count)) for order in orders)
        followed = [pair for order in orders for pair in itertools.pairwise(order)]
        assert len(set(followed)) == count * (count - 1)
        assert len({followed.count(pair) for pair in followed}) == 1


def test_samples_of_batched_sides() -> None:
    asked: list[int] = []
    side = Side("made", asked.append, 8, inner=7, batched=True)
    side.sample()
    side.sample(3)
    assert asked == [7, 3]


def test_the_mixture_of_experts() -> None:
    assert mixture.tensors() == 31_337
    assert 2 * mixture.bytes_of() <= 100_000_000  # source and destination together
    assert "**31,337**" in mixture.table()
    dsts, srcs = mixture.make(1000)
    assert {dst.dtype for dst in dsts} == {torch.bfloat16}
    assert [dst.shape for dst in dsts] == [src.shape for src in srcs]


def test_tiled_values_repeat() -> None:
    for dtype in (torch.float32, torch.float8_e5m2, torch.bool):
        made = inputs.tiled((3, 11), dtype, period=7).view(-1).view(torch.uint8)
        raw = inputs.values((7,), dtype).view(torch.uint8)
        assert torch.equal(made, raw.repeat(5)[: made.numel()])
    assert inputs.tiled((0, 3), torch.float32).shape == (0, 3)


def test_temporary_memory_is_seen() -> None:
    square = torch.rand(300, 300)
    assert memory._allocated(lambda: torch.zeros(300, 300).copy_(square.t())) > square.nbytes
    assert memory._allocated(lambda: torch.empty(1 << 16, dtype=torch.uint8)) >= 1 << 16
    assert memory._allocated(lambda: None) == 0
    # In a process of its own, as the cases run: a heap that tests before have left grows otherwise.
    code = """
        import torch
        from benchmarks import memory
        size, held = 64 << 20, []
        grown = memory._peak_growth(lambda: held.append(torch.ones(size, dtype=torch.uint8)))
        assert grown > size // 2, grown
        assert memory._peak_growth(lambda: None) < memory.RESOLUTION
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_case_of_memory() -> None:
    case = next(case for case in CASES if case.mode == "memory")
    outcome = run_case(case, tiny=True)
    assert outcome.verdict == Verdict("met"), outcome.verdict
    assert outcome.as_dict()["temporary_bytes"]["paramkit"] == 0


# --- transplants ----------------------------------------------------------------------------------


def test_the_named_mixture_is_the_mixture() -> None:
    shapes = models.experts()
    assert Counter(shapes.values()) == sum(
        (Counter({line.shape: line.count}) for line in mixture.TABLE), Counter()
    )
    assert max(math.prod(shape) for shape in shapes.values()) == 1024 * 32
    assert len(models.experts(2)) < 0.51 * len(shapes)  # half as much, for growth


def test_models_have_the_names_and_tensors_given() -> None:
    for shapes in (models.experts(64), DENSE["tiny"]):
        for make in (models.filled, models.small):
            state = make(shapes)
            found = models.nested(state).state_dict()
            assert list(found) == list(shapes)
            assert all(found[name].data_ptr() == state[name].data_ptr() for name in found)
            assert {name: tuple(tensor.shape) for name, tensor in found.items()} == dict(shapes)
    for words, shapes in DENSE.items():
        size = 2 * sum(math.prod(shape) for shape in shapes.values())
        named = {"2 GiB": 2 << 30, "1 GiB": 1 << 30, "256 MiB": 256 << 20, "tiny": size}[words]
        assert named <= size < 1.001 * named


def test_fused_models_hold_what_split_ones_hold() -> None:
    for sizes, words in ((fused.LARGE, 1 << 30), (fused.SMALL, 192 << 20), (fused.TINY, 0)):
        split, whole = (
            sum(math.prod(shape) for shape in shapes.values())
            for shapes in (sizes.split(), sizes.fused())
        )
        assert split == whole
        assert not words or 2 * split == words


def test_folders_are_removed() -> None:
    folder = models.Folder()
    path = folder.path
    (path / "file").write_text("held")
    assert path.is_dir()
    del folder
    assert not path.exists()


def test_every_rule_of_the_matching_case_is_needed() -> None:
    pairs = experts.rules()
    assert len({src for src, _ in pairs}) == len(pairs) == experts.RULES
    names = list(models.experts(64))
    renamed = experts._renamed(names, pairs)
    assert len(set(renamed.values())) == len(names)
    assert renamed["model.layers.7.moe.experts.1.up.weight"] == "decoder.blocks.7.experts.1.w3"
    assert renamed["model.layers.8.moe.experts.1.up.weight"] == "model.blocks.8.experts.1.w3"
    assert renamed["model.layers.70.attn.q.weight"] == "decoder.blocks.70.attention.q"
    assert renamed["model.layers.5.attn.q.weight"] == "model.layers.5.attn.q.weight"
    for pair in pairs[:: len(pairs) // 7]:
        assert len(experts._renamed(names, [pair]).items() - {(n, n) for n in names}) > 0


def test_verify_is_not_timed_where_it_is_blind() -> None:
    state = {"a": torch.ones(8, dtype=torch.bfloat16), "b": torch.ones(8, dtype=torch.bfloat16)}
    held = {name: tensor.clone() for name, tensor in state.items()}
    verify._see_a_bit(paramkit.plan(held, state), held)
    assert all(torch.equal(held[name], state[name]) for name in state)

    class Blind:
        def verify(self) -> list[str]:
            return []

    with pytest.raises(AssertionError, match="one bit of b"):
        verify._see_a_bit(Blind(), held)
    held["a"][0] = 2
    with pytest.raises(AssertionError, match="after apply"):
        verify._see_a_bit(paramkit.plan(held, state), held)


@pytest.mark.parametrize("right", [True, False])
def test_what_a_call_finds_is_proved_by_another(right: bool) -> None:
    def make(tiny: bool) -> Work:
        dst = torch.zeros(8)
        return Work(
            ours=lambda: None,
            proof=lambda: dst.fill_(1.0 if right else 2.0),
            peer=lambda: dst.fill_(1.0),
            dsts=[dst],
            bytes=0,
        )

    wanted = (AtLeast("ratio", 1e-9), AtMost("seconds", 60))
    outcome = run_case(
        Case("made", "small", "made for the test", wanted, "interleaved", make), tiny=True
    )
    assert outcome.verdict.word == ("met" if right else "error")


def test_growth_is_measured() -> None:
    def make(tiny: bool) -> Work:
        dst = torch.zeros(8)

        def ours() -> None:
            time.sleep(0.02)
            dst.fill_(1.0)

        return Work(
            ours=ours,
            half=lambda: time.sleep(0.001),
            peer=lambda: dst.fill_(1.0),
            dsts=[dst],
            bytes=32,
        )

    limit = (AtMost("growth", 4.0),)
    case = Case("made", "small", "made for the test", limit, "interleaved", make)
    outcome = run_case(case, tiny=True)
    assert outcome.verdict.word == "missed"  # twenty times as long, give or take the clock
    assert "the time of half as much, wanted 4" in outcome.verdict.detail
    found = json.loads(json.dumps(outcome.as_dict()))
    assert found["growth"]["value"] > 4
    assert outcome.figures["seconds"] is not None and outcome.figures["seconds"].value >= 0.02
    shown = table.plain(result(row("a", "small", 2.0, growth=found["growth"])))
    assert "growth" in shown
    assert "growth" not in table.plain(result(row("a", "small", 2.0)))


# --- plain C --------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("own_pool", [False, True])
@pytest.mark.parametrize("kind", range(len(plain.KINDS)), ids=plain.KINDS)
def test_plain_copies_and_fills(kind: int, own_pool: bool) -> None:
    """Every length and misalignment, and nothing around it is touched."""
    if not plain.compiled().plain_has(kind):
        pytest.skip("this machine does not have it")
    guard = 0xA5
    source = inputs.random_bits((9000,), torch.uint8)
    sizes = [*range(70), 255, 256, 257, 300, 511, 513, 1023, 4097, 8191]
    for size, offset in itertools.product(sizes, (0, 1, 31, 63)):
        whole = torch.full((size + 256,), guard, dtype=torch.uint8)
        dst, src = whole[64 + offset : 64 + offset + size], source[offset * 3 :][:size]
        threads = size % 5 + 1
        for loop, expected in (
            (plain.Loop(kind, dst, src, threads, own_pool=own_pool), src),
            (plain.Loop(kind, dst, None, threads, 7, own_pool), torch.full_like(src, 7)),
        ):
            loop(2)
            assert torch.equal(dst, expected), (size, offset)
            assert (whole[: 64 + offset] == guard).all()
            assert (whole[64 + offset + size :] == guard).all()


@needs_compiler
def test_limits_are_the_best_plain_loops() -> None:
    limits = Limits(1 << 16)
    assert limits.gbs("copy") is None
    for what, moved in (("copy", 2 << 16), ("fill", 1 << 16), ("compare", 2 << 16)):
        loop = limits.loop(what)
        assert loop is not None and loop.bytes == moved
        limits.add(what, [float(moved), 2.0 * moved, 4.0 * moved])
        assert limits.gbs(what) == 0.5
    assert limits.as_dict()["copy"]["samples"] == 3
    with pytest.raises(ValueError, match="dense"):
        plain.candidates(torch.zeros(4, 4).t(), None)
    with pytest.raises(ValueError, match="dense"):
        plain.comparisons(torch.zeros(4, 4), torch.zeros(4, 4).t())


@needs_compiler
@pytest.mark.parametrize("own_pool", [False, True])
@pytest.mark.parametrize("kind", range(len(plain.COMPARISONS)), ids=plain.COMPARISONS)
def test_plain_comparisons_see_every_byte(kind: int, own_pool: bool) -> None:
    """Every length, and a bit changed anywhere: first, last, between; not the bytes around."""
    if not plain.compiled().plain_has_compare(kind):
        pytest.skip("this machine does not have it")
    source = inputs.random_bits((9000,), torch.uint8)
    for size in (*range(70), 255, 256, 257, 511, 513, 1023, 4097, 8191):
        other = torch.full((size + 2,), 0xA5, dtype=torch.uint8)
        first, second = source[size % 7 :][:size], other[1 : size + 1]
        second.copy_(first)
        loop = plain.Compare(kind, first, second, size % 3 + 1, own_pool)
        assert loop.bytes == 2 * size
        assert loop(2)
        for at in {0, size // 3, size // 2, size - 1} if size else ():
            second[at] ^= 1 << at % 8
            assert not loop(), (size, at)
            second[at] ^= 1 << at % 8
        assert loop()


def test_without_a_compiler_the_plain_columns_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler-here")
    for cached in (plain.why_not, plain.compiled):
        cached.cache_clear()
    try:
        assert "no-such-compiler-here" in plain.why_not()
        limits = Limits(1 << 12)
        case = next(case for case in CASES if "limit" in case.needs)
        outcome = run_case(case, tiny=True, limits=limits)
        assert set(outcome.sides) <= {"paramkit", "torch", "numpy"}
        assert outcome.figures["limit"] is None
        assert outcome.verdict.word in ("unknown", "noise", "missed")
        assert "why_not" in limits.as_dict()
    finally:
        for cached in (plain.why_not, plain.compiled):
            cached.cache_clear()


@needs_compiler
def test_the_sides_that_targets_need_are_there() -> None:
    for name, needed in (
        ("copy 256 MiB", {"numpy", "libc", "limit"}),
        ("column slice", {"numpy", "ceiling"}),
        ("cast float8_e4m3fn->bfloat16", {"ceiling"}),
        ("replay 1000x64", {"ceiling"}),
        ("replay experts", set()),
        ("verify 1 GiB", {"limit"}),
        ("match 31337 names x 400 rules", {"half"}),
    ):
        case = next(case for case in CASES if case.name == name)
        found = sides_of(case, case.make(True), Limits(1 << 12), quick=False)
        assert set(found) == {"paramkit", "torch"} | needed


@needs_compiler
def test_plain_pairs_write_what_the_list_call_writes() -> None:
    """The floor of small lists does the same work, or it is none: dense pairs, and taps of one number."""
    for name in ("replay 1000x64", "fill slices 4x4x3x3"):
        work = next(case for case in CASES if case.name == name).make(True)
        assert work.pairs is not None
        work.ours()
        expected = [dst.clone() for dst in work.dsts]
        for dst in work.dsts:
            dst.zero_()
        work.pairs(2)
        assert all(torch.equal(dst, want) for dst, want in zip(work.dsts, expected, strict=True))
        assert work.pairs._memory[2][::64].tolist() == [2] * len(work.pairs.dsts)


# --- targets --------------------------------------------------------------------------------------


def flat(value: float, spread: float = 0.0) -> Figure:
    return Figure(value, value - spread, value + spread)


def test_verdicts() -> None:
    guard = (AtLeast("ratio", 0.95),)
    assert judge(guard, {"ratio": flat(1.0)}) == Verdict("met")
    assert judge(guard, {"ratio": flat(0.94, 0.02)}).word == "noise"
    assert judge(guard, {"ratio": flat(0.94)}).word == "missed"
    assert judge(guard, {"ratio": flat(0.5, 1.5)}).word == "missed"
    assert judge((AtMost("memory", 0),), {"memory": flat(0)}).word == "met"
    assert judge((AtMost("seconds", 2),), {"seconds": flat(2.0)}).word == "met"
    assert judge((AtMost("seconds", 2),), {"seconds": flat(2.1, 0.2)}).word == "noise"
    assert judge((AtMost("seconds", 2),), {"seconds": flat(2.1, 0.05)}).word == "missed"
    assert judge((AtMost("seconds", 2),), {"seconds": flat(3.0, 2.0)}).word == "missed"
    assert str(AtMost("seconds", 2)) == "<= 2 s"
    assert "4,096 bytes" in judge((AtMost("memory", 0),), {"memory": flat(4096)}).detail


def test_the_worst_condition_is_named() -> None:
    conditions = (AtLeast("ratio", 0.95), AtLeast("limit", 0.7))
    verdict = judge(conditions, {"ratio": flat(3.0), "limit": flat(0.61)})
    assert str(verdict) == "missed: 0.61 of the limit, wanted 0.7"
    verdict = judge(conditions, {"ratio": flat(3.0), "limit": None})
    assert verdict.word == "unknown"
    verdict = judge(conditions, {"ratio": flat(0.5), "limit": None})
    assert verdict.word == "missed"


def test_either_condition_is_enough() -> None:
    either = (AtLeast("ratio", 0.95), Either(AtLeast("ratio", 8), AtLeast("ceiling", 0.85)))
    for ratio, ceiling, word in (
        (9.0, 0.1, "met"),
        (1.2, 0.9, "met"),
        (0.5, 0.9, "missed"),
        (1.2, 0.5, "missed"),
    ):
        figures = {"ratio": flat(ratio), "ceiling": flat(ceiling)}
        assert judge(either, figures).word == word
    assert judge(either, {"ratio": flat(9.0), "ceiling": None}).word == "met"
    assert judge(either, {"ratio": flat(2.0), "ceiling": None}).word == "unknown"
    detail = judge(either, {"ratio": flat(1.2), "ceiling": flat(0.5)}).detail
    assert detail == "1.2x torch, wanted 8, and 0.5 of a plain copy, wanted 0.85"


def test_conditions_survive_json() -> None:
    for case in CASES:
        for target in case.targets:
            assert from_dict(json.loads(json.dumps(target.as_dict()))) == target


def test_group_means() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([]) == 0.0
    mean, verdict = judge_group(4.0, [flat(2.0), flat(8.0)], complete=True)
    assert mean is not None and mean.value == pytest.approx(4.0)
    assert judge_group(3.9, [flat(2.0), flat(8.0)], complete=True)[1].word == "met"
    assert judge_group(8.0, [flat(2.0), flat(8.0)], complete=True)[1].word == "missed"
    assert judge_group(3.0, [flat(2.0), flat(8.0)], complete=False)[1].word == "unknown"
    assert judge_group(None, [flat(2.0)], complete=False)[1].word == "met"
    assert judge_group(8.0, [], complete=True)[0] is None
    assert verdict.word in ("met", "noise")  # 4.0, give or take the last bit


# --- results made up ------------------------------------------------------------------------------


def side(median: float) -> dict[str, Any]:
    return {
        "median_ns": median,
        "q1_ns": median * 0.9,
        "q3_ns": median * 1.1,
        "samples": 9,
        "gbs": 1e6 / median,
    }


def row(name: str, group: str, ratio: float, verdict: str = "met", **more: Any) -> dict[str, Any]:
    figure = {"value": ratio, "q1": ratio * 0.95, "q3": ratio * 1.05}
    return {
        "name": name,
        "group": group,
        "what": "made up",
        "mode": "interleaved",
        "bytes": 1 << 20,
        "sides": {"paramkit": side(1e5), "torch": side(1e5 * ratio), "libc": side(9e4)},
        "ratio": figure,
        "share_of_limit": {"value": 0.6, "q1": 0.55, "q3": 0.65} if "permute" in name else None,
        "share_of_ceiling": None,
        "targets": [AtLeast("ratio", 2.0).as_dict(), AtLeast("limit", 0.7).as_dict()],
        "wanted": ">= 2x",
        "verdict": verdict,
        "detail": "" if verdict == "met" else "0.6 of the limit, wanted 0.7",
        **more,
    }


def result(*cases: dict[str, Any]) -> dict[str, Any]:
    names = list(dict.fromkeys(case["group"] for case in cases))
    machine = {"cpu": "made up", "cores": 2, "threads": 2, "torch": "2", "torch_capability": "no"}
    machine |= {"numpy": "2", "backend": "cpu", "capability": "scalar", "python": "3"}
    machine |= {"commit": "0000000", "date": "2000-01-01", "load": 0.1}
    limit = {"loop": "libc", "threads": 2, "gbs": 20.0, "gbs_q1": 19, "gbs_q3": 21, "samples": 9}
    groups = [
        {
            "name": name,
            "title": GROUPS[name].title,
            "mean": {"value": 3.0, "q1": 2.0, "q3": 4.0},
            "target": GROUPS[name].mean,
            "verdict": "missed" if GROUPS[name].mean else "",
            "detail": "3x torch, wanted 8" if GROUPS[name].mean else "",
            "counts": {},
        }
        for name in names
    ]
    return {
        "schema": table.SCHEMA,
        "machine": machine,
        "quick": False,
        "limits": {"bytes": 1 << 28, "copy": limit, "fill": limit},
        "groups": groups,
        "cases": list(cases),
    }


def whole() -> dict[str, Any]:
    casts = [
        row("cast float32->float8_e5m2", "casts", 9.0, facts={"class": "float8"}),
        row("cast float8_e5m2->float32", "casts", 0.8, "missed", facts={"class": "float8"}),
        row("cast float32->bfloat16", "casts", 1.2, "noise", facts={"class": "other"}),
    ]
    memory_row = row("memory cast", "memory", 1.0)
    memory_row |= {"mode": "memory", "ratio": None, "sides": {}}
    memory_row["temporary_bytes"] = {"paramkit": 0, "torch": 64}
    return result(
        row("foreach_copy 1000x64", "small", 9.0),
        row("copy 4 KiB", "contiguous copies", 1.4, bytes=8 << 10),
        row("copy 256 MiB", "contiguous copies", 0.7, "missed", bytes=512 << 20),
        row("fill 4 KiB", "contiguous fills", 1.4, bytes=4 << 10),
        row("permute 4096x4096->10 float32", "permutes", 8.5, "missed"),
        row("permute 4096x4096->10 bfloat16", "permutes", 0.5, "missed"),
        *casts,
        memory_row,
    )


def test_durations_ratios_sizes() -> None:
    assert text.duration(418) == "418 ns"
    assert text.duration(4180) == "4.18 us"
    assert text.duration(41.8e6) == "41.8 ms"
    assert text.duration(999.6) == "1.00 us"
    assert [text.ratio(value) for value in (0.954, 9.99, 12.34, 99.97)] == [
        "0.95x",
        "9.99x",
        "12.3x",
        "100x",
    ]
    assert [text.size(value) for value in (256, 4096, 1 << 28)] == ["256 B", "4 KiB", "256 MiB"]


def test_a_busy_machine_is_mentioned() -> None:
    machine = whole()["machine"]
    assert "busy" not in text.caption(machine)
    assert "busy (load 3" in text.caption({**machine, "load": 3})


def test_tables() -> None:
    data = whole()
    shown = table.markdown(data)
    assert "10 cases: 5 met, 1 noise, 4 missed." in shown
    assert "| case | paramkit | torch |" in shown
    assert "missed: 0.6 of the limit, wanted 0.7" in shown
    assert "Geometric mean of the ratios: 3.00x (target >= 8x): missed" in shown
    assert "| from \\ to | f32 | e5m2 | bf16 |" in shown
    assert "**0.80** ✗" in shown and "1.20 ~" in shown
    assert "0 bytes | 64 bytes" in shown
    assert "limit, plain C over 256 MiB: copy 20.0 GB/s (libc)" in shown
    padded = table.plain(data)
    assert "copy 256 MiB" in padded and "|" not in padded
    classes = {each["class"]: each for each in matrix.classes(data["cases"][6:9])}
    assert classes["float8"]["below"] == 1
    assert classes["float8"]["mean"] == pytest.approx(geometric_mean([9.0, 0.8]))


def test_choosing_from_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made.json"
    path.write_text(json.dumps(whole()))
    assert table.main([str(path), "--only", "copy*MiB"]) == 0
    shown = capsys.readouterr().out
    assert "copy 256 MiB" in shown and "4 KiB" not in shown
    assert table.main([str(path), "--group", "small", "--plain"]) == 0
    assert "1 cases" in capsys.readouterr().out
    assert table.main([str(path), "--only", "nothing like it"]) == 2
    path.write_text("{}")
    with pytest.raises(SystemExit, match="run it again"):
        table.main([str(path)])


# --- comparing ------------------------------------------------------------------------------------


def test_changes_know_about_noise() -> None:
    def figure(value: float, spread: float) -> dict[str, float]:
        return {"value": value, "q1": value * (1 - spread), "q3": value * (1 + spread)}

    assert compare.verdict(figure(2.0, 0.01), figure(3.0, 0.01)) == "faster"
    assert compare.verdict(figure(3.0, 0.01), figure(2.0, 0.01)) == "slower"
    assert compare.verdict(figure(3.0, 0.3), figure(2.0, 0.3)) == "same"  # quartiles overlap
    assert compare.verdict(figure(2.0, 0.001), figure(2.05, 0.001)) == "same"  # too little
    assert compare.verdict(figure(2.05, 0.001), figure(2.0, 0.001)) == "same"


def test_comparing_results() -> None:
    old = result(row("a", "small", 4.0), row("b", "small", 4.0), row("gone", "small", 1.0))
    new = result(row("a", "small", 2.0), row("b", "small", 4.1), row("added", "small", 1.0))
    found = {change.name: change.verdict for change in compare.changes(old, new)}
    assert found == {"a": "slower", "b": "same", "gone": "gone", "added": "new"}
    assert compare.worse(compare.changes(old, new))
    assert not compare.worse(compare.changes(old, old))
    shown = compare.table(old, new)
    assert "0.50  slower" in shown
    assert "gone" in shown and "new" in shown
    broken = row("a", "small", 2.0, "error")
    broken["ratio"] = None
    assert compare.changes(old, result(broken))[0].verdict == "error"


def test_comparing_memory() -> None:
    old, new = whole(), whole()
    new["cases"][-1]["temporary_bytes"]["paramkit"] = 1 << 20
    assert compare.changes(old, new)[-1].verdict == "more memory"
    assert compare.changes(new, old)[-1].verdict == "less memory"


# --- charts and documents -------------------------------------------------------------------------


def test_charts_are_the_same_each_time(tmp_path: Path) -> None:
    need_module("matplotlib")
    from benchmarks import charts

    names = {"bandwidth.svg", "ratios.svg", "limit-shares.svg"}
    first = {path.name: path.read_bytes() for path in charts.draw(whole(), tmp_path)}
    again = {path.name: path.read_bytes() for path in charts.draw(whole(), tmp_path)}
    assert set(first) == names
    assert first == again
    for drawn in first.values():
        assert b"<dc:date>" not in drawn
        assert len(drawn) < 200_000
    assert b"0.70x" in first["ratios.svg"]  # losses are there, in their own colour
    from benchmarks.charts.style import LOSS

    assert LOSS.encode() in first["ratios.svg"]


def test_charts_without_their_cases_are_left_out(tmp_path: Path) -> None:
    need_module("matplotlib")
    from benchmarks import charts

    assert [path.name for path in charts.draw(result(row("a", "small", 2.0)), tmp_path)] == [
        "ratios.svg"
    ]


def test_many_slower_conversions_are_counted() -> None:
    need_module("matplotlib")
    from benchmarks.charts import ratios

    slower = [row(f"cast a{n}->b", "casts", 0.5 + n / 1000) for n in range(40)]
    ((_, made),) = ratios.bars(result(*slower))
    assert any(bar.label.startswith("and 20 more") for bar in made)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """A project's folder with marked documents and a result."""
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    marked = f"# Title\n\nbefore\n\n{publish.BEGIN}\nold\n{publish.END}\n\nafter\n"
    (tmp_path / "README.md").write_text(marked)
    (folder / "README.md").write_text("# Results\n\nwords\n")
    (folder / "made.json").write_text(json.dumps(whole()))
    return tmp_path


def test_publishing_twice_changes_nothing(documents: Path) -> None:
    need_module("matplotlib")
    source = documents / "benchmarks" / "results" / "made.json"
    first = publish.publish(source, documents)
    assert len(first) == 5
    assert publish.publish(source, documents) == []
    readme = (documents / "README.md").read_text()
    assert readme.startswith("# Title\n\nbefore\n") and readme.endswith("\n\nafter\n")
    assert "old" not in readme.split(publish.BEGIN)[1].split(publish.END)[0].split()
    assert "| foreach_copy 1000x64 |" in readme
    assert "benchmarks/results/made/bandwidth.svg" in readme
    own = (documents / "benchmarks" / "results" / "README.md").read_text()
    assert "## made.json" in own and "(made/ratios.svg)" in own
    for name in ("bandwidth", "ratios", "limit-shares"):
        assert source.with_suffix("").joinpath(f"{name}.svg").exists()


def test_a_second_result_has_a_section_of_its_own(documents: Path) -> None:
    need_module("matplotlib")
    folder = documents / "benchmarks" / "results"
    publish.publish(folder / "made.json", documents)
    shutil.copy(folder / "made.json", folder / "other.json")
    publish.publish(folder / "other.json", documents)
    own = (folder / "README.md").read_text()
    assert own.index("## made.json") < own.index("## other.json")
    assert "(other/ratios.svg)" in own and "(made/ratios.svg)" in own


def test_publishing_needs_markers(documents: Path) -> None:
    need_module("matplotlib")
    (documents / "README.md").write_text("no markers\n")
    with pytest.raises(ValueError, match="benchmark:begin"):
        publish.publish(documents / "benchmarks" / "results" / "made.json", documents)


def test_the_documents_have_markers() -> None:
    for name in ("README.md", "benchmarks/results/README.md"):
        document = (ROOT / name).read_text(encoding="utf-8")
        assert document.count(publish.BEGIN) == document.count(publish.END) >= 1


def test_selected_cases_exist() -> None:
    names = {case.name for case in CASES}
    assert set(publish.SELECTION) <= names


# --- streaming ------------------------------------------------------------------------------------


def test_where_streaming_begins_to_win() -> None:
    def gains(*values: float) -> list[dict[str, float]]:
        return [{"bytes": 1 << number, "gain": gain} for number, gain in enumerate(values)]

    assert streaming.crossover(gains(0.5, 0.8, 1.2, 1.5)) == 4
    assert streaming.crossover(gains(1.5, 0.8, 1.2, 1.5)) == 4  # it must stay so
    assert streaming.crossover(gains(0.5, 0.8, 1.2, 1.0)) is None
    assert streaming.SIZES[0] == 64 << 10 and streaming.SIZES[-1] == 512 << 20


def test_streaming_is_forced_and_put_back() -> None:
    asked: list[int] = []

    def setter(threshold: int) -> int:
        asked.append(threshold)
        return 77

    found = streaming.measure(setter, "rows", 64 << 10, rounds.TINY)
    assert {streaming.ALWAYS, streaming.NEVER, 77} == set(asked)
    assert asked[1::2] == [77] * (len(asked) // 2)
    shown = streaming.table(
        {"rows": [found], "crossover": {"rows": None}, "machine": whole()["machine"]}
    )
    assert "rows: streaming wins at no size" in shown


# --- threads --------------------------------------------------------------------------------------


def test_threads_beside_one() -> None:
    found = threads.measure(3, "100 x 64", rounds.TINY)
    assert found["threads"] > 0
    shown = threads.table({"rows": [found], "machine": whole()["machine"]})
    assert "100 x 64" in shown and "less than 0.9 kept" in shown


# --- the command line -----------------------------------------------------------------------------


def test_from_command_line_to_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "results" / "here.json"
    assert main(["--only", "fill 4 KiB", "--quick", "--tiny", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert [case["name"] for case in found["cases"]] == ["fill 4 KiB"]
    assert found["machine"]["torch"] == torch.__version__
    assert found["quick"] is True
    capsys.readouterr()
    assert table.main([str(target)]) == 0
    shown = capsys.readouterr().out
    assert "| case | paramkit |" in shown
    assert "| fill 4 KiB |" in shown
    arguments = ["--only", "fill 4 KiB", "--quick", "--tiny", "--compare", str(target)]
    assert main(arguments) == 0
    assert "new / old" in capsys.readouterr().out


def test_the_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--list", "--only", "small"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "foreach_copy experts" in done.stdout


def test_choosing_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "replay*hot"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["--list", "--only", "casts"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 18 * 17 + 1  # and "foreach_copy casts"
    assert main(["--list", "--only", "casts", "--quick"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(QUICK) + 1
    assert main(["--list", "--quick", "--only", "cast int8->uint8"]) == 0  # named, so meant
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert main(["--only", "no such case"]) == 2
    assert main(["--sizes"]) == 0
    assert "31,337" in capsys.readouterr().out


def test_dropin(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Both tables, from tiny writes in processes of their own; the times mean nothing here."""
    from benchmarks import dropin

    assert dropin.main(["--tiny", "--json", str(tmp_path / "dropin.json")]) == 0
    result = json.loads((tmp_path / "dropin.json").read_text(encoding="utf-8"))
    assert result["large"].keys() == dropin.large_writes(tiny=True).keys()
    assert result["tiny"].keys() == dropin.tiny_writes().keys()
    for row in result["tiny"].values():
        assert len(row["cost"]) == 3 and all(cost > 0 for cost in row["cost"])
    shown = capsys.readouterr().out
    assert "copy_, transposed" in shown and "copy_ of 64" in shown


def test_dropin_times_what_it_says() -> None:
    """Large writes take the kernels under the patch; of the tiny ones those that say so."""
    from benchmarks import dropin

    need_extension()
    for writes, taken in ((dropin.large_writes(tiny=True), True), (dropin.tiny_writes(), False)):
        for name, call in writes.items():
            with paramkit.patch_torch(), torch.no_grad():
                call()  # once for the conversions that the kernels ask torch about
                with paramkit.backend.trace() as trace:
                    call()
            expected = taken or "(taken)" in name or "_foreach_copy_" in name
            assert bool(trace.routes) == expected, name
