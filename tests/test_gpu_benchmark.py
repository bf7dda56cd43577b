"""The GPU benchmark without a GPU: its cases on the emulated kernels, its clocks, verdicts and table.

Nothing here looks at a time. A stand-in takes the place of the device: CPU tensors on the kernels compiled
for the host, or a clock that only the test moves.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import paramkit
from benchmarks import machine, rounds
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cases, check, compiled, facts, ready, registry, table
from benchmarks.gpu import run as running
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.check import Difference, count
from benchmarks.gpu.clocks import LEAST, Side
from benchmarks.gpu.compiled import Compiler
from benchmarks.gpu.limits import Limits
from benchmarks.gpu.measure import run_case, share
from benchmarks.gpu.registry import CASES, CLOCKS, GROUPS, Case, Work
from benchmarks.gpu.run import budget_of, run
from benchmarks.table import load
from benchmarks.targets import AtLeast, from_dict, wanted
from paramkit.backend import toolkit
from tests.conftest import emulated, need_extension
from tests.fake_nvcc import FakeNvcc, path_without_nvcc
from tests.programs import program

ROOT = Path(__file__).resolve().parent.parent

# The table of what is promised.
PROMISED = {
    "foreach_copy 10000x1024": ">= 3x",
    "replay 10000x1024": ">= 20x",
    "graph replay 10000x1024": ">= 30x",
    "foreach_copy 1024x1MiB": ">= 1.15x; >= 0.93 of the limit",
    "mixed list": ">= 5x; >= 0.85 of the limit",
    "transpose 8192x8192 *": ">= 3x; >= 0.9 of the limit",
    "permute 32x128x4096->201 *": ">= 3x; >= 0.9 of the limit",
    "permute 32x128x4096->021 *": ">= 3x; >= 0.9 of the limit",
    "permute 32x128x4096->210 *": ">= 3x; >= 0.9 of the limit",
    "fill slices 10000": ">= 10x",
    "replay slices 10000": ">= 100x",
    "host float32->bfloat16 8 GiB": ">= 3x; >= 0.9 of the limit",
    "foreach_copy 20000 host->device": ">= 10x",
}


class Emulated:
    """CPU tensors as a device's."""

    where = torch.device("cpu")
    cache = 4096
    memory = 80 << 30

    def now(self) -> int:
        return time.perf_counter_ns()

    def mark(self) -> int:
        return time.perf_counter_ns()

    def between(self, first: int, second: int) -> float:
        return max(1.0, float(second - first))

    def synchronize(self) -> None:
        pass

    def flush(self) -> None:
        pass

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        return call

    def forget(self) -> None:
        pass


class Simulated(Emulated):
    """A device with a queue, and a clock that only calls move."""

    def __init__(self) -> None:
        self.host = 0  # the host's time
        self.ready = 0  # when the device will have done all that is queued
        self.flushed = 0

    def now(self) -> int:
        return self.host

    def launch(self, host: int, device: int) -> None:
        self.host += host
        self.ready = max(self.ready, self.host) + device

    def mark(self) -> int:
        self.ready = max(self.ready, self.host)
        return self.ready

    def synchronize(self) -> None:
        self.host = max(self.host, self.ready)

    def flush(self) -> None:
        self.flushed += 1
        self.launch(1000, 100_000)


@pytest.fixture
def kernels(emulator: Path) -> Iterator[Emulated]:
    need_extension()
    with torch.no_grad(), emulated(emulator, "kernels"):
        yield Emulated()


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


# --- cases ----------------------------------------------------------------------------------------


def test_cases_have_names_groups_and_targets() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.group for case in CASES} == set(GROUPS)
    for case in CASES:
        assert case.what and case.peer and case.clock in CLOCKS
        assert "ratio" in case.needs  # never slower than torch, at the least
        assert case.limit is not None or "limit" not in case.needs
        assert case.staged == (case.limit in ("to_device", "to_host"))


