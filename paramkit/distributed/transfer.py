"""`plan` and `transplant` over a process group: from what ranks hold, to what ranks hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from time import perf_counter
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor, nn

from ..errors import Finding, PlanError
from ..plan import ModelPlan, Options
from ..report import Report, Summary
from ..rules import Rule
from ..torn import Torn, clear, mark, reason_of
from .agree import agree_on
from .errors import SyncError
from .run import Course, Stopped
from .summary import explained
from .talk import Talk, failure_of
from .work import Want, Work

__all__ = ["Abandoned", "Transfer", "pass_over", "plan", "transplant"]

Progress = Callable[[int, int], object]
Model: TypeAlias = "nn.Module | Mapping[str, Tensor]"
# Of each rank, for the buffers that messages go through.
STAGING = 256 << 20


def plan(
    model: Model | None,
    source: Any,
    rules: Iterable[Rule] | str | os.PathLike[str] = (),
    *,
    group: dist.ProcessGroup | None = None,
    src: int | None = None,
    identity: bool = True,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    casting: str = "same_kind",
    overflow: str = "ignore",
    hooks: str = "refuse",
    mmap: bool = False,
    staging: int | None = None,
) -> Transfer:
    """Work out how the ranks of a group fill their models from what they hold. Collective.

    Every rank passes what it writes and what it holds: shards of DTensors, whole tensors, or nothing.
    Boxes of elements that the writer does not hold itself are sent to it, packed and unpacked by the fused
    kernels, through buffers of a fixed size. No rank ever has a whole tensor that it does not own.

    Args:
        model: what this rank writes: a module or mapping, with DTensors or plain tensors; None: nothing.
            Those that ranks pass must agree in names, global shapes and dtypes.
        source: what this rank holds: a module or mapping, None: nothing. A plain tensor is held in full.
            Or, on every rank, a path that all can read (see `paramkit.open_source`): each reads its part.
        rules: as for `paramkit.plan`; the same on every rank, like all that follows.
        group: the ranks that take part; None: all.
        src: the rank of the group whose source counts; others may pass anything.
        identity, allow_missing, allow_unexpected, casting, overflow, hooks, mmap: as for `paramkit.plan`.
        staging: bytes of this rank's buffers at most, where that is at least 4 KiB a message; None: 256 MiB.

    Returns:
        A `Transfer`; its `apply()` sends and writes.

    Raises:
        SyncError: on every rank, before anything is sent: what is wrong on one of them, or the first
            thing in which they differ.
        RuntimeError: torch.distributed is not initialised.

    Example:
        >>> import os, tempfile, torch, paramkit.distributed as pkd
        >>> store = torch.distributed.FileStore(tempfile.mktemp(), 1)
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> model, trained = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> report = pkd.plan(model, trained).apply()
        >>> torch.equal(model.weight, trained.weight)
        True
        >>> torch.distributed.destroy_process_group()
    """
    talk = Talk(group)
    made: dict[str, Any] = {}

    def options() -> None:
        if src is not None and not (
            isinstance(src, int) and not isinstance(src, bool) and 0 <= src < talk.size
        ):
            raise ValueError(f"src must be a rank of the group, 0 to {talk.size - 1}, got {src!r}")
        made["options"] = Options.make(
            rules,
            allow_missing,
            allow_unexpected,
            STAGING if staging is None else staging,
            identity=identity,
            casting=casting,
            overflow=overflow,
            hooks=hooks,
            mmap=mmap,
        )

    error: BaseException | None = None
    try:
        options()
    except BaseException as caught:  # it must not leave the others waiting
        error = caught
    return Transfer(model, source, talk, made.get("options"), src, error)


def transplant(
    model: Model | None,
    source: Any,
    rules: Iterable[Rule] | str | os.PathLike[str] = (),
    *,
    group: dist.ProcessGroup | None = None,
    src: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """`plan(...).apply()`: fill the models of a group's ranks from what its ranks hold. Collective.

    Args:
        model, source, rules, group, src, options: as for `paramkit.distributed.plan`.
        progress: as for `Transfer.apply`.

    Returns:
        What this rank wrote.

    Raises:
        SyncError: on every rank.
    """
    return plan(model, source, rules, group=group, src=src, **options).apply(progress=progress)


class Transfer:
    """A transfer between the ranks of a group, ready to run again and again. Made by `plan`.

    Every method but `explain` is collective: all ranks of the group call it.
    """

    def __init__(
        self,
        model: Model | None,
        source: Any,
        talk: Talk,
        options: Options | None,
        src: int | None,
        error: BaseException | None = None,
    ) -> None:
        self._talk, self._model, self._src = talk, model, src
        self._options = Options() if options is None else options
        self._work: Work | None = None
        self._files: ModelPlan | None = None
        self._from_files = False
        self._compile(source, error)

    def _compile(self, source: Any, error: BaseException | None = None) -> None:
        talk = self._talk
        if self._src is not None and talk.rank != self._src:
            source = None
        failure = None if error is None else failure_of(error)
        heard = talk.gather((failure, _kind(source), None if failure else self._src))
        talk.judge([f for f, *_ in heard], error, "reading the arguments")
        said = [(kind, src) for _, kind, src in heard]
        odd = next((r for r, (_, src) in enumerate(said) if src != said[0][1]), None)
        if odd is not None:
            raise SyncError(
                "ranks were given different arguments; nothing was sent.",
                [
                    Finding(
                        "src",
                        "rule",
                        f"{said[odd][1]} on rank {odd}",
                        f"{said[0][1]}, as on rank 0",
                    )
                ],
                odd,
            )
        kinds = [kind for kind, _ in said]
        paths = [rank for rank, kind in enumerate(kinds) if kind == "path"]
        if self._src is None and paths:
            odd = next((r for r in range(talk.size) if r not in paths), None)
            if odd is not None:
                raise SyncError(
                    "a path is a source on all ranks or on none; nothing was sent.",
                    [
                        Finding(
                            "source",
                            "type",
                            f"{kinds[odd]} on rank {odd}",
                            f"a path, as on rank {paths[0]}",
                            "pass src=rank if one rank alone can read it",
                        )
                    ],
                    odd,
                )
            self._same_arguments()
            # What fails leaves the transfer as it was.
            self._files = talk.together("planning", lambda: self._opened(source))
            self._work, self._from_files = None, True
        else:
            if paths:  # src alone reads it, as tensors in memory, mapped
                source = talk.together("opening the source", lambda: _mapped(source))
            self._work = Work(talk, Want(self._model, source, self._options), "planning")
            self._files, self._from_files = None, False

    def _same_arguments(self) -> None:
        """Files are each rank's own matter, but all must want the same of them."""
        from .layout import describe_model

        want = Want(self._model, None, self._options)
        talk = self._talk

        def mine() -> tuple[Any, Any]:
            if self._model is None:
                return None, None
            found = describe_model(self._model, talk.ranks, talk.rank)
            return found, found

        agree_on(talk, mine, want.settings(), "planning")

    def _opened(self, source: Any) -> ModelPlan | None:
        return None if self._model is None else ModelPlan(self._model, source, self._options)

    # -- public --

    def apply(self, source: Any = None, *, progress: Progress | None = None) -> Report:
        """Send and write. Collective.

        Args:
            source: another source of the same names, shapes, dtypes and layouts on every rank (None where
                this rank has none); used from now on. None on all ranks: the one in use.
            progress: called now and then with (bytes done, bytes in all of this rank); on rank 0 of the
                group only.

        Returns:
            What this rank wrote.

        Raises:
            SyncError: on every rank. Before anything was written, or else this rank's model is torn
                (`paramkit.torn`), where it has begun to write.
        """
        talk = self._talk
        if talk.rank != 0:
            progress = None
        if any(given for (given,) in talk.numbers([source is not None])):
            self._compile(source)
        start = perf_counter()
        if self._from_files:
            return self._apply_files(start, progress)
        work = self._work
        assert work is not None
        for _ in pass_over(work, 0, progress, self._model):
            pass
        return Report(work.summary, perf_counter() - start)

    def _apply_files(self, start: float, progress: Progress | None) -> Report:
        files, talk = self._files, self._talk
        made: list[Report] = []

        def ready() -> None:
            if files is not None and files._is_stale():
                raise files._stale()

        talk.together("checking", ready)
        if files is None:
            talk.agree(None, "writing")
            return Report(Summary(), perf_counter() - start)
        talk.together("writing", lambda: made.append(files.apply(progress=progress)))
        return made[0]

    def explain(self) -> str:
        """What this rank writes, sends and receives, as text."""
        if self._files is not None:
            return self._files.explain()
        if self._work is None:
            return "nothing is written on this rank"
        return explained(self._work)

    def __repr__(self) -> str:
        return f"<paramkit.distributed.Transfer: rank {self._talk.rank} of {self._talk.size}>"


class Abandoned(BaseException):
    """Thrown into a pass that is not to talk to its group any more."""


def pass_over(
    work: Work,
    version: int,
    progress: Progress | None,
    model: object,
    refusal: Exception | None = None,
) -> Any:
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


def _kind(source: object) -> str:
    if source is None:
        return "nothing"
    if isinstance(source, (str, os.PathLike)):
        return "path"
    if isinstance(source, (list, tuple)) and source:
        return "path" if all(isinstance(s, (str, os.PathLike)) for s in source) else "list"
    return "tensors"


def _mapped(source: Any) -> Any:
    from ..sources import open_source

    if _kind(source) != "path":
        return source
    found = open_source(source, mmap=True)
    wrong = [
        Finding(name, "type", type(tensor).__name__, "a tensor in a file of its own")
        for name, tensor in found.items()
        if not isinstance(tensor, Tensor)
    ]
    if wrong:
        raise PlanError(
            "one rank alone cannot send chunks of a checkpoint folder: leave src out, and let all ranks read it.",
            wrong,
        )
    return found
