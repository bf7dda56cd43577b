"""Two lists, or a list and numbers, as the writes of a plan: destinations matched by position."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .backend import checks
from .destinations import Destination, layout_finding
from .errors import Finding, PlanError
from .fills import beside
from .resolve import Resolved, Write

__all__ = ["NUMBERS", "as_sources", "resolve_lists"]

# What torch takes as a number; numpy registers its scalars as numbers, except its bool.
NUMBERS = (numbers.Number, np.bool_)


def as_sources(dsts: Sequence[Tensor], srcs: Any) -> list[Any]:
    """One source for each destination, numbers made 0-dim tensors of the destination's dtype and device."""
    values = list(srcs) if isinstance(srcs, (list, tuple)) else [srcs] * len(dsts)
    if len(values) != len(dsts):
        raise PlanError(
            f"plan: expected as many sources as destinations, got {len(dsts)} dsts and {len(values)} srcs."
        )
    made: dict[Any, Tensor] = {}
    for i, (dst, value) in enumerate(zip(dsts, values, strict=True)):
        if isinstance(value, NUMBERS) and isinstance(dst, Tensor):
            # Filling one element is torch's own conversion, and its own error. Equal numbers share
            # it; -0.0 equals 0.0, and True equals 1, hence the repr and the type.
            key = (type(value), repr(value), dst.dtype, dst.device, min(dst.numel(), 2))
            if key not in made:
                try:
                    one = checks.element_of(value, dst)
                except (RuntimeError, NotImplementedError, OverflowError) as error:
                    raise type(error)(
                        f"plan: srcs[{i}] = {value} into dsts[{i}] of {dst.dtype}: {error}"
                    ) from None
                made[key] = beside(one, dst)
            values[i] = made[key]
    return values


def resolve_lists(dsts: Sequence[Tensor], srcs: Any) -> Resolved:
    values = as_sources(dsts, srcs)
    for what, tensors in (("dsts", dsts), ("srcs", values)):
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"plan: expected a tensor as {what}[{i}], got {type(tensor).__name__}"
                )
    resolved = Resolved()
    findings: list[Finding] = []
    for i, (dst, src) in enumerate(zip(dsts, values, strict=True)):
        name = f"dsts[{i}]"
        finding = layout_finding(name, dst, True) or layout_finding(f"srcs[{i}]", src, False)
        if finding is None and checks.broadcast_error(dst.shape, src.shape):
            finding = Finding(
                name,
                "shape",
                f"a source of shape {tuple(src.shape)}",
                f"one that broadcasts to {tuple(dst.shape)}",
            )
        if finding is not None:
            findings.append(finding)
            continue
        resolved.destinations.append(Destination(name, dst, None, name, "tensor"))
        resolved.source_names.append(f"srcs[{i}]")
        resolved.source_tensors.append(src)
        resolved.writes.append(_whole(len(resolved.writes), dst, src))
    if findings:
        raise PlanError(f"the plan has {len(findings)} problem(s); nothing was written.", findings)
    return resolved


def _whole(i: int, dst: Tensor, src: Tensor) -> Write:
    sizes = tuple(dst.shape)
    missing = len(sizes) - src.dim()
    strides = (0,) * missing + tuple(
        0 if n == 1 and size != 1 else st
        for n, st, size in zip(src.shape, src.stride(), sizes[missing:], strict=True)
    )
    return Write(i, i, sizes, dst.stride(), 0, strides, 0)
