"""``copy_`` and ``fill_``: values, layouts, aliases and unusual tensors, against torch's own."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import paramkit
from tests import cases
from tests.guards import (
    Layout,
    assert_same_bits,
    assert_same_storage,
    nothing_written,
    outcome,
    place,
    random_layout,
    random_shape,
    random_source,
    watch,
)
from tests.routes import routes_of

pytestmark = pytest.mark.usefixtures("backend")

WIDTHS = (torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128)
"""One dtype for each element size: 1, 2, 4, 8 and 16 bytes."""


def assert_copies_as_torch(
    dst: Layout, src: Layout, dst_dtype: torch.dtype, src_dtype: torch.dtype, what: str
) -> None:
    """One copy by torch and one by paramkit into twins; every byte of the storages is compared."""
    source = place(src, src_dtype, seed=1)
    if dst_dtype != src_dtype:
        source = place(src, src_dtype)
        source.copy_(cases.values(src.shape, src_dtype)) if 0 not in src.strides else None
    expected, got = place(dst, dst_dtype), place(dst, dst_dtype)
    expected.copy_(source)
    assert paramkit.copy_(got, source) is got
    assert_same_storage(got, expected, what)


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_copy_random_views(dtype: torch.dtype) -> None:
    for seed in range(250):
        rng = random.Random(seed)
        shape = random_shape(rng)
        dst, src = random_layout(rng, shape), random_source(rng, shape)
        assert_copies_as_torch(dst, src, dtype, dtype, f"seed {seed}: {dst} <- {src}")


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_fill_random_views(dtype: torch.dtype) -> None:
    for seed in range(150):
        rng = random.Random(seed)
        layout = random_layout(rng, random_shape(rng))
        expected, got = place(layout, dtype), place(layout, dtype)
        value = rng.randint(0, 100)
        expected.fill_(value)
        assert paramkit.fill_(got, value) is got
        assert_same_storage(got, expected, f"seed {seed}: {layout}")


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_every_length_and_alignment(size: int) -> None:
    """Lengths 0 to twice the widest vector, with both sides misaligned by turns."""
    dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[
        size
    ]
    longest = max(2 * 64 // size, 8) + 1
    for length in range(longest + 1):
        for shift in (0, 1, 2, 3, 5):
            dst = Layout((length,), (1,), shift, length + shift + 70)
            src = Layout((length,), (1,), (3 * shift) % 7, length + 80)
            assert_copies_as_torch(dst, src, dtype, dtype, f"{length} elements, shift {shift}")
            expected, got = place(dst, dtype), place(dst, dtype)
            expected.fill_(1)
            paramkit.fill_(got, 1)
            assert_same_storage(got, expected, f"fill, {length} elements, shift {shift}")


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 16, 33, 65])
def test_transposes_of_every_edge(rows: int, dtype: torch.dtype) -> None:
    """Row and column counts around the block sizes, dense and pitched, in both directions."""
    for cols in (1, 2, 8, 15, 16, 17, 31, 64, 66):
        for pitch in (0, 3):
            tall = Layout.dense((rows, cols), (1, rows + pitch))
            wide = Layout.dense((rows, cols), (cols + pitch, 1))
            for dst, src in ((wide, tall), (tall, wide)):
                assert_copies_as_torch(dst, src, dtype, dtype, f"{dst} <- {src}")


def test_batched_transposes() -> None:
    for dims in ((0, 2, 1), (2, 0, 1), (1, 0, 2), (2, 1, 0)):
        source = place(Layout.dense((5, 34, 19)), torch.float32, seed=3).permute(dims)
        dst = Layout.dense(tuple(source.shape))
        expected, got = place(dst, torch.float32), place(dst, torch.float32)
        expected.copy_(source)
        paramkit.copy_(got, source)
        assert_same_storage(got, expected, str(dims))


def test_large_tensors_use_every_chunk() -> None:
    """Sizes above any chunk or streaming threshold, with a ragged end."""
    numel = (8 << 20) + 13
    source = torch.randint(0, 2**31, (numel + 1,), dtype=torch.int32)[1:]
    layout = Layout((numel,), (1,), 3, numel + 70)
    got = place(layout, torch.int32)
    before = watch(got)
    paramkit.copy_(got, source)
    assert torch.equal(got, source)
    before.assert_only_inside()
    paramkit.fill_(got, -7)
    assert bool((got == -7).all())
    before.assert_only_inside()


def test_large_strided_tensors() -> None:
    for name, (got, source) in {
        "transpose": cases.transposed(1500, 1111, torch.float32),
        "permute": cases.permuted((37, 41, 301), (2, 0, 1), torch.bfloat16),
        "reverse": cases.permuted((20, 30, 10, 50), (3, 2, 1, 0), torch.uint8),
        "columns": cases.column_slice(1200, 700, torch.float32),
        "rows": cases.every_other_row(1200, 1111, torch.bfloat16),
    }.items():
        snapshot = watch(got)
        paramkit.copy_(got, source)
        assert torch.equal(got, source), name
        snapshot.assert_only_inside()


def test_zero_dim_and_empty() -> None:
    scalar = torch.zeros(())
    assert paramkit.copy_(scalar, torch.tensor(3.0)) is scalar
    assert scalar.item() == 3.0
    paramkit.copy_(scalar, torch.tensor([[4.0]]).reshape(()))
    assert scalar.item() == 4.0
    paramkit.fill_(scalar, 2)
    assert scalar.item() == 2.0
    for shape in ((0,), (3, 0), (0, 3), (2, 0, 5)):
        empty = torch.empty(shape)
        assert paramkit.copy_(empty, torch.empty(shape)) is empty
        assert paramkit.fill_(empty, 1.0) is empty
    paramkit.copy_(torch.empty(0, 3), torch.ones(1, 3))
    paramkit.copy_(torch.empty(0), torch.ones(1))
    paramkit.copy_(torch.empty(0), torch.tensor(1.0))


def test_broadcasting() -> None:
    for shape in ((), (1,), (4,), (3, 1), (1, 4), (1, 1), (2, 1, 4), (2, 3, 1)):
        source = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
        expected, got = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
        expected.copy_(source)
        paramkit.copy_(got, source)
        assert_same_bits(got, expected, what=str(shape))


def test_number_as_source() -> None:
    """``Tensor.copy_`` happens to take a plain number; here it is copied so, or refused."""
    got = torch.zeros(3)
    error = outcome(lambda: paramkit.copy_(got, 3))  # type: ignore[arg-type]
    assert error in (None, TypeError)
    assert got.tolist() == ([3.0] * 3 if error is None else [0.0] * 3)


def test_fill_from_a_zero_dim_tensor() -> None:
    for value in (torch.tensor(2.5), torch.tensor(3, dtype=torch.int8), torch.tensor(True)):
        for dtype in (torch.float32, torch.bfloat16, torch.int16, torch.bool):
            expected, got = torch.zeros(5, dtype=dtype), torch.zeros(5, dtype=dtype)
            expected.fill_(value)
            paramkit.fill_(got, value)
            assert_same_bits(got, expected, what=f"{dtype} <- {value}")


def test_fill_from_an_element_of_itself() -> None:
    expected, got = torch.arange(5.0), torch.arange(5.0)
    expected.fill_(expected[3])
    paramkit.fill_(got, got[3])
    assert_same_bits(got, expected)


def test_filling_an_expanded_destination_as_torch() -> None:
    """torch's ``fill_`` accepts an expanded tensor or refuses it; so do we, alike."""
    expected, got = torch.zeros(4, 1).expand(4, 3), torch.zeros(4, 1).expand(4, 3)
    theirs = outcome(lambda: expected.fill_(1.0))
    assert outcome(lambda: paramkit.fill_(got, 1.0)) is theirs
    assert_same_storage(got, expected)


