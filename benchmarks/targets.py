"""What a case is held to, and the verdict on what was measured.

A case has a list of conditions; each looks at one figure of its result:

* `ratio`: torch's time over paramkit's;
* `limit`: paramkit's bandwidth over that of the best plain C copy (or fill) of 256 MiB;
* `ceiling`: the time of a plain C copy of the same number of bytes over paramkit's;
* `memory`: bytes of temporary memory;
* `seconds`: paramkit's time;
* `growth`: paramkit's time over its time for half as much.

Verdicts: `met`; `noise` for a miss whose spread still reaches the target; `missed`; `unknown` where
a figure could not be measured (no C compiler); `error`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

__all__ = [
    "GUARD",
    "AtLeast",
    "AtMost",
    "Condition",
    "Either",
    "Figure",
    "Verdict",
    "from_dict",
    "geometric_mean",
    "judge",
    "judge_group",
    "wanted",
]

GUARD = 0.95
"""The ratio below which a case counts as slower than torch."""

CLOSE = 0.9
"""A miss is noise only if it is at least this part of its target."""

ORDER = ("met", "unknown", "noise", "missed", "error")
"""From best to worst; a case gets the worst of its conditions."""

WORDS = {
    "ratio": "x torch",
    "limit": " of the limit",
    "ceiling": " of a plain copy",
    "seconds": " s",
    "growth": "x the time of half as much",
}


@dataclass(frozen=True)
class Figure:
    """A ratio with its quartiles; for paired rounds these are of the rounds' own ratios."""

    value: float
    q1: float
    q3: float

    def as_dict(self) -> dict[str, float]:
        return {name: float(f"{value:.5g}") for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Verdict:
    """The word, and for anything but `met` the condition that failed."""

    word: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {self.detail}" if self.detail else self.word


Figures = Mapping[str, Figure | None]


class Condition(Protocol):
    """One thing that must hold for a case."""

    @property
    def needs(self) -> frozenset[str]: ...
    def judge(self, figures: Figures) -> Verdict: ...
    def as_dict(self) -> dict[str, Any]: ...
    def __str__(self) -> str: ...


def _shown(what: str, value: float) -> str:
    if what == "memory":
        return f"{value:,.0f} bytes of temporary memory"
    digits = ".3g" if value < 10 else ".0f"
    return f"{value:{digits}}{WORDS[what]}"


@dataclass(frozen=True)
class AtLeast:
    """`what` is `value` or more."""

    what: str
    value: float

    @property
    def needs(self) -> frozenset[str]:
        return frozenset((self.what,))

    def judge(self, figures: Figures) -> Verdict:
        figure = figures.get(self.what)
        if figure is None:
            return Verdict("unknown", f"not measured, wanted {_shown(self.what, self.value)}")
        if figure.value >= self.value:
            return Verdict("met")
        near = figure.q3 >= self.value and figure.value >= CLOSE * self.value
        text = f"{_shown(self.what, figure.value)}, wanted {self.value:g}"
        return Verdict("noise" if near else "missed", text)

    def as_dict(self) -> dict[str, Any]:
        return {"what": self.what, "at_least": self.value}

    def __str__(self) -> str:
        return f">= {self.value:g}" + ("x" if self.what == "ratio" else WORDS[self.what])


@dataclass(frozen=True)
class AtMost:
    """`what` is `value` or less; bytes of memory have no spread, so no noise."""

    what: str
    value: float

    @property
    def needs(self) -> frozenset[str]:
        return frozenset((self.what,))

    def judge(self, figures: Figures) -> Verdict:
        figure = figures.get(self.what)
        if figure is None:
            return Verdict("unknown", f"not measured, wanted at most {self.value:g}")
        if figure.value <= self.value:
            return Verdict("met")
        near = figure.q1 <= self.value and CLOSE * figure.value <= self.value
        text = f"{self.shown(figure.value)}, wanted {self.limit()}"
        return Verdict("noise" if near and figure.q1 < figure.value else "missed", text)

    def shown(self, value: float) -> str:
        return _shown(self.what, value)

    def limit(self) -> str:
        return f"{self.value:g}"

    def as_dict(self) -> dict[str, Any]:
        return {"what": self.what, "at_most": self.value}

    def __str__(self) -> str:
        if self.what == "memory":
            return f"<= {self.value:,.0f} bytes"
        return f"<= {self.value:g}{WORDS[self.what]}"


@dataclass(frozen=True)
class Either:
    """One of two conditions is enough: as fast as promised, or as fast as memory allows."""

    first: AtLeast
    second: AtLeast

    @property
    def needs(self) -> frozenset[str]:
        return self.first.needs | self.second.needs

    def judge(self, figures: Figures) -> Verdict:
        both = [self.first.judge(figures), self.second.judge(figures)]
        words = [verdict.word for verdict in both]
        for word in ("met", "noise", "unknown"):
            if word in words:
                break
        else:
            word = "missed"
        if word == "met":
            return Verdict("met")
        return Verdict(word, ", and ".join(verdict.detail for verdict in both if verdict.detail))

    def as_dict(self) -> dict[str, Any]:
        return {"either": [self.first.as_dict(), self.second.as_dict()]}

    def __str__(self) -> str:
        return f"{self.first} or {self.second}"


def from_dict(data: Mapping[str, Any]) -> Condition:
    """The condition that `as_dict` wrote."""
    if "either" in data:
        first, second = (from_dict(part) for part in data["either"])
        assert isinstance(first, AtLeast) and isinstance(second, AtLeast)
        return Either(first, second)
    if "at_most" in data:
        return AtMost(data["what"], data["at_most"])
    return AtLeast(data["what"], data["at_least"])


def wanted(conditions: Iterable[Condition]) -> str:
    """The conditions as one line of text."""
    return "; ".join(str(condition) for condition in conditions)


def judge(conditions: Sequence[Condition], figures: Figures) -> Verdict:
    """The worst verdict of the conditions, with every reason that has that word."""
    verdicts = [condition.judge(figures) for condition in conditions]
    if not verdicts:
        return Verdict("met")
    worst = max((verdict.word for verdict in verdicts), key=ORDER.index)
    details = [verdict.detail for verdict in verdicts if verdict.word == worst and verdict.detail]
    return Verdict(worst, "; ".join(details))


def geometric_mean(values: Iterable[float]) -> float:
    """The mean of ratios; 0 for none."""
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs)) if logs else 0.0


def judge_group(
    mean: float | None, figures: Sequence[Figure], complete: bool
) -> tuple[Figure | None, Verdict]:
    """The geometric mean of a group's ratios, and the verdict on it.

    Args:
        mean: the least geometric mean, or None where the group as a whole has no target.
        figures: the ratio of each case that was measured.
        complete: whether that is every case of the group; a part of it proves nothing.
    """
    if not figures:
        return None, Verdict("unknown", "no ratio was measured")
    found = Figure(
        geometric_mean(figure.value for figure in figures),
        geometric_mean(figure.q1 for figure in figures),
        geometric_mean(figure.q3 for figure in figures),
    )
    if mean is None:
        return found, Verdict("met")
    if not complete:
        return found, Verdict("unknown", "not every case of the group was measured")
    return found, AtLeast("ratio", mean).judge({"ratio": found})
