"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["caption", "duration", "limits_line", "ratio", "share", "size", "timing"]


BUSY = 0.7
"""Load from which a caption says so: on two cores, a third process takes turns with the rounds."""


def duration(nanoseconds: float) -> str:
    """A time in the unit that keeps three digits: ``418 ns``, ``4.18 us``, ``41.8 ms``."""
    for unit, scale in (("ns", 1.0), ("us", 1e3), ("ms", 1e6), ("s", 1e9)):
        if nanoseconds < 999.5 * scale or unit == "s":
            value = nanoseconds / scale
            digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
            return f"{value:.{digits}f} {unit}"
    raise AssertionError("unreachable")


def timing(side: Mapping[str, Any] | None) -> str:
    """A median and half the interquartile range: ``4.18 us ±2%``."""
    if not side:
        return ""
    spread = (side["q3_ns"] - side["q1_ns"]) / side["median_ns"]
    return f"{duration(side['median_ns'])} ±{spread * 50:.0f}%"


def ratio(value: float) -> str:
    return (
        f"{value:.2f}x" if value < 9.995 else f"{value:.1f}x" if value < 99.95 else f"{value:.0f}x"
    )


def share(figure: Mapping[str, float] | None) -> str:
    return f"{figure['value']:.2f}" if figure else ""


def size(count: float) -> str:
    """Bytes: ``256 B``, ``4 KiB``, ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def caption(machine: Mapping[str, Any]) -> str:
    """Where the figures come from, and a warning if the machine was busy before the run."""
    load = machine.get("load") or 0.0
    busy = f" The machine was busy (load {load:g} before the run)." if load > BUSY else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, threads used: {machine['threads']}; "
        f"torch {machine['torch']} ({machine['torch_capability']}), numpy {machine['numpy']}, "
        f"backend {machine['backend']} ({machine['capability']}), "
        f"Python {machine['python']}, commit {machine['commit']}, {machine['date']}. "
        "Medians, ± half the interquartile range." + busy
    )


def limits_line(limits: Mapping[str, Any]) -> str:
    """One sentence with the limits of the run."""
    parts = []
    for what in ("copy", "fill", "compare"):
        found = limits.get(what)
        if found:
            parts.append(f"{what} {found['gbs']:.1f} GB/s ({found['loop']})")
    if not parts:
        return f"No limit was measured: {limits.get('why_not', 'no case asked for it')}."
    return f"The limit, plain C over {size(limits['bytes'])}: {', '.join(parts)}."
