"""Name templates: names in which `{i}` and `{*p}` stand for parts, and matching many names with many of them.

Templates are matched through one tree of name components that all of them share, so that matching
costs what a name is long, not what the templates are many.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Bindings", "NameFilter", "Template", "TemplateIndex", "bound_index", "one_sided"]

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_CANONICAL_INT = re.compile(r"0|[1-9][0-9]{0,17}")

Bindings = dict[str, str]


class Template:
    """A name with placeholders.

    `{i}` stands for any run of characters without a dot, `{*p}` for one or more whole components.
    The same placeholder twice stands for the same text.

    Args:
        text: such as `layers.{i}.weight`, or `{*p}.q_proj.weight`.
        wildcards: whether `*` stands for any run of characters, dots included.

    Attributes:
        text: as given.
        placeholders: the names in braces, each once, in order.
        spans: those of them written `{*p}`.
        prefix: the literal characters before the first placeholder or wildcard.
        literal: whether the template is a plain name.
        crosses: whether it has a wildcard.

    Raises:
        ValueError: unbalanced braces, a placeholder that is not an identifier, two of them side by side,
            or a `{*p}` that is not a whole component.

    Example:
        >>> t = Template("h.{i}.{part}.weight")
        >>> t.match("h.3.attn.weight")
        {'i': '3', 'part': 'attn'}
        >>> t.format({"i": "3", "part": "mlp"})
        'h.3.mlp.weight'
        >>> Template("{*p}.weight").match("encoder.layers.0.weight")
        {'p': 'encoder.layers.0'}
    """

    __slots__ = (
        "_pieces",
        "_regex",
        "crosses",
        "literal",
        "placeholders",
        "prefix",
        "spans",
        "text",
    )

    def __init__(self, text: str, wildcards: bool = False) -> None:
        self.text = text
        names: list[str] = []
        spans: set[str] = set()
        pieces: list[tuple[str, str | None]] = []  # (literal text, the placeholder after it)
        pattern: list[str] = []
        end = 0
        for match in _PLACEHOLDER.finditer(text):
            name = match.group(1)
            if name.startswith("*"):
                name = name[1:]
                spans.add(name)
                before, after = text[: match.start()], text[match.end() :]
                if before[-1:] not in ("", ".") or after[:1] not in ("", "."):
                    raise ValueError(
                        f'name "{text}": "{{*{name}}}" stands for whole components; put dots around it'
                    )
            if not (name.isidentifier() and name.isascii()):
                raise ValueError(
                    f'name "{text}": "{{{match.group(1)}}}" is not a placeholder; '
                    "write a name in the braces: {i}"
                )
            if pieces and match.start() == end:
                # Where the one ends and the other begins could be told in many ways, and trying all takes long.
                raise ValueError(
                    f'name "{text}": two placeholders side by side; put something between them'
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
                part = r"[^.]+(?:\.[^.]+)*" if name in spans else "[^.]+"
                pattern.append(f"(?P<{name}>{part})")
        self.placeholders = tuple(names)
        self.spans = frozenset(spans)
        first = pieces[0][0]
        self.prefix = first.split("*", 1)[0] if wildcards else first
        self.crosses = wildcards and any("*" in literal for literal, _ in pieces)
        self.literal = not names and not self.crosses
        self._pieces = pieces
        self._regex = re.compile("".join(pattern), re.DOTALL)

    def match(self, name: str) -> Bindings | None:
        """What the placeholders stand for in `name`, or None where it does not match."""
        found = self._regex.fullmatch(name)
        return None if found is None else found.groupdict()

    def format(self, bindings: Mapping[str, str]) -> str:
        """The name with the placeholders filled in."""
        return "".join(t if p is None else t + bindings[p] for t, p in self._pieces)


def one_sided(a: Template, b: Template) -> list[str]:
    """Placeholders of `a` that `b` does not have."""
    return [p for p in a.placeholders if p not in b.placeholders]


def bound_index(text: str) -> int | None:
    """The index that a bound run of characters stands for, or None where it is not an integer."""
    return int(text) if _CANONICAL_INT.fullmatch(text) else None


# ---- matching ------------------------------------------------------------------------------------


class _Node:
    """A node of the component tree: where a name's components lead."""

    __slots__ = ("literal", "loops", "masks", "numbers", "span")

    def __init__(self, loops: bool = False) -> None:
        self.literal: dict[str, _Node] = {}
        self.masks: dict[str, tuple[re.Pattern[str] | None, _Node]] = {}
        self.span: _Node | None = None
        self.loops = loops  # entered by a `{*p}`, which may take further components
        self.numbers: list[int] = []


class TemplateIndex:
    """Many templates, ready for matching names.

    Components with placeholders are anonymised (`{i}` and `{layer}` are the same edge of the tree), so
    400 templates about `layers.{i}...` share their way down.

    Args:
        templates: the templates, without wildcards; None for a number that never matches.

    Example:
        >>> index = TemplateIndex([Template("h.{i}.w"), Template("h.0.w")])
        >>> index.match("h.0.w")
        [(0, {'i': '0'}), (1, {})]
    """

    def __init__(self, templates: Sequence[Template | None]) -> None:
        self.templates = list(templates)
        self._root = _Node()
        for k, template in enumerate(templates):
            if template is not None:
                self._insert(template.text, k)

    def _insert(self, text: str, k: int) -> None:
        node = self._root
        for part in text.split("."):
            if "{" not in part:
                node = node.literal.setdefault(part, _Node())
                continue
            if part.startswith("{*"):
                if node.span is None:
                    node.span = _Node(loops=True)
                node = node.span
                continue
            mask = _PLACEHOLDER.sub("{}", part)
            if mask not in node.masks:
                literals = map(re.escape, mask.split("{}"))
                regex = None if mask == "{}" else re.compile("[^.]+".join(literals), re.DOTALL)
                node.masks[mask] = (regex, _Node())
            node = node.masks[mask][1]
        node.numbers.append(k)

    def match(self, name: str) -> list[tuple[int, Bindings]]:
        """The templates that match, by number in ascending order, with their bindings."""
        nodes = [self._root]
        for part in name.split("."):
            following: list[_Node] = []
            for node in nodes:
                if node.loops and part:
                    following.append(node)
                child = node.literal.get(part)
                if child is not None:
                    following.append(child)
                if node.masks and part:
                    for regex, masked in node.masks.values():
                        if regex is None or regex.fullmatch(part):
                            following.append(masked)
                if node.span is not None and part:
                    following.append(node.span)
            if not following:
                return []
            if len(following) > 1:
                # A node that takes any number of components is reached on several ways.
                following = list({id(node): node for node in following}.values())
            nodes = following
        found: list[tuple[int, Bindings]] = []
        for k in sorted(k for node in nodes for k in node.numbers):
            # The tree ignores that a placeholder used twice must bind the same text; the template does not.
            template = self.templates[k]
            assert template is not None
            bindings = template.match(name)
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
