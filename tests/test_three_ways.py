"""The three ways people set parameters by hand, each beside its plain-torch form.

1. a whole parameter from a tensor; 2. a model's parameters from another model; 3. single elements
and slices. Each is right under autograd: a tensor saved for backward and then written must make
backward raise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import paramkit
from tests.guards import assert_same_bits

pytestmark = pytest.mark.usefixtures("backend")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)).sigmoid())


VALUE = torch.linspace(-1, 1, 8).reshape(2, 4)
SOURCE = Model()


def whole_torch(model: Model) -> None:
    with torch.no_grad():
        model.fc.weight.copy_(VALUE)


def whole_copy(model: Model) -> None:
    with torch.no_grad():
        paramkit.copy_(model.fc.weight, VALUE)


def whole_foreach(model: Model) -> None:
    with torch.no_grad():
        paramkit.foreach_copy_([model.fc.weight], [VALUE])


def whole_writes(model: Model) -> None:
    with paramkit.writes(model) as w:
        w["fc.weight"][...] = VALUE


def model_torch(model: Model) -> None:
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), SOURCE.parameters(), strict=True):
            mine.copy_(theirs)


def model_load(model: Model) -> None:
    paramkit.load_state_dict(model, SOURCE.state_dict())


def model_foreach(model: Model) -> None:
    with torch.no_grad():
        paramkit.foreach_copy_(list(model.parameters()), list(SOURCE.parameters()))


def model_transplant(model: Model) -> None:
    paramkit.transplant(model, SOURCE)


def model_plan(model: Model) -> None:
    paramkit.plan(model, SOURCE).apply()


def slices_torch(model: Model) -> None:
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = 1.0
        model.conv.weight[:, :, 1:2, 1:2] = 0.5


def slices_writes(model: Model) -> None:
    with paramkit.writes(model) as w:
        w["conv.weight"][0, 0, 0, 0] = 1.0
        w["conv.weight"][:, :, 1:2, 1:2] = 0.5


def slices_by_object(model: Model) -> None:
    with paramkit.writes(model) as w:
        w[model.conv.weight][0, 0, 0, 0] = 1.0
        w[model.conv.weight][:, :, 1:2, 1:2] = 0.5


def slices_fill(model: Model) -> None:
    weight = model.conv.weight.detach()
    paramkit.foreach_fill_([weight[0, 0, 0, 0], weight[:, :, 1:2, 1:2]], [1.0, 0.5])


Way = Callable[[Model], None]
WAYS: list[tuple[Way, Way]] = [
    (whole_torch, whole_copy),
    (whole_torch, whole_foreach),
    (whole_torch, whole_writes),
    (model_torch, model_load),
    (model_torch, model_foreach),
    (model_torch, model_transplant),
    (model_torch, model_plan),
    (slices_torch, slices_writes),
    (slices_torch, slices_by_object),
    (slices_torch, slices_fill),
]
EACH = pytest.mark.parametrize(("plain", "ours"), WAYS, ids=[ours.__name__ for _, ours in WAYS])


@EACH
def test_same_bits_as_plain_torch(plain: Way, ours: Way) -> None:
    mine = Model()
    theirs = copy.deepcopy(mine)
    identity = [(id(p), p.data_ptr()) for p in mine.parameters()]
    ours(mine)
    plain(theirs)
    for got, expected in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert_same_bits(got.detach(), expected.detach())
    assert [(id(p), p.data_ptr()) for p in mine.parameters()] == identity
    assert all(p.requires_grad and p.is_leaf for p in mine.parameters())


@EACH
def test_written_after_forward_makes_backward_raise(plain: Way, ours: Way) -> None:
    for write in (plain, ours):
        model = Model()
        loss = model(torch.ones(1, 3, 5, 5, requires_grad=True)).sum()
        write(model)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@EACH
def test_training_goes_on(plain: Way, ours: Way) -> None:
    """After the write, forward and backward give plain torch's gradients."""
    mine = Model()
    theirs = copy.deepcopy(mine)
    ours(mine)
    plain(theirs)
    torch.manual_seed(0)
    x = torch.rand(2, 3, 6, 6)
    mine(x).sum().backward()
    theirs(x).sum().backward()
    for got, expected in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert got.grad is not None
        assert expected.grad is not None
        assert torch.equal(got.grad, expected.grad)


def test_data_writes_go_unnoticed() -> None:
    """The habit these ways replace: ``.data`` writes bypass autograd, and gradients are wrong."""
    model = Model()
    x = torch.ones(1, 3, 5, 5, requires_grad=True)
    honest = copy.deepcopy(model)
    honest(x).sum().backward()
    right = x.grad
    x.grad = None

    loss = model(x).sum()
    model.fc.weight.data.copy_(VALUE)
    model.conv.weight.data[:, :, 1:2, 1:2] = 0.5
    loss.backward()  # no error
    assert right is not None
    assert x.grad is not None
    assert not torch.equal(x.grad, right)


def test_frozen_parameters_stay_frozen() -> None:
    for write in (ours for _, ours in WAYS):
        model = Model()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        write(model)
        assert not any(p.requires_grad for p in model.parameters())
