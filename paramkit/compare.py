"""What differs between two sets of named tensors, read side by side in pieces of bounded size."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, permutations, product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import gather
from .destinations import layout_finding, memory_key
from .errors import Finding, SourceError
from .fills import Constant
from .resolve import resolve
from .rules import Rule
from .shapes import infer_destinations
from .sources import Lazy, Stored
from .sources.dcp import Chunk, Chunked
from .sources.lazy import contiguous_strides, in_a_row

__all__ = ["STATUSES", "Compared", "compare"]

STATUSES = (
    "equal",
    "close",
    "cast-equal",
    "changed",
    "reshaped",
    "resized",
    "only in A",
    "only in B",
)
"""In the order of how much of the one is in the other."""

PIECE = 4 << 20  # bytes of each side that are looked at together
SCRATCH = 32 << 20  # bytes that are read at once where elements lie scattered
BLOCK = 1 << 16  # elements whose differences are worked out at once: in the cache
MAX_AXES = 4  # of tensors that are tried in every order of their axes

Progress = Callable[[int, int], object]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


@dataclass(frozen=True)
class Compared:
    """How one tensor compares with its counterpart.

    Attributes:
        name: its name, in B where rules rename.
        status: one of `STATUSES`. "equal" is every bit; "close" is within `atol`; "cast-equal" is equal bits
            once one of the two is converted to the dtype of the other; "reshaped" has as many elements in
            another shape; "resized" has another number of them.
        a_shape, b_shape, a_dtype, b_dtype: of the two; None where there is none.
        nbytes: bytes of its elements, in B or else in A.
        differing: elements that differ, of a "changed" or "close" one.
        largest: the largest absolute difference of two numbers, inf where one of them is. None where no
            numbers differ, or none were compared.
        nan_differs: elements that are NaN in one of the two alone. Two NaNs of different payload count as
            differing, and here not.
        note: more, in words.
    """

    name: str
    status: str
    a_shape: tuple[int, ...] | None = None
    b_shape: tuple[int, ...] | None = None
    a_dtype: torch.dtype | None = None
    b_dtype: torch.dtype | None = None
    nbytes: int = 0
    differing: int = 0
    largest: float | None = None
    nan_differs: int = 0
    note: str = ""


def compare(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    rules: Iterable[Rule] = (),
    *,
    identity: bool = True,
    atol: float = 0.0,
    progress: Progress | None = None,
) -> list[Compared]:
    """Compare two sets of tensors name by name.

    Args:
        a, b: name -> CPU tensor or `Lazy`.
        rules: what makes names and axes of `b` from those of `a`, as for `paramkit.plan`.
        identity: names of `a` that no rule touches keep their name.
        atol: differences up to this count as "close".
        progress: called now and then with (bytes compared, bytes in all), of `b`.

    Returns:
        One for each name, in the order of `b`; those of `a` alone come last.

    Raises:
        PlanError: the rules do not fit `a`.
        SourceError: tensors without plain values, or a file that changed or cannot be read.

    Example:
        >>> a = {"w": torch.ones(2), "n": torch.ones(3), "x": torch.ones(2, 3)}
        >>> b = {"w": torch.tensor([1.0, 1.5]), "n": torch.ones(3).half(), "x": torch.ones(3, 2)}
        >>> for c in compare(a, b):
        ...     print(f"{c.name}: {c.status}, {c.largest or c.note}")
        w: changed, 0.5
        n: cast-equal, exact both ways
        x: reshaped, equal when flattened
    """
    findings = [
        f
        for tensors in (a, b)
        for name, tensor in tensors.items()
        if (f := _unreadable(name, tensor)) is not None
    ]
    if findings:
        raise SourceError("tensors without plain values cannot be compared.", findings)
    made = (
        _by_rules(a, b, list(rules), identity) if rules else {n: _Made.of(t) for n, t in a.items()}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about complex halves and the like
        found = list(_Comparison(made, b, atol, progress).run())
    every = [t for tensors in (a, b) for t in tensors.values()]
    stored = [t for t in every if isinstance(t, (Stored, Chunk, Chunked))]
    for file in {id(t.file): t.file for t in stored}.values():
        file.check()  # what was read must be one state of the file
    return found


def _unreadable(name: str, tensor: Any) -> Finding | None:
    if not isinstance(tensor, Lazy) and tensor.is_quantized:
        return Finding(name, "layout", "a quantized tensor", "plain values")
    return layout_finding(name, tensor, destination=False)


# ---- what rules make -----------------------------------------------------------------------------


class _View(NamedTuple):
    """Elements of a tensor: `tensor[begin + i * strides]` for every index i below `sizes`."""

    tensor: Any
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    begin: int


@dataclass(frozen=True)
class _Made:
    """A tensor of A as the rules make it.

    Attributes:
        shape, dtype: what it is.
        parts: (a view of a tensor of A, strides and offset of that part in the whole, contiguous).
        partial: the rules leave a part of it as it is.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[tuple[_View, tuple[int, ...], int]]
    partial: bool = False

    @classmethod
    def of(cls, tensor: Any) -> _Made:
        shape = tuple(tensor.shape)
        return cls(shape, tensor.dtype, [(_whole(tensor), contiguous_strides(shape), 0)])

    def plain(self) -> _View | None:
        """The tensor of A that it is, in its own order; None where it is made of parts."""
        if len(self.parts) != 1 or self.partial:
            return None
        view, strides, _ = self.parts[0]
        return (
            view if (view.sizes, strides) == (self.shape, contiguous_strides(self.shape)) else None
        )


