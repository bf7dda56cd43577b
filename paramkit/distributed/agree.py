"""What all ranks must have in common before anything is sent, and what each has to know of the others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import Finding
from .errors import SyncError
from .layout import Description, Held, Tensors
from .talk import Failure, Talk, failure_of

__all__ = ["Common", "Side", "agree_on", "compare", "first_difference"]


@dataclass(frozen=True)
class Side:
    """The destinations, or the sources, of all ranks together.

    Attributes:
        description: of the tensors, which all ranks that have them agree on.
        held: for each tensor the layouts in which ranks hold it.
        ranks: those that hold some.
    """

    description: Description
    held: tuple[tuple[Held, ...], ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Common:
    """What all ranks agreed on.

    Attributes:
        dst, src: what is written and what is read.
        streams: ranks that take whole tensors one by one.
        cuda: whether some rank has tensors on a GPU.
    """

    dst: Side
    src: Side
    streams: tuple[int, ...]
    cuda: bool


@dataclass
class _Brief:
    """What a rank says of itself first: short, whatever the model."""

    error: Failure | None
    versions: tuple[tuple[str, str], ...]
    settings: str
    dst: tuple[str, str] | None  # digests of the meaning, and of everything
    src: tuple[str, str] | None
    cuda: bool
    stream: bool


def compare(
    talk: Talk,
    work: Callable[[], tuple[Tensors | None, Tensors | None]],
    settings: Mapping[str, str],
    doing: str,
    stream: bool = False,
) -> tuple[list[_Brief], Tensors | None, Tensors | None]:
    """Make sure that all ranks want the same. Collective.

    Args:
        talk: the group.
        work: gives what this rank writes and reads, or raises.
        settings: name -> text; equal on all ranks, or it is an error that names the first difference.
        doing: for the error.
        stream: this rank takes whole tensors one by one, of no model: those of `work`, or else of the source.

    Returns:
        What each rank said, and what `work` gave.

    Raises:
        SyncError: on every rank: one rank's own error, or the first thing in which two ranks differ.
    """
    error: BaseException | None = None
    dst: Tensors | None = None
    src: Tensors | None = None
    try:
        dst, src = work()
    except BaseException as caught:
        error = caught
    brief = _Brief(
        None if error is None else failure_of(error),
        (("torch", torch.__version__), ("paramkit", _version())),
        _digest(settings),
        _digests(dst),
        _digests(src),
        any(_on_gpu(t) for side in (dst, src) if side is not None for t in side.local),
        stream,
    )
    briefs = talk.gather(brief)
    talk.judge([b.error for b in briefs], error, doing)
    _same_versions(briefs)
    if any(b.settings != briefs[0].settings for b in briefs):
        first_difference(talk.gather(dict(settings)))
    if all(b.dst is None and not b.stream for b in briefs):
        raise SyncError(f"no rank of {talk.size} has a model to write; nothing was written.")
    _same_meaning(talk, "source", src, [b.src for b in briefs])
    _same_meaning(talk, "model", dst, [b.dst for b in briefs])
    return briefs, dst, src


def agree_on(
    talk: Talk,
    work: Callable[[], tuple[Tensors | None, Tensors | None]],
    settings: Mapping[str, str],
    doing: str,
    stream: bool = False,
) -> tuple[Common, Tensors | None, Tensors | None]:
    """`compare`, and tell each other who holds what. Collective.

    Args, Raises:
        as `compare`.
    """
    briefs, dst, src = compare(talk, work, settings, doing, stream)
    streams = tuple(r for r, b in enumerate(briefs) if b.stream)
    as_source = any(briefs[r].dst is None for r in streams)
    if all(b.src is None for b in briefs):
        raise SyncError(f"no rank of {talk.size} has a source; nothing was written.")
    source = _side(talk, src, [b.src for b in briefs])
    if as_source:
        if any(b.dst is not None for b in briefs):
            raise SyncError(
                "some ranks take a stream without saying which tensors, and others write a model; nothing was "
                "sent: give the ranks of the stream a mapping of meta tensors as model."
            )
        model = _like_source(source, streams)
    else:
        model = _side(talk, dst, [b.dst for b in briefs])
    return Common(model, source, streams, any(b.cuda for b in briefs)), dst, src


def _like_source(source: Side, ranks: tuple[int, ...]) -> Side:
    """Destinations that are the source's tensors, in full on some ranks."""
    d = source.description
    n = len(d.names)
    description = Description(
        d.names, d.shapes, d.dtypes, ("tensor",) * n, ((),) * n, tuple(range(n))
    )
    return Side(description, ((Held((len(ranks),), ranks, (None,)),),) * n, ranks)


