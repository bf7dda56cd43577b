"""Sources in memory: modules and mappings, and a clear error for everything that is no source."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from paramkit.errors import SourceError
from paramkit.sources import Lazy, open_source


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.tied = nn.Linear(3, 2)
        self.tied.weight = self.fc.weight
        self.shared = self.fc
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.register_buffer("nothing", None)
        self.own = nn.Parameter(torch.zeros(2))


def test_module_gives_what_its_state_dict_names_in_its_order() -> None:
    model = Model()
    opened = open_source(model)
    assert list(opened) == list(model.state_dict())
    assert opened["fc.weight"] is model.fc.weight
    assert opened["tied.weight"] is model.fc.weight
    assert opened["shared.weight"] is model.fc.weight


def test_module_hooks_do_not_run_and_parametrizations_appear_by_their_own_names() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    model.register_state_dict_post_hook(lambda *_: pytest.fail("a hook ran"))
    names = set(open_source(model))
    assert "parametrizations.weight.original0" in names
    assert "bias" in names


def test_a_module_within_itself_ends() -> None:
    model = nn.Module()
    model.child = nn.Linear(2, 2)
    model.child.parent = model
    assert list(open_source(model)) == ["child.weight", "child.bias"]


def test_mapping_is_taken_as_it_is() -> None:
    tensor = torch.zeros(2)
    assert open_source({"a": tensor, "b.c": nn.Parameter(tensor)})["a"] is tensor
    assert open_source({}) == {}
    assert open_source({"a": tensor}, mmap=False)["a"] is tensor


def test_mapping_may_hold_lazy_tensors() -> None:
    lazy = Lazy((2, 3), torch.float32)
    assert open_source({"a": lazy})["a"] is lazy


def test_mapping_lists_all_that_is_no_tensor() -> None:
    bad = {
        "ok": torch.zeros(1),
        "numpy": np.zeros(2),
        "number": 3,
        "state_dict": {"a": torch.zeros(1)},
        "fc._extra_state": None,
        7: torch.zeros(1),
        "module": nn.Linear(1, 1),
    }
    with pytest.raises(SourceError) as caught:
        open_source(bad)
    text = str(caught.value)
    assert len(caught.value.findings) == 6
    assert "6 of 7 entries" in text
    for part in (
        "torch.from_numpy",
        "int 3",
        'pass source["state_dict"]',
        "extra state",
        "source[7]",
    ):
        assert part in text


@pytest.mark.parametrize(
    "source", [3, None, b"x", [], [1], torch.zeros(2), {1, 2}, ["a.safetensors", 3]]
)
def test_other_types_are_refused(source: object) -> None:
    with pytest.raises(SourceError, match=r"nn\.Module, a mapping|at least one path"):
        open_source(source)


# ---- the description of a lazy tensor ------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (4, 1, 2), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool])
def test_lazy_describes_what_a_tensor_would(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor, lazy = torch.zeros(shape, dtype=dtype), Lazy(shape, dtype)
    assert lazy.shape == tensor.shape and type(lazy.shape) is torch.Size
    assert (lazy.dtype, lazy.device, lazy.layout) == (tensor.dtype, tensor.device, tensor.layout)
    assert (lazy.dim(), lazy.numel(), lazy.nbytes) == (tensor.dim(), tensor.numel(), tensor.nbytes)
    assert (lazy.stride(), lazy.size()) == (tensor.stride(), tensor.size())
    assert lazy.element_size() == tensor.element_size()
    assert lazy.is_contiguous()


@pytest.mark.parametrize(
    ("shape", "strides", "span"),
    [((2, 3), (1, 2), 6), ((2, 3), (10, 2), 15), ((3,), (0,), 1), ((2, 0), (7, 1), 0), ((1, 4), (99, 1), 4)],
)  # fmt: skip
def test_lazy_span_of_strided(shape: tuple[int, ...], strides: tuple[int, ...], span: int) -> None:
    lazy = Lazy(shape, torch.int32, strides)
    tensor = torch.empty_strided(shape, strides, dtype=torch.int32)
    assert lazy.nbytes == 4 * span == tensor.untyped_storage().nbytes()
    assert lazy.is_contiguous() == tensor.is_contiguous()
    assert lazy.stride(0) == strides[0]
    memory = torch.arange(4 * span, dtype=torch.uint8)
    assert lazy.view(memory).stride() == strides
    if span:
        assert lazy.view(memory).data_ptr() == memory.data_ptr()


def test_lazy_refuses_what_is_no_layout() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Lazy((2, 3), torch.float32, (1,))
    with pytest.raises(ValueError, match="do not fit"):
        Lazy((2, 3), torch.float32, (3, -1))
