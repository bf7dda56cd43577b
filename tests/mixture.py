"""A small mixture of experts, 31,337 tensors in bfloat16: its size table, and its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests import cases

__all__ = ["TABLE", "Line", "bytes_of", "make", "table", "tensors"]

ROUTED, DENSE = 80, 6  # layers with experts, and plain ones before them
EXPERTS = 128
WIDTH, EXPERT, INNER = 32, 24, 128  # of the model, of an expert, of a plain layer's MLP
HEADS_KV = 8  # rows of k and v: four query heads share one
VOCABULARY = 1024
ITEM = 2  # bytes of a bfloat16


@dataclass(frozen=True)
class Line:
    """One kind of parameter: its name, its shape, how many there are."""

    name: str
    shape: tuple[int, ...]
    count: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM * self.count


LAYERS = ROUTED + DENSE
TABLE = (
    Line("embedding", (VOCABULARY, WIDTH), 1),
    Line("layer: norm before attention", (WIDTH,), LAYERS),
    Line("layer: q_proj", (WIDTH, WIDTH), LAYERS),
    Line("layer: k_proj", (HEADS_KV, WIDTH), LAYERS),
    Line("layer: v_proj", (HEADS_KV, WIDTH), LAYERS),
    Line("layer: o_proj", (WIDTH, WIDTH), LAYERS),
    Line("layer: norm after attention", (WIDTH,), LAYERS),
    Line("plain layer: gate_proj", (INNER, WIDTH), DENSE),
    Line("plain layer: up_proj", (INNER, WIDTH), DENSE),
    Line("plain layer: down_proj", (WIDTH, INNER), DENSE),
    Line("expert layer: router", (EXPERTS, WIDTH), ROUTED),
    Line("expert layer: gate_proj", (EXPERT, WIDTH), ROUTED * EXPERTS),
    Line("expert layer: up_proj", (EXPERT, WIDTH), ROUTED * EXPERTS),
    Line("expert layer: down_proj", (WIDTH, EXPERT), ROUTED * EXPERTS),
    Line("last norm", (WIDTH,), 1),
    Line("head", (VOCABULARY, WIDTH), 1),
)


def tensors() -> int:
    """How many tensors the model has."""
    return sum(line.count for line in TABLE)


def bytes_of() -> int:
    """Bytes of the model; a copy has it twice, as source and as destination."""
    return sum(line.bytes for line in TABLE)


def table() -> str:
    """The size table as Markdown."""
    lines = ["| tensors | each | bytes | parameter |", "|---:|---|---:|---|"]
    for line in TABLE:
        shape = "x".join(map(str, line.shape))
        lines.append(f"| {line.count:,} | {shape} | {line.bytes:,} | {line.name} |")
    lines.append(f"| **{tensors():,}** | bfloat16 | **{bytes_of():,}** | all |")
    return "\n".join(lines)


def make(share: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """Destinations and sources, each with a storage of its own; of each line one in `share`."""
    dsts: list[Tensor] = []
    srcs: list[Tensor] = []
    for seed, line in enumerate(TABLE):
        first = cases.values(line.shape, torch.bfloat16, seed)
        for _ in range(max(1, line.count // share)):
            dsts.append(torch.zeros(line.shape, dtype=torch.bfloat16))
            srcs.append(first.clone())
    return dsts, srcs
