"""The four operators, as a training loop calls them."""

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import paramkit


def average(model: nn.Module, shadow: dict[str, Tensor], decay: float) -> None:
    for name, parameter in model.named_parameters():
        assert_type(parameter, nn.Parameter)
        shadow[name].lerp_(parameter.detach(), 1 - decay)
    with torch.no_grad():
        paramkit.foreach_copy_(list(model.parameters()), list(shadow.values()))
        paramkit.foreach_copy_(tuple(model.parameters()), tuple(shadow.values()), non_blocking=True)


def fill(weights: list[Tensor], scale: np.float32, mask: Tensor) -> None:
    paramkit.foreach_fill_(weights, 0.5)
    paramkit.foreach_fill_(weights, mask)
    paramkit.foreach_fill_(weights, [1, 2.0, 1j, True, scale, mask])
    assert_type(paramkit.foreach_fill_(weights, scale), None)


linear, own = nn.Linear(2, 2), nn.Parameter(torch.zeros(2, 2))
# What comes back is what was passed in, a parameter too.
assert_type(paramkit.copy_(own, torch.zeros(2, 2)), nn.Parameter)
assert_type(paramkit.copy_(linear.weight.detach(), torch.zeros(2, 2), True), Tensor)
assert_type(paramkit.fill_(torch.zeros(3), 0), Tensor)
assert_type(paramkit.fill_(torch.zeros(3), torch.tensor(1.0)), Tensor)
assert_type(paramkit.fill_(torch.zeros(3), np.bool_(True)), Tensor)

paramkit.copy_(linear.weight, [1.0, 2.0])  # error: arg-type
paramkit.copy_(linear.weight)  # error: call-arg
paramkit.fill_(linear.weight, "zero")  # error: arg-type
paramkit.foreach_copy_(linear.parameters(), [torch.zeros(2)])  # error: arg-type
paramkit.foreach_fill_([torch.zeros(2)], ["one"])  # error: list-item
