"""Bad input to the operators: torch's exception types, a message that helps, nothing written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import paramkit
from tests.guards import Layout, nothing_written, outcome, place

pytestmark = pytest.mark.usefixtures("backend")


def strided() -> Tensor:
    """A destination with pattern all around it, ``[3, 4]`` float32."""
    return place(Layout.dense((3, 4), (9, 2)), torch.float32)


# Shapes.


@pytest.mark.parametrize("shape", [(3, 5), (5,), (2, 4), (1, 3, 4), (2, 3, 4), (0,), (4, 3)])
def test_shapes_as_torch(shape: tuple[int, ...]) -> None:
    dst = strided()
    source = torch.ones(shape)
    error = outcome(lambda: strided().copy_(source))
    if error is None:  # a leading axis of one is more than copy_ takes, so this never happens
        pytest.fail("torch copies this shape")
    with nothing_written(dst), pytest.raises(error) as caught:
        paramkit.copy_(dst, source)
    assert "3, 4]" in str(caught.value).replace(")", "]")
    assert str(list(shape)) in str(caught.value).replace("(", "[").replace(",)", "]").replace(
        ")", "]"
    )


def test_shape_errors_in_a_list_name_the_pair() -> None:
    dsts = [strided(), torch.zeros(2), strided()]
    with nothing_written(*dsts), pytest.raises(RuntimeError, match=r"\[2\]") as caught:
        paramkit.foreach_copy_(dsts, [torch.ones(3, 4), torch.ones(2), torch.ones(4, 3)])
    assert "4, 3" in str(caught.value)
    assert "3, 4" in str(caught.value)


def test_fill_value_with_a_shape() -> None:
    dst = strided()
    for value in (torch.ones(1), torch.ones(3, 4), torch.ones(0)):
        error = outcome(lambda v=value: strided().fill_(v))
        assert error is not None
        with nothing_written(dst), pytest.raises(error):
            paramkit.fill_(dst, value)
        with nothing_written(dst), pytest.raises(error):
            paramkit.foreach_fill_([dst], [value])


# Lists.


def test_empty_lists() -> None:
    with pytest.raises(RuntimeError):
        paramkit.foreach_copy_([], [])
    with pytest.raises(RuntimeError):
        paramkit.foreach_fill_([], [])
    with pytest.raises(RuntimeError):
        paramkit.foreach_fill_([], 1.0)


@pytest.mark.parametrize(("dsts", "srcs"), [(1, 2), (2, 1), (0, 1), (1, 0), (3, 30)])
def test_lists_of_different_lengths(dsts: int, srcs: int) -> None:
    destinations = [torch.zeros(2) for _ in range(dsts)]
    with nothing_written(*destinations), pytest.raises(RuntimeError):
        paramkit.foreach_copy_(destinations, [torch.ones(2)] * srcs)
    with nothing_written(*destinations), pytest.raises(RuntimeError):
        paramkit.foreach_fill_(destinations, [1.0] * srcs)


def test_lengths_are_named() -> None:
    with pytest.raises(RuntimeError) as caught:
        paramkit.foreach_copy_([torch.zeros(2)] * 3, [torch.ones(2)] * 7)
    assert "3" in str(caught.value)
    assert "7" in str(caught.value)


@pytest.mark.parametrize("bad", [3, 1.5, None, "x", [1.0], Ellipsis, torch.float32], ids=repr)
def test_entries_that_are_no_tensors(bad: Any) -> None:
    """TypeError with the index, as ``torch._foreach_copy_`` raises, and nothing written."""
    dsts = [strided(), strided()]
    with nothing_written(*dsts), pytest.raises(TypeError, match="1"):
        paramkit.foreach_copy_(dsts, [torch.ones(3, 4), bad])
    with nothing_written(dsts[0]), pytest.raises(TypeError, match="1"):
        paramkit.foreach_copy_([dsts[0], bad], [torch.ones(3, 4), torch.ones(3, 4)])
    with nothing_written(dsts[0]), pytest.raises(TypeError, match="1"):
        paramkit.foreach_fill_([dsts[0], bad], 1.0)
    with pytest.raises(TypeError):
        paramkit.copy_(bad, torch.ones(2))
    with pytest.raises(TypeError):
        paramkit.fill_(bad, 1.0)


@pytest.mark.parametrize("bad", [None, "x", [1.0], Ellipsis, torch.float32], ids=repr)
def test_fill_values_of_another_type(bad: Any) -> None:
    dsts = [strided(), strided()]
    with nothing_written(dsts[0]), pytest.raises(TypeError):
        paramkit.fill_(dsts[0], bad)
    with nothing_written(*dsts), pytest.raises(TypeError, match="1"):
        paramkit.foreach_fill_(dsts, [1.0, bad])


@pytest.mark.parametrize("bad", [3, None, "ab", torch.zeros(2)], ids=repr)
def test_lists_that_are_no_lists(bad: Any) -> None:
    good = [torch.zeros(2), torch.zeros(2)]
    error = outcome(lambda: torch._foreach_copy_(bad, good))
    with nothing_written(*good):
        ours = outcome(lambda: paramkit.foreach_copy_(bad, good))
        assert ours is not None
        assert ours is error or ours is TypeError
    error = outcome(lambda: torch._foreach_copy_([torch.zeros(2), torch.zeros(2)], bad))
    with nothing_written(*good):
        ours = outcome(lambda: paramkit.foreach_copy_(good, bad))
        assert ours is not None
        assert ours is error or ours is TypeError


def test_source_types_as_copy() -> None:
    dst = strided()
    for bad in (None, "x", [1.0] * 4, object()):
        with nothing_written(dst), pytest.raises(TypeError):
            paramkit.copy_(dst, bad)  # type: ignore[arg-type]


def test_wrong_arguments_are_type_errors() -> None:
    for call in (
        lambda: paramkit.copy_(),  # type: ignore[call-arg]
        lambda: paramkit.copy_(torch.zeros(1)),  # type: ignore[call-arg]
        lambda: paramkit.foreach_copy_([torch.zeros(1)]),  # type: ignore[call-arg]
        lambda: paramkit.foreach_fill_([torch.zeros(1)]),  # type: ignore[call-arg]
        lambda: paramkit.copy_(torch.zeros(1), torch.zeros(1), False, 1),  # type: ignore[call-arg]
    ):
        with pytest.raises(TypeError):
            call()


# A bad pair anywhere in a list.


class Plain(Tensor):
    """A subclass that changes nothing."""


def bad_pairs() -> dict[str, tuple[Tensor, Tensor]]:
    whole = torch.arange(16.0)
    return {
        "shape": (torch.zeros(3), torch.ones(4)),
        "rank": (torch.zeros(3), torch.ones(1, 3)),
        "expanded destination": (torch.zeros(1).expand(4), torch.ones(4)),
        "partial overlap": (whole[:8], whole[4:12]),
        "leaf": (torch.zeros(2, requires_grad=True), torch.ones(2)),
        "meta source": (torch.zeros(2), torch.ones(2, device="meta")),
        "shape of a subclass": (torch.zeros(2).as_subclass(Plain), torch.ones(3)),
        "conjugate shape": (
            torch.zeros(2, dtype=torch.complex64),
            torch.ones(3, dtype=torch.complex64).conj(),
        ),
        "leaf and a cast": (torch.zeros(2, requires_grad=True), torch.ones(2, dtype=torch.int8)),
        "expanded leaf": (torch.zeros(1, requires_grad=True).expand(3), torch.ones(3)),
        "sparse into dense shape": (torch.zeros(2, 2), torch.ones(3, 3).to_sparse()),
    }


@pytest.mark.parametrize("name", sorted(bad_pairs()))
@pytest.mark.parametrize("position", [0, 3, 6])
def test_one_bad_pair_writes_nothing(name: str, position: int) -> None:
    """The list is checked whole before its first byte moves; the type is torch's for that pair."""
    dst, src = bad_pairs()[name]
    their_dst, their_src = bad_pairs()[name]
    error = outcome(lambda: their_dst.copy_(their_src))
    assert error is not None
    dsts = [place(Layout.dense((3, 4)), torch.float32) for _ in range(6)]
    srcs = [torch.ones(3, 4) for _ in range(6)]
    dsts.insert(position, dst)
    srcs.insert(position, src)
    with nothing_written(*dsts), pytest.raises(error):
        paramkit.foreach_copy_(dsts, srcs)
    with nothing_written(dst), pytest.raises(error):
        paramkit.copy_(dst, src)


