"""Models of any parameters, by their names and shapes alone, and a folder for their files."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tests import cases as inputs
from tests import mixture

__all__ = ["Folder", "Shapes", "dense", "experts", "filled", "nested", "small"]

Shapes = Mapping[str, tuple[int, ...]]
"""Name -> shape, in the order of a state dict."""


class Folder:
    """A temporary folder, removed with everything in it once nobody holds this object."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="paramkit-benchmark-"))
        self._remove = weakref.finalize(self, shutil.rmtree, self.path, True)


def nested(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module whose `state_dict()` is `tensors`: a submodule for each part of a name before a dot."""
    root = nn.Module()
    owners: dict[str, nn.Module] = {"": root}

    def owner(path: str) -> nn.Module:
        if path not in owners:
            above, _, name = path.rpartition(".")
            made = nn.Module()
            owner(above).add_module(name, made)
            owners[path] = made
        return owners[path]

    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        owner(path).register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    return root


def filled(shapes: Shapes, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """A state dict of these shapes, each tensor with memory and values of its own."""
    return {
        name: inputs.tiled(shape, dtype, seed + number)
        for number, (name, shape) in enumerate(shapes.items())
    }


def small(shapes: Shapes, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """As `filled`, for ten thousands of small tensors: numbers drawn once for all, storages of their own."""
    most = max(math.prod(shape) for shape in shapes.values())
    numbers = inputs.values((most + 1021,), dtype, seed)
    found = {}
    for number, (name, shape) in enumerate(shapes.items()):
        first = number % 1021
        found[name] = numbers[first : first + math.prod(shape)].clone().view(shape)
    return found


def _attention(at: str, width: int, keys: int) -> dict[str, tuple[int, ...]]:
    """Of one layer with grouped queries: norms and projections."""
    return {
        f"{at}norm1.weight": (width,),
        f"{at}attn.q.weight": (width, width),
        f"{at}attn.k.weight": (keys, width),
        f"{at}attn.v.weight": (keys, width),
        f"{at}attn.o.weight": (width, width),
        f"{at}norm2.weight": (width,),
    }


def dense(width: int, inner: int, keys: int, layers: int, vocabulary: int) -> Shapes:
    """A decoder with grouped queries and a gated MLP: a few dozen large tensors."""
    found: dict[str, tuple[int, ...]] = {"embed.weight": (vocabulary, width)}
    for n in range(layers):
        at = f"layers.{n}."
        found |= _attention(at, width, keys) | _mlp(f"{at}mlp.", width, inner)
    return found


def experts(share: int = 1) -> Shapes:
    """The mixture of experts of `tests.mixture` with names: 31,337 parameters, one in `share` experts."""
    width, keys = mixture.WIDTH, mixture.HEADS_KV
    found: dict[str, tuple[int, ...]] = {"model.embed.weight": (mixture.VOCABULARY, width)}
    for n in range(mixture.LAYERS):
        at = f"model.layers.{n}."
        found |= _attention(at, width, keys)
        if n < mixture.DENSE:
            found |= _mlp(f"{at}mlp.", width, mixture.INNER)
            continue
        found[f"{at}moe.router.weight"] = (mixture.EXPERTS, width)
        for e in range(mixture.EXPERTS // share):
            found |= _mlp(f"{at}moe.experts.{e}.", width, mixture.EXPERT)
    found["model.norm.weight"] = (width,)
    found["head.weight"] = (mixture.VOCABULARY, width)
    return found


def _mlp(at: str, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    """A gated MLP."""
    return {
        f"{at}gate.weight": (inner, width),
        f"{at}up.weight": (inner, width),
        f"{at}down.weight": (width, inner),
    }
