"""All cases, in the order of the tables."""

from __future__ import annotations

# isort: off
from . import loading, files, syncing, resharding  # noqa: F401

# isort: on
from .registry import CASES, Case

__all__ = ["CASES", "Case"]
