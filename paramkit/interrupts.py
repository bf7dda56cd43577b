"""What has to be done to its end, whatever the user presses meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

__all__ = ["grad_mode_kept", "settled", "shielded", "without_grad"]

_T = TypeVar("_T")

# NOTE: [Interrupts] An interrupt (Ctrl-C, or the SystemExit of a handler of SIGTERM) may come at the beginning of every
# function of Python, at the end of a call and at a jump back; so also in what puts things right after a first one. It
# cannot come between what ends a `try` and the first call in its `except` or `finally`. So what must not be left
# undone is such that it may be called again, is called from there, and again from there: two interrupts are not
# enough to leave it, wherever they come.
_INTERRUPTS = (KeyboardInterrupt, SystemExit)


def shielded(function: Callable[[], object]) -> None:
    """Call a function that may be called again until it was not interrupted; interrupt then.

    One that comes before its first call leaves it undone, as it would the call of any function.
    """
    try:
        function()
    except _INTERRUPTS:
        try:
            function()
        except _INTERRUPTS:
            shielded(function)
            raise
        raise


def settled(body: Callable[[], _T], settle: Callable[[BaseException], BaseException | None]) -> _T:
    """Call a function; where it fails, put things right before the error goes on.

    Args:
        body: what may fail.
        settle: called with the error; again where it was interrupted itself. It may return an error to raise instead.

    Raises:
        BaseException: of `settle`, if there was one: an interrupt is raised when it is done; else what it returned,
            else that of `body`.
    """
    try:
        return body()
    except BaseException as error:
        try:
            other = settle(error)
        # Whatever it is: a handler of a signal may raise what it likes.
        except BaseException:
            try:
                settle(error)
            except _INTERRUPTS:
                shielded(partial(settle, error))
                raise
            raise
        if other is None:
            raise
        try:
            raise other from error
        finally:
            del other  # it knows this frame


def grad_mode_kept(function: Callable[[], _T]) -> _T:
    """Call a function of which an interrupt at the end of one of torch's `no_grad` may leave gradients off."""
    before = torch.is_grad_enabled()
    try:
        return function()
    finally:
        torch._C._set_grad_enabled(before)


def without_grad(function: Callable[[], _T]) -> _T:
    """Call a function as `no_grad` does, whose own end an interrupt may prevent."""

    def off() -> _T:
        torch._C._set_grad_enabled(False)
        return function()

    return grad_mode_kept(off)
