"""A process group, and what its ranks tell each other beside the values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from ..errors import PlanError
from .errors import SyncError

__all__ = ["Failure", "Talk", "Unreachable", "failure_of"]

T = TypeVar("T")
# What a rank says of an error: summary, findings, and whether it says already that it is of some rank.
Failure = tuple[str, tuple[Any, ...], "int | None"]


class Talk:
    """The collectives that agreement needs.

    Args:
        group: a process group that this rank belongs to; None: the default group.

    Attributes:
        group: the process group.
        rank, size: of this process in the group, and of the group.
        ranks: the global rank of each of the group's.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: this process is not in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialised: start with torchrun and call "
                "torch.distributed.init_process_group() first"
            )
        found = dist.group.WORLD if group is None else group
        if found is None or isinstance(found, int) or dist.get_rank(found) < 0:
            raise ValueError("group: this process is not one of its ranks")
        self.group: dist.ProcessGroup = found
        self.rank, self.size = dist.get_rank(found), dist.get_world_size(found)
        self.ranks = tuple(dist.get_process_group_ranks(found))
        kinds = {device.type for device in found._device_types}
        # Small tensors of agreement go where the group can send them.
        self.device = torch.device("cpu") if "cpu" in kinds else torch.device("cuda")

    def gather(self, said: T) -> list[T]:
        """What every rank says, in the order of ranks. Collective."""
        out: list[Any] = [None] * self.size
        with self.reaching("ranks of the group"):
            dist.all_gather_object(out, said, self.group)
        return out

    def tell(self, said: T | None, rank: int) -> T:
        """What one rank says. Collective."""
        box: list[Any] = [said]
        with self.reaching(f"rank {rank}"):
            dist.broadcast_object_list(box, self.ranks[rank], self.group)
        found: T = box[0]
        return found

    def numbers(self, mine: Sequence[int]) -> list[list[int]]:
        """A few integers of every rank. Collective, and cheap."""
        sent = torch.tensor(mine, dtype=torch.int64, device=self.device)
        out = torch.empty(self.size, len(mine), dtype=torch.int64, device=self.device)
        with self.reaching("ranks of the group"):
            dist.all_gather(list(out.unbind()), sent, self.group)
        found: list[list[int]] = out.tolist()
        return found

    def together(self, doing: str, work: Callable[[], T]) -> T:
        """Do something on every rank; where it fails on one, all raise.

        Raises:
            SyncError: the first rank's error, with what it found.
        """
        result, error = _tried(work)
        self.agree(error, doing)
        return cast(T, result)

    def collected(self, doing: str, work: Callable[[], T]) -> list[T]:
        """What comes of something that every rank does; where it fails on one, all raise.

        Raises:
            SyncError: as `together`.
        """
        result, error = _tried(work)
        said = self.gather((None if error is None else failure_of(error), result))
        self.judge([failure for failure, _ in said], error, doing)
        return [cast(T, found) for _, found in said]

    def agree(self, error: BaseException | None, doing: str) -> None:
        """Raise on every rank if one of them has an error.

        Raises:
            SyncError: the first rank's error, from this rank's own if it has one.
        """
        said = self.gather(None if error is None else failure_of(error))
        self.judge(said, error, doing)

    def judge(
        self, said: Sequence[Failure | None], error: BaseException | None, doing: str
    ) -> None:
        """Raise if one of the ranks said that it failed."""
        bad = [(rank, failure) for rank, failure in enumerate(said) if failure is not None]
        if not bad:
            return
        rank, (summary, findings, told) = bad[0]
        others = [r for r, _ in bad[1:]]
        also = f" (also on rank{'s' if len(others) > 1 else ''} {_few(others)})" if others else ""
        where = f"{doing} failed on rank {rank} of {self.size}{also}: " if told is None else ""
        made = SyncError(f"{where}{summary}", findings, rank if told is None else told)
        if error is not None and not isinstance(error, Exception):
            raise error from made  # an interrupt stays one where it came: who tries again does not catch it
        raise made from error

    def reaching(self, whom: str) -> _Reaching:
        """Say which ranks could not be reached, where torch says which connection failed."""
        return _Reaching(whom)


class _Reaching:
    """The context of `Talk.reaching`; a class, as a step enters some of them and is short."""

    __slots__ = ("_whom",)

    def __init__(self, whom: str) -> None:
        self._whom = whom

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (RuntimeError, dist.DistError)) and not isinstance(error, PlanError):
            raise Unreachable(self._whom, error) from error


class Unreachable(SyncError):
    """A rank that is gone, or did not answer within the group's timeout."""

    def __init__(self, whom: str, error: BaseException | str) -> None:
        self.whom, self.why = whom, str(error)
        super().__init__(
            f"{whom} could not be reached: gone, or no answer within the group's timeout "
            f"({str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__})"
        )

    def __reduce__(self) -> tuple[type, Any]:
        return type(self), (self.whom, self.why)


def _tried(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return work(), None
    except BaseException as error:  # also an interrupt: the other ranks would wait
        return None, error


def failure_of(error: BaseException) -> Failure:
    """An error as another rank can be told of it."""
    if isinstance(error, SyncError):
        return error.summary, error.findings, error.rank
    if isinstance(error, PlanError):
        return error.summary, error.findings, None
    return f"{type(error).__name__}: {error}", (), None


def _few(ranks: Sequence[int]) -> str:
    some = ", ".join(map(str, ranks[:8]))
    return some if len(ranks) <= 8 else f"{some} and {len(ranks) - 8} more"
