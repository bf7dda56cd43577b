"""A checkpoint, a model of other names, shapes and dtypes, and rules of every kind between them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

import paramkit
from paramkit import Rule

__all__ = ["DTYPES", "RULES", "checkpoint", "destination", "expected"]

RULES = [
    Rule("emb", "table", rows="overlap", fill=0.5),
    Rule("out", "head.weight", "i o -> o i"),
    Rule("{i}.q", "layers.{i}.qkv", "q e -> rows e", at={"rows": "0:q"}),
    Rule("{i}.k", "layers.{i}.qkv", "k e -> rows e", at={"rows": "q:q+k"}, q=8),
    Rule("{i}.v", "layers.{i}.qkv", "k e -> rows e", at={"rows": "q+k:q+k+k"}, q=8),
    Rule("gate_up", "gate", "(s f) e -> f e", at={"s": 0}, s=2),
    Rule("gate_up", "up", "(s f) e -> f e", at={"s": 1}, s=2),
    Rule("experts.{e}.w", "experts", "i o -> e o i"),
    Rule("grouped", "interleaved", "(g h d) e -> (h g d) e", g=3, h=2),
    Rule("old.*", None),
    Rule(None, "new", fill={"normal": 0.02, "seed": 3}),
]

_SOURCE = {
    "emb": (13, 6),
    "out": (6, 10),
    **{f"{i}.{n}": (8 if n == "q" else 4, 6) for i in range(2) for n in "qkv"},
    "gate_up": (10, 7),
    **{f"experts.{e}.w": (3, 5) for e in range(3)},
    "grouped": (18, 3),
    "old.thing": (4,),
    "norm": (5,),
    "tiny": (2,),
    "empty": (0, 3),
    "scale": (),
}

_DESTINATION = {
    "table": (16, 6),
    "head.weight": (10, 6),
    "layers.0.qkv": (16, 6),
    "layers.1.qkv": (16, 6),
    "gate": (5, 7),
    "up": (5, 7),
    "experts": (3, 5, 3),
    "interleaved": (18, 3),
    "new": (9, 2),
    "norm": (5,),
    "tiny": (2,),
    "empty": (0, 3),
    "scale": (),
}

# Of those that are not float32 on both sides.
DTYPES = {
    "table": torch.bfloat16,
    "experts": torch.float16,
    "interleaved": torch.bfloat16,
    "scale": torch.float64,
    "grouped": torch.bfloat16,
    "norm": torch.bfloat16,
}
# The same name and shape on both sides.
_OTHERS = {
    "steps": torch.arange(9),
    "mask": torch.arange(11) % 3 == 0,
    "spin": torch.arange(7) * (1 + 2j),
    "bytes": torch.arange(15, dtype=torch.uint8).view(5, 3),
    "eighth": torch.arange(8).to(torch.float8_e4m3fn),
}


def checkpoint(seed: int = 0) -> dict[str, Tensor]:
    """The source, in full; another one for each seed."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in _SOURCE.items()}
    made = {name: t.to(DTYPES.get(name, t.dtype)) for name, t in made.items()}
    for name, t in _OTHERS.items():
        # Of a byte each: other bits, none of them NaN.
        made[name] = t.roll(1 + seed) if t.dtype.itemsize == 1 else t + 1 + seed
    return made


def destination() -> dict[str, Tensor]:
    """What is written, in full, of no particular values."""
    made = {
        # A norm of higher precision than the checkpoint's.
        name: torch.full(
            shape, -7.0, dtype=torch.float32 if name == "norm" else DTYPES.get(name, torch.float32)
        )
        for name, shape in _DESTINATION.items()
    }
    return made | {name: torch.zeros_like(t) for name, t in _OTHERS.items()}


@lru_cache
def expected(seed: int = 0) -> dict[str, Tensor]:
    """The destination after a transplant in one process."""
    made = destination()
    paramkit.transplant(made, checkpoint(seed), RULES)
    return made
