"""How much Python a call runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

__all__ = ["python_calls"]


def python_calls(call: Callable[[], object]) -> int:
    """How many calls, of Python functions and from Python code, a call makes."""
    count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count
