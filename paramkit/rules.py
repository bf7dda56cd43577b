"""Rules: which source names go to which destination names, and how their axes correspond.

A name template is a name in which `{i}` stands for any run of characters without a dot. Templates
are matched through a tree of name components that all rules share, so that matching costs what a
name is long, not what the rules are many.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .patterns import parse, parse_at

__all__ = ["NameFilter", "Rule", "RuleIndex", "Template", "one_sided_text"]

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_CANONICAL_INT = re.compile(r"0|[1-9][0-9]{0,17}")

Bindings = dict[str, str]


class Template:
    """A name with placeholders.

    Args:
        text: such as `layers.{i}.weight`.
        wildcards: whether `*` stands for any run of characters, dots included.

    Attributes:
        text: as given.
        placeholders: the names in braces, each once, in order.
        prefix: the literal characters before the first placeholder or wildcard.
        literal: whether the template is a plain name.

    Raises:
        ValueError: unbalanced braces, or a placeholder that is not an identifier.

    Example:
        >>> t = Template("h.{i}.{part}.weight")
        >>> t.match("h.3.attn.weight")
        {'i': '3', 'part': 'attn'}
        >>> t.format({"i": "3", "part": "mlp"})
        'h.3.mlp.weight'
    """

    __slots__ = ("_pieces", "_regex", "literal", "placeholders", "prefix", "text")

    def __init__(self, text: str, wildcards: bool = False) -> None:
        self.text = text
        names: list[str] = []
        pieces: list[tuple[str, str | None]] = []  # (literal text, the placeholder after it)
        pattern: list[str] = []
        end = 0
        for match in _PLACEHOLDER.finditer(text):
            name = match.group(1)
            if not (name.isidentifier() and name.isascii()):
                raise ValueError(
                    f'name "{text}": "{{{name}}}" is not a placeholder; write a name in the braces: {{i}}'
                )
            pieces.append((text[end : match.start()], name))
            end = match.end()
        pieces.append((text[end:], None))
        for literal, name in pieces:
            if "{" in literal or "}" in literal:
                raise ValueError(f'name "{text}": a brace without its partner')
            escaped = re.escape(literal)
            pattern.append(escaped.replace(r"\*", ".*") if wildcards else escaped)
            if name is None:
                continue
            if name in names:
                pattern.append(f"(?P={name})")
            else:
                names.append(name)
                pattern.append(f"(?P<{name}>[^.]+)")
        self.placeholders = tuple(names)
        first = pieces[0][0]
        self.prefix = first.split("*", 1)[0] if wildcards else first
        self.literal = not names and (not wildcards or "*" not in text)
        self._pieces = pieces
        self._regex = re.compile("".join(pattern), re.DOTALL)

    def match(self, name: str) -> Bindings | None:
        """What the placeholders stand for in `name`, or None where it does not match."""
        found = self._regex.fullmatch(name)
        return None if found is None else found.groupdict()

    def format(self, bindings: Mapping[str, str]) -> str:
        """The name with the placeholders filled in."""
        return "".join(t if p is None else t + bindings[p] for t, p in self._pieces)


@dataclass(frozen=True, init=False, repr=False)
class Rule:
    """One correspondence between source names and destination names.

    Args:
        src: source name template. `{i}` binds any run of characters without a dot. Where `dst` is
            None, `*` stands for any run of characters, dots included.
        dst: destination name template; None drops the source on purpose.
        pattern: axis pattern such as `"i o -> o i"`, source axes first; None where the shapes are
            equal. Compiled to views of both sides, never to a copy.
        at: for axes that one side alone has: the index (an int, or text such as `"r+1"` in which an
            axis name stands for its size), or a range (`"0:r"` or a slice) that is paired with an
            axis of the other side.
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
    """

    src: str
    dst: str | None
    pattern: str | None
    at: tuple[tuple[str, int | str], ...]
    axis_sizes: tuple[tuple[str, int], ...]

    def __init__(
        self,
        src: str,
        dst: str | None,
        pattern: str | None = None,
        *,
        at: Mapping[str, int | str | slice] | None = None,
        **axis_sizes: int,
    ) -> None:
        for label, value, types in (("src", src, str), ("dst", dst, (str, type(None)))):
            if not isinstance(value, types):
                raise TypeError(f"Rule: {label} must be a name, got {type(value).__name__}")
        if not (pattern is None or isinstance(pattern, str)):
            raise TypeError(f"Rule: pattern must be text, got {type(pattern).__name__}")
        if not (at is None or isinstance(at, Mapping)):
            raise TypeError(
                f'Rule: at must be a mapping such as {{"s": 0}}, got {type(at).__name__}'
            )
        pins = tuple((axis, _pin(axis, value)) for axis, value in (at or {}).items())
        object.__setattr__(self, "src", src)
        object.__setattr__(self, "dst", dst)
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "at", pins)
        object.__setattr__(self, "axis_sizes", tuple(axis_sizes.items()))
        self._validate()

    def _validate(self) -> None:
        source = Template(self.src, wildcards=self.dst is None)
        for axis, size in self.axis_sizes:
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(
                    f"{self}: axis size {axis} must be an int, got {type(size).__name__} {size!r}"
                )
            if size < 0:
                raise ValueError(f"{self}: axis size {axis} must not be negative, got {size}")
        if self.dst is None:
            if self.pattern is not None or self.at or self.axis_sizes:
                raise ValueError(
                    f"{self}: a rule that drops (dst=None) takes no pattern, at or axis sizes"
                )
            return
        if "*" in self.src or "*" in self.dst:
            raise ValueError(
                f'{self}: "*" stands only in rules that drop (dst=None) and in allow-lists; '
                "use placeholders such as {i}, one for each part between dots"
            )
        target = Template(self.dst)
        if self.pattern is None:
            if self.at or self.axis_sizes:
                raise ValueError(f"{self}: at and axis sizes need an axis pattern to refer to")
            lone = [*one_sided(source, target), *one_sided(target, source)]
            if lone:
                raise ValueError(
                    f"{self}: {one_sided_text(lone)} on one side only, and no axis pattern"
                )
            return
        pattern = parse(self.pattern)
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
        sides = (
            (one_sided(source, target), pattern.dst_axes, pattern.src_axes, "destination"),
            (one_sided(target, source), pattern.src_axes, pattern.dst_axes, "source"),
        )
        pinned = {axis for axis, _ in self.at}
        for lone, must, must_not, label in sides:
            bad = [p for p in lone if p not in must or p in must_not]
            if bad:
                raise ValueError(
                    f"{self}: {one_sided_text(bad)} on one side only; it must then be an axis of the "
                    f"{label} side alone in the pattern"
                )
            twice = [p for p in lone if p in pinned]
            if twice:
                raise ValueError(f"{self}: {one_sided_text(twice)} is bound by the name and by at")

    def __repr__(self) -> str:
        parts = [repr(self.src), repr(self.dst)]
        if self.pattern is not None:
            parts.append(repr(self.pattern))
        if self.at:
            parts.append(f"at={dict(self.at)}")
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


def one_sided(a: Template, b: Template) -> list[str]:
    """Placeholders of `a` that `b` does not have."""
    return [p for p in a.placeholders if p not in b.placeholders]


def one_sided_text(placeholders: Iterable[str]) -> str:
    """Placeholders as they are written: `{e}, {i}`."""
    return ", ".join(f"{{{p}}}" for p in placeholders)


def bound_index(text: str) -> int | None:
    """The index that a bound run of characters stands for, or None where it is not an integer."""
    return int(text) if _CANONICAL_INT.fullmatch(text) else None


# ---- matching ------------------------------------------------------------------------------------


class _Node:
    """A node of the component tree: where a name's components lead."""

    __slots__ = ("literal", "masks", "rules")

    def __init__(self) -> None:
        self.literal: dict[str, _Node] = {}
        self.masks: dict[str, tuple[re.Pattern[str] | None, _Node]] = {}
        self.rules: list[int] = []


