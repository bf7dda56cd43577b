"""``writes()``: recorded slice writes, one pass on leaving the block, none if anything is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paramkit
from tests.guards import assert_same_bits, nothing_written, outcome

pytestmark = pytest.mark.usefixtures("backend")


class Net(nn.Module):
    """A convolution with batch norm, a linear layer and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(2, 10)
        self.register_buffer("table", torch.arange(12).reshape(3, 4))


def tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_the_documented_block(net: Net) -> None:
    rows = torch.rand(10, 2)
    expected = net.conv.weight.detach().clone()
    expected[0, 0, 0, 0] = 1.0
    expected[:, :, 1:2, 1:2] = 0.5
    with paramkit.writes(net) as w:
        w["conv.weight"][0, 0, 0, 0] = 1.0
        w["conv.weight"][:, :, 1:2, 1:2] = 0.5
        w[net.fc.weight][...] = rows
    assert_same_bits(net.conv.weight, expected)
    assert_same_bits(net.fc.weight, rows)
    assert all(p.requires_grad for p in net.parameters())


def test_nothing_happens_before_the_end(net: Net) -> None:
    with paramkit.writes(net) as w, nothing_written(*tensors(net)):
        w["fc.bias"][:] = 3.0
        w["fc.weight"][1] = torch.ones(2)
    assert net.fc.bias.tolist() == [3.0] * 10
    assert net.fc.weight[1].tolist() == [1, 1]


def test_apply_again(net: Net) -> None:
    with paramkit.writes(net) as w:
        w["fc.weight"][:, 0] = 7.0
        w["fc.bias"][2:4] = torch.tensor([1.0, 2.0])
    with torch.no_grad():
        net.fc.weight.zero_()
        net.fc.bias.zero_()
    before = net.fc.weight._version
    w.plan.apply()
    assert net.fc.weight[:, 0].tolist() == [7.0] * 10
    assert net.fc.weight[:, 1].tolist() == [0.0] * 10
    assert net.fc.bias.tolist() == [0, 0, 1, 2, 0, 0, 0, 0, 0, 0]
    assert net.fc.weight._version > before


def test_autograd_notices(net: Net) -> None:
    x = torch.ones(1, 2, requires_grad=True)
    loss = net.fc(x).sum()
    with paramkit.writes(net) as w:  # no no_grad needed: writes are not recorded
        w["fc.weight"][0, 0] = 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_sources_are_detached(net: Net) -> None:
    value = torch.ones(10, requires_grad=True)
    with paramkit.writes(net) as w:
        w["fc.bias"][...] = value * 2
    assert net.fc.bias.tolist() == [2.0] * 10
    assert net.fc.bias.grad_fn is None
    assert net.fc.bias.is_leaf


def test_buffers(net: Net) -> None:
    with paramkit.writes(net) as w:
        w["bn.running_mean"][1:3] = 4.0
        w["bn.num_batches_tracked"][...] = 9
        w["table"][0] = torch.tensor([9, 8, 7, 6])
    assert net.bn.running_mean is not None
    assert net.bn.running_mean[1:3].tolist() == [4, 4]
    assert int(net.bn.num_batches_tracked or 0) == 9
    assert net.table[0].tolist() == [9, 8, 7, 6]


def test_identity_is_kept(net: Net) -> None:
    before = {name: (id(p), p.data_ptr()) for name, p in net.named_parameters()}
    with paramkit.writes(net) as w:
        w["conv.weight"][...] = 0.0
        w["fc.weight"][0] = 0.0
    assert {name: (id(p), p.data_ptr()) for name, p in net.named_parameters()} == before


def test_an_empty_block(net: Net) -> None:
    with nothing_written(*tensors(net)), paramkit.writes(net):
        pass


# Indexing and values, as torch's item assignment.

INDICES: dict[str, Any] = {
    "int": 1,
    "negative int": -1,
    "slice": slice(1, 3),
    "step": slice(None, None, 2),
    "negative bounds": slice(-2, None),
    "beyond the end": slice(1, 100),
    "empty slice": slice(2, 2),
    "ellipsis": ...,
    "ellipsis last": (..., 0),
    "ellipsis middle": (0, ..., slice(1, 2)),
    "none": (None, 0),
    "none last": (0, ..., None),
    "ints": (0, 1, 2),
    "mixed": (slice(None), 0, slice(None, None, 2)),
    "nothing": (),
}


