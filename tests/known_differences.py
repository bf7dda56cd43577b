"""Where the operators do not do what torch does, on purpose. A short list; each entry is justified.

`tests/test_opinfo.py` fails if a sample differs in a way that is not listed, or if a listed difference no longer
occurs. `docs/semantics.md` shows the same list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import paramkit

from .cases import FLOAT8, random_bits
from .guards import bits, elements, storage_bytes
from .twins import is_strided

if TYPE_CHECKING:
    from .parity import Call, Seen

__all__ = ["DIFFERENCES", "VERSIONS", "Difference"]


@dataclass(frozen=True)
class Difference:
    """One known difference.

    Attributes:
        name: short, as in the document.
        torch: what torch does.
        paramkit: what paramkit does.
        why: the reason.
        matches: whether a call that was done on both sides shows it.
        shows: whether a smallest example shows it today; asserted.
        patched: whether it shows in torch's own functions, too, while `patch_torch` is on.
        sampled: whether torch's own samples show it.
    """

    name: str
    torch: str
    paramkit: str
    why: str
    matches: Callable[[Call, Seen, Seen], bool]
    shows: Callable[[], bool]
    patched: bool = False
    sampled: bool = True


def _list_failed(call: Call, reference: Seen, got: Seen) -> bool:
    return (
        call.kind.startswith("foreach_")
        and reference.error is not None
        and type(got.error) is type(reference.error)
        and any(rise > 0 for rise in reference.rises)
    )


def _list_shows() -> bool:
    written = []
    for copy in (torch._foreach_copy_, paramkit.foreach_copy_):
        good = torch.zeros(2)
        try:
            copy([good, torch.zeros(3)], [torch.ones(2), torch.ones(4)])
        except RuntimeError:
            written.append(bool(good.any()))
    return written == [True, False]


def _list_refused(call: Call, reference: Seen, got: Seen) -> bool:
    tensors = [*call.dst, *call.value] if call.kind == "foreach_copy_" else call.dst
    return (
        call.kind in ("foreach_copy_", "foreach_zero_")
        and type(reference.error) is RuntimeError
        and "fallback doesn't currently" in str(reference.error)
        and got.error is None
        and any(t.is_conj() or t.is_neg() for t in tensors)
    )


def _list_is_refused() -> bool:
    dst = torch.zeros(2, dtype=torch.complex64).conj()
    src = torch.full((2,), 1j)
    paramkit.foreach_copy_([dst], [src])
    try:
        torch._foreach_copy_([dst], [src])
    except RuntimeError:
        return dst.tolist() == [1j, 1j]
    return False


def _copied(call: Call, reference: Seen, got: Seen) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(torch's destination, ours, the source) of every copy between strided tensors."""
    if call.kind not in ("copy_", "foreach_copy_") or reference.error or got.error:
        return
    sources = call.value if isinstance(call.value, (list, tuple)) else [call.value]
    for theirs, mine, src in zip(reference.tensors, got.tensors, sources):
        if is_strided(mine) and is_strided(src) and mine.numel():
            yield theirs, mine, src.detach().expand(mine.shape)