class RuleIndex:
    """All rules' source templates, ready for matching names.

    Templates are put into one tree by their components; components with placeholders are anonymised
    (`{i}` and `{layer}` are the same edge), so 400 rules about `layers.{i}...` share their way down.
    A name costs its number of components, whatever the number of rules.

    Args:
        rules: the rules, in order.

    Example:
        >>> index = RuleIndex([Rule("h.{i}.w", "layers.{i}.w"), Rule("h.0.w", None)])
        >>> [(k, b) for k, b in index.match("h.0.w")]
        [(0, {'i': '0'}), (1, {})]
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.templates: list[Template] = []
        self.wildcards: list[int] = []  # rules with `*`, which cross components
        self._root = _Node()
        for k, rule in enumerate(rules):
            crosses = rule.dst is None and "*" in rule.src
            self.templates.append(Template(rule.src, wildcards=crosses))
            if crosses:
                self.wildcards.append(k)
            else:
                self._insert(rule.src, k)

    def _insert(self, text: str, k: int) -> None:
        node = self._root
        for part in text.split("."):
            if "{" not in part:
                node = node.literal.setdefault(part, _Node())
                continue
            mask = _PLACEHOLDER.sub("{}", part)
            if mask not in node.masks:
                literals = map(re.escape, mask.split("{}"))
                regex = None if mask == "{}" else re.compile("[^.]+".join(literals), re.DOTALL)
                node.masks[mask] = (regex, _Node())
            node = node.masks[mask][1]
        node.rules.append(k)

    def match(self, name: str) -> list[tuple[int, Bindings]]:
        """The rules without `*` whose source template matches, in order, with their bindings."""
        nodes = [self._root]
        for part in name.split("."):
            following: list[_Node] = []
            for node in nodes:
                child = node.literal.get(part)
                if child is not None:
                    following.append(child)
                for regex, masked in node.masks.values():
                    if part and (regex is None or regex.fullmatch(part)):
                        following.append(masked)
            if not following:
                return []
            nodes = following
        found: list[tuple[int, Bindings]] = []
        for k in sorted(k for node in nodes for k in node.rules):
            # The tree ignores that a placeholder used twice must bind the same text; the template does not.
            bindings = self.templates[k].match(name)
            if bindings is not None:
                found.append((k, bindings))
        return found


class NameFilter:
    """Which of many names a list of templates with `*` matches.

    Args:
        templates: exact names, `{i}` placeholders, `*` for any run of characters, dots included.
        argument: the argument's name, for errors.

    Raises:
        TypeError: a template that is not text, or one text in place of a list.
        ValueError: a template that cannot be read.

    Example:
        >>> NameFilter(["pooler.*"], "allow").select(["pooler.dense.weight", "fc.weight"])
        ({'pooler.dense.weight': 0}, [])
    """

    def __init__(self, templates: Iterable[str], argument: str) -> None:
        if isinstance(templates, str):
            raise TypeError(
                f'{argument} must be a list of names, got the text "{templates}"; write ["{templates}"]'
            )
        self.templates: list[Template] = []
        for k, text in enumerate(templates):
            if not isinstance(text, str):
                raise TypeError(f"{argument}[{k}] must be a name, got {type(text).__name__}")
            self.templates.append(Template(text, wildcards=True))

    def select(self, names: Iterable[str]) -> tuple[dict[str, int], list[str]]:
        """The names matched.

        Returns:
            ({name: number of the first template that matches it}, the templates that match none).
        """
        given = dict.fromkeys(names)
        ordered: list[str] | None = None
        chosen: dict[str, int] = {}
        idle: list[str] = []
        for k, template in enumerate(self.templates):
            if template.literal:
                hits = [template.text] if template.text in given else []
            else:
                # Only names with the template's literal beginning are tried.
                ordered = sorted(given) if ordered is None else ordered
                start = bisect.bisect_left(ordered, template.prefix)
                hits = []
                for name in ordered[start:]:
                    if not name.startswith(template.prefix):
                        break
                    if template.match(name) is not None:
                        hits.append(name)
            if not hits:
                idle.append(template.text)
            for name in hits:
                chosen.setdefault(name, k)
        return chosen, idle
