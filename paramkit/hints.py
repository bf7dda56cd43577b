"""What to say beside a problem: the name or the pattern that was probably meant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, permutations
from math import prod

from .errors import Numbers, Suggester, split_numbers
from .templates import Template

__all__ = ["Counterparts", "did_you_mean", "joined", "nearest_template", "pattern_guess"]

Shape = tuple[int, ...]
Groups = dict[Numbers, list[list[str]]]


def did_you_mean(name: str | None) -> str:
    return "" if name is None else f"did you mean {name}?"


def joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def nearest_template(template: str, near: Suggester) -> str | None:
    """A near miss of a template: with `{i}` as layer 0, and without the wildcards."""
    plain = Template(template, wildcards=True)
    probe = plain.format(dict.fromkeys(plain.placeholders, "0")).replace("*", "").strip(".")
    return near(probe) if probe else None


def pattern_guess(src: Shape, dst: Shape) -> str:
    """What a pattern could do about two different shapes."""
    if len(src) == len(dst) == 2 and src == dst[::-1]:
        return 'did you mean "i o -> o i"?'
    if len(src) == len(dst) <= 4 and sorted(src) == sorted(dst):
        names = "abcd"[: len(src)]
        for order in permutations(range(len(src))):
            if tuple(src[k] for k in order) == dst:
                return f'did you mean "{" ".join(names)} -> {" ".join(names[k] for k in order)}"?'
    if prod(src) == prod(dst):
        return "as many elements: an axis pattern may fit"
    if len(src) == len(dst):
        different = [k for k in range(len(src)) if src[k] != dst[k]]
        if len(different) == 1 and src[different[0]] and dst[different[0]]:
            k = different[0]
            axes = list("abcd"[: len(src)]) if len(src) <= 4 else []
            fused = " ".join(f"(s {a})" if j == k else a for j, a in enumerate(axes))
            plain = " ".join(axes)
            if axes and dst[k] % src[k] == 0:
                return f'to fuse {dst[k] // src[k]} of them: "{plain} -> {fused}", at={{"s": ...}}'
            if axes and src[k] % dst[k] == 0:
                return (
                    f'to take one part of {src[k] // dst[k]}: "{fused} -> {plain}", at={{"s": ...}}'
                )
            if k == 0:
                return 'other rows: rows="overlap" copies those that both have'
    return ""


class Counterparts:
    """For a tensor without a partner, those of the other side that would fit it: by name, by shape, as
    parts of it, or as something that it is a part of.

    Args:
        idle: name -> shape of the other side's tensors that have no partner either.
        mine: name -> shape of this side's, all without a partner.

    Example:
        >>> idle = {f"h.0.{k}.weight": (2, 4) for k in ("query", "key", "value")}
        >>> Counterparts(idle, {"h.0.qkv.weight": (6, 4)}).hint("h.0.qkv.weight")
        'fused from h.0.query.weight, h.0.key.weight, h.0.value.weight?'
    """

    _MOST = 20_000  # names looked at for shapes, and
    _HINTS = 2_000  # names that get a hint by shape: more are no longer read
    _BESIDE = 8  # names of one module among which parts are looked for

    def __init__(self, idle: Mapping[str, Shape], mine: Mapping[str, Shape]) -> None:
        self._idle, self._mine = idle, mine
        self._near = Suggester(idle)
        self._left = self._HINTS
        self._ready = False
        self._fusable: Groups = {}
        self._own_groups: Groups = {}
        self._by_numbers: dict[Numbers, list[str]] = {}
        self._by_shapes: dict[tuple[Numbers, Shape], list[str]] = {}

    def hint(self, name: str) -> str:
        """The hint, "" where nothing fits."""
        shape = self._mine[name]
        near = self._near(name)
        if near is not None and self._idle[near] == shape:
            return did_you_mean(near)
        self._left -= 1
        found = self._by_shape(name, shape) if self._left >= 0 else ""
        if found or near is None:
            return found
        return joined(did_you_mean(near), pattern_guess(self._idle[near], shape))

    def _by_shape(self, name: str, shape: Shape) -> str:
        self._prepare()
        numbers = split_numbers(name)[1]
        for names in self._fusable.get(numbers, ()):
            if self._adds_up(shape, names, self._idle):
                return f"fused from {', '.join(names)}?"
        same_layer = self._by_numbers.get(numbers, [])
        for names in self._own_groups.get(numbers, ()):
            if name in names:
                for whole in same_layer:
                    if self._adds_up(self._idle[whole], names, self._mine):
                        return f"a part of {whole}?"
        for wanted, text in ((shape, "of the same shape"), (shape[::-1], "transposed")):
            found = self._by_shapes.get((numbers, wanted), [])
            if len(found) == 1:
                return f"did you mean {found[0]}, {text}?"
        return ""

    @staticmethod
    def _adds_up(whole: Shape, names: Iterable[str], shapes: Mapping[str, Shape]) -> bool:
        parts = [shapes[n] for n in names]
        return (
            len(whole) > 0
            and all(len(p) == len(whole) and p[1:] == whole[1:] for p in parts)
            and sum(p[0] for p in parts) == whole[0]
        )

    def _prepare(self) -> None:
        if self._ready:
            return
        self._ready = True
        self._fusable = self._siblings(self._idle)
        self._own_groups = self._siblings(self._mine)
        for name in islice(self._idle, self._MOST):
            numbers = split_numbers(name)[1]
            self._by_numbers.setdefault(numbers, []).append(name)
            self._by_shapes.setdefault((numbers, self._idle[name]), []).append(name)

    def _siblings(self, shapes: Mapping[str, Shape]) -> Groups:
        """Names equal but for one component that is no number: q_proj, k_proj and v_proj of one layer."""
        groups: dict[tuple[Numbers, str, str], list[str]] = {}
        for name in islice(shapes, self._MOST):
            parts = name.split(".")
            numbers = split_numbers(name)[1]
            for k, part in enumerate(parts):
                if not part.isdigit():
                    key = (numbers, ".".join(parts[:k]), ".".join(parts[k + 1 :]))
                    groups.setdefault(key, []).append(name)
        out: Groups = {}
        for (numbers, *_), names in groups.items():
            if 2 <= len(names) <= self._BESIDE:
                out.setdefault(numbers, []).extend(_runs(names))
        return out


def _runs(names: list[str]) -> Iterator[list[str]]:
    """Two to four names that follow each other, more before fewer: others may stand beside them."""
    for size in range(min(4, len(names)), 1, -1):
        for first in range(len(names) - size + 1):
            yield names[first : first + size]
