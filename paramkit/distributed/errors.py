"""The error that every rank raises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import Finding, PlanError

__all__ = ["SyncError"]


class SyncError(PlanError):
    """Something went wrong on one rank or between ranks; all ranks that can be reached raise it.

    Attributes:
        rank: of the group, where it went wrong first; None where that cannot be told.

    Example:
        >>> error = SyncError("ranks have different models; nothing was sent.", rank=1)
        >>> error.rank, isinstance(error, PlanError)
        (1, True)
    """

    def __init__(
        self, summary: str, findings: Sequence[Finding] = (), rank: int | None = None
    ) -> None:
        super().__init__(summary, findings)
        self.rank = rank

    def __reduce__(self) -> tuple[type, Any]:
        return type(self), (self.summary, self.findings, self.rank)
