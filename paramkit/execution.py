"""Performing a compiled plan: all of it, or put back, or a model that is known to be torn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .errors import PlanError
from .journal import Journal, shielded
from .stream import Streamed
from .torn import Torn, clear, mark, torn_error

__all__ = ["execute"]

Progress = Callable[[int, int], object]


def execute(
    compiled: Any,
    names: Sequence[str],
    write_names: Sequence[str],
    model: object,
    *,
    progress: Progress | None = None,
    atomic: bool = False,
) -> bool:
    """Run a compiled plan.

    Args:
        compiled: a backend's plan, or a `Streamed` one.
        names: of its destinations.
        write_names: for each write the name of its destination.
        model: what is marked where it is left torn.
        progress: called now and then with (bytes written, bytes in all).
        atomic: put everything back on a failure.

    Returns:
        False, and nothing was written, if a tensor is not what the plan was made for.

    Raises:
        TornError: a failure after something was written, without `atomic`. An interrupt stays what it is;
            the model is marked all the same.
    """
    journal = Journal() if atomic else None
    try:
        if isinstance(compiled, Streamed):
            if compiled.replaced() or any(compiled.moved()):
                return False
            done: list[int] = []
            _run_steps(compiled, journal, progress, done)
        else:
            if journal is not None:
                journal.note_plan(compiled)
            if not compiled.run(progress):
                return False
    except BaseException as error:
        if journal is not None:
            shielded(journal.restore)
            raise
        steps = done if isinstance(compiled, Streamed) else None
        state = _state(compiled, names, write_names, error, steps)
        if state is None:
            raise
        mark(model, state)
        if not isinstance(error, Exception):
            raise
        raise torn_error(state, getattr(error, "findings", ())) from error
    clear(model, names)
    return True


def _run_steps(
    compiled: Streamed, journal: Journal | None, progress: Progress | None, done: list[int]
) -> None:
    total = sum(step.bytes for step in compiled.steps)
    written = 0
    for number, step in enumerate(compiled.loaded()):
        if journal is not None:
            journal.note_plan(step.plan)
        done.append(number)  # before: from here on it may have been written in part
        compiled.run_step(step)
        written += step.bytes
        if progress is not None:
            progress(written, total)


def _state(
    compiled: Any,
    names: Sequence[str],
    write_names: Sequence[str],
    error: BaseException,
    steps: list[int] | None,
) -> Torn | None:
    """What was written; None where it is nothing, or everything."""
    if steps is None:
        # What a failed run of sources in memory did is told from the values themselves.
        differ = set(compiled.verify())
        left = {write_names[w] for w in differ}
        if not differ or len(differ) == len(write_names):
            return None
    else:
        if not steps:
            return None
        left = set()
        for number, step in enumerate(compiled.steps):
            # The last one that was begun counts as unwritten: it may be, in part.
            if number not in steps[:-1]:
                left.update(names[d] for d in step.dsts)
    reason = error.summary if isinstance(error, PlanError) else f"{type(error).__name__}: {error}"
    return Torn(
        tuple(n for n in names if n not in left), tuple(n for n in names if n in left), reason
    )
