"""Slices by name: `writes`."""

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import paramkit
from paramkit.typing import Overlap


def prune(model: nn.Module, rows: slice, overlap: Overlap = "error") -> paramkit.Plan | None:
    with paramkit.writes(model, overlap=overlap) as w:
        w["weight"][0, 0] = 1.0
        w["weight"][..., 1:2] = torch.zeros(1)
        w["weight"][rows, None] = True
        w["bias"][...] = 0
    assert_type(w.plan, paramkit.Plan | None)
    return w.plan


def by_parameter(linear: nn.Linear, tensors: dict[str, Tensor]) -> None:
    with paramkit.writes(linear) as w:
        w[linear.weight][0] = linear.bias.detach()
    with paramkit.writes(tensors, overlap="last") as w:
        w["a"][-1] = 1j


linear = nn.Linear(2, 2)
with paramkit.writes(linear) as w:
    w["weight"] = torch.zeros(2, 2)  # error: index
    w["weight"][0] += 1.0  # error: index
    w["weight"][0].fill_(1.0)  # error: index
    w["weight"]["0"] = 1.0  # error: index
    w["weight"][torch.tensor([0])] = 1.0  # error: index
    w["weight"][0] = "one"  # error: assignment
    w[0][...] = 1.0  # error: index
paramkit.writes(linear, overlap="first")  # error: arg-type
paramkit.writes([torch.zeros(2)])  # error: arg-type