def test_targets_are_those_promised() -> None:
    for pattern, text in PROMISED.items():
        found = [case for case in CASES if _matches(case.name, pattern)]
        assert found, pattern
        assert {wanted(case.targets) for case in found} == {text}, pattern
    names = {case.name for case in CASES}
    for dtype in ("float32", "bfloat16", "float8_e4m3fn", "float32->bfloat16"):
        assert f"transpose 8192x8192 {dtype}" in names
        assert f"permute 32x128x4096->201 {dtype}" in names
    for case in CASES:
        if not any(_matches(case.name, pattern) for pattern in PROMISED):
            assert AtLeast("ratio", 0.95) in case.targets, case.name


def _matches(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def test_clocks_are_those_promised() -> None:
    for case in CASES:
        eager_list = case.name.startswith(("foreach_copy 10000", "fill slices"))
        small = case.name.endswith((" 64 KiB", " 1 MiB"))
        assert (case.clock == "wall") == (eager_list or small or case.staged), case.name
        if "replay" in case.name:
            assert (case.launches, case.uploads) == (1, 0)


def test_a_case_that_is_registered_twice_or_wrongly() -> None:
    held = (AtLeast("ratio", 1.0),)
    known = CASES[0]
    for options, text in (
        ({"name": known.name, "group": known.group}, "two GPU cases"),
        ({"name": "new", "group": "nowhere"}, "there is no group"),
        ({"name": "new", "group": known.group, "clock": "sun"}, "clock is 'sun'"),
        ({"name": "new", "group": known.group, "limit": "sky"}, "limit is 'sky'"),
    ):
        before = len(CASES)
        with pytest.raises(ValueError, match=text):
            registry.case(what="", targets=held, **options)(lambda tiny, gpu: None)  # type: ignore
        assert len(CASES) == before


@pytest.mark.parametrize("group", [name for name in GROUPS if "transfers" not in name])
def test_cases_of_the_device_on_its_kernels(group: str, kernels: Emulated) -> None:
    """Tiny, but the same calls: torch's bytes, one launch, nothing through torch's own copy_."""
    for case in CASES:
        if case.group == group:
            work = case.make(True, kernels)
            check.check(work, kernels)
            counts = count(case, work)
            assert counts["launches"] == 1, case.name
            assert "native" not in counts["routes"] and "staged" not in counts["routes"]
            assert sum(counts["routes"].values()) == work.facts.get("tensors", 1), case.name
            assert work.bytes > 0
            if "replay" in case.name:
                assert counts["uploads"] == 0


@pytest.mark.parametrize("how", ["to device", "to host"])
def test_transfers_are_staged(how: str, emulator: Path) -> None:
    need_extension()
    chosen = [case for case in CASES if case.limit == how.replace(" ", "_")]
    assert len(chosen) >= 2
    for case in chosen:
        with torch.no_grad(), emulated(emulator, how):
            work = case.make(True, Emulated())
            check.check(work, Emulated())
            counts = count(case, work)
        assert counts["routes"] == {"staged": work.facts.get("tensors", 1)}
        # What crosses the bus is what the limit's share is taken of.
        assert counts["staged_bytes"] == work.bytes, case.name


def test_sets_in_turn_are_beyond_the_cache(kernels: Emulated) -> None:
    work = named("copy 1 MiB").make(True, kernels)
    assert work.turns == 2 == len(work.dsts) == len(work.sets)
    assert work.turns * work.bytes >= 4 * kernels.cache
    written = []
    for _ in range(work.turns):
        for dst in work.dsts:
            dst.zero_()
        work.ours()
        written.append([bool(dst.any()) for dst in work.dsts])
    assert written == [[True, False], [False, True]]


def test_the_mix_has_every_kind(kernels: Emulated) -> None:
    dsts, srcs = cases.lists.mixed(True, kernels)
    pairs = {(src.dtype, dst.dtype) for dst, src in zip(dsts, srcs, strict=True)}
    assert len({dtype for pair in pairs for dtype in pair}) == 5
    assert sum(source != to for source, to in pairs) >= 3
    assert any(not src.is_contiguous() for src in srcs)
    assert any(not dst.is_contiguous() for dst in dsts)
    assert {src.dim() for src in srcs} == {2, 3}
    # Each kind comes in each shape.
    assert len(cases.lists.KINDS) % len(cases.lists.SHAPES)


def test_a_small_device_gets_a_smaller_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(Emulated):
        memory = 16 * 50_000

    monkeypatch.setattr(cases.lists, "GIB", 50_000)  # both have more or less than 24 of those
    monkeypatch.setattr(cases.lists, "SHAPES", cases.lists.TINY_SHAPES)
    sizes = [
        sum(dst.nbytes for dst in cases.lists.mixed(False, gpu)[0]) for gpu in (Emulated(), Small())
    ]
    assert sizes[0] >= 200_000 and 100_000 <= sizes[1] < 150_000


# --- checks ---------------------------------------------------------------------------------------


def made(
    ours: Callable[[torch.Tensor, torch.Tensor], object] = paramkit.copy_,
    **options: Any,
) -> Case:
    """A copy of 8 floats by a call of ours."""

    def make(tiny: bool, gpu: Any) -> Work:
        whole, src = torch.zeros(16), torch.arange(1.0, 9.0)
        dst = whole[4:12]
        return Work(
            ours=lambda: ours(dst, src),
            peer=lambda: dst.copy_(src),
            dsts=[dst],
            bytes=64,
            sets=[(dst, src)],
        )

    options = {"targets": (AtLeast("ratio", 1e-9),), "peer": "copy_", **options}
    return Case("made", "small", "made for the test", make=make, **options)


def test_a_case_is_measured(kernels: Emulated) -> None:
    for clock in CLOCKS:
        result = run_case(made(clock=clock), kernels, None, rounds.TINY, tiny=True)
        limits = Limits(kernels, (4096,))
        row = json.loads(json.dumps(result.judged(limits).as_dict()))
        assert (row["verdict"], row["detail"]) == ("met", "")
        assert set(row["sides"]) == {"paramkit", "torch"} == set(row["also"]["sides"])
        assert {row["clock"], row["also"]["clock"]} == set(CLOCKS)
        assert row["sides"]["paramkit"]["samples"] == 4
        assert row["ratio"]["q1"] <= row["ratio"]["q3"]
        assert row["facts"]["launches"] == 1
        assert [from_dict(each) for each in row["targets"]] == [AtLeast("ratio", 1e-9)]


@pytest.mark.parametrize(
    ("ours", "text"),
    [
        (lambda dst, src: paramkit.copy_(dst, src.flip(0)), "bytes differ from torch's"),
        (
            lambda dst, src: paramkit.copy_(dst._base, torch.cat([src, src])),
            "bytes differ from torch's",
        ),
        (
            lambda dst, src: [paramkit.copy_(dst, src) for _ in "ab"],
            "2 launches a call, expected 1",
        ),
        (lambda dst, src: dst.copy_(src), "0 launches a call"),
        (
            lambda dst, src: paramkit.copy_(dst, torch.nn.Parameter(src).as_subclass(Own)),
            "torch's own",
        ),
    ],
    ids=["wrong", "around the view", "two launches", "not ours", "native"],
)
def test_a_wrong_way_is_no_figure(
    ours: Callable[[torch.Tensor, torch.Tensor], object], text: str, kernels: Emulated
) -> None:
    result = run_case(made(ours), kernels, None, rounds.TINY, tiny=True).outcome
    assert result.verdict.word == "error"
    assert text in result.verdict.detail
    assert not result.sides


class Own(torch.Tensor):
    """A subclass: torch's own business."""


def test_what_must_be_staged(kernels: Emulated) -> None:
    case = made(staged=True)
    with pytest.raises(Difference, match="no writes were staged"):
        count(case, case.make(True, kernels))


def test_uploads_are_counted(kernels: Emulated) -> None:
    replay = named("replay slices 10000")
    eager = Case("made", "small", "", (), named("fill slices 10000").make, uploads=0)
    count(replay, replay.make(True, kernels))
    with pytest.raises(Difference, match="1 uploads a call, expected 0"):
        count(eager, eager.make(True, kernels))


# --- clocks ---------------------------------------------------------------------------------------


def side(
    gpu: Simulated, clock: str, host: int, device: int, turns: int = 1, name: str = "made"
) -> Side:
    return Side(name, lambda: gpu.launch(host, device), gpu, clock, 8, turns)


def test_the_wall_clock_ends_when_the_stream_is_empty() -> None:
    gpu = Simulated()
    timed = side(gpu, "wall", host=10_000, device=30_000)
    timed.prepare()
    before = gpu.flushed
    # What fills the cache is over before the clock starts.
    assert timed.sample() == 40_000 == timed.sample(7)
    assert gpu.flushed == before + 2


@pytest.mark.parametrize(
    ("host", "device", "least", "most"),
    [
        (10_000, 30_000, 30_000, 30_500),  # the device is the slow part
        (200_000, 13_000, 200_000, 205_000),  # the host is, and has no head start
    ],
)
def test_events_take_the_slower_of_host_and_device(
    host: int, device: int, least: int, most: int
) -> None:
    gpu = Simulated()
    timed = side(gpu, "events", host, device)
    timed.prepare()
    assert least <= timed.sample() <= most


def test_how_many_calls_are_between_two_events() -> None:
    gpu = Simulated()
    for device, turns, inner in (
        (40_000, 1, 50),
        (40_000, 8, 56),  # whole turns
        (1_000_000, 1, LEAST),
        (1_000_000, 3, 6),
        (60_000_000, 1, 2),
        (500_000_000, 1, 1),
        (10, 1, 256),
    ):
        timed = side(gpu, "events", 0, device, turns)
        timed.prepare()
        assert timed.inner == inner


def test_sides_take_turns_on_the_simulated_device() -> None:
    gpu = Simulated()
    times = {"a": 50_000, "b": 150_000}
    sides = {name: side(gpu, "events", 100, time, name=name) for name, time in times.items()}
    for each in sides.values():
        each.prepare()
    samples = rounds.interleaved(sides, rounds.TINY)  # type: ignore[arg-type]
    assert [round(b / a, 1) for a, b in zip(samples["a"], samples["b"], strict=True)] == [3.0] * 4


# --- limits and verdicts --------------------------------------------------------------------------


def test_limits_keep_the_best(kernels: Emulated) -> None:
    limits = Limits(kernels, (4096, 8192))
    assert limits.gbs("copy") is None is limits.gbs(None)
    for what in ("copy", "to_device", "to_host", "copy"):
        limits.measure(what)
    found = limits.as_dict()
    assert found["bytes"] == 8192 and found["fill"] is None
    for what in ("copy", "to_device", "to_host"):
        entry: Any = found[what]
        assert entry["gbs_q1"] <= entry["gbs"] <= entry["gbs_q3"]
        assert limits.gbs(what) == entry["gbs"] > 0
    best = limits.gbs("copy")
    limits._best["copy"]["gbs"] = 1e9  # type: ignore[index]
    limits.measure("copy")
    assert best and limits.gbs("copy") == 1e9


def test_a_share_of_the_limit_is_judged(kernels: Emulated) -> None:
    held = made(targets=(AtLeast("ratio", 1e-9), AtLeast("limit", 0.9)))
    result = run_case(held, kernels, None, rounds.TINY, tiny=True)
    limits = Limits(kernels, (4096,))
    assert result.judged(limits).outcome.verdict.word == "unknown"
    own = result.outcome.sides["paramkit"]
    for gbs, word in ((64 / own.median, "met"), (2 * 64 / own.median, "missed")):
        limits._best["copy"] = {"gbs": gbs}
        judged = result.judged(limits).outcome
        figure = judged.figures["limit"]
        assert judged.verdict.word == word
        assert figure is not None and figure == share(own, 64, gbs)
        assert figure.q1 <= figure.value <= figure.q3


def test_an_error_stays_an_error(kernels: Emulated) -> None:
    wrong = run_case(made(lambda dst, src: None), kernels, None, rounds.TINY, tiny=True)
    assert wrong.judged(Limits(kernels, (4096,))).outcome.verdict.word == "error"


# --- torch.compile --------------------------------------------------------------------------------


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_has_triton", lambda: True)


def test_compiling_says_why_it_is_left_out(
    monkeypatch: pytest.MonkeyPatch, kernels: Emulated
) -> None:
    monkeypatch.setattr(compiled, "_has_triton", lambda: False)
    result = run_case(made(compile=True), kernels, Compiler(kernels, 9), rounds.TINY, tiny=True)
    assert result.outcome.facts["left_out"] == {"compiled": "triton is not installed"}
    assert "compiled" not in result.outcome.sides


def test_compiling_fails_alone(
    monkeypatch: pytest.MonkeyPatch, triton: None, kernels: Emulated
) -> None:
    def refuse() -> Callable[..., object]:
        raise RuntimeError("no C compiler\nand more")

    monkeypatch.setattr(compiled, "_compile", refuse)
    result = run_case(made(compile=True), kernels, Compiler(kernels, 9), rounds.TINY, tiny=True)
    assert result.outcome.facts["left_out"] == {
        "compiled": "torch.compile: RuntimeError: no C compiler"
    }
    assert set(result.outcome.sides) == {"paramkit", "torch"}


@pytest.mark.parametrize("wrong", [False, True])
def test_what_was_compiled_is_checked(
    wrong: bool, monkeypatch: pytest.MonkeyPatch, triton: None, kernels: Emulated
) -> None:
    def compile() -> Callable[..., object]:
        return lambda dst, src: compiled._copy(dst, src + 1 if wrong else src)

    monkeypatch.setattr(compiled, "_compile", compile)
    compiler = Compiler(kernels, 1e-9)
    outcome = run_case(made(compile=True), kernels, compiler, rounds.TINY, tiny=True).outcome
    assert ("compiled" in outcome.sides) == (not wrong)
    if wrong:
        assert "bytes differ" in outcome.facts["left_out"]["compiled"]  # type: ignore[index]
    assert compiler.copy([]) == "no time left for torch.compile"


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_on_the_emulated_kernels(kernels: Emulated, tmp_path: Path) -> None:
    chosen = [case for case in CASES if case.group in ("small", "slice fills")]
    saved: list[dict[str, Any]] = []
    result = run(
        chosen,
        kernels,
        MACHINE,
        tiny=True,
        save=lambda part: saved.append(copy.deepcopy(part)),
    )
    assert [len(part["cases"]) for part in saved] == [1, 2, 3, 4, 5, 5]
    assert result == saved[-1] == json.loads(json.dumps(result))
    assert [group["name"] for group in result["groups"]] == ["small", "slice fills"]
    assert all(row["verdict"] != "error" for row in result["cases"])
    assert result["limits"]["copy"]["gbs"] > 0 and result["limits"]["to_device"] is None
    graph = next(row for row in result["cases"] if row["name"].startswith("graph replay"))
    assert graph["facts"]["launches"] == 1 and "torch graph" in graph["sides"]
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    shown = table.plain(load(path))
    for case in chosen:
        assert case.name in shown


def test_what_does_not_fit_into_the_time_is_left_out() -> None:
    gpu = Simulated()

    def make(tiny: bool, device: Any) -> Work:
        gpu.host += 2_000_000_000
        raise RuntimeError("built")

    chosen = [Case(f"made {i}", "small", "", (), make, limit=None) for i in range(4)]
    result = run(chosen, gpu, MACHINE, seconds=3.0)
    verdicts = [(row["verdict"], row["detail"]) for row in result["cases"]]
    late = ("unknown", "no time was left")
    assert verdicts == [("error", "RuntimeError: built")] * 2 + [late] * 2


def test_budgets_share_what_is_left() -> None:
    first, second = (
        Case(str(s), "small", "", (), lambda t, g: None, seconds=s, least=9)  # type: ignore[arg-type, return-value]
        for s in (2.0, 6.0)
    )
    assert budget_of(first, 100.0, [second], False).seconds == 2.0
    assert budget_of(first, 100.0, [second], True).seconds == 0.5
    assert budget_of(first, 6.0, [second], False).seconds == 1.0  # half of what both ask for
    assert budget_of(first, 1.0, [second], False).seconds == 0.0
    assert budget_of(first, 1.0, [], False).least == 9
    assert budget_of(first, 1.0, [], True).least == 4
    asked = sum(case.seconds for case in CASES)
    assert asked + len(CASES) * running.AROUND + running.COMPILING < running.SECONDS + 10


def test_a_quick_run_has_fewer_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--quick"]) == 0
    quick = capsys.readouterr().out
    assert main(["--list"]) == 0
    everything = capsys.readouterr().out
    assert len(quick.splitlines()) < len(everything.splitlines())
    for group in GROUPS:
        assert any(case.quick for case in CASES if case.group == group), group
    assert "host float32->bfloat16 8 GiB" in everything and "8 GiB" not in quick
    # Whoever names a case means it.
    assert main(["--list", "--quick", "--only", "host float32->bfloat16 8 GiB"]) == 0
    assert "8 GiB" in capsys.readouterr().out


def test_command_line_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "no such case"]) == 2
    assert "no case matches" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["--only", "small"]) == 2
        assert "CUDA" in capsys.readouterr().err


