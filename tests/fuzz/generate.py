"""Random lists of writes, made in bulk: a block of them from one seed, with numpy, a few microseconds a write.

All views of a list lie in one arena, with bytes of pattern around and between them. An arena has four zones. In a
list that only moves bytes a view may lie anywhere, and have any dtype. In one that converts each zone has a
dtype, and numbers that every dtype of the list can hold (:mod:`tests.fuzz.values`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tests.cases import DTYPES
from tests.fuzz.values import KINDS, POOL, pool

__all__ = [
    "GUARD",
    "SCALES",
    "SERIAL",
    "SHIFTS",
    "Scale",
    "View",
    "Write",
    "WriteList",
    "block",
    "scale_of",
    "shift_of",
]

GUARD = 64
"""Bytes of pattern in front of each zone, and behind the last."""

SERIAL = 30_000
"""Elements of a write that one thread of torch's does: of more, memory that overlaps has no order in it."""

SHIFTS = (0, 0, 16, 32, 48)
"""Bytes behind a multiple of 64 at which arenas begin. Of what is no multiple of 16 torch fills no complex128."""

RANK = 5
SIZES = {dtype: dtype.itemsize for dtype in DTYPES}
# Sizes at which kernels change their way.
EDGES = np.array(
    [0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1025]
)
NUMBERS = (0, 1, 3, 7, 2.5, -1, True, 300, -70000, 1e30, float("inf"), float("nan"), 2j)


@dataclass(frozen=True)
class Scale:
    """How large the arenas of a block are, and how many lists it has."""

    name: str
    zone: int  # bytes
    lists: int

    @property
    def bytes(self) -> int:
        return 4 * (self.zone + GUARD) + GUARD

    def zone_at(self, index: int) -> int:
        return GUARD + index * (self.zone + GUARD)


SCALES = {
    "small": Scale("small", 512, 250),
    "medium": Scale("medium", 6 << 10, 100),
    "large": Scale("large", 128 << 10, 30),  # several threads, several blocks and strips
}


# Of blocks 0, 1, ... each process takes every second, say, and every 61st goes to an emulated GPU. These periods
# have no factor in common with those or with one another, so that everything meets everything.
def scale_of(number: int) -> Scale:
    """The scale of a block."""
    return SCALES[{3: "medium", 6: "large"}.get(number % 7, "small")]


def shift_of(number: int) -> int:
    """Where the arenas of a block begin."""
    return SHIFTS[number % len(SHIFTS)]


