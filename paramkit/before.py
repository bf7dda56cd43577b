"""What is asked of the values themselves before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .backend.native import same_bits
from .casting import may_overflow, overflow_finding, overflows
from .destinations import Destination
from .errors import Finding
from .pieces import same_memory, views
from .resolve import Resolved, Write

__all__ = ["overflow_findings", "tie_finding", "tie_findings"]


def tie_findings(resolved: Resolved, sources: Sequence[Any], limit: int) -> list[Finding]:
    """Pairs of sources for the same elements whose values differ.

    Args:
        resolved: with its ties.
        sources: those in use, in the order of `resolved.source_tensors`.
        limit: bytes of a lazy source that are read at once.
    """
    findings = []
    for a, b in resolved.ties:
        dtype = resolved.destinations[a.dst].tensor.dtype
        pair = (sources[a.src], sources[b.src])
        if same_memory(sources, a, b):
            continue
        if not all(_agree(x, y, dtype) for x, y in views(pair, (a, b), limit)):
            d = resolved.destinations[a.dst]
            first, second = (resolved.source_names[w.src] for w in (a, b))
            text = f"from {first} and from {second}"
            if first == second:
                text = f"from several indices of {first} ({a.text})"
            findings.append(tie_finding(d, text))
    return findings


def tie_finding(d: Destination, sources: str) -> Finding:
    """Two sources of one element, which differ.

    Args:
        d: the destination.
        sources: which, such as "from a and from b".
    """
    ties = f", tied to {', '.join(d.aliases)}" if d.aliases else ""
    return Finding(
        d.name,
        "conflict",
        f"two different values for the same elements, {sources}",
        f"one value for each element{ties}",
        "drop one of them with a rule: Rule(name, None)",
    )


def _agree(a: Tensor, b: Tensor, dtype: Any) -> bool:
    if a.dtype == b.dtype:
        return same_bits(a, b.to(a.device))
    return same_bits(a.to(dtype), b.to(a.device))


def overflow_findings(
    resolved: Resolved, writes: Sequence[Write], sources: Sequence[Any], limit: int
) -> list[Finding]:
    """Finite values that the destination's dtype cannot hold."""
    findings = []
    for write in writes:
        d, source = resolved.destinations[write.dst], sources[write.src]
        device = d.tensor.device.type
        if not may_overflow(source.dtype, d.tensor.dtype, device):
            continue
        for (view,) in views((source,), (write,), limit):
            lost = overflows(d.tensor.dtype, view)
            if lost is not None:
                name = resolved.source_names[write.src]
                findings.append(overflow_finding(d.name, name, d.tensor.dtype, lost))
                break
    return findings
