"""What was there before a write, to put it back when a later one fails."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .interrupts import without_grad
from .ops import foreach_copy_
from .pieces import view_of

__all__ = ["Journal"]


class Journal:
    """Copies of what is about to be overwritten, and the way back.

    It holds as many bytes as were noted, without what lies between the elements of a view.
    """

    def __init__(self) -> None:
        self._saved: list[tuple[Tensor, Tensor]] = []

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(copy.nbytes for _, copy in self._saved)

    def note(self, views: Iterable[Tensor]) -> None:
        """Copy views of destinations, before they are written."""
        views = [v for v in views if v.numel()]
        copies = [torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in views]
        if views:
            without_grad(partial(foreach_copy_, copies, views))
        self._saved += zip(views, copies, strict=True)

    def note_plan(self, compiled: Any) -> None:
        """Copy all that a backend's plan is about to write."""
        dsts = compiled.destinations()
        self.note(
            view_of(dsts[d], sizes, strides, offset)
            for d, _, sizes, strides, offset, *_ in compiled.writes()
        )

    def restore(self) -> None:
        """Put everything back, the latest first. May be called again where it was interrupted."""
        views = [v for v, _ in reversed(self._saved)]
        copies = [c for _, c in reversed(self._saved)]
        if views:
            without_grad(partial(foreach_copy_, views, copies))
