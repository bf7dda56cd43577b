"""Errors that list every problem at once, folded to what a person can read.

A weight transfer that goes wrong usually goes wrong in every layer, so a plain list of problems is hundreds of lines
of the same thing. Here a problem is a `Finding` (plain data), and `PlanError` prints findings that are equal but for
their layer numbers as one line:

    layers.{0..47}.mlp.up | shape | got (4096, 11008) | expected (11008, 4096) | did you mean "i o -> o i"?
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Finding",
    "PlanError",
    "RuleFileError",
    "SourceError",
    "UnknownNameError",
    "dtype_text",
    "fold_names",
    "suggest",
]

# More lines than this are counted, not shown: a screenful says what is wrong, a thousand lines hide it.
MAX_LINES = 50
# A set of numbers with more gaps than this is abbreviated: {0,2,4,..,46 (24)}.
MAX_RUNS = 8
# Places are control characters below the tab, which text may hold.
MAX_PLACES = 9

_N = r"(?:0|[1-9][0-9]{0,17})"
# A whole component (`layers.3.up`) or a whole subscript (`dsts[3]`).
_INTEGER = re.compile(rf"(?<![^.]){_N}(?![^.])|(?<=\w\[){_N}(?=\])")
# In free text (a hint, an expected value) a number counts where a dot and a name stand beside it.
_INTEGER_IN_TEXT = re.compile(
    rf"(?<=\w\.){_N}(?!\w)|(?<![\w.]){_N}(?=\.[A-Za-z_])|(?<=\w\[){_N}(?=\])"
)

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Finding:
    """One problem, as data.

    Args:
        name: the parameter, source name, rule or argument that the problem is about.
        kind: a short tag: "missing", "unexpected", "unknown", "shape", "dtype", "device", "layout", "rule", "conflict",
            "meta", "expanded", "moved", "kept", "unread", "overflow", "hook", "type", "file".
        got: what was found, "" where the kind says it all.
        expected: what should have been there.
        hint: what to do about it.

    Example:
        >>> print(Finding("fc.weight", "shape", got="(2, 3)", expected="(3, 2)", hint='did you mean "i o -> o i"?'))
        fc.weight | shape | got (2, 3) | expected (3, 2) | did you mean "i o -> o i"?
    """

    name: str
    kind: str
    got: str = ""
    expected: str = ""
    hint: str = ""

    def __str__(self) -> str:
        return _line(self.name, self.kind, self.got, self.expected, self.hint)


class PlanError(RuntimeError):
    """Everything that is wrong with a plan, in one error. Nothing was written.

    Args:
        summary: one sentence: what failed and how many problems there are.
        findings: the problems, in the order in which they are to be read.

    Attributes:
        summary: the sentence.
        findings: the problems as a tuple of `Finding`, one for each parameter, not folded.

    Example:
        >>> names = [f"layers.{i}.up" for i in range(4)]
        >>> print(PlanError("4 problems.", [Finding(n, "missing") for n in names]))
        4 problems.
          layers.{0..3}.up | missing
    """

    def __init__(self, summary: str, findings: Sequence[Finding] = ()) -> None:
        self.summary = summary
        self.findings = tuple(findings)
        self.text = render(summary, self.findings)
        super().__init__(self.text)

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[type, Any]:
        # The default would call the class with the finished text alone, and lose the findings on the way.
        return type(self), (self.summary, self.findings)


class UnknownNameError(PlanError, KeyError):
    """A name that the model does not have. A KeyError too, because it comes from indexing by name.

    Example:
        >>> import torch, paramkit
        >>> try:
        ...     with paramkit.writes(torch.nn.Linear(2, 2)) as w:
        ...         w["wieght"][0] = 1.0
        ... except KeyError as error:
        ...     print(error)
        writes: the model has no such tensor; nothing was written.
          wieght | unknown | did you mean weight?
    """


class RuleFileError(PlanError, ValueError):
    """A rule file that cannot be read: each finding names the file and the line. A ValueError too.

    Example:
        >>> import paramkit
        >>> try:
        ...     paramkit.load_rules("no/rules.toml")
        ... except ValueError as error:
        ...     print(error)
        the rule file no/rules.toml cannot be read.
          no/rules.toml | rule | got No such file or directory | expected a rule file
    """


class SourceError(PlanError):
    """A source that cannot be read: a missing, truncated or corrupt file, or an object of the wrong type.

    Example:
        >>> import paramkit
        >>> try:
        ...     paramkit.open_source({"w": 3})
        ... except paramkit.SourceError as error:
        ...     print(error.findings[0].name, error.findings[0].got)
        w int 3
    """


def render(summary: str, findings: Sequence[Finding]) -> str:
    """The text of a `PlanError`: the summary, then one line for each group of findings.

    Args:
        summary: the first line.
        findings: the problems; those of one kind are brought together, kinds in order of first appearance.

    Returns:
        Text of at most 52 lines.
    """
    groups: dict[tuple[str, ...], list[Numbers]] = {}
    for finding in findings:
        template, numbers = split_numbers(finding.name)
        texts = (hide_numbers(t, numbers) for t in (finding.got, finding.expected, finding.hint))
        groups.setdefault((finding.kind, template, *texts), []).append(numbers)

    by_kind: dict[str, list[str]] = {}
    counts: dict[str, list[int]] = {}
    for (kind, template, *shown), rows in groups.items():
        for folded, members in fold_numbers(rows):
            name = join_numbers(template, folded)
            by_kind.setdefault(kind, []).append(
                _line(name, kind, *(join_numbers(t, folded) for t in shown))
            )
            counts.setdefault(kind, []).append(len(members))

    lines = [line for kind in by_kind for line in by_kind[kind]]
    sizes = [size for kind in counts for size in counts[kind]]
    if len(lines) > MAX_LINES:
        rest = sum(sizes[MAX_LINES:])
        lines = [*lines[:MAX_LINES], f"... and {rest} more (all of them are in .findings)"]
    return "\n".join([summary, *(f"  {line}" for line in lines)])


def _line(name: str, kind: str, got: str, expected: str, hint: str) -> str:
    parts = [name, kind]
    if got:
        parts.append(f"got {got}")
    if expected:
        parts.append(f"expected {expected}")
    if hint:
        parts.append(hint)
    return " | ".join(parts)


def dtype_text(dtype: object) -> str:
    """A dtype as people write it.

    >>> import torch
    >>> dtype_text(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


# ---- folding -------------------------------------------------------------------------------------
# A name is split into a template, in which the k-th integer component is the character chr(k), and the integers. Names
# never hold control characters, so such a template cannot be mistaken for a name, and it can be used as a dict key.


def split_numbers(name: str) -> tuple[str, Numbers]:
    r"""A name as (template, integers).

    Example:
        >>> split_numbers("layers.3.experts.12.w1")
        ('layers.\x00.experts.\x01.w1', (3, 12))
    """
    if not any(map(name.__contains__, "0123456789")):  # the common quick case: nothing to fold
        return name, ()
    numbers: list[int] = []

    def keep(match: re.Match[str]) -> str:
        numbers.append(int(match.group()))
        place = len(numbers) - 1
        return chr(place) if place < MAX_PLACES else match.group()

    template = _INTEGER.sub(keep, name)
    return template, tuple(numbers[:MAX_PLACES])


def hide_numbers(text: str, numbers: Numbers) -> str:
    """Text with the integers of dotted names in it replaced as in `split_numbers`, where they are
    among `numbers`, so that texts about different layers become equal."""
    if not text or not numbers:
        return text
    count = 0

    def hide(match: re.Match[str]) -> str:
        nonlocal count
        value = int(match.group())
        if value not in numbers:
            return match.group()
        # Position by position where that fits: layer 1, expert 1 must not become layer 1 twice.
        same_place = numbers[count % len(numbers)] == value
        position = count % len(numbers) if same_place else numbers.index(value)
        count += 1
        return chr(position)

    return _INTEGER_IN_TEXT.sub(hide, text)


def join_numbers(template: str, parts: Sequence[str | int]) -> str:
    """The inverse of `split_numbers`, for integers or for folded sets of them."""
    for k, part in enumerate(parts):
        template = template.replace(chr(k), str(part))
    return template


def fold_numbers(rows: Sequence[Numbers]) -> list[tuple[tuple[str, ...], list[int]]]:
    """Fold equally long tuples of integers to products of sets.

    Args:
        rows: the tuples.

    Returns:
        [(one text for each position, indices into `rows`)]: every row is in exactly one of them.
    """
    return [(texts, sorted(members)) for texts, members in _fold(rows, list(range(len(rows))), 0)]


def _fold(
    rows: Sequence[Numbers], members: list[int], position: int
) -> list[tuple[tuple[str, ...], list[int]]]:
    if not members or position == len(rows[members[0]]):
        return [((), members)] if members else []
    by_value: dict[int, list[int]] = {}
    for member in members:
        by_value.setdefault(rows[member][position], []).append(member)
    # Values whose remaining positions hold the same set of tuples are one group: layers 0..47 with experts 0..127 each.
    by_rest: dict[frozenset[Numbers], list[int]] = {}
    for value in sorted(by_value):
        rest = frozenset(rows[member][position + 1 :] for member in by_value[value])
        by_rest.setdefault(rest, []).append(value)
    out: list[tuple[tuple[str, ...], list[int]]] = []
    for values in by_rest.values():
        own = [member for value in values for member in by_value[value]]
        out.extend(
            ((_range_text(values), *texts), found)
            for texts, found in _fold(rows, own, position + 1)
        )
    return out


def _range_text(values: Sequence[int]) -> str:
    """Sorted distinct integers as text: `7`, `{0..5}`, `{0,2,5}`, `{0..3,7}`."""
    if len(values) == 1:
        return str(values[0])
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    texts = [str(a) if a == b else f"{a}..{b}" for a, b in runs]
    if len(texts) > MAX_RUNS:
        return "{" + ",".join(texts[:3]) + f",..,{texts[-1]} ({len(values)})" + "}"
    return "{" + ",".join(texts) + "}"


def fold_names(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Fold names that are equal but for integer components.

    Args:
        names: parameter names, in any order.

    Returns:
        [(folded name, the names in it, in the given order)], in order of first appearance. Takes O(n log n).

    Example:
        >>> fold_names(["h.0.w", "h.1.w", "h.2.w", "tok.w"])
        [('h.{0..2}.w', ['h.0.w', 'h.1.w', 'h.2.w']), ('tok.w', ['tok.w'])]
    """
    groups: dict[str, tuple[list[Numbers], list[str]]] = {}
    for name in names:
        template, numbers = split_numbers(name)
        rows, members = groups.setdefault(template, ([], []))
        rows.append(numbers)
        members.append(name)
    out: list[tuple[str, list[str]]] = []
    for template, (rows, members) in groups.items():
        out.extend(
            (join_numbers(template, texts), [members[k] for k in found])
            for texts, found in fold_numbers(rows)
        )
    return out


# ---- near misses ---------------------------------------------------------------------------------


class Suggester:
    """Near misses of names among many candidates, at a bounded cost.

    Comparing every missing name with every candidate is quadratic. Names come in layers, so one comparison answers for
    a whole layer range: the answer is kept by template and only its integers are replaced. The comparisons proper look
    at the candidates that share components with the name, and stop after a budget.

    Args:
        candidates: the names that exist.
        budget: how many different templates are compared at most.
    """

    _POOL = 400  # candidates looked at closely for one name

    def __init__(self, candidates: Iterable[str], budget: int = 100) -> None:
        self._names = dict.fromkeys(candidates)
        self._budget = budget
        self._known: dict[str, Callable[[Numbers], str] | None] = {}
        self._templates: dict[str, Numbers] | None = None
        self._by_part: dict[str, list[str]] = {}

    def __call__(self, name: str) -> str | None:
        """The candidate closest to `name`, or None where none is close."""
        template, numbers = split_numbers(name)
        if template not in self._known:
            self._known[template] = self._search(template, numbers)
        make = self._known[template]
        if make is None:
            return None
        found = make(numbers)
        return found if found in self._names and found != name else None

    def _search(self, template: str, numbers: Numbers) -> Callable[[Numbers], str] | None:
        if self._budget <= 0 or not self._names:
            return None
        self._budget -= 1
        found = self._closest(template)
        if found is None:
            return None
        assert self._templates is not None
        own = self._templates[found]
        if len(own) == len(numbers) and join_numbers(found, numbers) in self._names:
            return lambda given: join_numbers(found, given)
        fixed = join_numbers(found, own)
        return lambda given: fixed

    def _closest(self, template: str) -> str | None:
        if self._templates is None:
            self._templates = {}
            for name in self._names:
                key, numbers = split_numbers(name)
                if key not in self._templates:
                    self._templates[key] = numbers
                    for part in dict.fromkeys(key.split(".")):
                        self._by_part.setdefault(part, []).append(key)
        if (
            template in self._templates
        ):  # the same name in another layer: no spelling mistake to point at
            return None
        parts = template.split(".")
        shared: dict[str, int] = {}
        for part in dict.fromkeys(parts):
            for key in self._by_part.get(part, ()):
                shared[key] = shared.get(key, 0) + 1
        pool = sorted(shared, key=shared.__getitem__, reverse=True)[: self._POOL]
        if len(pool) < self._POOL:
            pool += [key for key in list(self._templates)[: 4 * self._POOL] if key not in shared]
        match = _best(template, pool)
        if match is None:  # a wrapper added or removed a prefix: "module.fc.weight" for "fc.weight"
            ends = [k for k in pool if k.endswith("." + template) or template.endswith("." + k)]
            match = min(ends, key=len) if ends else None
        return match


def _best(name: str, pool: Sequence[str], cutoff: float = 0.75) -> str | None:
    best, score = None, cutoff
    matcher = difflib.SequenceMatcher(autojunk=False)
    matcher.set_seq2(name)
    for candidate in pool:
        matcher.set_seq1(candidate)
        if (
            matcher.real_quick_ratio() > score
            and matcher.quick_ratio() > score
            and (r := matcher.ratio()) > score
        ):
            best, score = candidate, r
    return best


def suggest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `name` is probably a misspelling of.

    Args:
        name: a name that does not exist.
        candidates: the names that do.

    Returns:
        The nearest of them, or None where none is near. For many names use one `Suggester`.

    Example:
        >>> suggest("fc.wieght", ["fc.weight", "fc.bias"])
        'fc.weight'
    """
    return Suggester(candidates)(name)
