"""Models and sources that hold one number: what is left of a mix of two writes shows at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import paramkit
from tests.guards import Layout, place

__all__ = ["COUNT", "STAGING", "eight", "eight_values", "held", "model_of", "plan_of", "values_of"]

COUNT, STAGING = 8, 16384


def model_of(count: int, numel: int, value: float = 0.0) -> nn.ParameterDict:
    """`count` parameters of `numel` elements, between guard bytes."""
    model = nn.ParameterDict()
    for k in range(count):
        tensor = place(Layout.dense((numel,)), torch.float32)
        model[f"w{k}"] = nn.Parameter(tensor.fill_(value))
    return model


def values_of(value: float, count: int, numel: int, prefix: str = "") -> dict[str, Tensor]:
    """A source of such a model."""
    return {f"{prefix}w{k}": torch.full((numel,), value) for k in range(count)}


def held(model: nn.Module) -> set[float]:
    """The numbers in a model: one, unless it is a mix."""
    return {x.item() for p in model.parameters() for x in p.detach().aminmax()}


def eight(numel: int, value: float = 0.0) -> nn.ParameterDict:
    """A model of `COUNT` parameters."""
    return model_of(COUNT, numel, value)


def eight_values(numel: int, value: float) -> dict[str, Tensor]:
    """A source of it."""
    return values_of(value, COUNT, numel)


def plan_of(model: nn.Module, kind: str, value: float, folder: Path) -> paramkit.Plan:
    """A plan of such a model, from memory or from a file."""
    source: Any = eight_values(next(model.parameters()).numel(), value)
    if kind == "memory":
        return paramkit.plan(model, source)
    path = folder / f"{value}.safetensors"
    save_file(source, path)
    return paramkit.plan(model, path, staging=STAGING)