# Routes: which kernel family ran.

FAMILY = {
    "contiguous": "copy",
    "transposed": "transpose",
    "permuted": "transpose",
    "row_slice": "copy",
    "column_slice": "rows",
    "every_other_row": "rows",
}


@pytest.mark.parametrize("name", sorted(cases.LAYOUTS))
@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_routes(backend: str, name: str, dtype: torch.dtype) -> None:
    dst, src = cases.LAYOUTS[name](dtype, cases.random_bits)
    with paramkit.backend.trace() as trace:
        paramkit.copy_(dst, src)
    assert trace.routes == routes_of(backend, **{FAMILY[name]: 1})
    assert_same_bits(dst, src)


def test_route_of_fills(backend: str) -> None:
    dst = torch.zeros(7, 9)
    with paramkit.backend.trace() as trace:
        paramkit.fill_(dst, 1.0)
        paramkit.fill_(dst[:, 2:5], 2.0)
    assert trace.routes == {"native" if backend == "native" else "fill": 2}
    with paramkit.backend.trace() as trace:
        paramkit.copy_(dst[1], torch.tensor(3.0))
    assert trace.routes == routes_of(backend, fill=1)


def test_route_of_general_strides(backend: str) -> None:
    dst, src = torch.zeros(8, 9, 10)[::2, :, ::3], torch.rand(4, 9, 4)
    with paramkit.backend.trace() as trace:
        paramkit.copy_(dst, src)
    assert torch.equal(dst, src)
    expected = set(routes_of(backend, general=1, rows=1, transpose=1))
    assert sum(trace.routes.values()) == 1
    assert set(trace.routes) <= expected


