"""Plans of two lists, matched by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .errors import PlanError
from .judge import (
    differences,
)
from .lists import as_sources, resolve_lists
from .plan import Plan
from .resolve import Resolved

__all__ = ["ListPlan"]


class ListPlan(Plan):
    """Destinations and sources matched by position: the replay of foreach_copy_ and foreach_fill_.

    It keeps no Python reference to its destinations, so that the backend can tell when nobody else has.
    """

    _follow_autograd = True

    def __init__(self, dsts: Sequence[Tensor], srcs: Any) -> None:
        super().__init__()
        self._compile(resolve_lists(dsts, srcs))

    def _build(self, source: Any) -> None:
        compiled = self._compiled
        if compiled is None:
            raise PlanError(
                "this plan of two lists was released, and they have no names: make a new plan."
            )
        self._compile(
            resolve_lists(compiled.destinations(), compiled.sources() if source is None else source)
        )

    def _explainable(self) -> Resolved:
        compiled = self._ready()
        return resolve_lists(compiled.destinations(), compiled.sources())

    def _rebind(self, source: Any) -> None:
        dsts = self._ready().destinations()
        tensors = as_sources(dsts, source)
        if self._compiled.rebind(dict(zip(self._src_names, tensors)), self._src_names):
            was = dict(zip(self._src_names, self._compiled.sources(), strict=True))
            findings = differences(was, dict(zip(self._src_names, tensors, strict=True)))
            if findings:
                raise PlanError(
                    "the new sources differ from those planned for; nothing was written.", findings
                )
            if self._is_stale():
                raise self._stale()
            self._compile(resolve_lists(dsts, tensors))