@pytest.mark.parametrize("name", sorted(INDICES))
def test_basic_indices_as_torch(name: str) -> None:
    index = INDICES[name]
    for value in (2.5, 3, True, torch.tensor(4.0), torch.tensor(5, dtype=torch.int8)):
        expected, module = torch.zeros(3, 4, 5), nn.Module()
        module.register_parameter("p", nn.Parameter(torch.zeros(3, 4, 5)))
        expected[index] = value
        with paramkit.writes(module) as w:
            w["p"][index] = value
        assert_same_bits(module.p, expected, what=f"[{name}] = {value!r}")
    expected, module = torch.zeros(3, 4, 5), nn.Module()
    module.register_parameter("p", nn.Parameter(torch.zeros(3, 4, 5)))
    value = torch.rand(expected[index].shape)
    expected[index] = value
    with paramkit.writes(module) as w:
        w["p"][index] = value
    assert_same_bits(module.p, expected, what=name)


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (1,),
        (4,),
        (3, 1),
        (3, 4),
        (1, 3, 4),
        (1, 1, 1, 4),
        (1, 1),
        (2, 3, 4),
        (3,),
        (0,),
        (4, 3),
    ],
)
@pytest.mark.parametrize("index", [..., (slice(None), slice(None)), slice(0, 3)], ids=repr)
def test_value_shapes_as_torch(shape: tuple[int, ...], index: Any) -> None:
    """Values broadcast, and leading axes of one are dropped; other shapes raise, nothing written."""
    value = torch.rand(shape)
    expected = torch.zeros(3, 4)
    error = outcome(lambda: expected.__setitem__(index, value))
    module = nn.Module()
    module.register_parameter("p", nn.Parameter(torch.zeros(3, 4)))

    def ours() -> None:
        with paramkit.writes(module) as w:
            w["p"][index] = value

    if error is None:
        ours()
        assert_same_bits(module.p, expected)
    else:
        with nothing_written(module.p), pytest.raises(error):
            ours()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64], ids=str
)  # fmt: skip
def test_scalar_conversions_as_torch(dtype: torch.dtype) -> None:
    import numpy

    for value in (
        0, 1, -1, 300, 1.9, -0.0, float("nan"), float("inf"), True, 1j, 2**31, 2**64, 1e300,
        torch.tensor(1.9), torch.tensor(7), numpy.float64(2.5), numpy.float32(2.5),
        "a", None, [1.0], object(),
    ):  # fmt: skip
        expected = torch.zeros(3, dtype=dtype)
        error = outcome(lambda e=expected, v=value: e.__setitem__(1, v))
        module = nn.Module()
        module.register_buffer("b", torch.zeros(3, dtype=dtype))

        def ours(module: nn.Module = module, value: Any = value) -> None:
            with paramkit.writes(module) as w:
                w["b"][1] = value

        what = f"{dtype}[1] = {value!r}"
        if isinstance(value, numpy.generic):
            if outcome(ours) is None:  # more than torch takes is welcome, as long as it is right
                assert module.b[1].item() == torch.tensor(value).to(dtype).item(), what
        elif error is None:
            ours()
            assert_same_bits(module.b, expected, any_nan=True, what=what)
        else:
            with nothing_written(module.b):
                raised = outcome(ours)
            assert raised is not None, what
            assert issubclass(raised, error) or raised is TypeError, what


def test_casts_and_strides(net: Net) -> None:
    half = torch.rand(2, 10, dtype=torch.bfloat16)
    with paramkit.writes(net) as w:
        w["fc.weight"][...] = half.t()
    assert_same_bits(net.fc.weight, half.t().float().contiguous())


@pytest.mark.parametrize(
    "index",
    [
        [0, 1],
        torch.tensor([0, 1]),
        (slice(None), [0]),
        torch.tensor([True, False, True]),
        (slice(None), torch.tensor(1)),
        "a",
        1.5,
        slice(None, None, -1),
        slice(None, None, 0),
        3,
        -4,
        (0, 0, 0),
    ],
    ids=repr,
)
def test_other_indices_raise(index: Any) -> None:
    """Only ints, slices, None and Ellipsis: anything else is refused, and nothing is written."""
    module = nn.Module()
    module.register_parameter("p", nn.Parameter(torch.zeros(3, 2)))
    with (
        nothing_written(module.p),
        pytest.raises((IndexError, TypeError, ValueError, paramkit.PlanError)),
        paramkit.writes(module) as w,
    ):
        w["p"][index] = 1.0


