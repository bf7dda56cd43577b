"""Axis patterns: `h e -> (s h) e` compiled to strided views of both sides.

Pure integer arithmetic, no tensors. A pattern names the axes of a source and of a destination, as
in einops. Each side is split into its elementary axes (a split of a strided dimension is always a
view), the source is permuted to the destination's order, and axes that one side alone has are
pinned to an index, paired with a range, or repeated. Nothing is ever merged, so nothing is ever copied.

Example:
    >>> sizes, dst, src, _ = compile("i o -> o i", (), {}, (2, 3), (3, 1), (3, 2), (2, 1))
    >>> sizes, dst.strides, src.strides
    ((3, 2), (2, 1), (1, 3))
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

__all__ = [
    "At",
    "Mismatch",
    "Pattern",
    "View",
    "Views",
    "compile",
    "compile_side",
    "infer",
    "parse",
    "parse_at",
    "reversed_text",
]

Shape = Sequence[int]


class View(NamedTuple):
    """A strided view of one tensor: sizes, strides and offset in elements."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class Views(NamedTuple):
    """Two views side by side.

    Attributes:
        sizes: of both views.
        dst, src: the views; a repeated axis has stride 0 in the source.
        same: (size, stride) of source axes whose indices must all hold what index 0 holds.
    """

    sizes: tuple[int, ...]
    dst: View
    src: View
    same: tuple[tuple[int, int], ...] = ()


class Mismatch(Exception):
    """A pattern that does not fit two shapes. Carries the parts of a finding.

    Args:
        got: what does not fit.
        expected: what would fit.
        hint: what to do.
    """

    def __init__(self, got: str, expected: str = "", hint: str = "") -> None:
        super().__init__(got)
        self.got, self.expected, self.hint = got, expected, hint


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern.

    Attributes:
        text: as it was written, spaces normalised.
        src: for each source dimension the names of its axes, outermost first; `1` has none.
        dst: the same for the destination.
    """

    text: str
    src: tuple[tuple[str, ...], ...]
    dst: tuple[tuple[str, ...], ...]

    @property
    def src_axes(self) -> tuple[str, ...]:
        """The source's elementary axes in order."""
        return tuple(axis for group in self.src for axis in group)

    @property
    def dst_axes(self) -> tuple[str, ...]:
        """The destination's elementary axes in order."""
        return tuple(axis for group in self.dst for axis in group)

    @property
    def one_sided(self) -> frozenset[str]:
        """Axes that one side alone has."""
        return frozenset(self.src_axes) ^ frozenset(self.dst_axes)


# ---- parsing -------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\s*(->|\(|\)|[A-Za-z_][A-Za-z0-9_]*|[0-9]+|\S)")


@lru_cache(maxsize=4096)
def parse(text: str) -> Pattern:
    """Parse a pattern.

    Args:
        text: two sides separated by `->`; a side is axis names, groups of names `(s h)` and `1`.

    Raises:
        ValueError: naming what cannot be read and where.

    Example:
        >>> parse("h e -> (s h) e").dst
        (('s', 'h'), ('e',))
    """
    sides: list[list[tuple[str, ...]]] = [[]]
    group: list[str] | None = None
    for match in _TOKEN.finditer(text):
        token = match.group(1)
        if token == "->":
            if group is not None or len(sides) == 2:
                raise ValueError(
                    f'pattern "{text}": "->" out of place at position {match.start(1)}'
                )
            sides.append([])
        elif token == "(":
            if group is not None:
                raise ValueError(f'pattern "{text}": a group within a group; write the axes flat')
            group = []
        elif token == ")":
            if group is None:
                raise ValueError(f'pattern "{text}": ")" without "("')
            sides[-1].append(tuple(group))
            group = None
        elif token.isidentifier() and token.isascii():
            if group is None:
                sides[-1].append((token,))
            else:
                group.append(token)
        elif token == "1":
            if group is None:
                sides[-1].append(())
        else:
            raise ValueError(
                f'pattern "{text}": cannot read "{token}" at position {match.start(1)}; '
                'use axis names, groups such as "(s h)", "1" and one "->"'
            )
    if group is not None:
        raise ValueError(f'pattern "{text}": "(" without ")"')
    if len(sides) != 2:
        raise ValueError(
            f'pattern "{text}": no "->" between the source axes and the destination axes'
        )
    for side, label in zip(sides, ("source", "destination"), strict=True):
        axes = [axis for axes in side for axis in axes]
        twice = sorted({axis for axis in axes if axes.count(axis) > 1})
        if twice:
            raise ValueError(f'pattern "{text}": axis {twice[0]} stands twice on the {label} side')
    src, dst = (tuple(side) for side in sides)
    return Pattern(_text(src) + " -> " + _text(dst), src, dst)


