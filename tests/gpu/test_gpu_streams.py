"""Streams and graphs: the current stream is used, captures hold what they need, and what cannot be captured says so."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import paramkit
from tests.gpu.needs import need_gpu
from tests.gpu.storages import assert_same_storage, counted, mixed, raw, twin
from tests.gpu.streams import capture, churn, delay

need_gpu()

ROOT = Path(__file__).resolve().parents[2]
MODES = ("global", "thread_local", "relaxed")


def assert_copied(dsts: list[Tensor], srcs: list[Tensor], what: str = "") -> None:
    """The destinations hold their sources, and nothing beside them was written: the pattern is still there."""
    for index, (dst, src) in enumerate(zip(dsts, srcs, strict=True)):
        want = twin(dst)
        want.copy_(src)
        assert_same_storage(dst, want, f"{what}: pair {index}")


def changed(dsts: list[Tensor], srcs: list[Tensor]) -> None:
    """Other values in the sources, none in the destinations."""
    for dst, src in zip(dsts, srcs, strict=True):
        dst.zero_()
        src.add_(1)


# Streams.

Write = Callable[[list[Tensor], list[Tensor]], object]
WRITES: dict[str, Write] = {
    "copy_": lambda dsts, srcs: [paramkit.copy_(*pair) for pair in zip(dsts, srcs, strict=True)],
    "foreach_copy_": paramkit.foreach_copy_,
    "the dispatcher": lambda dsts, srcs: torch.ops.paramkit.foreach_copy_(dsts, srcs),
    "fill_": lambda dsts, srcs: paramkit.foreach_fill_(dsts, [src[0, 0] for src in srcs]),
    "one plan": lambda dsts, srcs: paramkit.plan(dsts, srcs).apply(),
    "to the host": lambda dsts, srcs: [
        dst.copy_(host) for dst, host in zip(dsts, to_host(srcs), strict=True)
    ],
}


def to_host(srcs: list[Tensor]) -> list[Tensor]:
    hosts = [torch.empty(src.shape) for src in srcs]
    paramkit.foreach_copy_(hosts, srcs)
    return hosts


@pytest.mark.parametrize("count", [3, 2000])
@pytest.mark.parametrize("name", WRITES)
def test_the_current_stream(cuda: torch.device, name: str, count: int) -> None:
    """Behind what that stream does first, before what it does next, all without waiting."""
    dsts = [torch.zeros(4, 9, device=cuda) for _ in range(count)]
    memory = torch.zeros(count, 4, 9, device=cuda)
    srcs = [*memory.unbind()]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        delay(30)
        memory.fill_(3)
        WRITES[name](dsts, srcs)
        torch._foreach_add_(dsts, 1)
    side.synchronize()
    assert all(bool((dst == 4).all()) for dst in dsts)


def test_one_stream_after_another(cuda: torch.device) -> None:
    """The usual order by events; a plan made on a third stream."""
    dsts, srcs = mixed(300, cuda)
    plan = paramkit.plan(dsts, srcs)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for turn, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            if turn > 0:
                stream.wait_stream(streams[turn - 1])
            delay(10)
            torch._foreach_add_(srcs, 1)
            plan.apply()
    torch.cuda.synchronize()
    assert_copied(dsts, srcs)


def test_streams_of_several_threads(cuda: torch.device) -> None:
    """Each thread on a stream of its own, which is new to CUDA when it begins."""
    wrong: list[str] = []

    def work(number: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                dsts = [torch.zeros(50 + i, device=cuda) for i in range(700)]
                srcs = [torch.zeros(50 + i, device=cuda) for i in range(700)]
                plan = paramkit.plan(dsts, srcs)
                total = torch.zeros((), device=cuda)
                for turn in range(20):
                    torch._foreach_add_(srcs, number + 1)
                    plan.apply() if turn % 2 else paramkit.foreach_copy_(dsts, srcs)
                    total += (torch.cat(dsts) != (turn + 1) * (number + 1)).sum()
                if total.item() != 0:
                    wrong.append(f"thread {number}: {total.item()} elements")
        except Exception as error:
            wrong.append(f"thread {number}: {error!r}")

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    assert not wrong


# Graphs.


@pytest.mark.parametrize("mode", MODES)
def test_a_short_list_in_a_graph(cuda: torch.device, mode: str) -> None:
    """Its descriptors are part of the graph."""
    dsts, srcs = mixed(10, cuda)
    graphs = []
    counts = counted(
        lambda: graphs.append(
            capture(lambda: paramkit.foreach_copy_(dsts, srcs), capture_error_mode=mode)
        )
    )
    assert counts == {"launches": 1, "uploads": 0, "staged_bytes": 0}
    for turn in range(3):
        changed(dsts, srcs)
        graphs[0].replay()
        assert_copied(dsts, srcs, f"replay {turn}")


@pytest.mark.parametrize("mode", MODES)
def test_a_long_list_in_a_graph(cuda: torch.device, mode: str) -> None:
    """Several launches, for an upload would be read again at every replay."""
    dsts, srcs = mixed(2000, cuda)
    graphs = []
    counts = counted(
        lambda: graphs.append(
            capture(lambda: paramkit.foreach_copy_(dsts, srcs), capture_error_mode=mode)
        )
    )
    assert counts["launches"] > 1
    assert (counts["uploads"], counts["staged_bytes"]) == (0, 0)
    churn(cuda)
    for turn in range(3):
        changed(dsts, srcs)
        graphs[0].replay()
        assert_copied(dsts, srcs, f"replay {turn}")


def test_aliases_in_a_graph(cuda: torch.device) -> None:
    """As many launches as their order takes, in that order."""
    whole = torch.arange(64.0, device=cuda)
    dsts = [whole[i + 8 : i + 16] for i in range(0, 56, 8)]
    srcs = [whole[i : i + 8] for i in range(0, 56, 8)]
    graph = capture(lambda: paramkit.foreach_copy_(dsts, srcs))
    whole.copy_(torch.arange(64.0))
    graph.replay()
    assert whole.tolist() == [*range(8)] * 8


def test_fills_in_a_graph(cuda: torch.device) -> None:
    """A number, and a number of the host, are part of the graph; one on the device is read at every replay."""
    dsts = [torch.zeros(5, 7, device=cuda)[:, 1:4] for _ in range(3)]
    host, there = torch.tensor(2.0), torch.tensor(3.0, device=cuda)
    graph = capture(lambda: paramkit.foreach_fill_(dsts, [1.0, host, there]))
    for turn in range(3):
        for dst in dsts:
            raw(dst).zero_()
        host.fill_(50 + turn)
        there.fill_(60 + turn)
        graph.replay()
        assert [dst[2, 1].item() for dst in dsts] == [1, 2, 60 + turn]
        assert [dst._base.sum().item() for dst in dsts] == [15, 30, 15 * (60 + turn)]


@pytest.mark.parametrize("mode", MODES)
def test_a_plan_in_a_graph(cuda: torch.device, mode: str) -> None:
    """The graph keeps the plan's descriptors when the plan is gone, through a hundred replays."""
    dsts, srcs = mixed(1500, cuda)
    plans, graphs = [paramkit.plan(dsts, srcs)], []
    counts = counted(lambda: graphs.append(capture(plans[0].apply, capture_error_mode=mode)))
    assert counts == {"launches": 1, "uploads": 0, "staged_bytes": 0}
    plans.clear()
    gc.collect()
    churn(cuda)
    for turn in range(3):
        changed(dsts, srcs)
        graphs[0].replay()
        assert_copied(dsts, srcs, f"replay {turn}")
    for turn in range(100):
        srcs[0].fill_(turn)
        graphs[0].replay()
    assert_copied(dsts, srcs)