def _side(talk: Talk, own: Tensors | None, digests: Sequence[tuple[str, str] | None]) -> Side:
    mine = None if own is None else own.description
    holders = [r for r, d in enumerate(digests) if d is not None]
    # Of ranks that say the same, the first speaks; where all say the same, nobody has to.
    said: dict[str, Description] = {}
    for r in holders:
        digest = digests[r]
        assert digest is not None
        if digest[1] in said:
            continue
        alike = all(d is not None and d[1] == digest[1] for d in digests)
        if alike and mine is not None:
            said[digest[1]] = mine
        else:
            said[digest[1]] = talk.tell(mine if talk.rank == r else None, r)
    described = list(said.values())
    return Side(described[0], _held(described), tuple(holders))


def _held(described: Sequence[Description]) -> tuple[tuple[Held, ...], ...]:
    """The layouts of every tensor; ranks that each have all of one are put together."""
    out: list[tuple[Held, ...]] = []
    known: dict[tuple[Held, ...], tuple[Held, ...]] = {}
    for k in range(len(described[0].names)):
        found = tuple(d.layouts[d.held[k]] for d in described)
        merged = known.get(found)
        if merged is None:
            full = [h.ranks[0] for h in found if len(h.ranks) == 1]
            rest = tuple(dict.fromkeys(h for h in found if len(h.ranks) > 1))
            whole = (Held((len(full),), tuple(full), (None,)),) if full else ()
            merged = known[found] = (*whole, *rest)
        out.append(merged)
    return tuple(out)


def _same_versions(briefs: Sequence[_Brief]) -> None:
    for k, (name, version) in enumerate(briefs[0].versions):
        for rank, brief in enumerate(briefs):
            other = brief.versions[k][1]
            if other != version:
                raise SyncError(
                    f"ranks run different releases of {name}; nothing was sent.",
                    [Finding(name, "type", f"{other} on rank {rank}", f"{version}, as on rank 0")],
                    rank,
                )


def first_difference(said: Sequence[Mapping[str, str]]) -> None:
    """Raise if ranks were given different arguments.

    Args:
        said: of each rank, name -> text.

    Raises:
        SyncError: with the first argument in which a rank differs from rank 0.
    """
    for rank, other in enumerate(said):
        for name in {**said[0], **other}:
            a, b = said[0].get(name, "nothing"), other.get(name, "nothing")
            if a != b:
                raise SyncError(
                    "ranks were given different arguments; nothing was sent.",
                    [Finding(name, "rule", f"{b} on rank {rank}", f"{a}, as on rank 0")],
                    rank,
                )


def _same_meaning(
    talk: Talk,
    what: str,
    own: Tensors | None,
    digests: Sequence[tuple[str, str] | None],
) -> None:
    holders = [r for r, d in enumerate(digests) if d is not None]
    if not holders:
        return
    mine = None if own is None else own.description
    first = digests[holders[0]]
    odd = next((r for r in holders if digests[r][0] != first[0]), None)  # type: ignore[index]
    if odd is None:
        return
    ones = talk.tell(mine if talk.rank == holders[0] else None, holders[0])
    others = talk.tell(mine if talk.rank == odd else None, odd)
    found = ones.difference(others)
    assert found is not None
    name, a, b = found
    raise SyncError(
        f"ranks have different {what}s; nothing was sent.",
        [Finding(name, "shape", f"{b} on rank {odd}", f"{a}, as on rank {holders[0]}")],
        odd,
    )


def _digests(side: Tensors | None) -> tuple[str, str] | None:
    if side is None:
        return None
    return side.description.meaning().digest(), side.description.digest()


def _digest(settings: Mapping[str, str]) -> str:
    return hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()


def _on_gpu(tensor: Any) -> bool:
    return bool(tensor.device.type != "cpu" and not tensor.is_meta)


def _version() -> str:
    from .. import __version__

    return __version__
