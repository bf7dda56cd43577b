"""Before timing: every side leaves the same bytes as torch, and our calls go the way they should."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import paramkit

from .device import MIB, Device
from .registry import Case, Work

__all__ = ["Difference", "check", "count", "differing"]


class Difference(AssertionError):
    """A side that does not do what torch does, or does it by another way."""


class _Memory:
    """The memory of some tensors as bytes, around the views too; small storages together."""

    def __init__(self, tensors: list[Tensor]) -> None:
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
        raw = [
            torch.empty(0, dtype=torch.uint8, device=each.device).set_(each)
            for each in storages.values()
        ]
        self._small = [each for each in raw if each.numel() < MIB]
        self._large = [each for each in raw if each.numel() >= MIB]

    def zero(self) -> None:
        if self._small:
            torch._foreach_zero_(self._small)
        for each in self._large:
            each.zero_()

    def now(self) -> list[Tensor]:
        """What is there, small storages copied, large ones themselves."""
        return ([torch.cat(self._small)] if self._small else []) + self._large

    def copy(self) -> list[Tensor]:
        return self.now()[: bool(self._small)] + [each.clone() for each in self._large]


def differing(work: Work, calls: dict[str, Callable[[], object]], gpu: Device) -> dict[str, str]:
    """Of the calls, each by its name, those that do not leave the bytes that torch's leaves; and how."""
    memory = _Memory(work.dsts)
    found = {}
    expected: list[Tensor] = []
    for name, call in {"torch": work.peer, **calls}.items():
        memory.zero()
        for _ in range(work.turns):
            call()
        gpu.synchronize()
        if name == "torch":
            expected = memory.copy()
            continue
        for got, wanted in zip(memory.now(), expected, strict=True):
            if not torch.equal(got, wanted):
                count = int((got != wanted).sum())
                found[name] = f"{name}: {count} of {got.numel()} bytes differ from torch's"
                break
    return found


def check(work: Work, gpu: Device) -> None:
    """
    Raises:
        Difference: our call, or a side that is known to do the same, does not leave torch's bytes.
    """
    found = differing(work, {"paramkit": work.ours, **work.others}, gpu)
    if found:
        raise Difference("; ".join(found.values()))


def count(case: Case, work: Work) -> dict[str, object]:
    """What one of our calls takes: launches, uploads, staged bytes, writes by route.

    Raises:
        Difference: it takes another way than the case says, or torch's own copy_ or fill_ at all.
    """
    call = work.counted or work.ours
    before = paramkit.backend.active().cuda_counts()
    with paramkit.backend.trace() as trace:
        for _ in range(work.turns):
            call()
    after = paramkit.backend.active().cuda_counts()
    counts = {name: (after[name] - before[name]) / work.turns for name in after}
    routes = {name: n // work.turns for name, n in trace.routes.items()}
    problems = []
    if routes.get("native"):
        problems.append(f"{routes['native']} writes went through torch's own copy_ or fill_")
    if case.staged != ("staged" in routes):
        problems.append(f"{'no' if case.staged else 'some'} writes were staged: {routes}")
    if case.staged and not counts["staged_bytes"]:
        problems.append("no bytes were staged")
    for name, wanted in (("launches", case.launches), ("uploads", case.uploads)):
        if wanted is not None and counts[name] != wanted:
            problems.append(f"{counts[name]:g} {name} a call, expected {wanted}")
    if problems:
        raise Difference("paramkit: " + "; ".join(problems))
    whole = {name: int(n) if n == int(n) else n for name, n in counts.items()}
    return {**whole, "routes": routes, "casts": trace.casts // work.turns}