def _by_rules(
    a: Mapping[str, Any], b: Mapping[str, Any], rules: list[Rule], identity: bool
) -> dict[str, _Made]:
    # What a rule makes without a source is not of A. Rows that only overlap are compared like any others.
    used = [
        Rule(rule.src, rule.dst) if rule.rows is not None else rule
        for rule in rules
        if rule.src is not None or rule.pattern is not None
    ]
    targets = infer_destinations(a, used, identity=identity)
    resolved = resolve(
        targets,
        a,
        used,
        identity=identity,
        casting="unsafe",
        allow_unexpected=["*"],
        device=torch.device("cpu"),
    )
    sources = [_in_memory(source) for source in resolved.source_tensors]
    partial = set(resolved.partial)
    made = {
        d.name: _Made(tuple(d.tensor.shape), d.tensor.dtype, [], d.name in partial)
        for d in resolved.destinations
    }
    for w in resolved.writes:
        view = _View(sources[w.src], w.sizes, w.src_strides, w.src_offset)
        made[resolved.destinations[w.dst].name].parts.append((view, w.dst_strides, w.dst_offset))
    return made


def _in_memory(source: Any) -> Any:
    if isinstance(source, Constant):
        return torch.empty((), dtype=source.dtype).fill_(source.value)
    return source


# ---- comparing -----------------------------------------------------------------------------------


@dataclass
class _Difference:
    """What differs between two sets of elements."""

    differing: int = 0
    largest: float | None = None
    nan_differs: int = 0

    def note(self, largest: float | None) -> None:
        if largest is not None:
            self.largest = largest if self.largest is None else max(self.largest, largest)


