"""Models and sources that hold one number: what is left of a mix of two writes shows at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.guards import Layout, place

__all__ = ["held", "model_of", "values_of"]


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