def _casts(call: Call, reference: Seen, got: Seen) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(torch's destination, ours, where the source is NaN) of every conversion of real numbers."""
    for theirs, mine, src in _copied(call, reference, got):
        if src.dtype != mine.dtype and src.is_floating_point():
            yield theirs, mine, src.to(torch.float64).isnan().reshape(-1)


def _take_over(theirs: Tensor, mine: Tensor, where: Tensor) -> bool:
    """Give torch's twin our bytes at these elements; whether any were others. Not seen by versions."""
    size = mine.element_size()
    other = (bits(theirs) != bits(mine)).any(-1) & where
    if not bool(other.any()):
        return False
    raw = storage_bytes(theirs)
    whole = raw[: raw.numel() // size * size].view(-1, size)
    whole[elements(theirs)[other]] = bits(mine)[other]
    return True


def _nan_as_float(call: Call, reference: Seen, got: Seen) -> bool:
    found = False
    for theirs, mine, nan in _casts(call, reference, got):
        if mine.is_floating_point():
            both = (
                theirs.detach().to(torch.float64).isnan() & mine.detach().to(torch.float64).isnan()
            )
            found |= _take_over(theirs, mine, nan & both.reshape(-1))
    return found


def _nan_as_integer(call: Call, reference: Seen, got: Seen) -> bool:
    found = False
    for theirs, mine, nan in _casts(call, reference, got):
        if not (mine.is_floating_point() or mine.is_complex()) and mine.element_size() >= 4:
            lowest = 0 if not mine.dtype.is_signed else torch.iinfo(mine.dtype).min
            allowed = (mine.detach() == lowest) | (mine.detach() == 0)
            found |= _take_over(theirs, mine, nan & allowed.reshape(-1))
    return found


def _converts_otherwise(dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether a NaN becomes other bits than in torch for some pair of dtypes, dense or strided."""
    for src_dtype in (torch.float32, torch.float64, torch.float16, *FLOAT8):
        for dtype in dtypes:
            if dtype is src_dtype:
                continue
            src = random_bits((2, 4096), src_dtype)
            for source in (src, src[:, ::3]):
                nan = source.to(torch.float64).isnan()
                theirs, mine = (torch.zeros(source.shape, dtype=dtype) for _ in range(2))
                theirs.copy_(source)
                paramkit.copy_(mine, source)
                if bool(((bits(theirs) != bits(mine)).any(-1) & nan.reshape(-1)).any()):
                    return True
    return False


def _index(call: Call, reference: Seen, got: Seen) -> bool:
    return (
        call.kind == "assign"
        and type(got.error) is TypeError
        and "expected integers, slices, None or ..." in str(got.error)
    )


def _index_shows() -> bool:
    tensor = torch.zeros(3)
    tensor[[0, 2]] = 1
    try:
        with paramkit.writes({"tensor": tensor}) as w:
            w["tensor"][[0, 2]] = 2
    except TypeError:
        return tensor.tolist() == [1, 0, 1]
    return False


def _plan_error(call: Call, reference: Seen, got: Seen) -> bool:
    return (
        call.kind == "assign"
        and type(reference.error) is RuntimeError
        and type(got.error) is paramkit.PlanError
    )


def _plan_error_shows() -> bool:
    tensor = torch.zeros(3)
    try:
        with paramkit.writes({"tensor": tensor}) as w:
            w["tensor"][:2] = torch.ones(5)
    except RuntimeError as error:
        return type(error) is paramkit.PlanError
    return False


def _versions(call: Call, reference: Seen, got: Seen) -> bool:
    return (
        call.kind == "assign"
        and reference.error is got.error is None
        and got.rises != reference.rises
        and all(1 <= rise <= 2 for rise in got.rises)  # a call is one assignment
    )


def _versions_show() -> bool:
    """Three by the kernels, and one that they leave to torch."""
    rises = []
    for dtype, count in ((torch.float32, 3), (torch.complex64, 1)):
        tensor = torch.zeros(3, dtype=dtype)
        with paramkit.writes({"tensor": tensor}) as w:
            for index in range(count):
                w["tensor"][index] = torch.ones(())
        rises.append(tensor._version)
    return rises == [1, 2]


def _bool_bytes(call: Call, reference: Seen, got: Seen) -> bool:
    found = False
    for theirs, mine, src in _copied(call, reference, got):
        if mine.dtype is src.dtype is torch.bool:
            moved = (bits(mine) > 1) & (bits(mine) == bits(src)) & (bits(theirs) == 1)
            found |= _take_over(theirs, mine, moved.reshape(-1))
    return found


def _bool_bytes_show() -> bool:
    src = torch.tensor([0, 1, 2, 255], dtype=torch.uint8).view(torch.bool)
    theirs, mine = (torch.zeros(4, dtype=torch.bool) for _ in range(2))
    theirs.copy_(src)
    paramkit.copy_(mine, src)
    return [t.view(torch.uint8).tolist() for t in (theirs, mine)] == [[0, 1, 1, 1], [0, 1, 2, 255]]


VERSIONS = "versions after `writes`"

DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        name="a list that fails",
        torch="has written the pairs before the bad one",
        paramkit="has written nothing",
        why="half a model is worse than none",
        matches=_list_failed,
        shows=_list_shows,
    ),
    Difference(
        name="a list with conjugate or negative views",
        torch="RuntimeError: `_foreach_copy_` and `_foreach_zero_` do not take them",
        paramkit="writes them, as the loop of `copy_` does",
        why="the loop is the contract, and torch's refusal is a gap of its fallback",
        matches=_list_refused,
        shows=_list_is_refused,
    ),
    Difference(
        name="NaN converted to a float",
        torch="a NaN with a sign and payload that depend on the dtypes and on the path taken",
        paramkit="a NaN, of any sign and payload",
        why="torch's vector and scalar paths differ among themselves, so there is nothing to match",
        matches=_nan_as_float,
        patched=True,
        shows=lambda: _converts_otherwise((torch.float64, torch.float32, torch.float16)),
    ),
    Difference(
        name="NaN converted to a 32- or 64-bit integer",
        torch="0 or the smallest integer, by the source's dtype and the path taken",
        paramkit="0 or the smallest integer",
        why="no such value means anything, and torch's own paths differ",
        matches=_nan_as_integer,
        patched=True,
        shows=lambda: _converts_otherwise((torch.int32, torch.int64)),
    ),
    Difference(
        name="a list, mask or tensor as an index in `writes`",
        torch="writes the elements that it selects",
        paramkit="TypeError",
        why="which elements depends on data, which a plan cannot check beforehand",
        matches=_index,
        shows=_index_shows,
    ),
    Difference(
        name="an error of `writes`",
        torch="RuntimeError, of the first bad assignment",
        paramkit="PlanError, which is a RuntimeError, at the end of the block",
        why="it has everything that is wrong with the block",
        matches=_plan_error,
        shows=_plan_error_shows,
    ),
    Difference(
        name="the byte of a bool that is neither 0 nor 1",
        torch="1",
        paramkit="the byte",
        why="bools of one dtype are moved; torch makes such a byte only by `view(torch.bool)`",
        matches=_bool_bytes,
        patched=True,
        sampled=False,
        shows=_bool_bytes_show,
    ),
    Difference(
        name=VERSIONS,
        torch="rise by one for each assignment",
        paramkit="rise by one in all, and by one for each assignment that the kernels leave to torch",
        why="autograd needs only that they rise",
        matches=_versions,
        shows=_versions_show,
    ),
)