@dataclass(frozen=True)
class View:
    """A view of an arena; the offset is in elements of the dtype, from the arena's beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Write:
    """`dst` takes the values of a view, or is filled with one of shape () or a number."""

    dst: View
    src: View | int | float | complex
    fill: bool


@dataclass
class WriteList:
    """Some writes into an arena of given bytes, and how they are asked for."""

    name: str
    scale: Scale
    start: bytes
    writes: list[Write]
    how: str  # "copy": foreach_copy_; "fill": foreach_fill_; "each": one by one; "plan"
    apart: bool  # no source is in a zone that is written
    keeps_errors: bool  # writes that torch refuses stay: nothing may then be written
    kind: str
    shift: int = 0  # bytes behind a multiple of 64 at which its arena begins


class _Sides:
    """Sizes and strides of many writes at once: arrays [n, RANK]; axes beyond the rank have size 1."""

    def __init__(
        self,
        rng: np.random.Generator,
        rooms: tuple[np.ndarray, np.ndarray],
        meets: np.ndarray,
        large: bool,
    ) -> None:
        """`rooms`: elements [n] that each side has; `meets`: whether both may share memory [n]."""
        n = len(meets)
        self.rng, self.n = rng, n
        self.rank = rng.choice(RANK + 1, n, p=(0.06, 0.3, 0.28, 0.2, 0.1, 0.06))
        sizes = rng.integers(1, 9, (n, RANK))
        wide = rng.random((n, RANK)) < 0.25
        sizes[wide] = rng.integers(1, 48, int(wide.sum()))
        edge = rng.random((n, RANK)) < 0.12
        sizes[edge] = rng.choice(EDGES[1:], int(edge.sum()))
        sizes[rng.random((n, RANK)) < 0.006] = 0
        if large:
            sizes *= rng.choice((1, 1, 3, 11), (n, RANK))
        sizes[np.arange(RANK)[None, :] >= self.rank[:, None]] = 1
        serial = meets if large else np.ones(n, bool)
        # In large arenas mostly a good part of the room: one axis is as long as the others leave.
        grown = np.flatnonzero((self.rank > 0) & (rng.random(n) < (0.85 if large else 0)))
        axes = rng.integers(0, self.rank[grown])
        sizes[grown, axes] = 1
        others = np.maximum(sizes[grown].astype(np.float64).prod(1), 1)
        wanted = np.where(serial, np.minimum(rooms[0], SERIAL), rooms[0])[grown]
        sizes[grown, axes] = np.ceil(wanted * np.sqrt(rng.random(len(grown))) / others)
        for axis in range(RANK):
            many = serial & (sizes.prod(1) > SERIAL)
            sizes[many, axis] = 1
        self.sizes, self.serial = sizes, serial
        self.dst, _ = self._strides(rooms[0], 0.0, 0.03)
        self.src, _ = self._strides(rooms[1], 0.08, 0.05)
        # Only now: the source may have made an axis shorter.
        self.dst_offset = self._offset(self.dst, rooms[0])
        self.src_offset = self._offset(self.src, rooms[1])

    def _strides(self, room: np.ndarray, zero: float, odd: float) -> tuple[np.ndarray, np.ndarray]:
        """Strides that stay within `room` elements [n]; axes that do not fit are made shorter."""
        rng, n, rows = self.rng, self.n, np.arange(self.n)
        order = np.argsort(rng.random((n, RANK)), axis=1)
        plain = rng.random(n) < 0.45
        order[plain] = np.arange(RANK)[::-1]
        step, span = np.ones(n, np.int64), np.ones(n, np.int64)
        strides = np.zeros((n, RANK), np.int64)
        for turn in range(RANK):
            axis = order[:, turn]
            stride = step * np.where(rng.random(n) < 0.12, rng.integers(2, 4, n), 1)
            stride = np.where(rng.random(n) < zero, 0, stride)
            strange = (rng.random(n) < odd) & self.serial
            stride = np.where(strange, rng.integers(0, 10, n), stride)
            size = self.sizes[rows, axis]
            most = np.where(stride == 0, size, (room - span) // np.maximum(stride, 1) + 1)
            size = np.minimum(size, most)
            self.sizes[rows, axis], strides[rows, axis] = size, stride
            span += np.maximum(size - 1, 0) * stride
            pad = np.where(rng.random(n) < 0.2, rng.integers(1, 6, n), 0)
            step = np.maximum(step, stride * np.maximum(size, 1)) + pad
        return strides, span

    def _offset(self, strides: np.ndarray, room: np.ndarray) -> np.ndarray:
        span = 1 + (np.maximum(self.sizes - 1, 0) * strides).sum(1)
        return (self.rng.random(self.n) * (room - span + 1)).astype(np.int64)


def _zones_of(draws: list[int], converts: bool) -> tuple[str, list[torch.dtype]]:
    """The kind of a list, and the dtypes of its zones: the first two may be written."""
    if not converts:
        return "moves", [torch.uint8] * 4
    kind = KINDS[draws[4] % len(KINDS)]
    sides = [kind.destinations if z < 2 else kind.sources for z in range(4)]
    return kind.name, [side[n % len(side)] for n, side in zip(draws, sides)]


def _arena(
    draws: list[int], scale: Scale, noise: np.ndarray, kind: str, zones: list[torch.dtype]
) -> bytes:
    if kind == "moves":
        return noise.tobytes()
    for z, dtype in enumerate(zones):
        numbers = pool(kind, dtype)
        size = SIZES[dtype]
        if len(numbers) >= scale.zone:
            first = draws[z] % ((len(numbers) - scale.zone) // size + 1) * size
            wanted = numbers[first : first + scale.zone]
        else:
            wanted = np.resize(np.roll(numbers, draws[z] % POOL * size), scale.zone)
        noise[scale.zone_at(z) : scale.zone_at(z) + scale.zone] = wanted
    return noise.tobytes()


def block(seed: int, number: int) -> list[WriteList]:
    """The lists of a block, always the same for a seed."""
    scale = scale_of(number)
    rng = np.random.default_rng([seed, number])
    count = scale.lists
    per_list = np.minimum(rng.integers(1, 9, count), rng.integers(2, 9, count))
    per_list += scale.name == "large"
    total = int(per_list.sum())
    converts = rng.random(count) < 0.5
    apart = rng.random(count) < 0.5
    ones = (rng.random(count) < 0.3) & ~converts  # bytes of 0 and 1, which a bool may be
    hows = rng.choice(("copy", "fill", "each", "plan"), count, p=(0.64, 0.14, 0.2, 0.02))
    keeps = rng.random(count) < 0.1
    words = rng.integers(0, 1 << 64, (count, scale.bytes // 8), dtype=np.uint64)
    # In some every float is a NaN or infinite.
    words[(rng.random(count) < 0.1) & ~converts & ~ones] |= np.uint64(0x7FF07F807F807F80)
    noise = words.view(np.uint8)
    noise[ones] &= 1
    owner = np.repeat(np.arange(count), per_list)

    # Where each side of each write is, and its dtype.
    draws = rng.integers(0, 1 << 40, (2, count, 5)).tolist()
    kinds = [_zones_of(draws[0][at], bool(each)) for at, each in enumerate(converts)]
    dtypes = rng.integers(0, len(DTYPES), total)
    zone_dst, zone_src = rng.integers(0, 2, total), rng.integers(0, 4, total)
    zone_src = np.where(apart[owner], 2 + zone_src % 2, zone_src)
    # Whether the sides of a write may share memory. Else those of other writes of the list still may.
    meets = ~apart[owner]
    if scale.name == "large":
        meets &= rng.random(total) < 0.5
        zone_src = np.where(~meets & (zone_src == zone_dst), 1 - zone_dst, zone_src)
    cuts = rng.uniform(0.2, 0.8, total)
    ahead = rng.random(total) < 0.5
    places = []
    for w, at in enumerate(owner.tolist()):
        if converts[at]:
            zones = kinds[at][1]
            d, s = int(zone_dst[w]), int(zone_src[w])
            places.append(
                (zones[d], scale.zone_at(d), scale.zone, zones[s], scale.zone_at(s), scale.zone)
            )
            continue
        dtype = DTYPES[dtypes[w]]
        if dtype == torch.bool and not ones[at]:
            dtype = torch.uint8
        half = 2 * scale.zone + GUARD
        if apart[at]:
            places.append((dtype, GUARD, half, dtype, scale.zone_at(2), half))
            continue
        whole = scale.bytes - 2 * GUARD
        if meets[w]:
            places.append((dtype, GUARD, whole, dtype, GUARD, whole))
            continue
        cut = int(whole * cuts[w]) // 16 * 16
        front, back = (GUARD, cut), (GUARD + cut, whole - cut)
        places.append(
            (dtype, *(front if ahead[w] else back), dtype, *(back if ahead[w] else front))
        )
    room_dst = np.array([p[2] // SIZES[p[0]] for p in places])
    room_src = np.array([p[5] // SIZES[p[3]] for p in places])
    sides = _Sides(rng, (room_dst, room_src), meets, scale.name == "large")

    # How sources differ from the shape: axes of 1, and missing ones.
    single = (rng.random((total, RANK)) < 0.3) & (rng.random(total) < 0.2)[:, None]
    lost = np.where(rng.random(total) < 0.1, rng.integers(0, RANK + 1, total), 0)
    wrong = rng.random(total) < 0.015  # shapes that do not broadcast
    fills = rng.random(total) < 0.35
    numbered = rng.random(total) < 0.6
    numbers = rng.integers(0, len(NUMBERS), total)
    common = rng.integers(0, 6, total)  # numbers that every dtype has
    rank, sizes = sides.rank.tolist(), sides.sizes.tolist()
    dst_strides, src_strides = sides.dst.tolist(), sides.src.tolist()
    dst_offset, src_offset = sides.dst_offset.tolist(), sides.src_offset.tolist()

    lists = []
    w = 0
    for at in range(count):
        kind, zones = kinds[at]
        how = str(hows[at])
        writes = []
        for _ in range(int(per_list[at])):
            dst_dtype, dst_at, _, src_dtype, src_at, _ = places[w]
            r = rank[w]
            shape = tuple(sizes[w][:r])
            dst = View(
                dst_dtype,
                shape,
                tuple(dst_strides[w][:r]),
                dst_at // SIZES[dst_dtype] + dst_offset[w],
            )
            first = src_at // SIZES[src_dtype] + src_offset[w]
            source: View | int | float | complex
            fill = how == "fill" or (how == "each" and bool(fills[w]))
            if fill and numbered[w]:
                if kind != "moves":  # what is written is read again, as other dtypes
                    source = NUMBERS[common[w] % 4]
                elif ones[at]:  # a bool has 0 and 1, and in torch no other byte has one meaning
                    byte = dst_dtype.itemsize == 1 and not dst_dtype.is_floating_point
                    source = int(numbers[w] % 2) if byte else 0
                else:
                    source = NUMBERS[numbers[w]]
            elif fill:
                source = View(src_dtype, (), (), first)
            else:
                src_shape = [1 if one and n else n for n, one in zip(shape, single[w])]
                begin = min(int(lost[w]), r)
                if wrong[w] and r:
                    src_shape[-1] += 1
                    begin = 0
                source = View(
                    src_dtype, tuple(src_shape[begin:]), tuple(src_strides[w][begin:r]), first
                )
                if wrong[w]:
                    source = View(src_dtype, source.shape, (0,) * len(source.shape), first)
            writes.append(Write(dst, source, fill))
            w += 1
        lists.append(
            WriteList(
                f"{seed}:{number}:{at}",
                scale,
                _arena(draws[1][at], scale, noise[at], kind, zones),
                writes,
                how,
                bool(apart[at]),
                bool(keeps[at]),
                kind,
                shift_of(number),
            )
        )
    return lists
