"""Comparing a whole model with its source, bit for bit, against the memory's limit of reading both."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..targets import GUARD
from .models import Shapes, filled, nested
from .registry import Work, case, moved, targets
from .transplants import DENSE, TRANSPLANTS


def _verify(shapes: Shapes, dtype: torch.dtype, tiny: bool) -> Work:
    import paramkit

    state = filled(DENSE["tiny"] if tiny else shapes, dtype)
    for tensor in state.values():
        tensor.nan_to_num_()  # torch.equal calls no NaN equal
    model = nested({name: torch.zeros(t.shape, dtype=torch.bfloat16) for name, t in state.items()})
    plan = paramkit.plan(model, state)
    plan.apply()
    held = model.state_dict()
    _see_a_bit(plan, held)
    answer = torch.zeros(1, dtype=torch.int64)

    def ours() -> None:
        answer[0] = 1 + len(plan.verify())

    def peer() -> None:
        answer[0] = 1 + sum(
            not torch.equal(tensor, state[name].to(torch.bfloat16)) for name, tensor in held.items()
        )

    return Work(
        ours=ours,
        peer=peer,
        dsts=[answer],
        bytes=moved(list(held.values()), list(state.values())),
        keep=[model],
    )


def _see_a_bit(plan: Any, held: dict[str, torch.Tensor]) -> None:
    """A comparison that finds nothing proves nothing: one bit in the middle of a tensor must show."""
    if plan.verify():
        raise AssertionError("verify finds a difference after apply")
    name = list(held)[len(held) // 2]
    bits = held[name].view(-1).view(torch.int16)
    at = bits.numel() // 2 + 1
    bits[at] ^= 1
    found = plan.verify()
    bits[at] ^= 1
    if found != [name]:
        raise AssertionError(f"verify says {found}, one bit of {name} was changed")


for size, quick in (("1 GiB", False), ("256 MiB", True)):
    for words, dtype in (("", torch.bfloat16), (" cast", torch.float32)):
        case(
            f"verify{words} {size}",
            TRANSPLANTS,
            f"bfloat16 against {str(dtype).removeprefix('torch.')}, all equal".replace(
                "against bfloat16", "of the same dtype"
            ),
            targets(GUARD, limit=0.8),
            limit="compare",
            quick=quick,
        )(partial(_verify, DENSE[size], dtype))