class _Comparison:
    def __init__(
        self,
        made: Mapping[str, _Made],
        b: Mapping[str, Any],
        atol: float,
        progress: Progress | None,
    ) -> None:
        self.made, self.b, self.atol, self.progress = made, b, atol, progress
        self.total = sum(_bytes(t) for t in b.values())
        self.done = self.limit = 0
        self.reader = _Reader()
        self.known: dict[object, Compared] = {}

    def run(self) -> Iterator[Compared]:
        for name, tensor in self.b.items():
            own = self.made.get(name)
            self.limit = self.done + _bytes(tensor)
            if own is None:
                yield Compared(
                    name,
                    "only in B",
                    b_shape=tuple(tensor.shape),
                    b_dtype=tensor.dtype,
                    nbytes=_bytes(tensor),
                )
            else:
                yield self._pair(name, own, tensor)
            self._advance(_bytes(tensor))
        for name, own in self.made.items():
            if name not in self.b:
                size = prod(own.shape) * own.dtype.itemsize
                yield Compared(name, "only in A", own.shape, None, own.dtype, None, size)

    def _advance(self, size: int) -> None:
        """Note bytes that were looked at. Of one tensor they count once."""
        size = min(size, self.limit - self.done)
        self.done += size
        if self.progress is not None and size:
            self.progress(self.done, self.total)

    def _pair(self, name: str, own: _Made, tensor: Any) -> Compared:
        # Tied tensors are compared once.
        key = (
            tuple((memory_key(v.tensor), v[1:], *at) for v, *at in own.parts),
            memory_key(tensor),
        )
        if key not in self.known:
            self.known[key] = self._compare(name, own, tensor)
        return replace(self.known[key], name=name)

    def _compare(self, name: str, own: _Made, tensor: Any) -> Compared:
        shape = tuple(tensor.shape)
        out = Compared(
            name, "equal", own.shape, shape, own.dtype, tensor.dtype, nbytes=_bytes(tensor)
        )
        if own.shape != shape:
            if prod(own.shape) == prod(shape):
                return replace(out, status="reshaped", note=self._reshaped(own, tensor))
            return replace(out, status="resized", note=self._resized(own, tensor))
        plain = own.plain()
        if plain is not None and memory_key(plain.tensor) == memory_key(tensor):
            if plain == _whole(plain.tensor):
                return out  # the same place in the same file
        pairs = _aligned(own, tensor)
        if own.partial:
            out = replace(out, note="compared in part: the rules leave the rest as it is")
        exact = self._conversions(pairs, self._advance)
        if all(exact):
            if own.dtype == tensor.dtype:
                return out
            return replace(out, status="cast-equal", note="exact both ways")
        if own.dtype != tensor.dtype and any(exact):
            way = "A converted is B" if exact[0] else "B converted is A"
            return replace(out, status="cast-equal", note=way)
        found = self._differences(pairs)
        within = (found.largest or 0.0) <= self.atol and not found.nan_differs
        out = replace(
            out,
            status="close" if self.atol > 0 and within else "changed",
            differing=found.differing,
            largest=found.largest,
            nan_differs=found.nan_differs,
        )
        if out.status == "changed" and plain is not None and len(shape) == 2:
            if shape[0] == shape[1] > 1 and self._same(_permuted(plain, (1, 0)), _whole(tensor)):
                out = replace(out, note="equal when transposed")
        return out

    def _conversions(
        self, pairs: Sequence[tuple[_View, _View]], advance: Callable[[int], None] | None = None
    ) -> tuple[bool, bool]:
        """Whether A converted is B, and B converted is A, bit for bit; any NaN equals any NaN after a conversion."""
        forth = back = True
        for x, y in pairs:
            if x.tensor.dtype.is_complex != y.tensor.dtype.is_complex:
                forth, back = (
                    forth and y.tensor.dtype.is_complex,
                    back and x.tensor.dtype.is_complex,
                )
            for p, q in self.reader.pieces(x, y):
                forth = forth and _same_converted(p, q)
                back = back and (forth if p.dtype == q.dtype else _same_converted(q, p))
                if not forth and not back:
                    return False, False
                if advance is not None:
                    advance(q.numel() * q.element_size())
        return forth, back

    def _same(self, x: _View, y: _View) -> bool:
        return any(self._conversions([(x, y)]))

    def _differences(self, pairs: Sequence[tuple[_View, _View]]) -> _Difference:
        out = _Difference()
        for x, y in pairs:
            for p, q in self.reader.pieces(x, y):
                for k in range(0, p.numel(), BLOCK):
                    _add_differences(out, p[k : k + BLOCK], q[k : k + BLOCK])
                self._advance(q.numel() * q.element_size())
        return out

    def _reshaped(self, own: _Made, tensor: Any) -> str:
        plain = own.plain()
        if plain is None:
            return ""
        if prod(own.shape) == 0:
            return "empty"
        flat_a, flat_b = _flat(plain), _flat(_whole(tensor))
        if flat_a is not None and flat_b is not None and self._same(flat_a, flat_b):
            return "equal when flattened"
        if len(own.shape) == tensor.dim() <= MAX_AXES:
            for axes in permutations(range(tensor.dim())):
                if tuple(own.shape[k] for k in axes) != tuple(tensor.shape):
                    continue
                if self._same(_permuted(plain, axes), _whole(tensor)):
                    how = "transposed" if len(axes) == 2 else f"permuted {axes}"
                    return f"equal when {how}"
        return "other values"

    def _resized(self, own: _Made, tensor: Any) -> str:
        plain = own.plain()
        if plain is None or len(own.shape) != tensor.dim():
            return ""
        sizes = tuple(map(min, zip(own.shape, tensor.shape)))
        if 0 in sizes:
            return ""
        whole = _whole(tensor)
        same = self._same(plain._replace(sizes=sizes), whole._replace(sizes=sizes))
        return f"the common {sizes} is {'equal' if same else 'different'}"