def test_unusual_pairs_go_native(backend: str) -> None:
    with paramkit.backend.trace() as trace:
        paramkit.copy_(torch.zeros(2, dtype=torch.complex64), torch.tensor([1 + 2j, 3 - 1j]).conj())
    assert trace.routes == {"native": 1}


# Aliases.


def test_source_is_destination() -> None:
    tensor = torch.arange(6.0)
    version = tensor._version
    assert paramkit.copy_(tensor, tensor) is tensor
    assert torch.equal(tensor, torch.arange(6.0))
    twin = torch.arange(6.0)
    before = twin._version
    twin.copy_(twin)
    assert tensor._version - version >= twin._version - before


def test_an_expanded_tensor_into_itself_as_torch(backend: str) -> None:
    """torch looks whether both are views of the same elements before it looks at anything else."""
    base = torch.arange(24.0)
    tensor = base[6:9].expand(4, 3)
    others = {
        "another offset": base[7:10].expand(4, 3),
        "other strides": base.as_strided((4, 3), (0, 2), 6),
        "one row": base[6:9],
        "another dtype": base.view(torch.int32)[6:9].expand(4, 3),
        "another storage": base.clone()[6:9].expand(4, 3),
    }
    for same in (tensor, tensor[:], base.as_strided((4, 3), (0, 1), 6)):
        before = tensor._version
        assert tensor.copy_(same) is tensor
        theirs = tensor._version - before
        with nothing_written(base):
            assert paramkit.copy_(tensor, same) is tensor
            assert tensor._version - before == 2 * theirs
            paramkit.foreach_copy_([tensor], [same])
    with nothing_written(base):
        for source in others.values():
            for copy in (Tensor.copy_, paramkit.copy_):
                with pytest.raises(RuntimeError, match="single memory location"):
                    copy(tensor, source)


@pytest.mark.parametrize("dtype", (*cases.DTYPES, torch.bits8, torch.bits16, torch.uint4))
def test_nothing_into_nothing_of_another_dtype_as_torch(dtype: torch.dtype) -> None:
    """Where there is no element, torch asks for no conversion; with one it does."""
    for other in (torch.bits8, torch.uint4, torch.float32):
        for n in (0, 1):
            theirs, mine = torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype)
            source = torch.empty(n, dtype=other)
            expected = outcome(partial(theirs.copy_, source))
            assert outcome(partial(paramkit.copy_, mine, source)) is expected
            assert outcome(partial(paramkit.foreach_copy_, [mine], [source])) is expected
            assert n == 1 or expected is None


def test_a_tensor_that_torch_cannot_copy_into_itself() -> None:
    """No value moves, so no conversion is missed; a leaf is refused all the same."""
    tensor = torch.empty(3, dtype=torch.uint4)
    assert outcome(lambda: tensor.copy_(tensor)) is None
    assert paramkit.copy_(tensor, tensor) is tensor
    leaf = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        paramkit.copy_(leaf, leaf)


def test_source_is_the_same_view() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    paramkit.copy_(whole[:, 1:3], whole[:, 1:3])
    assert torch.equal(whole, torch.arange(12.0).reshape(3, 4))


def test_disjoint_views_of_one_storage() -> None:
    expected, got = torch.arange(24.0), torch.arange(24.0)
    for whole, copy in ((expected, Tensor.copy_), (got, paramkit.copy_)):
        copy(whole[:8], whole[8:16])
        copy(whole[1::2], whole[::2])
        copy(whole.view(4, 6)[:, :2], whole.view(4, 6)[:, 3:5])
    assert_same_bits(got, expected)


