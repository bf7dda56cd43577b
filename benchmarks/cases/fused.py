"""Split to fused: q, k and v in one tensor, rotary halves to pairs, MLPs transposed, in one pass.

torch's side does the same as people write it: `permute`, `cat`, `contiguous`, `copy_`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..targets import AtMost
from .memory import MEMORY
from .models import Folder, Shapes, filled, nested
from .registry import Work, case, moved, targets
from .transplants import TRANSPLANTS


@dataclass(frozen=True)
class Sizes:
    """A decoder with `keys` heads of keys for `heads` heads of queries, each of two halves of `half`."""

    heads: int
    keys: int
    half: int
    inner: int
    layers: int
    vocabulary: int

    @property
    def width(self) -> int:
        return self.heads * 2 * self.half

    def split(self) -> Shapes:
        """The source: q, k and v apart, the MLP as (in, out)."""
        width, keys = self.width, self.keys * 2 * self.half
        found: dict[str, tuple[int, ...]] = {"embed.weight": (self.vocabulary, width)}
        for n in range(self.layers):
            at = f"layers.{n}."
            found |= {
                f"{at}q.weight": (width, width),
                f"{at}k.weight": (keys, width),
                f"{at}v.weight": (keys, width),
                f"{at}o.weight": (width, width),
                f"{at}fc.weight": (width, self.inner),
                f"{at}proj.weight": (self.inner, width),
            }
        return found

    def fused(self) -> Shapes:
        """The model: qkv in one, the MLP as (out, in)."""
        rows = (self.heads + 2 * self.keys) * 2 * self.half
        found: dict[str, tuple[int, ...]] = {"embed.weight": (self.vocabulary, self.width)}
        for n in range(self.layers):
            at = f"layers.{n}."
            found |= {
                f"{at}qkv.weight": (rows, self.width),
                f"{at}o.weight": (self.width, self.width),
                f"{at}fc.weight": (self.inner, self.width),
                f"{at}proj.weight": (self.width, self.inner),
            }
        return found

    def rules(self) -> list[Any]:
        from paramkit import Rule

        heads, last = self.heads, self.heads + self.keys
        qkv, pairs = "layers.{i}.qkv.weight", {"two": 2, "d": self.half}
        return [
            Rule(
                "layers.{i}.q.weight",
                qkv,
                "(h two d) e -> (all d two) e",
                at={"all": f"0:{heads}"},
                **pairs,
            ),
            Rule(
                "layers.{i}.k.weight",
                qkv,
                "(h two d) e -> (all d two) e",
                at={"all": f"{heads}:{last}"},
                **pairs,
            ),
            Rule(
                "layers.{i}.v.weight",
                qkv,
                "(h d) e -> (all d) e",
                at={"all": f"{last}:{last + self.keys}"},
                d=2 * self.half,
            ),
            Rule("layers.{i}.fc.weight", "layers.{i}.fc.weight", "i o -> o i"),
            Rule("layers.{i}.proj.weight", "layers.{i}.proj.weight", "i o -> o i"),
        ]

    def by_hand(self, to: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """The same in torch."""
        to["embed.weight"].copy_(state["embed.weight"])
        for n in range(self.layers):
            at = f"layers.{n}."
            q, k = (
                state[f"{at}{part}.weight"]
                .view(-1, 2, self.half, self.width)
                .permute(0, 2, 1, 3)
                .reshape(-1, self.width)
                for part in "qk"
            )
            to[f"{at}qkv.weight"].copy_(torch.cat([q, k, state[f"{at}v.weight"]]))
            to[f"{at}o.weight"].copy_(state[f"{at}o.weight"])
            for part in ("fc", "proj"):
                to[f"{at}{part}.weight"].copy_(state[f"{at}{part}.weight"].t().contiguous())


LARGE = Sizes(heads=16, keys=8, half=64, inner=8192, layers=11, vocabulary=14336)
SMALL = Sizes(heads=16, keys=8, half=64, inner=8192, layers=2, vocabulary=4096)
STAGING = 32 << 20
"""Bytes of the buffer that a file is read through; sources in memory need none."""

TINY = Sizes(heads=4, keys=2, half=4, inner=48, layers=2, vocabulary=64)


def _fused(sizes: Sizes, how: str, tiny: bool) -> Work:
    from safetensors.torch import load_file, save_file

    import paramkit

    sizes = TINY if tiny else sizes
    source: Any = filled(sizes.split())
    state, keep = source, []
    if how != "memory":
        folder = Folder()
        source = folder.path / "split.safetensors"
        save_file(state, source)
        keep.append(folder)
        if how == "mmap":
            # Mapped and touched beforehand: pages of the file that it maps are no memory of its own.
            source = paramkit.open_source(source, mmap=True)
            for tensor in source.values():
                tensor.view(torch.int16).max()
        state = {} if how == "pread" else source
    to = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in sizes.fused().items()}
    model, rules = nested(to), sizes.rules()
    dsts = list(model.parameters())
    return Work(
        ours=lambda: paramkit.transplant(model, source, rules, staging=STAGING),
        peer=lambda: sizes.by_hand(to, state or load_file(source)),
        dsts=dsts,
        bytes=moved(dsts, dsts),
        keep=keep,
    )


for size, sizes, quick in (("1 GiB", LARGE, False), ("192 MiB", SMALL, True)):
    case(
        f"transplant fused {size}",
        TRANSPLANTS,
        "q, k, v to fused qkv, rotary halves to pairs, MLPs transposed; bfloat16",
        targets(4),
        seconds=8.0,
        quick=quick,
    )(partial(_fused, sizes, "memory"))

# From memory and from a mapped file nothing is needed; a file that is read takes the staging buffer.
for how, most in (("memory", 0), ("mmap", 0), ("pread", STAGING)):
    case(
        f"memory transplant fused {how}",
        MEMORY,
        "the same of 1 GiB; torch's side is permute, cat, contiguous, copy_",
        (AtMost("memory", most),),
        mode="memory",
        quick=False,
    )(partial(_fused, LARGE, how))