def _text(side: tuple[tuple[str, ...], ...]) -> str:
    return " ".join(g[0] if len(g) == 1 else f"({' '.join(g)})" if g else "1" for g in side)


class Sum(NamedTuple):
    """A parsed index expression: a sum of signed products of integers and axis names."""

    terms: tuple[tuple[int, tuple[str, ...]], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The axes whose sizes the expression needs."""
        return tuple(name for _, names in self.terms for name in names)

    def value(self, sizes: Mapping[str, int]) -> int | None:
        """The value, or None while a size is unknown."""
        if any(name not in sizes for name in self.names):
            return None
        return sum(factor * prod(sizes[name] for name in names) for factor, names in self.terms)


class At(NamedTuple):
    """A parsed `at` entry: an index (`stop` unused, `is_range` False), a range, or `*`, every index."""

    text: str
    is_range: bool
    start: Sum | None
    stop: Sum | None
    is_every: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The axes whose sizes the entry needs."""
        return tuple(name for part in (self.start, self.stop) if part for name in part.names)


@lru_cache(maxsize=4096)
def parse_at(text: str) -> At:
    """Parse an `at` value: an index such as `2`, `-1`, `r`, `r+1`, a range `0:r`, `4:`, `:-2`, or `*`.

    Raises:
        ValueError: naming what cannot be read.

    Example:
        >>> parse_at("r+1").start.value({"r": 4})
        5
    """
    if len(text) > 200:
        raise ValueError(f'at "{text[:40]}...": {len(text)} characters, expected at most 200')
    if text.strip() == "*":
        return At("*", False, None, None, True)
    parts = text.split(":")
    if len(parts) > 2:
        raise ValueError(f'at "{text}": a range is "start:stop", without a step')
    sums = [_parse_sum(part, text) if part.strip() else None for part in parts]
    if len(parts) == 1:
        if sums[0] is None:
            raise ValueError(
                'at "": expected an index such as 0, "r", "r+1", a range such as "0:r", or "*"'
            )
        return At(text.strip(), False, sums[0], None)
    return At(text.replace(" ", ""), True, sums[0], sums[1])


def _parse_sum(part: str, text: str) -> Sum:
    terms: list[tuple[int, tuple[str, ...]]] = []
    for sign, body in re.findall(r"([+-]?)([^+-]*)", part.replace(" ", "")):
        if not sign and not body:
            continue
        factor, names = (-1 if sign == "-" else 1), []
        for atom in body.split("*"):
            if atom.isascii() and atom.isdigit() and len(atom) < 19:
                factor *= int(atom)
            elif atom.isascii() and atom.isidentifier():
                names.append(atom)
            else:
                raise ValueError(
                    f'at "{text}": cannot read "{body}"; an index is a sum of integers and axis names '
                    'such as 2, "r", "r+1"'
                )
        terms.append((factor, tuple(names)))
    return Sum(tuple(terms))


# ---- compiling -----------------------------------------------------------------------------------


def compile(
    pattern: str | Pattern,
    at: Mapping[str, int | str] | Iterable[tuple[str, int | str]],
    axis_sizes: Mapping[str, int],
    src_shape: Shape,
    src_strides: Shape,
    dst_shape: Shape,
    dst_strides: Shape,
) -> Views:
    """Views of a source and a destination that a pattern puts side by side.

    Args:
        pattern: text or a parsed pattern.
        at: axis -> index or range, for axes that one side alone has.
        axis_sizes: sizes that the shapes alone do not tell.
        src_shape: the source's shape, with `src_strides` in elements.
        dst_shape: the destination's shape, with `dst_strides` in elements.

    Returns:
        One size for each elementary axis that takes part, in the destination's order; both views of those
        sizes; and the source axes at `*`, which must hold the same values at every index.

    Raises:
        Mismatch: the pattern does not fit the shapes; names the axis.
        ValueError: the pattern or `at` cannot be read, or `at` pins an axis of both sides.

    Example:
        >>> compile("h e -> (s h) e", {"s": 1}, {}, (2, 5), (5, 1), (6, 5), (5, 1))[1]
        View(sizes=(2, 5), strides=(5, 1), offset=10)
    """
    parsed = parse(pattern) if isinstance(pattern, str) else pattern
    pins = {axis: parse_at(str(value)) for axis, value in dict(at).items()}
    for axis in pins:
        if axis not in parsed.one_sided:
            raise ValueError(
                f'pattern "{parsed.text}": at pins {axis}, which is not an axis of one side alone'
            )
    for shape, side, label in (
        (src_shape, parsed.src, "source"),
        (dst_shape, parsed.dst, "destination"),
    ):
        if len(shape) != len(side):
            raise Mismatch(
                f"{label} {tuple(shape)} with {_axes(len(shape))}",
                f'{_axes(len(side))}, as in "{_text(side)}"',
            )
    return _Compiler(parsed, pins, axis_sizes, tuple(src_shape), tuple(dst_shape)).views(
        tuple(src_strides), tuple(dst_strides)
    )


def compile_side(
    pattern: str | Pattern,
    at: Mapping[str, int | str] | Iterable[tuple[str, int | str]],
    axis_sizes: Mapping[str, int],
    shape: Shape,
    strides: Shape,
) -> View:
    """The view of one tensor that a pattern with one side, such as `"-> (s h)"`, and its pins select.

    Args:
        pattern: one of its sides has no axes.
        at: axis -> index or range; an axis without one is taken whole.
        axis_sizes: sizes that the shape alone does not tell.
        shape: the tensor's shape, with `strides` in elements.

    Raises:
        Mismatch: the pattern does not fit the shape.

    >>> compile_side("-> (s h)", {"s": 1}, {"s": 3}, (12,), (1,))
    View(sizes=(4,), strides=(1,), offset=4)
    """
    parsed = parse(pattern) if isinstance(pattern, str) else pattern
    side = parsed.src or parsed.dst
    if len(shape) != len(side):
        raise Mismatch(
            f"{tuple(shape)} with {_axes(len(shape))}", f'{_axes(len(side))}, as in "{_text(side)}"'
        )
    pins = {axis: parse_at(str(value)) for axis, value in dict(at).items()}
    whole = Pattern(parsed.text, (), side)
    return _Compiler(whole, pins, axis_sizes, (), tuple(shape), alone=True).views(
        (), tuple(strides)
    )[1]


def infer(
    pattern: str | Pattern,
    at: Mapping[str, int | str] | Iterable[tuple[str, int | str]],
    axis_sizes: Mapping[str, int],
    src_shape: Shape,
) -> tuple[dict[str, int], dict[str, int]]:
    """What a source tells of the destination's axes, where there is no destination yet.

    Args:
        pattern, at, axis_sizes, src_shape: as for `compile`.

    Returns:
        (sizes of the destination axes that are known, the least sizes of the others: behind the index or
        range that the source fills).

    Raises:
        Mismatch: the source does not fit, or an axis cannot be worked out.

    >>> infer("h e -> (s h) e", {"s": 1}, {}, (2, 5))
    ({'h': 2, 'e': 5}, {'s': 2})
    """
    parsed = parse(pattern) if isinstance(pattern, str) else pattern
    if len(src_shape) != len(parsed.src):
        raise Mismatch(
            f"source {tuple(src_shape)} with {_axes(len(src_shape))}",
            f'{_axes(len(parsed.src))}, as in "{_text(parsed.src)}"',
        )
    pins = {axis: parse_at(str(value)) for axis, value in dict(at).items()}
    return _Inference(parsed, pins, axis_sizes, tuple(src_shape)).result()


def reversed_text(text: str) -> str:
    """The pattern of the way back.

    >>> reversed_text("h e -> (s h) e")
    '(s h) e -> h e'
    """
    pattern = parse(text)
    return f"{_text(pattern.dst)} -> {_text(pattern.src)}".strip()


def _axes(count: int) -> str:
    return f"{count} axis" if count == 1 else f"{count} axes"


class _Compiler:
    """One compilation: solves sizes to a fixed point, then lays out both views."""

    def __init__(
        self,
        pattern: Pattern,
        pins: Mapping[str, At],
        axis_sizes: Mapping[str, int],
        src_shape: tuple[int, ...],
        dst_shape: tuple[int, ...],
        alone: bool = False,
    ) -> None:
        self.pattern, self.pins = pattern, pins
        self.src_shape, self.dst_shape = src_shape, dst_shape
        self.alone = alone  # there is no other side: axes and ranges need no partner
        self.sizes: dict[str, int] = dict(axis_sizes)
        # Ranges and the one-sided axis on the other side that each is paired with.
        self.partner = self._pair()
        self._solve()

    def _pair(self) -> dict[str, str | None]:
        src, dst = self.pattern.src_axes, self.pattern.dst_axes
        free = {
            "src": [a for a in src if a not in dst and a not in self.pins],
            "dst": [a for a in dst if a not in src and a not in self.pins],
        }
        partner: dict[str, str | None] = {}
        ranges = [axis for axis, pin in self.pins.items() if pin.is_range]
        # Ranges that name their partner choose first; a lone axis is then left for the others.
        for axis in sorted(ranges, key=lambda a: not self.pins[a].names):
            others = free["src" if axis in dst else "dst"]
            named = [name for name in self.pins[axis].names if name in others]
            choice = named if len(named) == 1 else others
            if len(choice) > 1:
                raise Mismatch(
                    f'at {axis}="{self.pins[axis].text}" could be paired with any of {", ".join(choice)}',
                    "one axis of the other side",
                    f'name it in the range, such as {axis}="0:{choice[0]}"',
                )
            partner[axis] = choice[0] if choice else None
            if choice:
                others.remove(choice[0])
        return partner

    # -- sizes --

    def _solve(self) -> None:
        progress = True
        while progress:
            progress = False
            for shape, side in (
                (self.src_shape, self.pattern.src),
                (self.dst_shape, self.pattern.dst),
            ):
                for size, group in zip(shape, side, strict=True):
                    progress |= self._solve_group(size, group)
            for axis, other in self.partner.items():
                length = self._range(axis)
                if other is not None and length is not None and other not in self.sizes:
                    self.sizes[other] = length[1] - length[0]
                    progress = True
        self._check()

    def _solve_group(self, size: int, group: tuple[str, ...]) -> bool:
        unknown = [axis for axis in group if axis not in self.sizes]
        known = prod(self.sizes[axis] for axis in group if axis in self.sizes)
        if len(unknown) != 1 or (known == 0 and size == 0):
            return False
        if known == 0 or size % known:
            raise Mismatch(
                f"size {size} for {_text((group,))}",
                f"a multiple of {self._sizes_text(a for a in group if a in self.sizes)}",
                f"axis {unknown[0]} would not be a whole number",
            )
        self.sizes[unknown[0]] = size // known
        return True

    def _check(self) -> None:
        both = (
            ("source", self.src_shape, self.pattern.src),
            ("destination", self.dst_shape, self.pattern.dst),
        )
        for label, shape, side in both:
            for dim, (size, group) in enumerate(zip(shape, side, strict=True)):
                unknown = [axis for axis in group if axis not in self.sizes]
                if unknown:
                    raise Mismatch(
                        f"{label} {shape}: the size of axis {unknown[0]} cannot be worked out",
                        "",
                        "give it in the rule: " + ", ".join(f"{axis}=..." for axis in unknown),
                    )
                if prod(self.sizes[axis] for axis in group) != size:
                    raise Mismatch(
                        f"{label} {shape} with {size} on dimension {dim}, {_text((group,))}",
                        f"{self._sizes_text(group) or 1} from the other side and the rule"
                        if group
                        else "1",
                    )
        for axis, other in self.partner.items():
            start, stop = self._bounds(axis)
            if other is not None and self.sizes[other] != stop - start:
                raise Mismatch(
                    f'axis {other} of size {self.sizes[other]} for at {axis}="{self.pins[axis].text}"',
                    f"{stop - start}",
                )
            if other is None and stop - start != 1 and not self.alone:
                raise Mismatch(
                    f'at {axis}="{self.pins[axis].text}" selects {stop - start} of {self.sizes[axis]}',
                    "an axis of that size that the other side alone has, or one index",
                )
        paired = {*self.partner.values()}
        for axis in (*self.pattern.src_axes, *self.pattern.dst_axes):
            lone = axis in self.pattern.one_sided and axis not in self.pins and axis not in paired
            if lone and self.sizes[axis] != 1 and not self.alone:
                label = "source" if axis in self.pattern.src_axes else "destination"
                raise Mismatch(
                    f"axis {axis} of size {self.sizes[axis]} on the {label} side alone",
                    "size 1, or an index",
                    f'say which one with at={{"{axis}": ...}}, or at={{"{axis}": "*"}} for all of them',
                )

    def _sizes_text(self, axes: Iterable[str]) -> str:
        return " * ".join(f"{axis}={self.sizes[axis]}" for axis in axes)

    def _range(self, axis: str) -> tuple[int, int] | None:
        """Start and stop of a range, or None while a size is unknown; not yet checked."""
        pin = self.pins[axis]
        size = self.sizes.get(axis)
        start = 0 if pin.start is None else pin.start.value(self.sizes)
        stop = size if pin.stop is None else pin.stop.value(self.sizes)
        if start is None or stop is None or (size is None and (start < 0 or stop < 0)):
            return None
        return (
            start + size if start < 0 and size is not None else start,
            stop + size if stop < 0 and size is not None else stop,
        )

    def _bounds(self, axis: str) -> tuple[int, int]:
        pin, size = self.pins[axis], self.sizes[axis]
        found = self._range(axis)
        if found is None:
            unknown = [name for name in pin.names if name not in self.sizes]
            raise Mismatch(
                f'at {axis}="{pin.text}" needs the size of {", ".join(unknown)}',
                "",
                "give it in the rule: " + ", ".join(f"{name}=..." for name in unknown),
            )
        if not 0 <= found[0] <= found[1] <= size:
            raise Mismatch(
                f'at {axis}="{pin.text}", which is {found[0]}:{found[1]}',
                f"a range within 0:{size}",
            )
        return found

    def _index(self, axis: str) -> int:
        pin, size = self.pins[axis], self.sizes[axis]
        assert pin.start is not None
        index = pin.start.value(self.sizes)
        if index is None:
            unknown = [name for name in pin.start.names if name not in self.sizes]
            raise Mismatch(
                f'at {axis}="{pin.text}" needs the size of {", ".join(unknown)}',
                "",
                "give it in the rule: " + ", ".join(f"{name}=..." for name in unknown),
            )
        if not -size <= index < size:
            raise Mismatch(f"index {index} for axis {axis}", f"an index of an axis of size {size}")
        return index + size if index < 0 else index

    # -- views --

    def views(self, src_strides: tuple[int, ...], dst_strides: tuple[int, ...]) -> Views:
        """The two views, axes in the destination's order."""
        src_steps = self._steps(src_strides, self.src_shape, self.pattern.src)
        dst_steps = self._steps(dst_strides, self.dst_shape, self.pattern.dst)
        src_of = {d: s for d, s in self.partner.items() if s is not None and d in dst_steps}
        src_of |= {d: s for s, d in self.partner.items() if d is not None and s in src_steps}
        sizes, dst_out, src_out = [], [], []
        offsets = {"src": 0, "dst": 0}
        for axis in self.pattern.dst_axes:
            other = axis if axis in src_steps else src_of.get(axis)
            pin = self.pins.get(axis)
            if other is None:
                if (pin is not None and pin.is_every) or (self.alone and pin is None):
                    sizes.append(self.sizes[axis])
                elif self.alone and pin is not None and pin.is_range:
                    start, stop = self._bounds(axis)
                    sizes.append(stop - start)
                else:
                    continue
                dst_out.append(dst_steps[axis])
                src_out.append(0)
                continue
            # Of a pair, the range is the longer axis and the partner has the length that is copied.
            ranged = axis in self.partner
            sizes.append(self.sizes[other if ranged else axis])
            dst_out.append(dst_steps[axis])
            src_out.append(src_steps[other])
        same = []
        for side, steps in (("src", src_steps), ("dst", dst_steps)):
            for axis, pin in self.pins.items():
                if axis not in steps:
                    continue
                if pin.is_every:
                    if side == "src" and self.sizes[axis] > 1:
                        same.append((self.sizes[axis], steps[axis]))
                    continue
                start = self._bounds(axis)[0] if pin.is_range else self._index(axis)
                offsets[side] += start * steps[axis]
        final = tuple(sizes)
        return Views(
            final,
            View(final, tuple(dst_out), offsets["dst"]),
            View(final, tuple(src_out), offsets["src"]),
            tuple(same),
        )

    def _steps(
        self, strides: tuple[int, ...], shape: tuple[int, ...], side: tuple[tuple[str, ...], ...]
    ) -> dict[str, int]:
        """The stride of each elementary axis: splitting a strided dimension is always a view."""
        steps: dict[str, int] = {}
        for stride, group in zip(strides, side, strict=True):
            step = stride
            for axis in reversed(group):
                steps[axis] = step
                step *= self.sizes[axis]
        return steps


class _Inference(_Compiler):
    """A compilation without a destination: what the source side alone tells."""

    def __init__(
        self,
        pattern: Pattern,
        pins: Mapping[str, At],
        axis_sizes: Mapping[str, int],
        src_shape: tuple[int, ...],
    ) -> None:
        self.pattern, self.pins = pattern, pins
        self.src_shape, self.dst_shape, self.alone = src_shape, (), False
        self.sizes = dict(axis_sizes)
        self.partner = self._pair()
        progress = True
        while progress:
            progress = False
            for size, group in zip(src_shape, pattern.src, strict=True):
                progress |= self._solve_group(size, group)
            for axis, other in self.partner.items():
                length = self._range(axis) if axis in pattern.src_axes else None
                if other is not None and length is not None and other not in self.sizes:
                    self.sizes[other] = length[1] - length[0]
                    progress = True

    def result(self) -> tuple[dict[str, int], dict[str, int]]:
        least: dict[str, int] = {}
        for axis in self.pattern.dst_axes:
            if axis in self.sizes:
                continue
            pin = self.pins.get(axis)
            end = None
            if pin is None:
                end = None if axis in self.pattern.src_axes else 1
            elif pin.is_range:
                other = self.partner.get(axis)
                start = 0 if pin.start is None else pin.start.value(self.sizes)
                if pin.stop is not None:
                    end = pin.stop.value(self.sizes)
                elif start is not None and other in self.sizes:
                    end = start + self.sizes[other]
            elif pin.start is not None:
                index = pin.start.value(self.sizes)
                end = None if index is None else index + 1
            if end is None or end <= 0:
                raise Mismatch(
                    f"the size of axis {axis} cannot be worked out from a source {self.src_shape}",
                    "",
                    f"give it in the rule: {axis}=...",
                )
            least[axis] = end
        return {a: self.sizes[a] for a in self.pattern.dst_axes if a in self.sizes}, least