def _same_converted(source: Tensor, other: Tensor) -> bool:
    """Whether `source`, converted to the dtype of `other`, has its bits. Both are flat."""
    if source.dtype == other.dtype:
        return torch.equal(_bits(source), _bits(other))
    converted = source.to(other.dtype)
    differ = _differing(converted, other)
    if not bool(differ.any()):
        return True
    x, y = converted[differ], other[differ]
    return bool((_isnan(x) & _isnan(y)).all())


def _bits(flat: Tensor) -> Tensor:
    return flat.view(torch.int64 if flat.element_size() == 16 else _BITS[flat.element_size()])


def _differing(x: Tensor, y: Tensor) -> Tensor:
    """For each element of two flat tensors of one dtype whether its bits differ."""
    differ = _bits(x) != _bits(y)
    return differ.view(-1, 2).any(1) if x.element_size() == 16 else differ


def _isnan(flat: Tensor) -> Tensor:
    if flat.dtype.is_complex:
        return torch.isnan(flat.to(torch.complex128))
    if not flat.dtype.is_floating_point:
        return torch.zeros(flat.shape, dtype=torch.bool)
    return torch.isnan(flat.to(torch.float64))


def _add_differences(out: _Difference, x: Tensor, y: Tensor) -> None:
    """Count what differs between two flat tensors."""
    if x.dtype == y.dtype:
        differ = _differing(x, y)
        if not bool(differ.any()):
            return
        x, y = x[differ], y[differ]
        out.differing += len(x)
    x_nan, y_nan = _isnan(x), _isnan(y)
    out.nan_differs += int((x_nan != y_nan).sum())
    apart = _apart(x, y)
    numbers = ~(x_nan | y_nan)
    if x.dtype != y.dtype:
        out.differing += int((torch.where(numbers, apart != 0, x_nan != y_nan)).sum())
    if bool(numbers.any()):
        out.note(float(apart[numbers].max()))


def _apart(x: Tensor, y: Tensor) -> Tensor:
    """Absolute differences in float64; of equal infinities 0."""
    if x.dtype == y.dtype and x.dtype in (torch.int64, torch.uint64):
        # A difference of large integers is lost in float64, but not in integers, of one sign.
        i, j = x.view(torch.int64), y.view(torch.int64)
        small = (i - j).abs().to(torch.float64)
        return torch.where((i < 0) == (j < 0), small, _float64(x).sub(_float64(y)).abs())
    p, q = _float64(x), _float64(y)
    return torch.where(p == q, 0.0, (p - q).abs())


def _float64(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.dtype.is_complex else torch.float64)


# ---- views and pieces ----------------------------------------------------------------------------


def _whole(tensor: Any) -> _View:
    return _View(tensor, tuple(tensor.shape), tuple(tensor.stride()), 0)


def _permuted(view: _View, axes: Sequence[int]) -> _View:
    return view._replace(
        sizes=tuple(view.sizes[k] for k in axes), strides=tuple(view.strides[k] for k in axes)
    )


def _flat(view: _View) -> _View | None:
    """A contiguous view with one axis."""
    if not in_a_row(view.sizes, view.strides):
        return None
    return view._replace(sizes=(prod(view.sizes),), strides=(1,))


