"""Lists of CUDA tensors: one launch for any mixture, aliases as the loop, native pairs alone, autograd as torch."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from torch import Tensor

import paramkit
from tests import cases
from tests.gpu.needs import need_gpu
from tests.gpu.storages import assert_same_storage, counted, place, small_numbers, twin
from tests.gpu.streams import delay
from tests.guards import random_layout, random_shape, random_source
from tests.test_foreach import CHAINS, LARGE, loop

need_gpu()

Pairs = tuple[list[Tensor], list[Tensor]]


def ramp(count: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(count, device=device).to(dtype)


# Launches.


@pytest.mark.parametrize("seed", range(16))
def test_mixed_lists(cuda: torch.device, seed: int) -> None:
    """Every dtype, ranks 0 to 6, any strides, broadcasts, empty tensors, some casts: one launch."""
    rng = random.Random(seed)
    got: list[Tensor] = []
    srcs: list[Tensor] = []
    for index in range(rng.choice((3, 37, 120, 400))):
        shape = random_shape(rng)
        dtype = rng.choice(cases.DTYPES)
        casts = not dtype.is_complex and rng.random() < 0.3
        src_dtype = rng.choice([d for d in cases.DTYPES if not d.is_complex]) if casts else dtype
        got.append(place(random_layout(rng, shape), dtype, cuda))
        source = place(random_source(rng, shape), src_dtype, cuda, index)
        srcs.append(small_numbers(source) if src_dtype != dtype else source)
    want = [twin(dst) for dst in got]
    loop(want, srcs)
    with paramkit.backend.trace() as trace:
        counts = counted(lambda: paramkit.foreach_copy_(got, srcs))
    assert (counts["launches"], counts["staged_bytes"]) == (1, 0)
    assert "native" not in trace.routes
    for index, (ours, theirs, src) in enumerate(zip(got, want, srcs, strict=True)):
        what = f"seed {seed}, pair {index}, {src.dtype} -> {ours.dtype}"
        assert_same_storage(ours, theirs, what, any_nan=ours.dtype != src.dtype)


@pytest.mark.parametrize(("count", "uploads"), [(1, 0), (8, 0), (3000, 1)])
def test_short_lists_travel_with_the_launch(cuda: torch.device, count: int, uploads: int) -> None:
    """Longer ones are uploaded first; each is one launch."""
    dsts = [torch.zeros(100 + i, device=cuda) for i in range(count)]
    srcs = [torch.rand(100 + i, device=cuda) for i in range(count)]
    counts = counted(lambda: paramkit.foreach_copy_(dsts, srcs))
    assert counts == {"launches": 1, "uploads": uploads, "staged_bytes": 0}
    for dst, src in zip(dsts, srcs, strict=True):
        assert torch.equal(dst, src)


def test_uploads_follow_one_another(cuda: torch.device) -> None:
    """Twenty long lists under way at once: no upload overwrites one that has not been read."""
    source = torch.rand(3000, 70, device=cuda)
    rounds = [torch.zeros(3000, 70, device=cuda) for _ in range(20)]
    delay(100)
    for index, memory in enumerate(rounds):
        rows = [*memory.unbind()]
        paramkit.foreach_copy_(rows, [*(source + index).unbind()])
    for index, memory in enumerate(rounds):
        assert torch.equal(memory, source + index), f"list {index}"


def test_one_tensor_is_one_launch(cuda: torch.device) -> None:
    dst, src = torch.zeros(7, 9, device=cuda), torch.rand(9, 7, device=cuda)
    assert counted(lambda: paramkit.copy_(dst, src.t()))["launches"] == 1
    assert torch.equal(dst, src.t())
    assert paramkit.copy_(dst, src.t()) is dst
    assert counted(lambda: paramkit.fill_(dst[:, ::2], 3))["launches"] == 1
    assert torch.equal(dst[:, ::2], torch.full((7, 5), 3.0, device=cuda))
    assert torch.equal(dst[:, 1::2], src.t()[:, 1::2])


def test_nothing_to_write_is_no_launch(cuda: torch.device) -> None:
    dsts = [torch.empty(0, device=cuda), torch.empty(2, 0, 3, device=cuda)]
    srcs = [torch.empty(0, device=cuda), torch.empty(2, 0, 3, device=cuda)]
    assert counted(lambda: paramkit.foreach_copy_(dsts, srcs))["launches"] == 0
    assert counted(lambda: paramkit.foreach_fill_(dsts, 1.0))["launches"] == 0


def test_through_the_dispatcher(cuda: torch.device) -> None:
    """torch.ops.paramkit takes the same way."""
    dsts = [torch.zeros(5, device=cuda), torch.zeros(6, 4, dtype=torch.bfloat16, device=cuda)]
    srcs = [torch.rand(5, device=cuda), torch.rand(4, 6, device=cuda).t()]
    counts = counted(lambda: torch.ops.paramkit.foreach_copy_(dsts, srcs))
    assert counts["launches"] == 1
    assert torch.equal(dsts[0], srcs[0])
    assert torch.equal(dsts[1], srcs[1].to(torch.bfloat16))
    torch.ops.paramkit.foreach_fill_(dsts, [1.0, 2.0])
    assert (dsts[0].sum().item(), dsts[1].sum().item()) == (5, 48)


# Aliases across pairs: the loop's result, in the loop's order.


@pytest.mark.parametrize("name", sorted(CHAINS))
def test_aliases_behave_as_the_loop(cuda: torch.device, name: str) -> None:
    expected, got = ramp(16, cuda), ramp(16, cuda)
    loop(*CHAINS[name](expected))
    paramkit.foreach_copy_(*CHAINS[name](got))
    assert torch.equal(got, expected), name


@pytest.mark.parametrize("name", sorted(LARGE))
def test_large_aliases_behave_as_the_loop(cuda: torch.device, name: str) -> None:
    """Enough for all multiprocessors: what may not overtake does not."""
    expected, got = ramp(1 << 23, cuda, torch.int32), ramp(1 << 23, cuda, torch.int32)
    loop(*LARGE[name](expected))
    paramkit.foreach_copy_(*LARGE[name](got))
    assert torch.equal(got, expected), name


@pytest.mark.parametrize("seed", range(8))
def test_random_aliases(cuda: torch.device, seed: int) -> None:
    """Random strided slices of one storage on both sides, none of which overlaps itself."""

    def pairs(whole: Tensor) -> Pairs:
        rng = random.Random(seed)
        dsts, srcs = [], []
        while len(dsts) < 60:
            length, step = rng.randint(1, 400), rng.choice((1, 1, 2, 3))
            first, second = sorted(rng.sample(range(4000 - 1200), 2))
            if second - first < length * step:
                continue
            views = [whole[at : at + length * step : step] for at in (first, second)]
            rng.shuffle(views)
            dsts.append(views[0])
            srcs.append(views[1])
        return dsts, srcs

    expected, got = ramp(4000, cuda), ramp(4000, cuda)
    loop(*pairs(expected))
    paramkit.foreach_copy_(*pairs(got))
    assert torch.equal(got, expected), f"seed {seed}"


def test_a_long_chain(cuda: torch.device) -> None:
    """Each tensor feeds the next."""
    expected = [torch.full((5000,), float(i), device=cuda) for i in range(60)]
    got = [tensor.clone() for tensor in expected]
    loop(expected[1:], expected[:-1])
    paramkit.foreach_copy_(got[1:], got[:-1])
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_last_of_overlapping_fills_wins(cuda: torch.device) -> None:
    whole = torch.zeros(10, device=cuda)
    paramkit.foreach_fill_([whole, whole[2:6], whole[4:8]], [1.0, 2.0, 3.0])
    assert whole.tolist() == [1, 1, 2, 2, 3, 3, 3, 3, 1, 1]


def test_a_pair_that_overlaps_itself(cuda: torch.device) -> None:
    """Partly overlapping is refused as torch does; the same tensor on both sides is not."""
    whole = ramp(20, cuda)
    with pytest.raises(RuntimeError, match="single memory location"):
        paramkit.foreach_copy_([whole[:10]], [whole[5:15]])
    paramkit.foreach_copy_([whole], [whole])
    windows = torch.zeros(12, device=cuda).as_strided((4, 6), (2, 1))
    want = windows.clone()
    numbers = torch.zeros(4, 6, device=cuda)
    paramkit.copy_(windows, numbers)  # all one number: the order does not matter
    want.copy_(numbers)
    assert torch.equal(windows, want)
    assert torch.equal(whole, ramp(20, cuda))


# Fills.


def test_fills_with_values_of_every_kind(cuda: torch.device) -> None:
    """Numbers, 0-d tensors of the host and of the device, of other dtypes too: one launch."""
    rng = random.Random(1)
    got, values = [], []
    for index in range(200):
        dtype = rng.choice(cases.DTYPES)
        got.append(place(random_layout(rng, random_shape(rng)), dtype, cuda))
        number = rng.randint(1, 8)
        kind = rng.choice((torch.float32, torch.int16, torch.bfloat16, dtype))
        values.append(
            (
                number,
                float(number),
                True,
                torch.tensor(number),
                torch.tensor(number, device=cuda).to(dtype if dtype.is_complex else kind),
            )[index % 5]
        )
    want = [twin(dst) for dst in got]
    for dst, value in zip(want, values, strict=True):
        dst.fill_(value)
    assert counted(lambda: paramkit.foreach_fill_(got, values))["launches"] == 1
    for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        what = f"fill {index} of {ours.dtype} with {values[index]!r}"
        assert_same_storage(ours, theirs, what, any_nan=True)


@pytest.mark.parametrize("on_device", [False, True])
def test_one_value_for_all(cuda: torch.device, on_device: bool) -> None:
    weights = cases.conv_weights(500)
    weights = [weight.to(cuda) for weight in weights]
    value = torch.tensor(0.3, device=cuda) if on_device else 0.3
    counts = counted(lambda: paramkit.foreach_fill_(cases.centre_views(weights), value))
    assert (counts["launches"], counts["uploads"]) == (1, 1)
    want = torch.zeros(8, 8, 3, 3, device=cuda)
    want[:, :, 1, 1] = 0.3
    for weight in weights:
        assert torch.equal(weight, want)


@pytest.mark.parametrize("value", [1e300, 300, -1, float("inf"), 2.7, 1 + 2j, True, 2**40])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_fills_out_of_range_as_torch(
    cuda: torch.device, dtype: torch.dtype, value: complex
) -> None:
    """The same values, or the same type of error and nothing written."""
    got = torch.zeros(5, device=cuda).to(dtype)
    want, before, error = got.clone(), got.clone(), None
    try:
        want.fill_(value)
    except NotImplementedError:
        pytest.skip(f"torch fills no {dtype}")
    except Exception as raised:
        error = type(raised)
    if error is not None:
        with pytest.raises(error):
            paramkit.fill_(got, value)
        assert_same_storage(got, before)
        return
    paramkit.fill_(got, value)
    assert_same_storage(got, want, f"{value} into {dtype}", any_nan=True)


def test_a_value_that_an_earlier_fill_writes(cuda: torch.device) -> None:
    expected, got = ramp(6, cuda), ramp(6, cuda)
    for dst, value in zip([expected[0], expected[1:4]], [expected[5], expected[0]], strict=True):
        dst.fill_(value)
    paramkit.foreach_fill_([got[0], got[1:4]], [got[5], got[0]])
    assert torch.equal(got, expected)


# Pairs of other kinds among them.


def test_odd_pairs_go_native_alone(cuda: torch.device) -> None:
    conj = torch.tensor([1 + 2j, 3 - 1j], device=cuda).conj()
    sparse = torch.tensor([[0.0, 1.0], [2.0, 0.0]], device=cuda).to_sparse()
    dsts = [
        torch.zeros(2, dtype=torch.complex64, device=cuda),
        torch.zeros(100, device=cuda),
        torch.zeros(2, 2, device=cuda).to_sparse(),
        torch.zeros(6, 9, device=cuda)[:, 1:6],
    ]
    srcs = [conj, torch.rand(100, device=cuda), sparse, torch.rand(6, 5, device=cuda)]
    with paramkit.backend.trace() as trace:
        paramkit.foreach_copy_(dsts, srcs)
    assert trace.routes == {"native": 2, "copy": 1, "rows": 1}
    for dst, src in zip(dsts, srcs, strict=True):
        assert torch.equal(dst.to_dense(), src.to_dense())


def test_complex_to_real_and_back(cuda: torch.device) -> None:
    """Not the kernels' conversion, torch's own."""
    source = torch.randn(50, dtype=torch.complex64, device=cuda)
    got = [torch.zeros(50, dtype=torch.complex128, device=cuda), torch.zeros(50, device=cuda)]
    want = [dst.clone() for dst in got]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the imaginary part is discarded
        loop(want, [source, source])
        paramkit.foreach_copy_(got, [source, source])
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


def test_both_devices_in_one_list(cuda: torch.device) -> None:
    """Within the GPU, within the host, to the GPU and back, by turns."""
    rng = random.Random(3)
    places = [torch.device("cpu"), cuda]
    got, srcs, kinds = [], [], []
    for index in range(400):
        to, at = rng.choice(places), rng.choice(places)
        shape = random_shape(rng, 4)
        dtype = rng.choice((torch.float32, torch.bfloat16, torch.int64, torch.uint8))
        src_dtype = dtype if rng.random() < 0.6 else torch.float16
        got.append(place(random_layout(rng, shape), dtype, to))
        source = place(random_source(rng, shape), src_dtype, at, index)
        srcs.append(small_numbers(source) if src_dtype != dtype else source)
        kinds.append(f"{at.type} {src_dtype} to {to.type} {dtype}")
    want = [twin(dst) for dst in got]
    loop(want, srcs)
    counts = counted(lambda: paramkit.foreach_copy_(got, srcs))
    assert counts["staged_bytes"] > 0
    # On the device, to it and from it.
    assert counts["launches"] <= 3
    for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert_same_storage(ours, theirs, f"pair {index}, {kinds[index]}")


def test_a_chain_from_device_to_device(cuda: torch.device) -> None:
    """Host to GPU to GPU to host to host to GPU, each from what the one before wrote."""
    for size in (10, 100_000):
        source = torch.rand(size)
        a, b, e = (torch.zeros(size, device=cuda) for _ in range(3))
        c, d = torch.zeros(size), torch.zeros(size)
        paramkit.foreach_copy_([a, b, c, d, e], [source, a, b, c, d])
        for index, tensor in enumerate((a, b, c, d, e)):
            assert torch.equal(tensor.cpu(), source), f"step {index} of {size}"


# Autograd, version counters, errors.


def test_a_leaf_is_refused_and_written_without_grad_mode(cuda: torch.device) -> None:
    dsts = [torch.zeros(5, device=cuda), torch.zeros(5, device=cuda, requires_grad=True)]
    srcs = [torch.ones(5, device=cuda), torch.ones(5, device=cuda)]
    with pytest.raises(RuntimeError, match="leaf Variable"):
        paramkit.foreach_copy_(dsts, srcs)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        paramkit.foreach_fill_(dsts, 1.0)
    assert not dsts[0].any()
    versions = [dst._version for dst in dsts]
    with torch.no_grad():
        paramkit.foreach_copy_(dsts, srcs)
        paramkit.foreach_fill_(dsts, 2.0)
    assert all(bool((dst == 2).all()) for dst in dsts)
    assert all(dst._version >= was + 2 for dst, was in zip(dsts, versions, strict=True))
    assert dsts[1].requires_grad
    assert dsts[1].is_leaf


def test_a_source_that_requires_grad_keeps_its_graph(cuda: torch.device) -> None:
    source = torch.rand(4, device=cuda, requires_grad=True)
    dsts = [torch.zeros(4, device=cuda), torch.zeros(4, device=cuda)]
    paramkit.foreach_copy_(dsts, [source * 3, torch.ones(4, device=cuda)])
    dsts[0].sum().backward()
    assert source.grad is not None
    assert source.grad.tolist() == [3, 3, 3, 3]
    assert not dsts[1].requires_grad


def test_a_saved_tensor_that_was_written_is_noticed(cuda: torch.device) -> None:
    x = torch.rand(4, device=cuda, requires_grad=True)
    for write in (
        lambda y: paramkit.copy_(y, torch.ones(4, device=cuda)),
        lambda y: paramkit.copy_(y, torch.ones(4)),
        lambda y: paramkit.foreach_fill_([y], 1.0),
    ):
        y = x.exp()
        with torch.no_grad():
            write(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_inference_tensors(cuda: torch.device) -> None:
    with torch.inference_mode():
        dst = torch.zeros(4, device=cuda)
        paramkit.foreach_copy_([dst, dst[:2]], [torch.ones(4, device=cuda), torch.full((2,), 5.0)])
        assert dst.tolist() == [5, 5, 1, 1]
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        paramkit.foreach_copy_([dst], [torch.zeros(4, device=cuda)])
    normal = torch.zeros(4, device=cuda)
    paramkit.foreach_copy_([normal], [dst])  # as a source it may be read
    assert torch.equal(normal, dst)


@pytest.mark.parametrize("index", [0, 1, 3999])
def test_an_error_names_the_pair_and_nothing_is_written(cuda: torch.device, index: int) -> None:
    dsts = [*torch.zeros(4000, 8, device=cuda).unbind()]
    srcs = [*torch.rand(4000, 8, device=cuda).unbind()]
    srcs[index] = torch.rand(7, device=cuda)
    with pytest.raises(RuntimeError, match=rf"srcs\[{index}\]"):
        paramkit.foreach_copy_(dsts, srcs)
    assert not torch.stack(dsts).any()
    with pytest.raises(RuntimeError, match="single memory location"):
        paramkit.foreach_copy_([dsts[0], torch.zeros(1, device=cuda).expand(8)], [srcs[5], srcs[6]])
    assert not dsts[0].any()


def test_a_storage_without_memory(cuda: torch.device) -> None:
    """As FSDP leaves its parameters: refused before anything is written."""
    dst, empty = torch.zeros(8, device=cuda), torch.zeros(8, device=cuda)
    empty.untyped_storage().resize_(0)
    for dsts, srcs in (
        ([dst, empty], [torch.ones(8, device=cuda)] * 2),
        ([dst, dst], [torch.ones(8, device=cuda), empty]),
    ):
        with pytest.raises(RuntimeError, match="no memory"):
            paramkit.foreach_copy_(dsts, srcs)
    assert not dst.any()


# Memory formats, and other devices.


def test_channels_last(cuda: torch.device) -> None:
    """Between memory formats, both ways, in place."""
    shape = (32, 24, 5, 7)
    plain = torch.rand(shape, device=cuda)
    last = torch.zeros(shape, device=cuda).to(memory_format=torch.channels_last)
    back = torch.zeros(shape, device=cuda)
    paramkit.foreach_copy_([last], [plain])
    paramkit.foreach_copy_([back], [last])
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, plain)
    assert torch.equal(back, plain)


@pytest.fixture
def gpus(cuda: torch.device) -> list[torch.device]:
    """All GPUs, if there are several."""
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("one GPU")
    return [torch.device("cuda", index) for index in range(count)]


def test_several_devices_in_one_list(gpus: list[torch.device]) -> None:
    """A launch for each, whichever is the current one; across them as torch."""
    for current in gpus:
        with torch.cuda.device(current):
            got = [torch.zeros(50 + i, device=gpus[i % len(gpus)]) for i in range(200)]
            srcs = [torch.rand(50 + i, device=gpus[i % len(gpus)]) for i in range(200)]
            assert counted(lambda got=got, srcs=srcs: paramkit.foreach_copy_(got, srcs))[
                "launches"
            ] == len(gpus)
            assert torch.cuda.current_device() == current.index
        for dst, src in zip(got, srcs, strict=True):
            assert torch.equal(dst, src)


def test_across_devices(gpus: list[torch.device]) -> None:
    """Every pair of devices, the host among them, with a cast and a permute."""
    places = [torch.device("cpu"), *gpus]
    got, srcs, want = [], [], []
    for to in places:
        for at in places:
            for dtype in (torch.float32, torch.bfloat16):
                source = torch.rand(30, 40, device=at)
                got.append(torch.zeros(40, 30, dtype=dtype, device=to))
                srcs.append(source.t())
                want.append(source.t().cpu().to(dtype))
    paramkit.foreach_copy_(got, srcs)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours.cpu(), theirs)
    plan = paramkit.plan(got, srcs)
    for dst in got:
        dst.zero_()
    plan.apply()
    assert plan.verify() == []
