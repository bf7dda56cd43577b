"""What has to be done to its end, whatever the user presses meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

__all__ = ["settled", "shielded"]

_T = TypeVar("_T")

# NOTE: [Interrupts] An interrupt (Ctrl-C, a signal handler that raises) may come at the beginning of every function of
# Python, at the end of every call and at every jump back; so also in what puts things right after a first one, when
# it is pressed twice. It cannot come between the end of a `try` and the first call of its `except` or `finally`. So
# what must not be left undone may be called again, and is called from there: two interrupts are not enough to leave
# it, wherever they come; a third would have to hit the very beginning of one function.


def shielded(function: Callable[[], object]) -> None:
    """Call a function that may be called again until it was not interrupted; interrupt then."""
    try:
        function()
    except KeyboardInterrupt:
        try:
            function()
        except KeyboardInterrupt:
            shielded(function)
            raise
        raise


def settled(body: Callable[[], _T], settle: Callable[[BaseException], object]) -> _T:
    """Call a function; where it fails, put things right before the error goes on.

    Args:
        body: what may fail.
        settle: called with the error, again where it is interrupted. It may raise another one instead.

    Raises:
        KeyboardInterrupt: also where only `settle` was interrupted, after it was done.
    """
    try:
        return body()
    except BaseException as error:
        try:
            settle(error)
        except KeyboardInterrupt:
            shielded(partial(settle, error))
            raise
        raise
