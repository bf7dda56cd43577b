"""What planning costs one rank of many: names, proof and routes, for models and groups of any size.

Routes are worked out from what ranks say of themselves, so one process can stand for any rank of any group. No
tensor is there.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch

from paramkit import Rule
from paramkit.destinations import Destination
from paramkit.distributed.agree import Common, Side
from paramkit.distributed.layout import Description, Held, spreads
from paramkit.distributed.routes import route
from paramkit.resolve import resolve

__all__ = ["LAYOUTS", "planned"]

EXPERTS, DIM, FFN, LAYERS = 384, 7168, 2048, 60  # about 1T elements
# Name: whether the trainer has one tensor for each expert, trainers, copies, ranks of a copy.
LAYOUTS = {
    "1T, experts stacked on both sides": (False, 256, 16, 16),
    "1T, a tensor for each expert at the trainer": (True, 256, 16, 16),
}


def planned(name: str) -> dict[str, Any]:
    """Seconds of one rank, without what it waits for."""
    single, S, C, T = LAYOUTS[name]
    matrices = {"gate": (FFN, DIM), "up": (FFN, DIM), "down": (DIM, FFN)}
    src: dict[str, tuple[int, ...]] = {}
    dst: dict[str, tuple[int, ...]] = {}
    for layer in range(LAYERS):
        for part, shape in matrices.items():
            dst[f"layers.{layer}.{part}"] = (EXPERTS, *shape)
            if single:
                src |= {f"layers.{layer}.{e}.{part}": shape for e in range(EXPERTS)}
            else:
                src[f"layers.{layer}.{part}"] = (EXPERTS, *shape)
        attention = {f"layers.{layer}.q": (8192, DIM), f"layers.{layer}.o": (DIM, 8192)}
        src |= attention
        dst |= attention
    rules = [
        Rule(f"layers.{{l}}.{{e}}.{part}", f"layers.{{l}}.{part}", "o i -> e o i")
        for part in matrices
        if single
    ]
    trainers = Held((S,), tuple(range(S)), ((0, 1),))
    copies = tuple(
        Held((T,), tuple(range(S + c * T, S + (c + 1) * T)), ((0, 1),)) for c in range(C)
    )
    ours, theirs = _described(dst, copies[0]), _described(src, trainers)
    common = Common(_side(ours, copies), _side(theirs, (trainers,)), (), False)

    begin = perf_counter()
    sources = dict(zip(theirs.names, spreads(theirs, None, "source")))
    destinations = [
        Destination(n, s, None, n, "tensor")
        for n, s in zip(ours.names, spreads(ours, None, "destination"))
    ]
    resolved = resolve({}, sources, rules, destinations=destinations)
    times = [perf_counter()]
    for rank in (0, S):
        _, findings = route(resolved, common, rank)
        assert not findings
        times.append(perf_counter())
    return {
        "name": name,
        "ranks": f"{S} + {C} x {T}",
        "writes": len(resolved.writes),
        "resolve": times[0] - begin,
        "sender": times[1] - times[0],
        "receiver": times[2] - times[1],
    }


def _described(shapes: dict[str, tuple[int, ...]], held: Held) -> Description:
    n = len(shapes)
    names, dtypes = tuple(shapes), (torch.bfloat16,) * n
    sizes = tuple(shapes.values())
    return Description(
        names, sizes, dtypes, ("tensor",) * n, ((),) * n, tuple(range(n)), (0,) * n, (held,)
    )


def _side(description: Description, helds: tuple[Held, ...]) -> Side:
    ranks = tuple(rank for held in helds for rank in held.ranks)
    return Side(description, (helds,) * len(description.names), ranks)