def test_a_plan_twice_in_one_graph_and_in_two(cuda: torch.device) -> None:
    dsts, srcs = mixed(500, cuda)
    plan = paramkit.plan(dsts, srcs)

    def twice() -> None:
        plan.apply()
        srcs[0].add_(1)
        plan.apply()

    graphs = [capture(twice), capture(plan.apply)]
    for turn, graph in enumerate(graphs):
        changed(dsts, srcs)
        graph.replay()
        assert_copied(dsts, srcs, f"graph {turn}")
    del graph, graphs[0]
    gc.collect()
    changed(dsts, srcs)
    graphs[0].replay()
    assert_copied(dsts, srcs, "what is left")
    changed(dsts, srcs)
    plan.apply()
    assert_copied(dsts, srcs, "the plan itself")


def test_on_another_stream_inside_a_capture(cuda: torch.device) -> None:
    """A stream that the capture forks to."""
    dsts, srcs = mixed(1500, cuda)
    plans = [paramkit.plan(dsts[:700], srcs[:700])]

    def forked() -> None:
        side, origin = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(origin)
        with torch.cuda.stream(side):
            plans[0].apply()
            paramkit.foreach_copy_(dsts[700:], srcs[700:])
        origin.wait_stream(side)

    graph = capture(forked)
    plans.clear()
    gc.collect()
    churn(cuda)
    changed(dsts, srcs)
    graph.replay()
    assert_copied(dsts, srcs)


def test_replays_on_other_streams(cuda: torch.device) -> None:
    dsts, srcs = mixed(500, cuda)
    plan = paramkit.plan(dsts, srcs)
    graph = capture(plan.apply)
    side = torch.cuda.Stream()
    for _ in range(3):
        changed(dsts, srcs)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            delay(10)
            srcs[0].add_(1)
            graph.replay()
        side.synchronize()
        assert_copied(dsts, srcs)


def test_a_graph_that_is_gone_while_it_runs(cuda: torch.device) -> None:
    """And its plan with it: the descriptors stay until it has run."""
    side = torch.cuda.Stream()
    small = torch.zeros(4, device=cuda)
    for turn in range(3):
        dsts, srcs = mixed(1000, cuda)
        plan = paramkit.plan(dsts, srcs)
        graph = capture(plan.apply)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            delay(100)
            graph.replay()
        gone = weakref.ref(plan)
        del plan, graph
        assert gone() is None
        paramkit.fill_(small, 1.0)  # frees what graphs have left behind
        churn(cuda)
        torch.cuda.synchronize()
        assert_copied(dsts, srcs, f"turn {turn}")


