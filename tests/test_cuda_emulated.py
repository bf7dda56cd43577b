"""The CUDA route without a GPU: launches, packets, staging; every other test runs on it too, see conftest.py."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import paramkit
from paramkit.backend import staging
from tests import emulation
from tests.cases import random_bits
from tests.conftest import emulated, need_extension
from tests.guards import assert_same_bits, nothing_written, watch

Counts = dict[str, int]


@contextmanager
def on(library: Path, how: str) -> Iterator[ModuleType]:
    need_extension()
    with emulated(library, how):
        yield paramkit.backend.active()


def counted(call: Callable[[], object]) -> Counts:
    """What a call adds to the counts of launches, uploads and staged bytes."""
    extension = paramkit.backend.active()
    before = extension.cuda_counts()
    call()
    return {name: n - before[name] for name, n in extension.cuda_counts().items()}


def mixed(count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Pairs of every family: contiguous, rows, transposes, casts, fills, in turn."""
    dsts, srcs = [], []
    for i in range(count):
        n = 5 + i % 40
        src = torch.arange(3.0 * n * n).reshape(3 * n, n)
        kind = i % 5
        dsts.append(
            torch.zeros(n, 3 * n)
            if kind == 1
            else torch.zeros(3 * n, n + kind, dtype=torch.bfloat16 if kind == 3 else None)[:, :n]
        )
        srcs.append(src.t() if kind == 1 else src[:1, :1] if kind == 4 else src)
    return dsts, srcs


def assert_holds(dsts: list[Tensor], srcs: list[Tensor]) -> None:
    for dst, src in zip(dsts, srcs, strict=True):
        assert torch.equal(dst, src.to(dst.dtype).expand(dst.shape))


# Launches.


@pytest.mark.parametrize("count", [1, 4, 300])
def test_one_launch_for_a_list(emulator: Path, count: int) -> None:
    dsts, srcs = mixed(count)
    with on(emulator, "kernels"):
        counts = counted(lambda: paramkit.foreach_copy_(dsts, srcs))
    # The emulated device takes 1 KiB by value.
    assert counts == {"launches": 1, "uploads": int(count > 4), "staged_bytes": 0}
    assert_holds(dsts, srcs)


def test_a_replay_is_one_launch_and_no_upload(emulator: Path) -> None:
    dsts, srcs = mixed(300)
    with on(emulator, "kernels"):
        plan = paramkit.plan(dsts, srcs)
        for factor in (1, 2):
            for src in srcs:
                src.mul_(factor)
            counts = counted(plan.apply)
            assert counts == {"launches": 1, "uploads": 0, "staged_bytes": 0}
            assert_holds(dsts, srcs)
        assert plan.verify() == []


def test_replayed_fills(emulator: Path) -> None:
    views = [torch.zeros(4, 4, 3, 3)[:, :, 1:2, 1:2] for _ in range(100)]
    with on(emulator, "kernels"):
        plan = paramkit.plan(views, 0.5)
        assert counted(plan.apply)["launches"] == 1
        assert counted(lambda: paramkit.foreach_fill_(views, 2.0))["launches"] == 1
    assert all(bool((view == 2).all()) for view in views)


def test_a_model_is_one_launch(emulator: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(30, 50), nn.Conv2d(3, 9, 3), nn.LayerNorm(40), nn.Linear(7, 7)
        )

    model, other, third = make(), make(), make()
    with on(emulator, "kernels"):
        plan = paramkit.plan(model, other)
        assert counted(plan.apply)["launches"] == 1
        assert counted(lambda: plan.apply(third))["launches"] == 1  # rebound
        assert counted(lambda: paramkit.load_state_dict(model, other.state_dict()))["launches"] == 1
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(ours.detach(), theirs.detach())


def test_aliases_cost_launches_but_no_order(emulator: Path) -> None:
    """A chain through one buffer: as the loop, in as many launches as it takes."""
    whole, want = torch.arange(64.0), torch.arange(64.0)
    for i in range(0, 56, 8):
        want[i + 8 : i + 16] = want[i : i + 8]
    with on(emulator, "kernels"):
        counts = counted(
            lambda: paramkit.foreach_copy_(
                [whole[i + 8 : i + 16] for i in range(0, 56, 8)],
                [whole[i : i + 8] for i in range(0, 56, 8)],
            )
        )
    assert 1 < counts["launches"] <= 7
    assert torch.equal(whole, want)