# Names and handles.


def test_unknown_name(net: Net) -> None:
    with (
        nothing_written(*tensors(net)),
        pytest.raises(KeyError) as caught,
        paramkit.writes(net) as w,
    ):
        w["fc.bias"][...] = 1.0
        w["conv.wieght"][...] = 1.0
    assert isinstance(caught.value, paramkit.PlanError)
    assert "conv.wieght" in str(caught.value)
    assert "conv.weight" in str(caught.value)  # the near miss


def test_foreign_parameter(net: Net) -> None:
    stranger = nn.Parameter(torch.zeros(3))
    with (
        nothing_written(*tensors(net), stranger),
        pytest.raises((KeyError, paramkit.PlanError)),
        paramkit.writes(net) as w,
    ):
        w[stranger][...] = 1.0


def test_names_of_another_type(net: Net) -> None:
    for bad in (3, None, ("a",)):
        with (
            nothing_written(*tensors(net)),
            pytest.raises((TypeError, KeyError, paramkit.PlanError)),
            paramkit.writes(net) as w,
        ):
            w[bad][...] = 1.0  # type: ignore[index]


def test_reading_a_handle_raises(net: Net) -> None:
    with nothing_written(*tensors(net)):
        with (
            pytest.raises((TypeError, RuntimeError), match=r"(?i)read|write-only|record"),
            paramkit.writes(net) as w,
        ):
            w["fc.bias"][...] = 1.0
            w["fc.bias"][0]
        with (
            pytest.raises((TypeError, RuntimeError), match=r"(?i)read|write-only|record"),
            paramkit.writes(net) as w,
        ):
            w["fc.bias"][0] += 1


def test_assigning_without_an_index(net: Net) -> None:
    """``w["name"] = value`` means the whole parameter, or is refused: never silently ignored."""
    value = torch.rand(10)

    def block() -> None:
        with paramkit.writes(net) as w:
            w["fc.bias"] = value  # type: ignore[index]

    if outcome(block) is None:
        assert torch.equal(net.fc.bias, value)


def test_recording_after_the_block(net: Net) -> None:
    with paramkit.writes(net) as w:
        handle = w["fc.bias"]
        handle[0] = 1.0
    with nothing_written(*tensors(net)), pytest.raises(RuntimeError):
        handle[1] = 2.0
        w.plan.apply()


def test_an_argument_that_is_no_model() -> None:
    for bad in (3, None, "model"):
        with pytest.raises(TypeError), paramkit.writes(bad):  # type: ignore[arg-type]
            pass


# All or nothing.


def test_a_raising_block_writes_nothing(net: Net) -> None:
    class Stop(Exception):
        pass

    with nothing_written(*tensors(net)), pytest.raises(Stop), paramkit.writes(net) as w:
        w["fc.bias"][...] = 1.0
        w["conv.weight"][...] = 2.0
        raise Stop


@pytest.mark.parametrize("late", [False, True])
def test_one_bad_write_writes_nothing(net: Net, late: bool) -> None:
    bad: Callable[[Any], None]
    for bad in (
        lambda w: w["fc.weight"].__setitem__(0, torch.ones(3)),
        lambda w: w["fc.weight"].__setitem__(99, 1.0),
        lambda w: w["table"].__setitem__(0, float("nan")),
        lambda w: w["fc.weight"].__setitem__(..., torch.ones(10, 2, device="meta")),
        lambda w: w["nothing"].__setitem__(..., 1.0),
    ):
        with (
            nothing_written(*tensors(net)),
            pytest.raises(Exception),  # noqa: B017
            paramkit.writes(net) as w,
        ):
            if not late:
                bad(w)
            w["fc.bias"][...] = 1.0
            w["conv.bias"][...] = 1.0
            if late:
                bad(w)


# Conflicts.


def conflict(net: Net, record: Callable[[Any], None], **options: Any) -> None:
    with paramkit.writes(net, **options) as w:
        record(w)


