"""Models that a failed write left half old and half new, and how to know them."""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import Finding, PlanError, fold_names

__all__ = ["Torn", "TornError", "clear", "mark", "reason_of", "torn", "torn_error"]


@dataclass(frozen=True)
class Torn:
    """A model in which some tensors were written and others were not.

    Attributes:
        written: destinations that hold the new values in full.
        unwritten: destinations that hold the old values, or some of each.
        reason: what went wrong.

    >>> Torn(("a.weight",), ("a.bias",), "OSError: the disk is gone").unwritten
    ('a.bias',)
    """

    written: tuple[str, ...]
    unwritten: tuple[str, ...]
    reason: str


class TornError(PlanError):
    """Writing failed half way: the model has new values in some tensors and old ones in others.

    Attributes:
        state: a `Torn`, with the names.

    >>> import torch, paramkit
    >>> def stream():
    ...     yield "weight", torch.zeros(2, 2)
    ...     raise OSError("the line is down")
    >>> model = torch.nn.Linear(2, 2)
    >>> try:
    ...     paramkit.transplant(model, stream())
    ... except paramkit.TornError as error:
    ...     print(error.state.written, error.state.unwritten, error.state.reason)
    ('weight',) ('bias',) OSError: the line is down
    """

    def __init__(
        self, summary: str, findings: Sequence[Finding] = (), state: Torn | None = None
    ) -> None:
        super().__init__(summary, findings)
        self.state = state

    def __reduce__(self) -> tuple[type, Any]:
        return type(self), (self.summary, self.findings, self.state)


_torn: weakref.WeakKeyDictionary[nn.Module, Torn] = weakref.WeakKeyDictionary()


def torn(model: nn.Module) -> Torn | None:
    """What a failed write left of a model, or None where it is whole.

    A model is torn from a failure that showed only while writing (a read error, a device out of memory,
    an interrupt), without `atomic=True`, until a plan that writes all of those tensors has succeeded.

    Args:
        model: the module that was given to `transplant` or `plan`.

    Returns:
        What was written and what was not, by name; None for a model that is whole.

    Raises:
        TypeError: an object that cannot be looked up, such as a mapping: of those the error alone says it.

    >>> import torch, paramkit
    >>> paramkit.torn(torch.nn.Linear(2, 2)) is None
    True
    """
    return _torn.get(model)


def mark(model: object, state: Torn) -> None:
    """Say that a model is torn; mappings cannot be marked, the error alone says it."""
    if isinstance(model, nn.Module):
        before = _torn.get(model)
        if before is not None:  # what was torn before and not written now still is
            now = {*state.written, *state.unwritten}
            state = Torn(
                (*state.written, *(n for n in before.written if n not in now)),
                (*state.unwritten, *(n for n in before.unwritten if n not in now)),
                state.reason,
            )
        _torn[model] = state


def clear(model: object, written: Sequence[str]) -> None:
    """Say that tensors of a model were written; once all of a torn state are, the model is whole again."""
    if not isinstance(model, nn.Module):
        return
    state = _torn.get(model)
    if state is None:
        return
    now = set(written)
    left = [tuple(n for n in names if n not in now) for names in (state.written, state.unwritten)]
    if any(left):
        _torn[model] = Torn(left[0], left[1], state.reason)
    else:
        del _torn[model]


def reason_of(error: BaseException) -> str:
    """What went wrong, without the assurance that nothing was written, which is no longer so."""
    if not isinstance(error, PlanError):
        return f"{type(error).__name__}: {error}"
    return re.sub(r"[;.,]? *nothing was written", "", error.summary, flags=re.I).rstrip(" .;")


def torn_error(state: Torn, findings: Sequence[Finding] = ()) -> TornError:
    """The error that reports a torn state."""

    def some(names: Sequence[str]) -> str:
        folded = [name for name, _ in fold_names(names)]
        return ", ".join(folded[:6]) + (f", and {len(folded) - 6} more" if len(folded) > 6 else "")

    total = len(state.written) + len(state.unwritten)
    written = f" ({some(state.written)})" if state.written else ""
    others = f", the others do not ({some(state.unwritten)})" if state.unwritten else ""
    return TornError(
        f"writing failed half way, and the model is torn: {len(state.written)} of {total} tensors hold the new "
        f"values{written}{others}: {state.reason}. "
        "Write it again, or use atomic=True, which puts back what was there.",
        findings,
        state,
    )