@pytest.mark.parametrize("broken", [False, True])
def test_command_line_writes_the_result(
    broken: bool,
    kernels: Emulated,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ready, "missing", lambda needs: [])
    monkeypatch.setattr(paramkit.backend, "force", lambda name: nullcontext())
    monkeypatch.setattr(command, "Gpu", lambda: kernels)
    monkeypatch.setattr(facts, "describe", lambda: MACHINE)
    monkeypatch.setattr(command, "run", lambda *a, **options: run(*a, **options, tiny=True))
    if broken:
        monkeypatch.setattr(paramkit, "copy_", lambda dst, src: dst)
    path = tmp_path / "new" / "gpu.json"
    code = main(["--only", "copy 1 MiB", "--json", str(path), "--seconds", "9"])
    shown = capsys.readouterr()
    assert code == int(broken)
    assert "copy 1 MiB" in shown.out
    assert ("error: copy 1 MiB: Difference: paramkit: " in shown.err) == broken
    result = load(path)
    assert [row["name"] for row in result["cases"]] == ["copy 1 MiB"]
    assert [each.name for each in path.parent.iterdir()] == ["gpu.json"]


# --- the machine ----------------------------------------------------------------------------------

MACHINE: dict[str, object] = {
    "gpu": "Made GPU",
    "gpu_capability": "9.0",
    "multiprocessors": 132,
    "gpu_memory": 80 << 30,
    "cuda": "13.0",
    "driver": "580.1",
    "cpu": "Made CPU",
    "cores": 16,
    "torch": "2.11.0",
    "python": "3.12.3",
    "commit": "abc1234",
    "date": "2026-01-01",
}


