"""Rules: which source names go to which destination names, and how their axes correspond."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .fills import Fill
from .patterns import parse, parse_at, reversed_text
from .templates import Template, one_sided
from .typing import Filling

__all__ = ["Rule", "invert", "rule_list"]


@dataclass(frozen=True, init=False, repr=False)
class Rule:
    """One correspondence between source names and destination names.

    ==================================================== ======================================================
    form                                                 meaning
    ==================================================== ======================================================
    `Rule(src, dst)`                                     copy, shapes equal
    `Rule(src, dst, pattern, at=..., **axis_sizes)`      copy, axes as the pattern says
    `Rule(src, dst, rows="overlap", fill=...)`           copy the first rows that both have
    `Rule(src, None)`                                    drop a source on purpose
    `Rule(src, None, pattern, at=...)`                   drop a part of it
    `Rule(None, dst)`                                    keep a destination as it is, on purpose
    `Rule(None, dst, pattern, at=...)`                   keep a part of it
    `Rule(None, dst, fill=value)`, also with a pattern   fill a destination, or a part of it
    ==================================================== ======================================================

    In names `{i}` binds any run of characters without a dot, `{*p}` one or more whole components.
    Where one side is None, `*` in the other stands for any run of characters, dots included.

    Args:
        src: source name template, or None.
        dst: destination name template, or None.
        pattern: axis pattern such as `"i o -> o i"`, source axes first; None where the shapes are
            equal. Compiled to views of both sides, never to a copy. With one side None that side has
            no axes: `"(s h) ->"`, `"-> (s h)"`.
        at: for axes that one side alone has: the index (an int, or text such as `"r+1"` in which an
            axis name stands for its size), a range (`"0:r"` or a slice) that is paired with an axis of
            the other side, or `"*"`: every index of the destination gets the same values, or every
            index of the source holds them (compared before anything is written).
        rows: `"overlap"`: the first dimensions may differ; the rows that both have are copied, further
            rows of the source are dropped on purpose, those of the destination are kept on purpose, or
            filled.
        fill: for rows beyond the source's, and for rules without a source: a number, `"zeros"`,
            `{"normal": std, "mean": m, "seed": s}` (mean 0 and seed 0 by default), and for rows also
            `"mean"`, the mean of the source's rows.
        axis_sizes: sizes of axes that the shapes alone do not tell.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a template or pattern that cannot be read; a placeholder on one side only that is
            not an axis of the pattern; `at` or a size for an axis that the pattern does not have.

    Example:
        >>> Rule("enc.{i}.query.weight", "layers.{i}.in_proj_weight", "h e -> (s h) e", at={"s": 0})
        Rule('enc.{i}.query.weight', 'layers.{i}.in_proj_weight', 'h e -> (s h) e', at={'s': 0})
        >>> Rule("pooler.*", None)
        Rule('pooler.*', None)
        >>> Rule("tok.weight", "tok.weight", rows="overlap", fill="mean")
        Rule('tok.weight', 'tok.weight', rows='overlap', fill='mean')
    """

    src: str | None
    dst: str | None
    pattern: str | None
    at: tuple[tuple[str, int | str], ...]
    rows: Literal["overlap"] | None
    fill: Fill | None
    axis_sizes: tuple[tuple[str, int], ...]

    def __init__(
        self,
        src: str | None,
        dst: str | None,
        pattern: str | None = None,
        *,
        at: Mapping[str, int | str | slice] | None = None,
        rows: Literal["overlap"] | None = None,
        fill: Filling | None = None,
        **axis_sizes: int,
    ) -> None:
        for label, value in (("src", src), ("dst", dst)):
            if not isinstance(value, (str, type(None))):
                raise TypeError(f"Rule: {label} must be a name or None, got {type(value).__name__}")
        if not (pattern is None or isinstance(pattern, str)):
            raise TypeError(f"Rule: pattern must be text, got {type(pattern).__name__}")
        if not (at is None or isinstance(at, Mapping)):
            raise TypeError(
                f'Rule: at must be a mapping such as {{"s": 0}}, got {type(at).__name__}'
            )
        if rows not in (None, "overlap"):
            raise ValueError(f'Rule: rows must be "overlap" or None, got {rows!r}')
        pins = tuple((axis, _pin(axis, value)) for axis, value in (at or {}).items())
        object.__setattr__(self, "src", src)
        object.__setattr__(self, "dst", dst)
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "at", pins)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "fill", None if fill is None else Fill.read(fill))
        object.__setattr__(self, "axis_sizes", tuple(axis_sizes.items()))
        self._validate()

    @property
    def one_sided(self) -> bool:
        """Whether the rule names a source or a destination alone."""
        return self.src is None or self.dst is None

    def source_template(self) -> Template | None:
        """The source names, as a template that matches them; never raises.

        Returns:
            None for a rule without a source.
        """
        return None if self.src is None else Template(self.src, wildcards=self.one_sided)

    def target_template(self) -> Template | None:
        """The destination names, as a template that matches them; never raises.

        Returns:
            None for a rule without a destination.
        """
        return None if self.dst is None else Template(self.dst, wildcards=self.one_sided)

    def _validate(self) -> None:
        source, target = self.source_template(), self.target_template()
        for axis, size in self.axis_sizes:
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(
                    f"{self}: axis size {axis} must be an int, got {type(size).__name__} {size!r}"
                )
            if size < 0:
                raise ValueError(f"{self}: axis size {axis} must not be negative, got {size}")
        if source is None and target is None:
            raise ValueError("Rule: src and dst are both None; name at least one of them")
        if self.pattern is None and (self.at or self.axis_sizes):
            raise ValueError(f"{self}: at and axis sizes need an axis pattern to refer to")
        self._validate_rows_and_fill()
        if self.one_sided:
            self._validate_alone()
            return
        assert source is not None and target is not None
        for text in (source.text, target.text):
            if "*" in text.replace("{*", "{"):
                raise ValueError(
                    f'{self}: "*" stands only in rules with one side None and in allow-lists; '
                    "use placeholders such as {i} for a part between dots, {*p} for several"
                )
        if self.pattern is None:
            lone = [*one_sided(source, target), *one_sided(target, source)]
            if lone:
                raise ValueError(f"{self}: {_braced(lone)} on one side only, and no axis pattern")
            both = [p for p in source.placeholders if (p in source.spans) != (p in target.spans)]
            if both:
                raise ValueError(f"{self}: write {_braced(both)} the same way on both sides")
            return
        self._validate_pattern(source, target)

    def _validate_rows_and_fill(self) -> None:
        if self.rows is not None and (self.pattern is not None or self.one_sided):
            raise ValueError(f"{self}: rows is for a source and a destination without a pattern")
        if self.fill is None:
            return
        if self.src is not None and self.rows is None:
            raise ValueError(f'{self}: fill is for rows="overlap", and for rules without a source')
        if self.fill.kind == "mean" and self.rows is None:
            raise ValueError(
                f'{self}: fill="mean" is the mean of the source\'s rows; it needs rows'
            )

    def _validate_alone(self) -> None:
        if self.pattern is None:
            return
        pattern = parse(self.pattern)
        if self.src is None and pattern.src:
            raise ValueError(f'{self}: without a source the pattern has no source axes: "-> ..."')
        if self.dst is None and pattern.dst:
            raise ValueError(
                f'{self}: without a destination the pattern has no destination axes: "... ->"'
            )
        self._validate_axes(pattern)

    def _validate_axes(self, pattern: Any) -> None:
        axes = {*pattern.src_axes, *pattern.dst_axes}
        for axis, value in self.at:
            parsed = parse_at(str(value))
            if axis not in axes:
                raise ValueError(
                    f'{self}: at names axis {axis}, which "{self.pattern}" does not have'
                )
            if axis not in pattern.one_sided:
                raise ValueError(
                    f"{self}: at names axis {axis}, which both sides have; only an axis of one side "
                    "alone can be pinned"
                )
            known = axes | {name for name, _ in self.axis_sizes}
            for name in parsed.names:
                if name not in known:
                    raise ValueError(
                        f'{self}: at {axis}="{value}" uses {name}, which is no axis or size'
                    )
        used = axes | {name for _, value in self.at for name in parse_at(str(value)).names}
        for axis, _ in self.axis_sizes:
            if axis not in used:
                raise ValueError(
                    f'{self}: size given for axis {axis}, which neither "{self.pattern}" nor at has'
                )

    def _validate_pattern(self, source: Template, target: Template) -> None:
        pattern = parse(self.pattern or "")
        self._validate_axes(pattern)
        sides = (
            (one_sided(source, target), source, pattern.dst_axes, pattern.src_axes, "destination"),
            (one_sided(target, source), target, pattern.src_axes, pattern.dst_axes, "source"),
        )
        pinned = {axis for axis, _ in self.at}
        for lone, template, must, must_not, label in sides:
            bad = [p for p in lone if p not in must or p in must_not or p in template.spans]
            if bad:
                raise ValueError(
                    f"{self}: {_braced(bad)} on one side only; it must then be an axis of the "
                    f"{label} side alone in the pattern"
                )
            twice = [p for p in lone if p in pinned]
            if twice:
                raise ValueError(f"{self}: {_braced(twice)} is bound by the name and by at")

    def __repr__(self) -> str:
        parts = [repr(self.src), repr(self.dst)]
        if self.pattern is not None:
            parts.append(repr(self.pattern))
        if self.at:
            parts.append(f"at={dict(self.at)}")
        if self.rows is not None:
            parts.append(f"rows={self.rows!r}")
        if self.fill is not None:
            parts.append(f"fill={self.fill.plain()!r}")
        parts += [f"{axis}={size}" for axis, size in self.axis_sizes]
        return f"Rule({', '.join(parts)})"


def _pin(axis: object, value: object) -> int | str:
    if not isinstance(axis, str):
        raise TypeError(f"Rule: at must map axis names, got {axis!r}")
    if isinstance(value, slice):
        if value.step not in (None, 1):
            raise ValueError(f"Rule: at {axis}: a range has no step, got {value!r}")
        return ":".join("" if end is None else str(end) for end in (value.start, value.stop))
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(
            f"Rule: at {axis} must be an index or a range (int, text or slice), got {type(value).__name__}"
        )
    return value


def _braced(placeholders: Iterable[str]) -> str:
    """Placeholders as they are written: `{e}, {i}`."""
    return ", ".join(f"{{{p}}}" for p in placeholders)


def rule_list(rules: Iterable[Rule]) -> list[Rule]:
    """The rules, or a TypeError that says which of them is none."""
    if isinstance(rules, Rule):
        raise TypeError(f"rules must be a list of rules, got one Rule; write [{rules}]")
    out = list(rules)
    for k, rule in enumerate(out):
        if not isinstance(rule, Rule):
            raise TypeError(f"rules[{k}] must be a paramkit.Rule, got {type(rule).__name__}")
    return out


def invert(rules: Iterable[Rule]) -> list[Rule]:
    """The rules of the way back.

    A transplant followed by one with the inverse rules gives the bits that there were, as far as the
    first carried them over: casts lose what they lose, and what a rule dropped stays as it is. Drops
    become keeps and the other way round; what was filled is dropped. Where several sources went into
    one destination they are taken out of it; where one source went into several (`at={"r": "*"}`, or
    two rules), they must agree on the way back.

    Args:
        rules: any rules.

    Returns:
        One rule for each, in the same order.

    Raises:
        TypeError: something that is no rule.

    Example:
        >>> invert([Rule("a.w", "b.w", "i o -> o i"), Rule("pooler.*", None)])
        [Rule('b.w', 'a.w', 'o i -> i o'), Rule(None, 'pooler.*')]
    """
    out = []
    for rule in rule_list(rules):
        pattern = None if rule.pattern is None else reversed_text(rule.pattern)
        out.append(
            Rule(
                rule.dst,
                rule.src,
                pattern,
                at=dict(rule.at),
                rows=rule.rows,
                **dict(rule.axis_sizes),
            )
        )
    return out
