"""Of a file only those bytes are read that are needed: parts of rows, without the rest of the rows."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import paramkit
from paramkit import Rule, SourceError
from paramkit.pieces import read_view
from paramkit.ranges import packed
from paramkit.resolve import Write
from paramkit.sources import Lazy, Stored, StoredFile, open_source, reading
from paramkit.stream import Streamed
from tests.conftest import need_extension
from tests.guards import Layout, assert_same_bits, assert_same_storage, place, watch

GAP = reading.GAP
ROWS, COLUMNS = 96, 4096  # float32: a half is 8 KiB of a row, a quarter 4 KiB


@pytest.fixture(params=["native", "cpu"], autouse=True)
def route(request: pytest.FixtureRequest) -> Iterator[str]:
    """Rows read by the extension and by Python."""
    if request.param == "cpu":
        need_extension()
    with paramkit.backend.force(request.param) as module:
        assert hasattr(module, "read_rows") == (request.param == "cpu")
        yield request.param


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    seeded = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=seeded, dtype=torch.float64).to(dtype)


def saved(folder: Path, **tensors: Tensor) -> Path:
    path = folder / "m.safetensors"
    save_file(tensors, path)
    return path


def file_of(source: Any) -> StoredFile:
    stored = next(iter(source.values()))
    assert isinstance(stored, Stored)
    return stored.file


def opened(path: Path) -> Any:
    return open_source(path, mmap=False)


def guarded(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return place(Layout.dense(shape), dtype)


def streamed(plan: paramkit.Plan) -> Streamed:
    assert isinstance(plan._compiled, Streamed)
    return plan._compiled


def goes_straight(plan: paramkit.Plan) -> list[bool]:
    return [step.straight is not None for step in streamed(plan).steps]


def part(pattern: str, shards: int, rank: int, **sizes: int) -> list[Rule]:
    """A part of the axis that the pattern says is (s c): for s one value is read, the others are left."""
    unread = pattern.partition("->")[0] + "->"
    named = {name: size for name, size in sizes.items() if name in unread}
    return [
        Rule("w", "w", pattern, at={"s": k}, s=shards, **sizes)
        if k == rank
        else Rule("w", None, unread, at={"s": k}, s=shards, **named)
        for k in range(shards)
    ]


COLUMN = "r (s c) -> r c"


# ---- each rank reads its part --------------------------------------------------------------------


@pytest.mark.parametrize("staging", [4096, 9999, 100_000, None])
@pytest.mark.parametrize("shards", [2, 4])
def test_shards_of_columns_read_the_file_once_together(
    tmp_path: Path, shards: int, staging: int | None
) -> None:
    whole = values(ROWS, COLUMNS)
    path = saved(tmp_path, w=whole)
    total = 0
    for rank, expected in enumerate(whole.chunk(shards, 1)):
        source, dst = opened(path), guarded(ROWS, COLUMNS // shards)
        plan = paramkit.plan({"w": dst}, source, part(COLUMN, shards, rank), staging=staging)
        seen = watch(dst)
        seen.assert_unwritten()
        assert file_of(source).bytes_read == 0
        plan.apply()
        assert_same_bits(dst, expected)
        seen.assert_only_inside()
        assert file_of(source).bytes_read == dst.nbytes  # not a byte more
        total += file_of(source).bytes_read
        assert plan.verify() == []
        assert file_of(source).bytes_read == 2 * dst.nbytes
        dst[-1, -1] += 1
        assert plan.verify() == ["w"]
    assert total == whole.nbytes


@pytest.mark.parametrize(
    ("pattern", "shape", "dtype"),
    [
        ("r (s c) -> r c", (ROWS, 1024), torch.bfloat16),  # converted
        ("r (s c) -> c r", (1024, ROWS), torch.float32),  # transposed
        ("r (s c) -> c r", (1024, ROWS), torch.float16),
        ("(a b) (s c) -> b a c", (16, 6, 1024), torch.float32),
        ("(a b) (s c) -> c b a", (1024, 16, 6), torch.float64),
        ("(a b) (s x y) -> b x a y", (16, 8, 6, 128), torch.float32),
    ],
)
@pytest.mark.parametrize("staging", [5000, None])
def test_what_is_rearranged_or_converted_is_read_as_little(
    tmp_path: Path,
    pattern: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    staging: int | None,
) -> None:
    whole = values(ROWS, COLUMNS)
    path, sizes = saved(tmp_path, w=whole), {"a": 6, "x": 8}
    total = 0
    for rank in range(4):
        source, dst, twin = opened(path), guarded(*shape, dtype=dtype), guarded(*shape, dtype=dtype)
        rules = part(pattern, 4, rank, **{n: k for n, k in sizes.items() if n in pattern})
        with paramkit.backend.force("native"):
            paramkit.transplant({"w": twin}, {"w": whole}, rules, casting="unsafe")
        plan = paramkit.plan({"w": dst}, source, rules, casting="unsafe", staging=staging)
        seen = watch(dst)
        plan.apply()
        seen.assert_only_inside()
        assert_same_storage(dst, twin)
        rows = pattern == "(a b) (s c) -> b a c" or (pattern.endswith("b x a y") and staging)
        assert any(goes_straight(plan)) == bool(rows and staging)
        total += file_of(source).bytes_read
        assert plan.verify() == []
    assert total == whole.nbytes


def test_rows_of_blocks_and_shards_of_three_axes(tmp_path: Path) -> None:
    """Experts, each a matrix of which this rank has some columns: loops around loops."""
    whole = values(5, 40, 2048)
    path = saved(tmp_path, w=whole)
    for staging in (4096, 70_000, None):
        source, dst = opened(path), guarded(5, 40, 512)
        rules = part("e r (s c) -> e r c", 4, 2)
        paramkit.transplant({"w": dst}, source, rules, staging=staging)
        assert_same_bits(dst, whole[:, :, 1024:1536])
        assert file_of(source).bytes_read == dst.nbytes


@pytest.mark.parametrize("staging", [8192, 60_000, None])
def test_columns_of_fused_parameters(tmp_path: Path, staging: int | None) -> None:
    """Query, key and value interleaved in one tensor, of each row one half: every byte once, and no other."""
    groups, heads, dim, width = 4, 3, 8, 1024
    whole = values(groups * (heads + 2) * dim, width)
    path = saved(tmp_path, w=whole)
    total = 0
    for rank in range(2):
        source = opened(path)
        dsts = {
            "q": guarded(groups * heads * dim, width // 2),
            "k": guarded(groups * dim, width // 2, dtype=torch.bfloat16),
            "v": guarded(groups * dim, width // 2),
        }
        sizes = {"p": heads + 2, "d": dim, "s": 2}
        side = "(g p d) (s c)"
        rules = [
            Rule("w", "q", f"{side} -> (g r d) c", at={"p": "0:r", "s": rank}, r=heads, **sizes),
            Rule("w", "k", f"{side} -> (g d) c", at={"p": heads, "s": rank}, **sizes),
            Rule("w", "v", f"{side} -> (g d) c", at={"p": heads + 1, "s": rank}, **sizes),
            Rule("w", None, f"{side} ->", at={"s": 1 - rank}, **sizes),
        ]
        seen = watch(*dsts.values())
        paramkit.transplant(dsts, source, rules, staging=staging)
        seen.assert_only_inside()
        half = whole.chunk(2, 1)[rank].unflatten(0, (groups, heads + 2, dim))
        assert_same_bits(dsts["q"], half[:, :heads].reshape(-1, width // 2))
        assert_same_bits(dsts["k"], half[:, heads].reshape(-1, width // 2).bfloat16())
        assert_same_bits(dsts["v"], half[:, heads + 1].reshape(-1, width // 2))
        total += file_of(source).bytes_read
    assert total == whole.nbytes


@pytest.mark.parametrize("gap", [GAP - 4, GAP])
def test_gaps_shorter_than_the_limit_are_read_along(tmp_path: Path, gap: int) -> None:
    run, rows = 2048, 50
    whole = values(rows, (run + gap) // 4)
    path = saved(tmp_path, w=whole)
    source, dst = opened(path), guarded(run // 4, rows).T  # turned, so not read straight
    write = Write(0, 0, (rows, run // 4), dst.stride(), 0, whole.stride(), 0)
    assert Streamed(paramkit.backend.active(), [dst], [source["w"]], [write], [], 1 << 20).run()
    assert_same_bits(dst, whole[:, : run // 4])
    wasted = (rows - 1) * gap if gap < GAP else 0
    assert file_of(source).bytes_read == rows * run + wasted


def test_rows_of_many_small_tensors_are_not_read_with_their_neighbours(tmp_path: Path) -> None:
    """Each rank has half of the rows of each tensor: what lies between is a gap, too."""
    tensors = {f"w{k}": values(8, 128, seed=k) for k in range(20)}  # halves of 2 KiB
    path = saved(tmp_path, **tensors)
    total = 0
    for rank in range(2):
        source = opened(path)
        dsts = {name: guarded(4, 128) for name in tensors}
        rules = [
            Rule(name, name if k == rank else None, "(s r) c -> r c" if k == rank else "(s r) c ->",
                 at={"s": k}, s=2)
            for name in tensors
            for k in range(2)
        ]  # fmt: skip
        paramkit.transplant(dsts, source, rules)
        for name, dst in dsts.items():
            assert_same_bits(dst, tensors[name].chunk(2)[rank])
        total += file_of(source).bytes_read
    assert total == sum(t.nbytes for t in tensors.values())


def test_the_same_columns_twice_are_read_once(tmp_path: Path) -> None:
    whole = values(ROWS, COLUMNS)
    source, dsts = opened(saved(tmp_path, w=whole)), [guarded(ROWS, 1024), guarded(1024, ROWS)]
    rules = [
        Rule("w", "a", "r (s c) -> r c", at={"s": 1}, s=4),
        Rule("w", "b", "r (s c) -> c r", at={"s": 1}, s=4),
        *(Rule("w", None, "r (s c) ->", at={"s": k}, s=4) for k in (0, 2, 3)),
    ]
    paramkit.transplant(dict(zip("ab", dsts)), source, rules)
    assert_same_bits(dsts[0], whole[:, 1024:2048])
    assert_same_bits(dsts[1], whole[:, 1024:2048].T)
    assert file_of(source).bytes_read == dsts[0].nbytes


@pytest.mark.parametrize(
    ("second", "read"),
    [
        (
            (slice(3, 20), slice(2048, 2560)),
            (10 + 17) * 2048,
        ),  # no strides for both: each by itself
        ((slice(3, 20), slice(256, 768)), 19 * 16384 + 768 * 4),  # they overlap: all, but once
    ],
)
def test_boxes_that_cannot_be_packed_together(
    tmp_path: Path, second: tuple[slice, slice], read: int
) -> None:
    whole = values(32, COLUMNS)
    source = opened(saved(tmp_path, w=whole))
    views = [whole[:10, :512], whole[second]]
    dsts = [guarded(*view.shape, dtype=torch.float64) for view in views]
    writes = [
        Write(k, 0, tuple(v.shape), d.stride(), 0, v.stride(), v.storage_offset())
        for k, (v, d) in enumerate(zip(views, dsts))
    ]
    seen = watch(*dsts)
    assert Streamed(paramkit.backend.active(), dsts, [source["w"]], writes, [], 4 << 20).run()
    for dst, view in zip(dsts, views):
        assert_same_bits(dst, view.double())
    seen.assert_only_inside()
    assert file_of(source).bytes_read == read


# ---- staging, or straight --------------------------------------------------------------------------


def test_staging_is_not_spent_on_gaps(tmp_path: Path) -> None:
    whole = values(200, 8192)
    path = saved(tmp_path, w=whole)
    dst = guarded(512, 200)
    plan = paramkit.plan({"w": dst}, opened(path), part("r (s c) -> c r", 16, 3), staging=None)
    assert streamed(plan)._staging.numel() <= dst.nbytes + 128
    assert len(streamed(plan).steps) == 1
    plan = paramkit.plan({"w": dst}, opened(path), part("r (s c) -> c r", 16, 3), staging=65536)
    steps = streamed(plan).steps
    # Halves are filled: each step but the last has at least a quarter of the staging.
    assert all(step.bytes >= 65536 // 4 for step in steps[:-1])
    for step in steps:
        for read in step.reads:
            assert step.half + read.at + read.size <= streamed(plan)._staging.numel()


def test_rows_are_read_straight_to_where_they_belong(tmp_path: Path) -> None:
    whole = values(ROWS, COLUMNS)
    path = saved(tmp_path, w=whole)
    for strides in ((1024, 1), (1111, 1)):  # rows one after the other, and with room between
        source, dst = opened(path), place(Layout.dense((ROWS, 1024), strides), torch.float32)
        plan = paramkit.plan({"w": dst}, source, part(COLUMN, 4, 3), staging=65536)
        straight = goes_straight(plan)
        assert len(straight) > 3 and straight == [False] + [True] * (len(straight) - 1)
        before, seen = dst._version, watch(dst)
        with paramkit.backend.trace() as trace:
            plan.apply()
        assert sum(trace.routes.values()) == len(streamed(plan).steps[0].write_of)
        assert_same_bits(dst, whole[:, 3072:])
        seen.assert_only_inside()
        assert dst._version > before
        assert file_of(source).bytes_read == ROWS * 4096


def test_whole_rows_into_rows_with_room_between(tmp_path: Path) -> None:
    """Of the file everything in a row, in memory not: one call reads many rows."""
    whole = values(300, 512)
    source = opened(saved(tmp_path, w=whole))
    dst = place(Layout.dense((300, 512), (600, 1)), torch.float32)
    plan = paramkit.plan({"w": dst}, source, staging=40_000)
    assert all(goes_straight(plan)[1:]) and len(streamed(plan).steps) > 5
    seen = watch(dst)
    plan.apply()
    assert_same_bits(dst, whole)
    seen.assert_only_inside()
    assert file_of(source).bytes_read == whole.nbytes


def test_short_rows_and_repeated_ones_go_through_staging(tmp_path: Path) -> None:
    whole = values(300, 512)
    path = saved(tmp_path, w=whole)
    narrow = place(Layout.dense((300, 2, 256), (700, 300, 1)), torch.float32)  # 1 KiB: long enough
    rules = [Rule("w", "w", "r (a b) -> r a b", a=2)]
    plan = paramkit.plan({"w": narrow}, opened(path), rules, staging=40_000)
    assert all(goes_straight(plan)[1:])
    plan.apply()
    assert_same_bits(narrow, whole.view(300, 2, 256))
    narrow = place(Layout.dense((300, 4, 128), (700, 150, 1)), torch.float32)
    rules = [Rule("w", "w", "r (a b) -> r a b", a=4)]
    plan = paramkit.plan({"w": narrow}, opened(path), rules, staging=40_000)
    assert not any(goes_straight(plan))
    plan.apply()
    assert_same_bits(narrow, whole.view(300, 4, 128))
    repeated = guarded(300, 3, 512)
    source = opened(path)
    rules = [Rule("w", "w", "r c -> r n c", at={"n": "*"})]
    plan = paramkit.plan({"w": repeated}, source, rules, staging=40_000)
    assert not any(goes_straight(plan))
    plan.apply()
    assert_same_bits(repeated, whole[:, None].expand(300, 3, 512).contiguous())
    assert file_of(source).bytes_read == whole.nbytes


# ---- by hand, at random ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_random_boxes_of_random_tensors(tmp_path: Path, seed: int) -> None:
    """Several boxes of one tensor, which overlap or not, in any order of axes and any staging."""
    rng = random.Random(seed)
    shape = [rng.choice((3, 5, 8)), rng.choice((4, 7, 12)), rng.choice((600, 1500, 2200))]
    rng.shuffle(shape)
    whole = values(*shape, seed=seed)
    stored = opened(saved(tmp_path, w=whole))["w"]
    assert isinstance(stored, Stored)
    dsts, writes, expected = [], [], []
    needed = torch.zeros(whole.numel(), dtype=torch.bool)
    for number in range(rng.randint(1, 4)):
        box = [sorted(rng.sample(range(n + 1), 2)) for n in shape]
        order = rng.sample(range(3), 3)
        view = whole[tuple(slice(*b) for b in box)].permute(order)
        needed.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        dtype = rng.choice((torch.float32, torch.float32, torch.float16))
        dst = guarded(*view.shape, dtype=dtype)
        dsts.append(dst)
        expected.append(view.to(dtype).contiguous())
        strides = dst.stride(), 0, view.stride()
        writes.append(Write(number, 0, tuple(view.shape), *strides, view.storage_offset()))
    staging = rng.choice((4096, 10_000, 50_000, 1 << 20))
    active = paramkit.backend.active()
    plan = Streamed(active, dsts, [stored], writes, [], staging)
    used = plan._staging.numel()
    for step in plan.steps:
        assert all(step.half + read.at + read.size <= used <= staging for read in step.reads)
    seen = watch(*dsts)
    assert plan.run()
    for dst, right in zip(dsts, expected):
        assert_same_bits(dst, right)
    seen.assert_only_inside()
    assert plan.verify() == []
    for write, right in zip(writes, expected):
        assert_same_bits(read_view(stored, write).contiguous().to(right.dtype), right)
    if len(writes) == 1:
        # All that is needed, and of gaps only those that are shorter than the limit.
        ends = (needed.int().diff(prepend=torch.zeros(1)) == -1).nonzero().flatten()
        begins = (needed.int().diff(prepend=torch.zeros(1)) == 1).nonzero().flatten()[1:]
        gaps = (begins - ends[: len(begins)]) * 4
        assert int(needed.sum()) * 4 <= packed(writes, 4).bytes
        assert packed(writes, 4).bytes == int(needed.sum()) * 4 + int(gaps[gaps < GAP].sum())


# ---- the file's own calls --------------------------------------------------------------------------


@pytest.fixture
def big(tmp_path: Path) -> tuple[StoredFile, Tensor]:
    content = torch.randint(0, 256, (2 * reading.BLOCK + 4321,), dtype=torch.uint8)
    path = tmp_path / "big.bin"
    path.write_bytes(content.numpy().tobytes())
    return StoredFile(path), content


@pytest.mark.parametrize(
    ("rows", "run", "step", "pitch"),
    [
        (0, 5, 7, 9), (3, 0, 7, 9), (1, 100, 0, 100), (7, 1, 1, 1), (300, 5, 7, 5), (300, 5, 5, 9), (3, 5, 2, 8),
        (100, 4000, 9000, 4001), (500, 4096, 8192, 4096), (1000, 4096, 4096, 4099),
        (2, 2 << 20, (2 << 20) + 99, 2 << 20), (40_000, 20, 100, 20),
    ],
)  # fmt: skip
@pytest.mark.parametrize("helpers", [0, 2])
def test_rows_of_every_kind(
    big: tuple[StoredFile, Tensor],
    rows: int,
    run: int,
    step: int,
    pitch: int,
    helpers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "_helpers", lambda: helpers)
    file, content = big
    memory = torch.full((33 + rows * pitch + run,), 0xAB, dtype=torch.uint8)
    twin = memory.clone()
    out = memory.as_strided((rows, run), (pitch, 1), 17)
    twin.as_strided((rows, run), (pitch, 1), 17).copy_(
        content.as_strided((rows, run), (step, 1), 3)
    )
    also = torch.empty(50, dtype=torch.uint8)
    file.read_many([(3, out, step), (len(content) - 50, also)])
    assert torch.equal(memory, twin)
    assert torch.equal(also, content[-50:])
    assert file.bytes_read == rows * run + 50


@pytest.mark.parametrize(("step", "pitch"), [(500, 100), (100, 130)])
def test_rows_that_are_read_in_parts(
    big: tuple[StoredFile, Tensor],
    step: int,
    pitch: int,
    route: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, content = big
    real, calls = os.preadv, []

    def some(fd: int, buffers: list[Any], offset: int) -> int:
        calls.append(offset)
        return real(fd, [memoryview(buffers[0])[: len(buffers[0]) // 2 + 1]], offset)

    monkeypatch.setattr(os, "preadv", some)
    out = torch.full((20, pitch), 0xAB, dtype=torch.uint8)
    file.read_many([(9, out[:, :100], step)])
    assert torch.equal(out[:, :100], content.as_strided((20, 100), (step, 1), 9))
    assert (out[:, 100:] == 0xAB).all()
    assert file.bytes_read == 2000
    assert len(calls) == (0 if route == "cpu" else 20 * 6)  # 51 of 100, 25 of 49, 13, 6, 3, 2


def test_bytes_of_headers_and_of_other_files_do_not_count(tmp_path: Path) -> None:
    path = saved(tmp_path, w=values(4, 4))
    one, other = opened(path), opened(path)
    assert file_of(one).bytes_read == 0
    one["w"].load()
    assert (file_of(one).bytes_read, file_of(other).bytes_read) == (64, 0)


def truncated(file: StoredFile, out: Tensor, offset: int, step: int) -> str:
    with pytest.raises(SourceError, match="truncated") as caught:
        file.read_many([(offset, out, step)])
    assert str(file.path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("cut", "end", "left"),
    [(7000, 7000, 100), (6950, 7000, 100), (6040, 6040, 60)],  # behind a gap, in a gap, in a row
)
def test_rows_behind_the_end_of_the_file(
    big: tuple[StoredFile, Tensor], cut: int, end: int, left: int
) -> None:
    file, content = big
    os.truncate(file.path, cut)
    memory = torch.full((20, 100), 0xAB, dtype=torch.uint8)
    said = truncated(file, memory, 0, 1000)
    assert f"its end at byte {end}" in said and f"{left} bytes more" in said
    complete = (cut + 899) // 1000  # rows before the one that is cut
    for k in range(complete):
        assert torch.equal(memory[k], content[1000 * k : 1000 * k + 100])
    assert (memory[complete + 1 :] == 0xAB).all()
    assert file.bytes_read == sum(min(100, max(0, cut - 1000 * k)) for k in range(20))


def test_rows_one_after_the_other_behind_the_end_of_the_file(
    big: tuple[StoredFile, Tensor],
) -> None:
    file, _ = big
    os.truncate(file.path, 6040)
    out = torch.empty(100, 110, dtype=torch.uint8)[:, :100]
    said = truncated(file, out, 0, 100)
    assert "its end at byte 6040" in said and "3960 bytes more" in said


def test_an_error_of_the_system_while_rows_are_read(big: tuple[StoredFile, Tensor]) -> None:
    file, _ = big
    out = torch.empty(4, 10, dtype=torch.uint8)
    folder = os.open("/", os.O_RDONLY)  # which cannot be read as a file
    file._fd, own = folder, file._fd
    try:
        with pytest.raises(SourceError, match=os.strerror(errno.EISDIR)):
            file.read_many([(0, out, 20)])
    finally:
        file._fd = own
        os.close(folder)
    assert file.bytes_read == 0


@pytest.mark.parametrize(
    "out",
    [torch.empty(4, 8), torch.empty(8, dtype=torch.uint8), torch.empty(4, 8, dtype=torch.uint8).T,
     torch.empty(4, 16, dtype=torch.uint8)[:, ::2], torch.empty(4, 8, dtype=torch.uint8, device="meta"),
     torch.empty(1, 8, dtype=torch.uint8).expand(4, 8)],
)  # fmt: skip
def test_rows_want_plain_bytes(big: tuple[StoredFile, Tensor], out: Tensor) -> None:
    with pytest.raises(ValueError, match="expected a 2-d"):
        big[0].read_many([(0, out, 100)])


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])  # straight, and through staging
def test_a_file_cut_while_columns_are_read(tmp_path: Path, target: torch.dtype) -> None:
    whole = values(ROWS, COLUMNS)
    path = saved(tmp_path, w=whole)
    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.zeros(ROWS, 1024, dtype=target))
    plan = paramkit.plan(module, path, part(COLUMN, 4, 1), staging=65536)
    assert any(goes_straight(plan)) == (target == torch.float32)
    cuts: list[Callable[[], None]] = [lambda: os.truncate(path, path.stat().st_size // 2)]

    def cut(done: int, total: int) -> None:
        if cuts:
            cuts.pop()()

    with pytest.raises(paramkit.TornError, match="truncated") as caught:
        plan.apply(progress=cut)
    assert isinstance(caught.value.__cause__, SourceError)
    assert paramkit.torn(module) is not None
    assert_same_bits(module.w[:8].detach(), whole[:8, 1024:2048].to(target))


def test_what_is_in_no_file_is_read_as_before(tmp_path: Path) -> None:
    """Only files know rows: another lazy source is asked for one range of bytes."""
    asked: list[tuple[int, int]] = []

    class Counted(Lazy):
        def read_into(self, begin: int, end: int, out: Tensor) -> None:
            asked.append((begin, end))
            out.copy_(whole.view(-1).view(torch.uint8)[begin:end])

    whole = values(8, 4096)
    dst = guarded(8, 1024)
    paramkit.transplant({"w": dst}, {"w": Counted((8, 4096), torch.float32)}, part(COLUMN, 4, 1))
    assert_same_bits(dst, whole[:, 1024:2048])
    assert asked == [(4096, 4096 + 7 * 16384 + 4096)]
