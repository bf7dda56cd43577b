"""The cases: what is timed, against which torch call, and what we promise.

A module for each topic; `registry` says what a case is. The order here is the order of the tables.
"""

from __future__ import annotations

# isort: off
from . import small, states, slices, contiguous, rows, permutes, casts, transplants, experts  # noqa: F401
from . import fused, verify, memory  # noqa: F401

# isort: on
from .registry import CASES, GROUPS, Case, Group, Work

__all__ = ["CASES", "GROUPS", "Case", "Group", "Work"]
