"""The GPU cases, a module for each topic. The order here is the order of the tables."""

from __future__ import annotations

# isort: off
from . import lists, permutes, fills, transfers, dense, rows, casts  # noqa: F401

# isort: on