CONFLICTS: dict[str, Callable[[Any], None]] = {
    "same element": lambda w: (w["fc.bias"].__setitem__(0, 1.0), w["fc.bias"].__setitem__(0, 2.0)),
    "whole after element": lambda w: (
        w["fc.bias"].__setitem__(3, 1.0),
        w["fc.bias"].__setitem__(..., 2.0),
    ),
    "rows and columns": lambda w: (
        w["fc.weight"].__setitem__(1, 1.0),
        w["fc.weight"].__setitem__((slice(None), 0), torch.full((10,), 2.0)),
    ),
    "steps that meet": lambda w: (
        w["fc.bias"].__setitem__(slice(0, None, 2), 1.0),
        w["fc.bias"].__setitem__(slice(0, None, 3), 2.0),
    ),
    "by name and by object": lambda w: (
        w["fc.bias"].__setitem__(slice(0, 5), 1.0),
        w["fc.bias"].__setitem__(slice(4, 9), 2.0),
    ),
}


@pytest.mark.parametrize("name", sorted(CONFLICTS))
def test_two_writes_into_one_element(net: Net, name: str) -> None:
    with nothing_written(*tensors(net)), pytest.raises(paramkit.PlanError, match=r"fc\.") as caught:
        conflict(net, CONFLICTS[name])
    assert "overlap" in str(caught.value)  # the message says how to allow it


@pytest.mark.parametrize("name", sorted(CONFLICTS))
def test_overlap_last(net: Net, name: str) -> None:
    """With ``overlap="last"`` the recorded order decides, as the plain assignments would."""
    twin = Net()
    twin.load_state_dict(net.state_dict())

    class Direct:
        def __getitem__(self, key: str) -> Tensor:
            return twin.get_parameter(key).detach()

    CONFLICTS[name](Direct())
    conflict(net, CONFLICTS[name], overlap="last")
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert_same_bits(ours.detach(), theirs.detach())


def test_overlap_of_another_value(net: Net) -> None:
    with (
        pytest.raises((ValueError, TypeError), match="overlap"),
        paramkit.writes(net, overlap="first"),
    ):
        pass


def test_conflict_through_object_and_name(net: Net) -> None:
    with (
        nothing_written(*tensors(net)),
        pytest.raises(paramkit.PlanError),
        paramkit.writes(net) as w,
    ):
        w["fc.bias"][0:3] = 1.0
        w[net.fc.bias][2] = 2.0


def test_conflict_through_tied_names(net: Net) -> None:
    net.tied = nn.Linear(2, 10)
    net.tied.weight = net.fc.weight
    with (
        nothing_written(*tensors(net)),
        pytest.raises(paramkit.PlanError),
        paramkit.writes(net) as w,
    ):
        w["fc.weight"][0] = 1.0
        w["tied.weight"][0] = 2.0
    with paramkit.writes(net) as w:
        w["fc.weight"][0] = 1.0
        w["tied.weight"][1] = 2.0
    assert net.fc.weight[:2].tolist() == [[1, 1], [2, 2]]


def test_conflict_through_shared_storage() -> None:
    """Two parameters over one memory: the bytes conflict, whatever the names say."""
    module = nn.Module()
    storage = torch.zeros(10)
    module.register_parameter("a", nn.Parameter(storage[:6]))
    module.register_parameter("b", nn.Parameter(storage[4:]))
    with nothing_written(storage), pytest.raises(paramkit.PlanError), paramkit.writes(module) as w:
        w["a"][...] = 1.0
        w["b"][...] = 2.0
    with paramkit.writes(module) as w:
        w["a"][:4] = 1.0
        w["b"][...] = 2.0
    assert storage.tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 2, 2]


def test_interleaved_slices_are_no_conflict() -> None:
    module = nn.Module()
    module.register_parameter("p", nn.Parameter(torch.zeros(8, 9)))
    with paramkit.writes(module) as w:
        w["p"][0::2, 0::3] = 1.0
        w["p"][0::2, 1::3] = 2.0
        w["p"][0::2, 2::3] = 3.0
        w["p"][1::2, :5] = torch.full((4, 5), 4.0)
        w["p"][1::2, 5:] = 5.0
    assert module.p[0].tolist() == [1, 2, 3] * 3
    assert module.p[1].tolist() == [4] * 5 + [5] * 4


