"""How a plan with names is made: the options of `plan` and `transplant`, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .casting import check_casting
from .rulefile import as_rules
from .rules import Rule
from .stream import STAGING_BYTES

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """How a plan with names is made; see `plan` for each."""

    rules: tuple[Rule, ...] = ()
    identity: bool = True
    allow_missing: Any = ()
    allow_unexpected: Any = ()
    casting: str = "same_kind"
    overflow: str = "ignore"
    hooks: str = "refuse"
    mmap: bool = False
    staging: int = STAGING_BYTES
    device: torch.device | None = None

    @staticmethod
    def make(
        rules: Any = (),
        allow_missing: Any = (),
        allow_unexpected: Any = (),
        staging: int | None = None,
        device: Any = None,
        **others: Any,
    ) -> Options:
        """Checked and ready to be used again.

        Raises:
            ValueError, TypeError: an argument that cannot be.
        """
        check_casting(others.get("casting", "same_kind"))
        overflow = others.get("overflow", "ignore")
        if overflow not in ("ignore", "error"):
            raise ValueError(f'overflow must be "ignore" or "error", got {overflow!r}')
        if staging is not None:
            if isinstance(staging, bool) or not isinstance(staging, int):
                raise TypeError(f"staging must be a number of bytes, got {staging!r}")
            if staging < 4096:
                raise ValueError(f"staging must be at least 4096 bytes, got {staging}")
        return Options(
            as_rules(rules),
            allow_missing=_kept(allow_missing),
            allow_unexpected=_kept(allow_unexpected),
            staging=STAGING_BYTES if staging is None else staging,
            device=None if device is None else torch.device(device),
            **others,
        )

    def resolving(self) -> dict[str, Any]:
        """What `resolve` takes."""
        names = ("rules", "identity", "allow_missing", "allow_unexpected", "casting", "hooks")
        return {name: getattr(self, name) for name in (*names, "device")}


def _kept(argument: Any) -> Any:
    """An iterable as a tuple, to be read again; what is no list of things is left for resolve() to refuse."""
    return argument if isinstance(argument, str) else tuple(argument)