@pytest.mark.parametrize("position", [0, 2, 4])
def test_one_bad_value_writes_nothing(position: int) -> None:
    for dtype, value in (
        (torch.int8, 300),
        (torch.int32, float("nan")),
        (torch.float32, 1j),
        (torch.float16, 1e6),
        (torch.float32, torch.ones(2)),
        (torch.int64, 2**64),
    ):
        dsts = [strided() for _ in range(4)]
        values: list[Any] = [1.0] * 4
        dsts.insert(position, torch.zeros(3, dtype=dtype))
        values.insert(position, value)
        error = outcome(lambda d=dtype, v=value: torch.zeros(3, dtype=d).fill_(v))
        assert error is not None
        with nothing_written(*dsts):
            ours = outcome(lambda d=dsts, v=values: paramkit.foreach_fill_(d, v))
            assert ours is error, f"{dtype} <- {value!r}"


def test_one_value_that_fits_some() -> None:
    """One scalar for all: the dtype that cannot hold it refuses for the whole list."""
    dsts = [torch.zeros(3), torch.zeros(3, dtype=torch.uint8)]
    with nothing_written(*dsts), pytest.raises(RuntimeError):
        paramkit.foreach_fill_(dsts, 300)


def test_a_leaf_among_unusual_fills_writes_nothing() -> None:
    """The value is a tensor and the destination expanded: still judged before the first write."""
    leaf = torch.nn.Parameter(torch.zeros(1))
    for bad in (leaf, leaf.expand(4), leaf[:]):
        for value in (1.0, torch.tensor(1.0), torch.tensor(1)):
            good = strided()
            with nothing_written(good, bad), pytest.raises(RuntimeError):
                paramkit.foreach_fill_([good, bad], [1.0, value])


