"""`plan` and `transplant` over a process group: from what ranks hold, to what ranks hold."""

from __future__ import annotations

import os
from collections.abc import Iterable
from time import perf_counter
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..errors import Finding, PlanError
from ..model_plan import ModelPlan
from ..options import Options
from ..report import Report, Summary
from ..typing import Casting, Hooks, Model, Overflow, Progress, Rules, Source
from .agree import compare, first_difference
from .errors import SyncError
from .layout import Tensors, describe_model
from .passing import pass_over
from .summary import explained
from .talk import Talk, failure_of
from .work import Want, Work

__all__ = ["Transfer", "pass_over", "plan", "transplant"]

# Of each rank, for the buffers that messages go through.
STAGING = 256 << 20


def plan(
    model: Model | None,
    source: Source | None,
    rules: Rules = (),
    *,
    group: dist.ProcessGroup | None = None,
    src: int | None = None,
    identity: bool = True,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    casting: Casting = "same_kind",
    overflow: Overflow = "ignore",
    hooks: Hooks = "refuse",
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
    source: Source | None,
    rules: Rules = (),
    *,
    group: dist.ProcessGroup | None = None,
    src: int | None = None,
    identity: bool = True,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    casting: Casting = "same_kind",
    overflow: Overflow = "ignore",
    hooks: Hooks = "refuse",
    mmap: bool = False,
    staging: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """`plan(...).apply()`: fill the models of a group's ranks from what its ranks hold. Collective.

    Args:
        model, source, rules, group, src: as for `paramkit.distributed.plan`.
        identity, allow_missing, allow_unexpected, casting, overflow, hooks, mmap, staging: the same.
        progress: as for `Transfer.apply`.

    Returns:
        What this rank wrote.

    Raises:
        SyncError: on every rank. Before anything was sent, or else this rank's model is torn.
        RuntimeError: torch.distributed is not initialised.

    Example:
        >>> import tempfile, torch, paramkit.distributed as pkd
        >>> store = torch.distributed.FileStore(tempfile.mktemp(), 1)
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> model = {"w": torch.zeros(2, dtype=torch.bfloat16)}
        >>> pkd.transplant(model, {"w": torch.ones(2)}, src=0).summary.bytes
        4
        >>> torch.distributed.destroy_process_group()
    """
    made = plan(
        model,
        source,
        rules,
        group=group,
        src=src,
        identity=identity,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
        casting=casting,
        overflow=overflow,
        hooks=hooks,
        mmap=mmap,
        staging=staging,
    )
    return made.apply(progress=progress)


class Transfer:
    """A transfer between the ranks of a group, ready to run again and again. Made by `plan`.

    Every method but `explain` is collective: all ranks of the group call it.

    Example:
        >>> import tempfile, torch, paramkit.distributed as pkd
        >>> store = torch.distributed.FileStore(tempfile.mktemp(), 1)
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> model = {"a": torch.zeros(2), "b": torch.zeros(2)}
        >>> transfer = pkd.plan(model, {"a": torch.ones(2), "b": torch.ones(2)})
        >>> transfer.apply().summary.bytes
        16
        >>> print(transfer.explain())
        rank 0 of 1: 2 tensors, 16 bytes written; 2 pieces held here, 0 received
        staging: 0 bytes
        >>> torch.distributed.destroy_process_group()
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
        self._files: ModelPlan | None = None  # where there is no work: each rank reads for itself
        self._compile(source, error)

    def _compile(self, source: Any, error: BaseException | None = None) -> None:
        talk = self._talk
        if self._src is not None and talk.rank != self._src:
            source = None
        failure = None if error is None else failure_of(error)
        heard = talk.gather((failure, _kind(source), None if failure else self._src))
        talk.judge([f for f, *_ in heard], error, "reading the arguments")
        first_difference([{"src": repr(src)} for _, _, src in heard])
        kinds = [kind for _, kind, _ in heard]
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
            self._work = None
        else:
            if paths:  # src alone reads it, as tensors in memory, mapped
                source = talk.together("opening the source", lambda: _mapped(source))
            self._work = Work(talk, Want(self._model, source, self._options), "planning")
            self._files = None

    def _same_arguments(self) -> None:
        """Files are each rank's own matter, but all must want the same of them."""
        talk, model = self._talk, self._model

        def mine() -> tuple[Tensors | None, None]:
            return None if model is None else describe_model(model, talk.ranks, talk.rank), None

        compare(talk, mine, Want(model, None, self._options).settings(), "planning")

    def _opened(self, source: Any) -> ModelPlan | None:
        return None if self._model is None else ModelPlan(self._model, source, self._options)

    # -- public --

    def apply(self, source: Source | None = None, *, progress: Progress | None = None) -> Report:
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
        work = self._work
        if work is None:
            return self._apply_files(start, progress)
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
        """What this rank writes, sends and receives; never raises, and is not collective.

        Returns:
            Lines of text: tensors, bytes, with whom, and how much staging it takes.
        """
        if self._files is not None:
            return self._files.explain()
        if self._work is None:
            return "nothing is written on this rank"
        return explained(self._work)

    def __repr__(self) -> str:
        return f"<paramkit.distributed.Transfer: rank {self._talk.rank} of {self._talk.size}>"


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