def properties(**more: object) -> SimpleNamespace:
    return SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=80 << 30,
        L2_cache_size=50 << 20,
        **more,
    )


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: properties(uuid="f00d-cafe")
    )


def test_facts_of_the_gpu(h100: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer = "580.1, 1980, 2619, 345, [N/A], 700.00, 5, 16, Enabled"
    program(tmp_path / "bin", "nvidia-smi", f'echo "$*" >> {tmp_path}/calls; echo "{answer}"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(machine, "_commit", lambda: "unknown")
    monkeypatch.setenv("PARAMKIT_COMMIT", "abc1234")
    found = facts.describe()
    assert found["gpu"] == "NVIDIA H100 80GB HBM3"
    assert (found["gpu_capability"], found["multiprocessors"]) == ("9.0", 132)
    assert (found["driver"], found["max_sm_mhz"], found["sm_mhz"]) == ("580.1", "1980", "345")
    assert "memory_mhz" not in found and found["commit"] == "abc1234"
    asked = (tmp_path / "calls").read_text()
    assert "--id=GPU-f00d-cafe" in asked
    # Nothing that names a host or a person.
    text = json.dumps(found)
    assert "f00d-cafe" not in text and str(ROOT) not in text


def test_facts_without_nvidia_smi(
    h100: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program(tmp_path / "bin", "nvidia-smi", "echo it fails; exit 9")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    found = facts.describe()
    assert "driver" not in found and found["gpu"]
    shutil.rmtree(tmp_path / "bin")
    assert "driver" not in facts.describe()


def test_names_for_files() -> None:
    assert facts.short_name("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert facts.short_name("NVIDIA H200") == "h200"
    assert facts.short_name("Tesla T4") == "tesla-t4"
    assert facts.short_name("///") == "gpu"


def test_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in ready.missing(["gpu"])[0]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolkit, "DEFAULT_HOME", tmp_path / "usual")
    monkeypatch.setenv("PATH", path_without_nvcc(tmp_path))
    assert ready.main(["gpu", "nvcc", "pytest"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "no CUDA device" in lines[0] and "no nvcc" in lines[1]

    FakeNvcc(tmp_path / "usual")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert ready.main(["gpu", "nvcc", "pytest"]) == 0
    assert capsys.readouterr().out == "name=h200\ncapability=9.0\n"

    monkeypatch.setattr(ready.importlib.util, "find_spec", lambda name: None)
    assert len(ready.missing(["gpu", "nvcc", "pytest"])) == 5


# --- the table ------------------------------------------------------------------------------------


def timing(median: float, gbs: float) -> dict[str, float]:
    return {"median_ns": median, "q1_ns": median, "q3_ns": median * 1.1, "samples": 9, "gbs": gbs}


def made_result() -> dict[str, Any]:
    figure = {"value": 4.0, "q1": 3.9, "q3": 4.1}
    row = {
        "name": "made case",
        "group": "made",
        "what": "made for the test",
        "mode": "interleaved",
        "bytes": 1000,
        "sides": {
            "paramkit": timing(1000.0, 3000.0),
            "torch": timing(4000.0, 750.0),
            "loop": timing(80_000.0, 40.0),
        },
        "ratio": figure,
        "share_of_limit": {**figure, "value": 0.912},
        "share_of_ceiling": None,
        "targets": [{"what": "ratio", "at_least": 3}],
        "wanted": ">= 3x",
        "verdict": "met",
        "detail": "",
        "facts": {"launches": 1, "left_out": {"compiled": "triton is not installed"}},
        "clock": "events",
        "peer": "_foreach_copy_",
        "limit": "copy",
        "also": {"clock": "wall", "sides": {}},
    }
    broken = {**row, "name": "broken", "sides": {}, "ratio": None, "facts": {}, "verdict": "error"}
    broken |= {"detail": "RuntimeError: no", "share_of_limit": None}
    return {
        "schema": 2,
        "machine": MACHINE,
        "quick": True,
        "limits": {
            "bytes": 1 << 30,
            "fill": None,
            "copy": {"gbs": 3000.0, "loop": "copy_, 1024 MiB"},
            "to_device": None,
            "to_host": None,
        },
        "groups": [{"name": "made", "title": "Made group"}, {"name": "none", "title": "Empty"}],
        "cases": [row, broken],
    }


def test_the_table_of_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made.json"
    path.write_text(json.dumps(made_result()))
    assert table.main([str(path)]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0] == "Made group" and "Empty" not in shown
    row = next(line for line in lines if "made case" in line)
    for text in ("1.00 us ±5%", "4.00 us", "_foreach_copy_", "loop 80.0 us", "events", "0.91"):
        assert text in row
    assert row.split()[-4:] == ["4.00x", ">=", "3x", "met"]
    assert "error: RuntimeError: no" in shown
    for text in ("2 cases: 1 met, 1 error.", "Made GPU", "driver 580.1", "A quick run"):
        assert text in shown
    assert "The limits: copy on the device 3000.0 GB/s (copy_, 1024 MiB)." in shown
    assert "Left out: compiled: triton is not installed." in shown

    assert table.main([str(path), "--markdown", "--only", "made case"]) == 0
    shown = capsys.readouterr().out
    assert "### Made group" in shown and "broken" not in shown
    assert "| made case | 1.00 us ±5% |" in shown
    assert table.main([str(path), "--only", "nothing"]) == 2


def test_the_table_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({**made_result(), "machine": {"cpu": "any"}}))
    assert table.main([str(path)]) == 2
    assert "python -m benchmarks.table" in capsys.readouterr().err


def test_nothing_needs_more_than_torch(tmp_path: Path) -> None:
    """On a machine with a GPU rich, matplotlib and hypothesis may not be there."""
    blocked = ("rich", "matplotlib", "hypothesis", "tokenizers", "transformers")
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}));"
        "from benchmarks.gpu.__main__ import main; sys.exit(main(['--list']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