def test_sparse_fills_that_torch_does_not_have() -> None:
    """Known from the layout, so it is said before the tensors in front of it are filled."""
    for sparse in (torch.eye(2).to_sparse(), torch.eye(2).to_sparse_csr()):
        for value in (torch.tensor(2.0), torch.ones(2), 2.0):
            error = outcome(lambda s=sparse, v=value: s.clone().fill_(v))
            good = strided()
            if error is None:  # a number into CSR
                paramkit.foreach_fill_([good, sparse], value)
                assert sparse.values().tolist() == [value, value]
                continue
            with nothing_written(good), pytest.raises(error):
                paramkit.foreach_fill_([good, sparse], [1.0, value])
            with pytest.raises(error, match=r"(?i)sparse"):
                paramkit.fill_(sparse, value)


def test_a_fill_value_of_a_dtype_that_torch_cannot_convert() -> None:
    value = torch.empty((), dtype=torch.bits8)
    error = outcome(lambda: strided().fill_(value))
    assert error is not None
    good, bad = strided(), strided()
    with nothing_written(good, bad), pytest.raises(error):
        paramkit.foreach_fill_([good, bad], [1.0, value])


def test_messages_name_the_argument() -> None:
    with pytest.raises(RuntimeError, match="dst"):
        paramkit.copy_(torch.zeros(3), torch.zeros(4))
    with pytest.raises(RuntimeError, match=r"dsts\[1\]|srcs\[1\]"):
        paramkit.foreach_copy_([torch.zeros(3)] * 2, [torch.zeros(3), torch.zeros(4)])
    with pytest.raises(TypeError, match=r"srcs\[1\]|element 1"):
        paramkit.foreach_copy_([torch.zeros(3)] * 2, [torch.zeros(3), 4])  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match=r"dsts\[1\]"):
        paramkit.foreach_copy_(
            [torch.zeros(3), torch.zeros(3, requires_grad=True)], [torch.zeros(3)] * 2
        )
    with pytest.raises(RuntimeError, match=r"values\[1\]|dsts\[1\]"):
        paramkit.foreach_fill_([torch.zeros(3), torch.zeros(3)], [1.0, torch.zeros(2)])