def test_many_disjoint_elements() -> None:
    """A thousand single elements of one parameter: no conflict, and not slow to prove."""
    module = nn.Module()
    module.register_parameter("p", nn.Parameter(torch.zeros(40, 50)))
    with paramkit.writes(module) as w:
        for i in range(0, 40, 2):
            for j in range(50):
                w["p"][i, j] = float(i * 50 + j + 1)
    expected = (torch.arange(2000.0) + 1).reshape(40, 50)
    expected[1::2] = 0
    assert torch.equal(module.p.detach(), expected)


# Values that change before they are written.


def test_recorded_value_changed_in_the_block(net: Net) -> None:
    value = torch.ones(10)
    with (
        nothing_written(*tensors(net)),
        pytest.raises(paramkit.PlanError, match=r"(?i)chang|modif"),
        paramkit.writes(net) as w,
    ):
        w["conv.bias"][...] = 5.0
        w["fc.bias"][...] = value
        value.add_(1)


def test_recorded_zero_dim_value_changed_in_the_block(net: Net) -> None:
    value = torch.tensor(1.0)
    with (
        nothing_written(*tensors(net)),
        pytest.raises(paramkit.PlanError, match=r"(?i)chang|modif"),
        paramkit.writes(net) as w,
    ):
        w["fc.bias"][...] = value
        value.fill_(2)


def test_one_value_written_to_several_places(net: Net) -> None:
    value = torch.rand(2)
    with paramkit.writes(net) as w:
        w["fc.weight"][0] = value
        w["fc.weight"][5] = value
    assert torch.equal(net.fc.weight[0], value)
    assert torch.equal(net.fc.weight[5], value)


def test_value_read_from_the_model_itself(net: Net) -> None:
    """A value that is a view of what another write reaches counts as it was when recorded.

    Or the block is refused: what must not happen is that the order of the pass shows.
    """

    def swap() -> None:
        with paramkit.writes(net) as w:
            w["fc.weight"][0] = net.fc.weight[1]
            w["fc.weight"][1] = net.fc.weight[0]

    def chain() -> None:
        with paramkit.writes(net) as w:
            w["fc.weight"][2] = net.fc.weight[3]
            w["fc.weight"][4] = net.fc.weight[2]

    for block, rows in ((swap, {0: 1, 1: 0}), (chain, {2: 3, 4: 2})):
        old = net.fc.weight.detach().clone()
        error = outcome(block)
        if error is None:
            for dst, src in rows.items():
                assert torch.equal(net.fc.weight[dst], old[src])
        else:
            assert issubclass(error, paramkit.PlanError)
            assert_same_bits(net.fc.weight.detach(), old)


# The model changes under the plan.


def test_replaced_parameter_is_not_missed(net: Net) -> None:
    with paramkit.writes(net) as w:
        w["fc.bias"][...] = 1.0
    old = net.fc.bias
    net.fc.bias = nn.Parameter(torch.zeros(10))
    with nothing_written(old, net.fc.bias), pytest.raises(paramkit.PlanError, match=r"fc\.bias"):
        w.plan.apply()
    w.plan.refresh()
    w.plan.apply()
    assert net.fc.bias.tolist() == [1.0] * 10


def test_meta_parameter(net: Net) -> None:
    net.fc.weight = nn.Parameter(torch.empty(10, 2, device="meta"))
    with (
        nothing_written(net.fc.bias),
        pytest.raises(paramkit.PlanError, match=r"(?i)meta"),
        paramkit.writes(net) as w,
    ):
        w["fc.bias"][...] = 1.0
        w["fc.weight"][...] = 1.0


def test_expanded_parameter() -> None:
    module = nn.Module()
    module.register_buffer("b", torch.zeros(3, 1).expand(3, 4))
    module.register_buffer("c", torch.zeros(3))
    with (
        nothing_written(module.b, module.c),
        pytest.raises(paramkit.PlanError, match=r"(?i)expand|overlap|memory"),
        paramkit.writes(module) as w,
    ):
        w["c"][...] = 1.0
        w["b"][...] = torch.rand(3, 4)


def test_routes(backend: str, net: Net) -> None:
    with paramkit.backend.trace() as trace, paramkit.writes(net) as w:
        w["conv.weight"][:, :, 1:2, 1:2] = 0.5
        w["fc.weight"][2:4] = torch.rand(2, 2)
    if backend == "native":
        assert trace.routes == {"native": 2}
    else:
        assert trace.routes == {"fill": 1, "copy": 1}