def views(name: str) -> list[Tensor]:
    """Views of one tensor that have no element in common, though their stretches of memory meet."""
    if name == "columns":
        return list(torch.zeros(64, 100).split((5, 10, 35, 50), 1))
    if name == "single columns":
        return list(torch.zeros(64, 100).unbind(1))
    if name == "taps":
        whole = torch.zeros(8, 9, 3, 3)
        return [whole[:, :, i, j] for i in range(3) for j in range(3)]
    if name == "every third":
        whole = torch.zeros(300)
        return [whole[i::3] for i in range(3)]
    if name == "halves of columns":
        whole = torch.zeros(64, 100)
        return [whole[:32, :50], whole[32:, 50:], whole[:32, 50:], whole[32:, :50]]
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name", ["columns", "single columns", "taps", "every third", "halves of columns"]
)
def test_views_of_one_tensor_are_one_launch(emulator: Path, name: str) -> None:
    dsts = views(name)
    srcs = [torch.rand(dst.shape) for dst in dsts]
    with on(emulator, "kernels"):
        assert counted(lambda: paramkit.foreach_copy_(dsts, srcs))["launches"] == 1
        assert_holds(dsts, srcs)
        assert counted(lambda: paramkit.foreach_fill_(dsts, 0.5))["launches"] == 1
    assert all(bool((dst == 0.5).all()) for dst in dsts)


def test_views_that_share_elements_keep_their_order(emulator: Path) -> None:
    """Random boxes of one matrix, of which some meet: whatever is found apart, the result is the loop's."""
    for seed in range(60):
        rng = random.Random(seed)
        whole, want = torch.zeros(12, 20), torch.zeros(12, 20)
        boxes = []
        for _ in range(rng.randint(2, 7)):
            top, left = rng.randrange(11), rng.randrange(19)
            boxes.append(
                (
                    slice(top, rng.randint(top + 1, 12), rng.choice((1, 1, 2))),
                    slice(left, rng.randint(left + 1, 20), rng.choice((1, 1, 2, 3))),
                )
            )
        for i, box in enumerate(boxes):
            want[box] = i + 1.0
        with on(emulator, "kernels"):
            paramkit.foreach_fill_(
                [whole[box] for box in boxes], [i + 1.0 for i in range(len(boxes))]
            )
        assert torch.equal(whole, want), seed
        twin = torch.zeros(12, 20)
        with paramkit.backend.force("cpu"):
            paramkit.foreach_fill_(
                [twin[box] for box in boxes], [i + 1.0 for i in range(len(boxes))]
            )
        assert torch.equal(twin, want), seed


def test_one_pair_for_torch_does_not_split_the_rest(emulator: Path) -> None:
    """Lists that alternate are grouped on either side of a pair that torch does itself."""
    conj = torch.tensor([1 + 2j, 3 - 1j]).conj()
    dsts, srcs = mixed(40)
    dsts.insert(20, torch.zeros(2, dtype=torch.complex64))
    srcs.insert(20, conj)
    with on(emulator, "kernels"):
        assert counted(lambda: paramkit.foreach_copy_(dsts, srcs))["launches"] == 2
    assert_holds(dsts, srcs)


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
def test_tiles_that_may_not_use_whole_cells(emulator: Path, width: int) -> None:
    """Transposes whose rows begin at every phase of a cell, on either side."""
    dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[
        width
    ]
    with on(emulator, "kernels"):
        for left, right in ((0, 0), (1, 0), (0, 1), (3, 2)):
            source = random_bits((150, 141 + left), dtype, 1)[:, left:]
            whole = random_bits((141, 150 + right), dtype, 2)
            got, seen = whole[:, right:], watch(whole[:, right:])
            with paramkit.backend.trace() as trace:
                paramkit.copy_(got, source.t())
            assert trace.routes == {"transpose": 1}
            seen.assert_only_inside()
            assert_same_bits(got, source.t(), what=f"{left}, {right}")


TYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64)


@pytest.mark.parametrize("src", TYPES, ids=str)
@pytest.mark.parametrize("dst", TYPES, ids=str)
def test_casts_in_tiles_of_every_width(emulator: Path, dst: torch.dtype, src: torch.dtype) -> None:
    """Transposes with a cast between all widths, whole cells and parts of them."""
    with on(emulator, "kernels"):
        for left, right in ((0, 0), (1, 0), (0, 1), (3, 2)):
            source = (torch.arange(150 * 144) % 9).float().reshape(150, 144).to(src)[:, left:]
            got = torch.zeros(source.shape[1], 150 + right).to(dst)[:, right:]
            want = got.clone().copy_(source.t())
            seen = watch(got)
            paramkit.copy_(got, source.t())
            seen.assert_only_inside()
            assert_same_bits(got, want, what=f"{left}, {right}")


TRANSPOSE = """
import sys, torch, paramkit
with paramkit.backend.force("cpu") as extension:
    extension.open_cuda(sys.argv[1], "kernels")
    source = torch.rand(200, 300)
    for _ in range(2):
        assert torch.equal(paramkit.copy_(torch.zeros(300, 200), source.t()), source.t())
"""


def test_a_missing_barrier_is_noticed(emulator: Path, tmp_path: Path) -> None:
    """The canary: kernels without barriers fail, or crash, where those with them pass."""
    need_extension()
    broken = emulation.build(tmp_path, "-DPARAMKIT_SHIM_NO_BARRIER")
    for library, right in ((emulator, True), (broken, False)):
        command = [sys.executable, "-c", TRANSPOSE, str(library)]
        done = subprocess.run(command, capture_output=True, check=False, timeout=100)
        assert (done.returncode == 0) == right, done.stderr


# Transfers.


@pytest.mark.parametrize("how", ["to device", "to host"])
def test_the_narrower_dtype_travels(emulator: Path, how: str) -> None:
    with on(emulator, how):
        for dst, src in (
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.float32, torch.float8_e4m3fn),
        ):
            source = torch.randint(0, 9, (30, 50)).float().to(src)
            got = torch.zeros(50, 30).to(dst)
            counts = counted(lambda got=got, source=source: paramkit.copy_(got, source.t()))
            assert counts["staged_bytes"] == 1500 * min(got.itemsize, source.itemsize)
            assert torch.equal(got.float(), source.t().float())


@pytest.mark.parametrize("how", ["to device", "to host"])
def test_small_slots(emulator: Path, how: str) -> None:
    """Writes that fit into a slot together, one by one, and not at all; of every layout."""
    rng = random.Random(5)
    with on(emulator, how), staging(3 * 4096):
        for size in (3, 40, 33_000):
            dsts, srcs = mixed(40)
            dsts.append(torch.zeros(size, 7)[:, 1:6])
            srcs.append(torch.arange(5.0 * size).reshape(5, size).t())
            dsts.append(torch.zeros(3, size))
            srcs.append(torch.tensor([[1.0], [2.0], [3.0]]))
            dsts.append(torch.zeros(2, 3, size).permute(2, 0, 1))
            srcs.append(
                torch.arange(6.0 * size).reshape(size, 2, 3).transpose(1, 2).reshape(size, 2, 3)
            )
            order = list(range(len(dsts)))
            rng.shuffle(order)
            seen = watch(*dsts)
            counts = counted(
                lambda order=order, dsts=dsts, srcs=srcs: paramkit.foreach_copy_(
                    [dsts[i] for i in order], [srcs[i] for i in order]
                )
            )
            assert counts["staged_bytes"] > 0
            seen.assert_only_inside()
            assert_holds(dsts, srcs)
            plan = paramkit.plan(dsts, srcs)
            for dst in dsts:
                dst.zero_()
            plan.apply()
            assert_holds(dsts, srcs)


def test_a_plan_survives_smaller_slots(emulator: Path) -> None:
    dst, src = torch.zeros(50_000), torch.rand(50_000)
    with on(emulator, "to device"):
        plan = paramkit.plan([dst], [src])
        with staging(3 * 4096):
            plan.apply()
    assert torch.equal(dst, src)


