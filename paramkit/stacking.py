"""Names that are axes: a bound index that goes into one place of an axis, an axis that becomes many names."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import Finding
from .patterns import parse
from .rules import Rule
from .templates import Bindings, bound_index

__all__ = ["axis_size", "bound_pins", "unknown_size"]


def bound_pins(
    name: str, rule: Rule, bindings: Bindings, lone: Sequence[str]
) -> tuple[tuple[str, int], ...] | Finding:
    """The indices on the axes of placeholders that the source's name alone has, or what is wrong with them.

    >>> bound_pins("x.3.w", Rule("x.{e}.w", "w", "i -> e i"), {"e": "3"}, ["e"])
    (('e', 3),)
    """
    pins = []
    for placeholder in lone:
        number = bound_index(bindings[placeholder])
        if number is None:
            text = f'{{{placeholder}}} = "{bindings[placeholder]}" in {rule}'
            return Finding(name, "rule", text, f"an integer, the index on axis {placeholder}")
        pins.append((placeholder, number))
    return tuple(pins)


def axis_size(axis: str, rule: Rule, shape: Sequence[int]) -> int | None:
    """The size of a source axis, as the rule or the source's shape tells it, or None.

    >>> axis_size("e", Rule("w", "x.{e}.w", "e i -> i"), (4, 2))
    4
    """
    size = dict(rule.axis_sizes).get(axis)
    side = parse(rule.pattern or "->").src
    if size is None and len(shape) == len(side):
        # Alone in its dimension, the axis has the dimension's size.
        return next((n for n, group in zip(shape, side, strict=True) if group == (axis,)), None)
    return size


def unknown_size(name: str, shape: Sequence[int], axis: str, rule: Rule) -> Finding:
    """That the size of an axis is not told."""
    text = f"{tuple(shape)}: the size of axis {axis} in {rule} cannot be worked out"
    return Finding(name, "shape", text, "", f"give it in the rule: {axis}=...")
