"""What is odd about a checkpoint, told from its headers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ..errors import Numbers, dtype_text, fold_names, join_numbers, split_numbers
from ..sources import Stored
from .files import checkpoints
from .text import counted

__all__ = ["Odd", "odd_things"]

# Components that wrappers leave in names, and who does.
_WRAPPERS = {
    "module": "DataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
_FEW = 4


@dataclass(frozen=True)
class Odd:
    """Something odd.

    Attributes:
        kind: "empty", "dtypes", "shapes", "gap", "offset", "overlap", "strides", "name", "wrapper", "other".
        text: one line.
        names: the tensors.
        hint: what to do about it.
    """

    kind: str
    text: str
    names: list[str] = field(default_factory=list)
    hint: str = ""


def odd_things(tensors: Mapping[str, Any]) -> list[Odd]:
    """What is odd about named tensors, of which only the description is looked at.

    Example:
        >>> import torch
        >>> [odd.text for odd in odd_things({"a.w": torch.ones(2), "a.b": torch.ones(0)})]
        ['1 empty tensor: a.b']
    """
    return [
        *_empty(tensors),
        *_mixed(tensors),
        *_gaps(tensors),
        *_misplaced(tensors),
        *_names(tensors),
        *_wrappers(tensors),
        *_others(tensors),
    ]


def _some(names: Iterable[str]) -> str:
    folded = [text for text, _ in fold_names(names)]
    rest = f", and {len(folded) - _FEW} more" if len(folded) > _FEW else ""
    return ", ".join(folded[:_FEW]) + rest


def _empty(tensors: Mapping[str, Any]) -> Iterator[Odd]:
    names = [name for name, tensor in tensors.items() if not tensor.numel()]
    if names:
        yield Odd("empty", f"{counted(len(names), 'empty tensor')}: {_some(names)}", names)


def _mixed(tensors: Mapping[str, Any]) -> Iterator[Odd]:
    """Layers of one kind in different dtypes."""
    by_template: dict[str, list[str]] = {}
    for name in tensors:
        by_template.setdefault(split_numbers(name)[0], []).append(name)
    # Of several names with the same dtypes in the same layers one line: usually whole layers differ.
    found: dict[tuple[Any, ...], list[list[str]]] = {}
    for names in by_template.values():
        dtypes: dict[str, list[str]] = {}
        for name in names:
            dtypes.setdefault(dtype_text(tensors[name].dtype), []).append(name)
        if len(dtypes) < 2:
            continue
        key = tuple(
            (dtype, tuple(split_numbers(name)[1] for name in own)) for dtype, own in dtypes.items()
        )
        found.setdefault(key, []).append(names)
    for key, groups in found.items():
        first = groups[0]
        own = {
            dtype: [name for name in first if dtype_text(tensors[name].dtype) == dtype]
            for dtype, _ in key
        }
        texts = ", ".join(f"{dtype} in {_some(names)}" for dtype, names in own.items())
        more = f"; the same for {counted(len(groups) - 1, 'other name')}" if len(groups) > 1 else ""
        yield Odd("dtypes", f"mixed dtypes: {texts}{more}", [n for g in groups for n in g])


# ---- gaps ----------------------------------------------------------------------------------------


def _gaps(tensors: Mapping[str, Any]) -> Iterator[Odd]:
    """Layers that are missing in a range.

    Numbers with gaps may be meant: the modules of a Sequential without weights have none, and hybrid models
    have another kind of layer now and then. So a gap counts only where most numbers follow one another.
    """
    # (names up to the number) -> the number -> (what follows, as a template)
    places: dict[tuple[str, Numbers], dict[int, set[str]]] = {}
    for name in tensors:
        template, numbers = split_numbers(name)
        for k, number in enumerate(numbers):
            head, _, tail = template.partition(chr(k))
            place = places.setdefault((head, numbers[:k]), {})
            place.setdefault(number, set()).add(tail)
    found: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
    for (head, before), members in places.items():
        shown = join_numbers(head, before)
        tails = set().union(*members.values())
        lost = _missing(members)
        if lost:
            found.setdefault((head, tuple(lost), ""), []).extend(f"{shown}{n}" for n in lost)
        for tail in sorted(tails):
            own = [n for n, has in members.items() if tail in has]
            partly = [n for n in _missing(own) if n in members]
            if partly:
                key = (head, tuple(partly), "some")
                found.setdefault(key, []).extend(f"{shown}{n}{_readable(tail)}" for n in partly)
    for (_, _, where), names in found.items():
        what = "missing, though the layers around have it" if where else "missing altogether"
        yield Odd("gap", f"{_some(names)}: {what}", names)


def _readable(tail: str) -> str:
    """What follows a number, with further numbers as a star."""
    return "".join("*" if ord(c) < 9 else c for c in tail)


def _missing(numbers: Iterable[int]) -> list[int]:
    """The numbers that are not there between those that are, if most of those follow one another."""
    there = sorted(set(numbers))
    steps = [b - a for a, b in pairwise(there)]
    whole = sum(step == 1 for step in steps)
    # A number that is far out is something else, not a gap of a million layers.
    if 2 * whole <= len(steps) or sum(steps) > 2 * len(there) + 2:
        return []
    return [n for a, b in pairwise(there) for n in range(a + 1, b)]


# ---- places in files -----------------------------------------------------------------------------


def _misplaced(tensors: Mapping[str, Any]) -> Iterator[Odd]:
    stored = {n: t for n, t in tensors.items() if isinstance(t, Stored) and t.numel()}
    names = [n for n, t in stored.items() if t.offset % _alignment(t)]
    if names:
        text = (
            f"{counted(len(names), 'tensor')} at offsets that are no multiple of the element size"
        )
        hint = (
            "they cannot be mapped into memory as they are; paramkit transplant writes them aligned"
        )
        yield Odd("offset", f"{text}: {_some(names)}", names, hint)
    names = [n for n, t in stored.items() if not t.is_contiguous()]
    if names:
        text = f"{counted(len(names), 'tensor')} stored transposed or with gaps"
        yield Odd("strides", f"{text}: {_some(names)}", names)
    names = list(_overlapping(stored))
    if names:
        text = f"{counted(len(names), 'tensor')} sharing memory with others in part"
        yield Odd("overlap", f"{text}: {_some(names)}", names)


def _alignment(tensor: Stored) -> int:
    size = tensor.element_size()
    return size // 2 if tensor.dtype.is_complex else size


def _overlapping(stored: Mapping[str, Stored]) -> Iterator[str]:
    """Names of tensors that begin within another one, and are not the same one."""
    places = sorted(
        ((str(t.file.identity), t.offset, t.offset + t.nbytes, n) for n, t in stored.items()),
    )
    file, reach, keys = "", 0, set[object]()
    for own, begin, end, name in places:
        if own != file or begin >= reach:
            file, reach, keys = own, end, {stored[name].location()}
            continue
        reach = max(reach, end)
        if stored[name].location() not in keys:
            keys.add(stored[name].location())
            yield name


# ---- names ---------------------------------------------------------------------------------------


def _names(tensors: Mapping[str, Any]) -> Iterator[Odd]:
    names = [n for n in tensors if not n or not n.isprintable() or any(c.isspace() for c in n)]
    if names:
        shown = ", ".join(repr(name) for name in names[:_FEW])
        rest = f", and {len(names) - _FEW} more" if len(names) > _FEW else ""
        text = f"{counted(len(names), 'name')} with spaces or unprintable characters"
        yield Odd("name", f"{text}: {shown}{rest}", names)
    names = [n for n in tensors if n and ("" in n.split("."))]
    if names:
        text = f"{counted(len(names), 'name')} with an empty component"
        yield Odd("name", f"{text}: {_some(names)}", names)


def _others(tensors: Mapping[str, Any]) -> Iterator[Odd]:
    """Entries of a checkpoint of torch.distributed.checkpoint that are no tensors."""
    for checkpoint in checkpoints(tensors):
        names = checkpoint.others
        if names:
            text = f"{len(names):,} beside the tensors, no tensor: {_some(names)}"
            yield Odd("other", text, names, "left out wherever the checkpoint is read")


def _wrappers(tensors: Mapping[str, Any]) -> Iterator[Odd]:
    members: dict[tuple[str, bool], list[str]] = {}
    for name in tensors:
        parts = name.split(".")
        for k, part in enumerate(parts[:-1]):
            # Within a name, `module` is a name like others.
            if part in _WRAPPERS and (k == 0 or part != "module"):
                members.setdefault((part, k == 0), []).append(name)
    for (part, leads), names in members.items():
        total = counted(len(tensors), "name")
        count = f"all {total}" if len(names) == len(tensors) else f"{len(names):,} of {total}"
        where = f"begin with {part}." if leads else f"have {part} within"
        rule = (
            f'{{src: "{part}.{{*p}}", dst: "{{*p}}"}}'
            if leads
            else f'{{src: "{{*a}}.{part}.{{*b}}", dst: "{{*a}}.{{*b}}"}}'
        )
        yield Odd(
            "wrapper",
            f"{count} {where}, which {_WRAPPERS[part]} adds",
            list(dict.fromkeys(names)),
            f"a rule that strips it: {rule}",
        )