def _aligned(own: _Made, tensor: Any) -> list[tuple[_View, _View]]:
    """Each part of what is made, beside the part of the tensor that should hold the same."""
    usual, strides = contiguous_strides(own.shape), tuple(tensor.stride())
    if all(n == 1 or u == s for n, u, s in zip(own.shape, usual, strides)):
        return [(v, _View(tensor, v.sizes, steps, at)) for v, steps, at in own.parts]
    # Of another layout: each part's place is worked out axis by axis.
    pairs = []
    for view, steps, at in own.parts:
        begin = _moved(at, usual, strides)
        moved = tuple(_moved(step, usual, strides) for step in steps)
        pairs.append((view, _View(tensor, view.sizes, moved, begin)))
    return pairs


def _moved(place: int, usual: Sequence[int], strides: Sequence[int]) -> int:
    """A place in a contiguous tensor as the place in one of other strides.

    A step of a view is a number of steps along the axes of the tensor, and stays one.
    """
    out = 0
    for unit, stride in zip(usual, strides):
        count, place = divmod(place, unit)
        out += count * stride
    return out


class _Reader:
    """Two views side by side, in flat pieces of bounded size."""

    def __init__(self) -> None:
        self._room: dict[int, Tensor] = {}

    def pieces(self, x: _View, y: _View) -> Iterator[tuple[Tensor, Tensor]]:
        """Flat tensors of the same elements of both, valid until the next ones are asked for."""
        if 0 in x.sizes:
            return
        order = sorted(range(len(x.sizes)), key=lambda k: (-y.strides[k], -x.strides[k]))
        x, y = _permuted(x, order), _permuted(y, order)
        widest = max(x.tensor.element_size(), y.tensor.element_size())
        for starts, sizes in _tiles(x, y, PIECE // widest):
            yield self._read(0, x, starts, sizes), self._read(1, y, starts, sizes)

    def _read(
        self, side: int, view: _View, starts: Sequence[int], sizes: tuple[int, ...]
    ) -> Tensor:
        begin = view.begin + sum(i * s for i, s in zip(starts, view.strides))
        tensor = view.tensor
        if not isinstance(tensor, Lazy):
            tensor = tensor.detach()
            offset = tensor.storage_offset() + begin
            part: Tensor = tensor.as_strided(sizes, view.strides, offset)
            return part.resolve_conj().resolve_neg().reshape(-1)
        size, count = tensor.element_size(), prod(sizes)
        raw = self._memory(side, PIECE)[: count * size]
        if in_a_row(sizes, view.strides):
            tensor.read_into(begin * size, (begin + count) * size, raw)
        else:
            out = raw.view(_BITS[size]).view(sizes)
            gather(tensor, begin, view.strides, out, self._memory(2, SCRATCH))
        return raw.view(tensor.dtype)

    def _memory(self, key: int, size: int) -> Tensor:
        if key not in self._room:
            self._room[key] = torch.empty(size, dtype=torch.uint8)
        return self._room[key]


def _tiles(x: _View, y: _View, most: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Tiles of at most so many elements that cover all indices: (first index, sizes).

    Where both lie in the same order a tile is a run of both. Otherwise it is about as long along every
    axis, so that neither is read in crumbs.
    """
    sizes = list(x.sizes)
    strides = [s for n, s in zip(x.sizes, x.strides) if n > 1]
    alike = all(a >= b for a, b in pairwise(strides))
    while prod(sizes) > most:
        axis = next(k for k, n in enumerate(sizes) if n > 1)
        if not alike:
            axis = max(range(len(sizes)), key=sizes.__getitem__)
        over = -(-prod(sizes) // most) if alike else 2
        sizes[axis] = max(1, sizes[axis] // over) if alike else -(-sizes[axis] // 2)
    steps = [range(0, n, step) for n, step in zip(x.sizes, sizes)]
    for starts in product(*steps):
        yield starts, tuple(min(step, n - i) for n, step, i in zip(x.sizes, sizes, starts))


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())
