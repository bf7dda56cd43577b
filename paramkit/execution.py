"""Performing a compiled plan: all of it, or put back, or a model that is known to be torn."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .backend.native import moved_by_callback
from .errors import PlanError, SourceError
from .interrupts import settled
from .journal import Journal
from .stream import Streamed
from .torn import Torn, TornError, clear, mark, reason_of, torn_error

__all__ = ["execute", "write"]

Progress = Callable[[int, int], object]


@dataclass
class Course:
    """How far a run came.

    Attributes:
        begun, finished: steps of a `Streamed` plan.
        runs: how many runs a backend's plan had behind it; None before this one was asked for.
    """

    begun: int = 0
    finished: int = 0
    runs: int | None = None


def execute(
    compiled: Any,
    names: Sequence[str],
    write_names: Sequence[str],
    model: object,
    *,
    progress: Progress | None = None,
    atomic: bool = False,
    apart: Collection[str] = (),
) -> bool:
    """Run a compiled plan.

    Args:
        compiled: a backend's plan, or a `Streamed` one.
        names: of its destinations.
        write_names: for each write the name of its destination.
        model: what is marked where it is left torn.
        progress: called now and then with (bytes written, bytes in all).
        atomic: put everything back on a failure.
        apart: names of destinations that are not in the model yet: what is written there tears nothing.

    Returns:
        False, and nothing was written, if a tensor is not what the plan was made for.

    Raises:
        TornError: a failure after something was written, without `atomic`. An interrupt stays what it is;
            the model is marked all the same.
        PlanError: inside a transform under which torch refuses these writes; nothing was written.
    """
    _check_transforms()
    journal = Journal() if atomic else None
    course = Course()

    def settle(error: BaseException) -> TornError | None:
        if journal is not None:
            journal.restore()
            return None
        state = _state(compiled, names, write_names, error, course, frozenset(apart))
        if state is None:
            return None
        mark(model, state)
        if not isinstance(error, Exception):
            return None
        return torn_error(state, getattr(error, "findings", ()))

    if not settled(partial(write, compiled, journal, progress, course), settle):
        return False
    clear(model, names)
    return True


def _check_transforms() -> None:
    """Raise where torch would refuse the first write: it changes what the transformed function captured."""
    stack = torch._C._functorch.get_interpreter_stack()
    if stack and any(layer.key() != torch._C._functorch.TransformType.Vmap for layer in stack):
        raise PlanError(
            "a model cannot be written inside torch.func.grad, vjp, jvp or functionalize: it is no argument of the "
            "function that is transformed. Write it before. Nothing was written."
        )


def write(
    compiled: Any,
    journal: Journal | None = None,
    progress: Progress | None = None,
    course: Course | None = None,
) -> bool:
    """Run a compiled plan, noting in a journal what it overwrites.

    Args:
        compiled, progress: as for `execute`.
        journal: None keeps nothing.
        course: is told how far it came.

    Returns:
        False, and nothing was written, if a tensor is not what the plan was made for.
    """
    streamed = isinstance(compiled, Streamed)
    if (streamed or journal is not None) and (compiled.replaced() or any(compiled.moved())):
        return False
    if streamed:
        _run_steps(compiled, journal, progress, course or Course())
        return True
    if journal is not None:
        journal.note_plan(compiled)
    if course is not None:
        course.runs = compiled.runs()
    return bool(compiled.run(progress))


def _run_steps(
    compiled: Streamed, journal: Journal | None, progress: Progress | None, course: Course
) -> None:
    total = sum(step.bytes for step in compiled.steps)
    written = 0
    for step in compiled.loaded(writing=True):
        if journal is not None:
            journal.note_plan(step.plan)
        course.begun += 1  # before: from here on it may have been written in part
        compiled.run_step(step)
        course.finished += 1
        written += step.bytes
        if progress is not None:
            progress(written, total)
            if written < total and (compiled.replaced() or any(compiled.moved())):
                raise moved_by_callback()


def _state(
    compiled: Any,
    names: Sequence[str],
    write_names: Sequence[str],
    error: BaseException,
    course: Course,
    apart: frozenset[str],
) -> Torn | None:
    """What was written to the model; None where it is nothing, or everything."""
    if apart.issuperset(names):
        return None
    if isinstance(compiled, Streamed):
        left = _left_by_steps(compiled, names, error, course, apart)
    elif course.runs in (None, compiled.runs()):
        return None  # before its first write
    else:
        # What a failed run of sources in memory did is told from the values themselves.
        left = _left_by_values(compiled, write_names)
    if not left:
        return None
    own = [n for n in names if n not in apart]
    return Torn(
        tuple(n for n in own if n not in left), tuple(n for n in own if n in left), reason_of(error)
    )


def _left_by_values(compiled: Any, write_names: Sequence[str]) -> set[str] | None:
    """Names that do not hold the new values in full; None where no write was done."""
    try:
        with compiled.claim("compare"):
            if any(
                compiled.moved()
            ):  # memory that was planned for is gone: nothing can be looked at
                return set(write_names)
            differ = set(compiled.verify())
    except Exception:  # a device that fails again; the first error is the one to tell
        return set(write_names)
    return None if len(differ) == len(write_names) else {write_names[w] for w in differ}


def _left_by_steps(
    compiled: Streamed,
    names: Sequence[str],
    error: BaseException,
    course: Course,
    apart: frozenset[str],
) -> set[str] | None:
    """Names that do not hold the new values in full; None where nothing was written to the model."""
    begun = {names[d] for step in compiled.steps[: course.begun] for d in step.dsts}
    if begun <= apart:
        return None
    steps = compiled.steps[course.finished :]
    if not steps and isinstance(error, SourceError):
        # A file changed while it was read: what came from files may be anything.
        steps = [step for step in compiled.steps if step.reads]
    return {names[d] for step in steps for d in step.dsts}