def test_graphs_free_what_they_kept(cuda: torch.device) -> None:
    """At the next write after CUDA has told that a graph is gone."""
    dsts, srcs = mixed(500, cuda)
    small = torch.zeros(4, device=cuda)

    def graphs(count: int) -> None:
        for _ in range(count):
            plan = paramkit.plan(dsts, srcs)
            graph = capture(plan.apply)
            del plan
            graph.replay()
            torch.cuda.synchronize()
            del graph
        gc.collect()

    def settled(most: int) -> int:
        """The memory in use, once it is so little, or after a while."""
        deadline = time.monotonic() + 2
        while torch.cuda.memory_allocated() > most and time.monotonic() < deadline:
            time.sleep(0.02)
            paramkit.fill_(small, 1.0)
        return torch.cuda.memory_allocated()

    before = torch.cuda.memory_allocated()
    graphs(1)
    before = settled(before)  # with what torch keeps of a first graph
    graphs(10)
    assert settled(before) <= before
    assert_copied(dsts, srcs)


# What cannot be captured.


def test_staged_transfers_cannot_be_captured(cuda: torch.device) -> None:
    """They say so and write nothing; the capture goes on, and so does everything after it."""
    host, there = torch.rand(40, 50), torch.rand(40, 50, device=cuda)
    to, back = torch.zeros(50, 40, device=cuda), torch.zeros(50, 40)
    plans = [paramkit.plan([to], [host.t()]), paramkit.plan([back], [there.t()])]
    kept = torch.zeros(3, device=cuda)
    calls: list[Callable[[], object]] = [
        lambda: paramkit.foreach_copy_([to], [host.t()]),
        lambda: paramkit.foreach_copy_([to], [host.t()], non_blocking=True),
        lambda: paramkit.copy_(to, host.t()),
        lambda: paramkit.foreach_copy_([kept, to], [torch.ones(3, device=cuda), host.t()]),
        lambda: paramkit.foreach_copy_([back], [there.t()]),
        *(plan.apply for plan in plans),
    ]
    versions = (to._version, back._version)

    def body() -> None:
        kept.add_(1)
        for call in calls:
            with pytest.raises(RuntimeError, match="captured in a graph"):
                call()
        kept.add_(1)

    graph = capture(body)
    assert (to._version, back._version) == versions
    graph.replay()
    assert kept.tolist() == [2, 2, 2]
    assert not to.any()
    assert not back.any()
    for call in calls:
        to.zero_()
        back.zero_()
        call()
        assert torch.equal(to, host.t().to(cuda)) or torch.equal(back, there.t().cpu())
    graph.replay()
    assert kept.tolist() == [3, 3, 3]


def test_a_plan_cannot_be_made_in_a_capture(cuda: torch.device) -> None:
    dst, src = torch.zeros(9, device=cuda), torch.rand(9, device=cuda)

    def body() -> None:
        with pytest.raises(RuntimeError, match="before the capture"):
            paramkit.plan([dst], [src])
        paramkit.copy_(dst, src)

    graph = capture(body)
    graph.replay()
    assert torch.equal(dst, src)
    paramkit.plan([dst], [src]).apply()


def test_a_plan_cannot_take_a_new_source_in_a_capture(cuda: torch.device) -> None:
    """And is as good as before when it has tried."""
    dsts, srcs = mixed(20, cuda)
    others = [src + 1 for src in srcs]
    plan = paramkit.plan(dsts, srcs)

    def body() -> None:
        with pytest.raises(RuntimeError, match="before the capture"):
            plan.apply(others)
        paramkit.copy_(dsts[0], srcs[0])

    graph = capture(body)
    graph.replay()
    plan.apply()
    assert_copied(dsts, plan._compiled.sources())
    plan.apply(others)
    assert_copied(dsts, others)
    plan.apply(srcs)
    assert_copied(dsts, srcs)


FIRST = """
import torch, paramkit
dsts = [torch.zeros(10 + i, device="cuda") for i in range(3000)]
srcs = [torch.ones(10 + i, device="cuda") for i in range(3000)]
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    paramkit.foreach_copy_(dsts, srcs)
    paramkit.foreach_fill_([dst[:1] for dst in dsts[:5]], 9.0)
torch._foreach_add_(srcs, 4)
graph.replay()
assert all(bool((dst[1:] == 5).all()) for dst in dsts)
assert [dst[0].item() for dst in dsts[:6]] == [9, 9, 9, 9, 9, 5]
counts = paramkit.backend.active().cuda_counts()
assert counts["launches"] > 2 and counts["uploads"] == 0, counts
"""


def test_the_first_write_of_a_process_is_captured(cuda: torch.device) -> None:
    """The library is opened, and its kernels loaded, while a graph is captured."""
    command = [sys.executable, "-c", FIRST]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