@pytest.mark.parametrize("how", ["to device", "to host"])
def test_destinations_written_twice_keep_their_order(emulator: Path, how: str) -> None:
    whole, want = torch.zeros(400), torch.zeros(400)
    rng = random.Random(1)
    starts = [rng.randrange(300) for _ in range(50)]
    srcs = [torch.full((100,), float(i + 1)) for i in range(50)]
    for start, src in zip(starts, srcs, strict=True):
        want[start : start + 100] = src
    with on(emulator, how):
        paramkit.foreach_copy_([whole[s : s + 100] for s in starts], srcs)
    assert torch.equal(whole, want)


@pytest.mark.parametrize("how", ["kernels", "to device", "to host"])
def test_a_list_of_which_nothing_is_taken(emulator: Path, how: str) -> None:
    """A destination that may hold an element twice is torch's own."""
    got, want = torch.zeros(10), torch.zeros(10)
    source = torch.arange(12.0).reshape(3, 4)
    want.as_strided((3, 4), (2, 1)).copy_(source)
    with on(emulator, how), paramkit.backend.trace() as trace:
        paramkit.foreach_copy_([got.as_strided((3, 4), (2, 1))], [source])
    assert trace.routes == {"native": 1}
    assert torch.equal(got, want)


@pytest.mark.parametrize("how", ["to device", "to host"])
def test_no_memory_for_the_slots(emulator: Path, how: str) -> None:
    """Nothing is written, no version counter rises, and the next call works."""
    dsts = [torch.zeros(5), torch.zeros(400_000)]
    with on(emulator, how):
        srcs = [torch.ones(5), torch.ones(400_000)]  # too much for torch's own cache
        with staging(1 << 55), nothing_written(*dsts), pytest.raises(RuntimeError, match="memory"):
            paramkit.foreach_copy_(dsts, srcs)
        assert [dst._version for dst in dsts] == [0, 0]
        paramkit.foreach_copy_(dsts, srcs)
    assert all(bool((dst == 1).all()) for dst in dsts)


def test_threads_take_turns_at_the_slots(emulator: Path) -> None:
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(20):
                dsts = [torch.zeros(50 + number, 70) for _ in range(20)]
                srcs = [torch.full((70, 50 + number), float(turn)).t() for _ in range(20)]
                paramkit.foreach_copy_(dsts, srcs)
                assert_holds(dsts, srcs)
        except BaseException as error:  # told below, in the test's own thread
            failed.append(error)

    with on(emulator, "to device"), staging(3 * 16384):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert failed == []


def test_staging_bytes_are_restored(emulator: Path) -> None:
    with on(emulator, "to device") as extension:
        usual = extension.staging_bytes()
        with staging(12_345):
            assert extension.staging_bytes() == 12_345
        assert extension.staging_bytes() == usual == 96 << 20
    with paramkit.backend.force("native"), staging(12_345):
        paramkit.copy_(torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize(
    ("total", "error"), [(100, ValueError), (-1, ValueError), (1e9, TypeError), (True, TypeError)]
)
def test_staging_of_no_sense(total: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="staging"), staging(total):  # type: ignore[arg-type]
        pass


# The library.


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    need_extension()
    wrong = tmp_path / "wrong.so"
    wrong.write_text("no library")
    with paramkit.backend.force("cpu") as extension:
        with pytest.raises(RuntimeError, match=r"wrong\.so"):
            extension.open_cuda(str(wrong), "kernels")
        with pytest.raises(RuntimeError, match=r"missing\.so"):
            extension.open_cuda(str(tmp_path / "missing.so"), "kernels")
    assert torch.equal(paramkit.copy_(torch.zeros(3), torch.ones(3)), torch.ones(3))


def test_a_library_of_another_interface(tmp_path: Path) -> None:
    need_extension()
    other = emulation.build(tmp_path, "-DPARAMKIT_CUDA_INTERFACE=999")
    with (
        paramkit.backend.force("cpu") as extension,
        pytest.raises(RuntimeError, match="interface 999, expected 1: build it again"),
    ):
        extension.open_cuda(str(other), "kernels")