@pytest.mark.parametrize(
    "views",
    [
        lambda t: (t[:8], t[4:12]),
        lambda t: (t[4:12], t[:8]),
        lambda t: (t[1:], t[:-1]),
        lambda t: (t[:9].view(3, 3), t[:9].view(3, 3).t()),
        lambda t: (t[:8], t.view(torch.int32)[1:9]),
        lambda t: (t[:1].expand(4), torch.ones(4)),
        lambda t: (t.as_strided((3, 3), (1, 1)), torch.ones(3, 3)),
        lambda t: (t.as_strided((3, 4), (2, 1)), torch.ones(3, 4)),
        lambda t: (t[:1].expand(1), torch.ones(1)),
    ],
)
def test_overlap_as_torch(views: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Where torch refuses overlapping memory, so do we, and nothing is written."""
    theirs, ours = torch.arange(16.0), torch.arange(16.0)
    expected_dst, expected_src = views(theirs)
    error = outcome(lambda: expected_dst.copy_(expected_src))
    dst, src = views(ours)
    if error is None:
        paramkit.copy_(dst, src)
        assert_same_storage(dst, expected_dst)
    else:
        with nothing_written(dst), pytest.raises(error):
            paramkit.copy_(dst, src)


def test_partial_overlap_raises() -> None:
    whole = torch.arange(16.0)
    with nothing_written(whole), pytest.raises(RuntimeError):
        paramkit.copy_(whole[:8], whole[4:12])
    with nothing_written(whole), pytest.raises(RuntimeError):
        paramkit.copy_(whole[:1].expand(4), torch.ones(4))


UNDECIDED = (
    lambda t: (t.view(6, 6)[:, :4], t.view(6, 6)[:, 2:]),
    lambda t: (t.view(6, 6)[:, 2:], t.view(6, 6)[:, :4]),
    lambda t: (t.view(6, 6)[1:, :4], t.view(6, 6)[:-1, :4]),
    lambda t: (t[::2][1:], t[::2][:-1]),
    lambda t: (t[1::2], t[::2]),
    lambda t: (t.view(6, 6)[:5, :5], t.view(6, 6)[:5, :5].t()),
)
"""Strided views of one storage whose overlap torch does not judge: it copies, in its own order."""


@pytest.mark.parametrize("views", UNDECIDED)
def test_undecided_overlap_keeps_torchs_result(
    views: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> None:
    expected, got = torch.arange(36.0), torch.arange(36.0)
    dst, src = views(expected)
    error = outcome(lambda: dst.copy_(src))
    ours, source = views(got)
    assert outcome(lambda: paramkit.copy_(ours, source)) is error
    assert_same_bits(got, expected)


@pytest.mark.parametrize("views", UNDECIDED)
def test_undecided_overlap_in_a_plan(views: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """A plan may refuse such a pair; what it must not do is write something else than torch."""
    expected, got = torch.arange(36.0), torch.arange(36.0)
    dst, src = views(expected)
    dst.copy_(src)
    ours, source = views(got)
    error = outcome(lambda: paramkit.plan([ours], [source]).apply())
    if error is None:
        assert_same_bits(got, expected)
    else:
        assert issubclass(error, RuntimeError)
        assert_same_bits(got, torch.arange(36.0))


# Tensors of an unusual kind.


def test_conjugate_and_negative_views() -> None:
    source = torch.randn(5, dtype=torch.complex64)
    for make in (
        lambda: (torch.zeros(5, dtype=torch.complex64), source.conj()),
        lambda: (torch.zeros(5, dtype=torch.complex64).conj(), source),
        lambda: (torch.zeros(5, dtype=torch.complex64).conj(), source.conj()),
        lambda: (torch.zeros(5), source.conj().imag),
        lambda: (torch.zeros(5, dtype=torch.complex64).conj().imag, source.imag),
        lambda: (torch.zeros(5, dtype=torch.complex128), source.conj()),
    ):
        (expected, src), (got, _) = make(), make()
        expected.copy_(src)
        paramkit.copy_(got, src)
        assert_same_storage(got, expected)
    for make_dst in (
        lambda: torch.zeros(5, dtype=torch.complex64).conj(),
        lambda: torch.zeros(5, dtype=torch.complex64).conj().imag,
    ):
        expected, got = make_dst(), make_dst()
        expected.fill_(2.0)
        paramkit.fill_(got, 2.0)
        assert_same_storage(got, expected)


def test_sparse_as_torch() -> None:
    dense = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    sparse = dense.to_sparse()
    expected, got = torch.zeros(2, 2).to_sparse(), torch.zeros(2, 2).to_sparse()
    expected.copy_(sparse)
    paramkit.copy_(got, sparse)
    assert torch.equal(got.to_dense(), expected.to_dense())

    for dst, src in (
        (torch.zeros(2, 2), sparse),
        (sparse.clone(), dense),
        (dense.to_sparse_csr(), dense),
    ):
        twin = dst.clone()
        error = outcome(lambda twin=twin, src=src: twin.copy_(src))
        assert outcome(lambda dst=dst, src=src: paramkit.copy_(dst, src)) is error
        if error is None:
            assert torch.equal(_dense(dst), _dense(twin))


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def test_meta_destination_is_a_no_op() -> None:
    meta = torch.empty(3, device="meta")
    assert paramkit.copy_(meta, torch.ones(3)) is meta
    assert paramkit.fill_(meta, 1.0) is meta
    paramkit.foreach_copy_([meta], [torch.ones(3)])
    paramkit.foreach_fill_([meta], 1.0)


def test_meta_source_raises() -> None:
    dst = torch.zeros(3)
    with nothing_written(dst), pytest.raises(NotImplementedError):
        paramkit.copy_(dst, torch.empty(3, device="meta"))


def test_subclass_sees_torch_function() -> None:
    """A subclass with ``__torch_function__`` is asked, as ``Tensor.copy_`` asks it."""

    class Noisy(Tensor):
        calls: list[str] = []

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            cls.calls.append(getattr(func, "__name__", str(func)))
            return super().__torch_function__(func, types, args, kwargs or {})

    for dst, src in (
        (torch.zeros(3).as_subclass(Noisy), torch.ones(3)),
        (torch.zeros(3), torch.ones(3).as_subclass(Noisy)),
    ):
        Noisy.calls.clear()
        paramkit.copy_(dst, src)
        assert "copy_" in Noisy.calls
        assert dst.as_subclass(Tensor).tolist() == [1, 1, 1]
    dst = torch.zeros(3).as_subclass(Noisy)
    Noisy.calls.clear()
    paramkit.fill_(dst, 2.0)
    assert "fill_" in Noisy.calls
    Noisy.calls.clear()
    paramkit.foreach_copy_([torch.zeros(2), dst], [torch.ones(2), torch.full((3,), 5.0)])
    assert "copy_" in Noisy.calls
    assert dst.as_subclass(Tensor).tolist() == [5, 5, 5]


def test_wrapper_subclass_with_torch_dispatch() -> None:
    """A wrapper without memory of its own: raw writes would be lost or crash."""
    from torch.utils._pytree import tree_map

    class Wrapped(Tensor):
        inner: Tensor

        @staticmethod
        def __new__(cls, inner: Tensor) -> Wrapped:
            self = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
            self.inner = inner
            return self

        def __init__(self, inner: Tensor) -> None:
            pass

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            def unwrap(value: object) -> object:
                return value.inner if isinstance(value, Wrapped) else value

            func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
            return args[0]

    dst = Wrapped(torch.zeros(3))
    paramkit.copy_(dst, torch.ones(3))
    assert dst.inner.tolist() == [1, 1, 1]
    paramkit.foreach_copy_([torch.zeros(1), dst], [torch.ones(1), torch.full((3,), 2.0)])
    assert dst.inner.tolist() == [2, 2, 2]
    paramkit.fill_(dst, 4.0)
    assert dst.inner.tolist() == [4, 4, 4]
    plain = torch.zeros(3)
    seen = outcome(lambda: plain.clone().copy_(Wrapped(torch.ones(3))))
    assert outcome(lambda: paramkit.copy_(plain, Wrapped(torch.ones(3)))) is seen


def test_parameters_and_buffers_are_plain() -> None:
    """A Parameter is torch's own class: the fast route takes it, and it stays the object it was."""
    parameter = torch.nn.Parameter(torch.zeros(4))
    pointer = parameter.data_ptr()
    with torch.no_grad():
        assert paramkit.copy_(parameter, torch.ones(4)) is parameter
    assert parameter.requires_grad
    assert parameter.data_ptr() == pointer
    assert parameter.tolist() == [1, 1, 1, 1]


def test_copy_on_write_storage_is_materialized_first() -> None:
    """A lazy clone shares memory until the first write; its twin must keep its values."""
    original = torch.arange(4.0)
    lazy = torch._lazy_clone(original)
    paramkit.copy_(lazy, torch.full((4,), 9.0))
    assert original.tolist() == [0, 1, 2, 3]
    assert lazy.tolist() == [9, 9, 9, 9]
    lazy = torch._lazy_clone(original)
    paramkit.foreach_fill_([lazy[1:3]], 7.0)
    assert original.tolist() == [0, 1, 2, 3]
    assert lazy.tolist() == [0, 7, 7, 3]
    target = torch.zeros(4)
    paramkit.copy_(target, torch._lazy_clone(original))
    assert target.tolist() == [0, 1, 2, 3]


def test_numpy_and_shared_memory() -> None:
    import numpy

    array = numpy.zeros((3, 4), dtype=numpy.float32)
    paramkit.copy_(torch.from_numpy(array)[:, ::2], torch.ones(3, 2))
    assert array[:, ::2].min() == 1
    assert array[:, 1::2].max() == 0


def test_two_storages_at_one_address() -> None:
    """torch judges the overlap of one storage alone; what it copies, in its own order, is copied."""
    import numpy

    arrays = [numpy.arange(64, dtype=numpy.float32) for _ in range(2)]
    theirs, ours = (
        [torch.from_numpy(array)[begin : begin + 8] for begin in (0, 2)] for array in arrays
    )
    theirs[0].copy_(theirs[1])
    paramkit.foreach_copy_(ours[:1], ours[1:])
    assert (arrays[0] == arrays[1]).all()


# Modes and transforms: torch's behaviour, not raw writes behind their back.


def test_under_a_dispatch_mode() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    dst = torch.zeros(3)
    with Record() as record:
        paramkit.foreach_copy_([dst], [torch.ones(3)])
    assert any("copy_" in name for name in record.names)
    assert dst.tolist() == [1, 1, 1]


def test_under_a_function_mode() -> None:
    from torch.overrides import TorchFunctionMode

    class Record(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.names.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    dst = torch.zeros(3)
    with Record() as record:
        paramkit.copy_(dst, torch.ones(3))
        paramkit.fill_(dst[:1], 2.0)
    assert any("copy_" in name for name in record.names)
    assert any("fill_" in name for name in record.names)
    assert dst.tolist() == [2, 1, 1]


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        dst, src = torch.zeros(3), torch.ones(3)
        assert paramkit.copy_(dst, src) is dst
        paramkit.foreach_fill_([dst], 1.0)


def test_vmap_as_torch() -> None:
    dsts, srcs = torch.zeros(4, 3), torch.rand(4, 3)
    torch.vmap(lambda d, s: paramkit.copy_(d, s))(dsts, srcs)
    assert torch.equal(dsts, srcs)
    torch.vmap(lambda d: paramkit.fill_(d, 2.0))(dsts)
    assert bool((dsts == 2).all())

    def unbatched(copy: Callable[[Tensor, Tensor], Tensor]) -> type[Exception] | None:
        plain = torch.zeros(3)
        return outcome(lambda: torch.vmap(lambda s: copy(plain, s))(srcs))

    assert unbatched(paramkit.copy_) is unbatched(Tensor.copy_)


def test_functional_call_and_grad_transform() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))
            self.register_buffer("last", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.weight
            paramkit.copy_(self.last, y.detach())
            return y.sum()

    net = Net()
    state = {"weight": torch.full((3,), 2.0), "last": torch.zeros(3)}
    torch.func.functional_call(net, state, (torch.ones(3),))
    assert state["last"].tolist() == [2, 2, 2]
    assert net.last.tolist() == [0, 0, 0]

    def loss(weight: Tensor) -> Tensor:
        buffer = torch.zeros_like(weight)
        paramkit.copy_(buffer, weight * 3)
        return (buffer * weight).sum()

    assert torch.func.grad(loss)(torch.tensor([1.0, 2.0])).tolist() == [6.0, 12.0]


def test_threads_may_call_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def work(number: int) -> bool:
        dsts = [torch.zeros(65) for _ in range(40)]
        for turn in range(20):
            paramkit.foreach_copy_(dsts, [torch.full((65,), float(number + turn))] * 40)
        return all(bool((dst == number + 19).all()) for dst in dsts)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))
