"""One pass of a transfer on all ranks: checked, sent, and agreed on."""

from __future__ import annotations

from collections.abc import Callable, Generator

from ..errors import Finding
from ..torn import Torn, clear, mark, reason_of
from .errors import SyncError
from .run import Course, Stopped
from .talk import Talk
from .work import Work

__all__ = ["Abandoned", "pass_over"]

Progress = Callable[[int, int], object]


class Abandoned(BaseException):
    """Thrown into a pass that is not to talk to its group any more."""


def pass_over(
    work: Work,
    version: int,
    progress: Progress | None,
    model: object,
    refusal: Exception | None = None,
) -> Generator[int, None, int]:
    """Check on all ranks, send and write, and agree on the outcome. Yields after each pass.

    Args:
        work: compiled on all ranks.
        version: that this rank holds; the one that is sent is one more than the highest of all ranks.
        progress: as for `Transfer.apply`.
        model: is marked where it is left torn.
        refusal: why this rank does not take part; the others are told.

    Returns:
        The version that all ranks hold now.

    Raises:
        SyncError: on every rank that can be reached.
    """
    talk = work.talk
    error: BaseException | None = refusal
    try:
        if refusal is None:
            work.check()
    except BaseException as caught:
        error = caught
    states = talk.numbers([error is not None, version, work.number])
    _same_transfer([number for _, _, number in states])
    if any(failed for failed, *_ in states):
        talk.agree(error, "checking")
    version = max(v for _, v, _ in states) + 1
    course = Course()
    stopped = False
    try:
        for k in work.run(version, course, progress):
            if stopped:
                continue
            try:
                yield k
            except Abandoned:
                raise
            except BaseException as error:
                # Whoever takes the tensors has stopped: the other ranks still wait for messages.
                stopped = True
                course.fail(_not_taken(talk) if isinstance(error, GeneratorExit) else error)
        states = talk.numbers([course.error is not None, version])
        if any(failed for failed, _ in states):
            told = None if isinstance(course.error, Stopped) else course.error
            talk.agree(told, "writing")
    except BaseException as failed:
        _mark(work, course, failed, model)
        raise
    work.torn = None
    clear(model, work.summary.names)
    return version


def _same_transfer(numbers: list[int]) -> None:
    """Two of equal shapes would take each other's values.

    Raises:
        SyncError: on every rank, if they are not all in one transfer.
    """
    rank = next((r for r, number in enumerate(numbers) if number != numbers[0]), None)
    if rank is not None:
        raise SyncError(
            "ranks run different transfers at once; nothing was sent.",
            [
                Finding(
                    "transfer",
                    "conflict",
                    f"number {numbers[rank]} on rank {rank}",
                    f"number {numbers[0]}, as on rank 0 (they are numbered as they are planned)",
                    "take the steps of several transfers in one order on all ranks",
                )
            ],
            rank,
        )


def _not_taken(talk: Talk) -> SyncError:
    return SyncError("the tensors of a stream were not taken to the end.", (), talk.rank)


def _mark(work: Work, course: Course, error: BaseException, model: object) -> None:
    """Say what this rank's model holds."""
    if not course.begun or not work.summary.names:
        return
    written, left = work.unwritten(course)
    state = Torn(tuple(written), tuple(left), reason_of(error))
    work.torn = state
    mark(model, state)
