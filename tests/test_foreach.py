"""``foreach_copy_`` and ``foreach_fill_``: mixed lists, aliases across pairs, routes per pair."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import paramkit
from tests import cases
from tests.guards import (
    Layout,
    assert_same_bits,
    assert_same_storage,
    outcome,
    place,
    random_layout,
    random_shape,
    random_source,
    watch,
)
from tests.routes import TRANSFERS, routes_of

pytestmark = pytest.mark.usefixtures("backend")


def loop(dsts: list[Tensor], srcs: list[Tensor]) -> None:
    """The reference: what the foreach call promises to equal."""
    for dst, src in zip(dsts, srcs, strict=True):
        dst.copy_(src)


@pytest.mark.parametrize("seed", range(12))
def test_mixed_lists(seed: int) -> None:
    """One call over every dtype, ranks 0 to 6, any strides, broadcasts, empties and some casts."""
    rng = random.Random(seed)
    expected: list[Tensor] = []
    got: list[Tensor] = []
    srcs: list[Tensor] = []
    for index in range(rng.choice((1, 2, 37, 120))):
        shape = random_shape(rng)
        layout = random_layout(rng, shape)
        dtype = rng.choice(cases.DTYPES)
        source = place(random_source(rng, shape), dtype, seed=index)
        if rng.random() < 0.2 and dtype.is_floating_point:
            dtype, source = torch.float32, cases.values(source.shape, torch.bfloat16)
        expected.append(place(layout, dtype))
        got.append(place(layout, dtype))
        srcs.append(source)
    loop(expected, srcs)
    paramkit.foreach_copy_(got, srcs)
    for index, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert_same_storage(ours, theirs, f"seed {seed}, pair {index}")


@pytest.mark.parametrize("value", [torch.tensor(3.0), torch.tensor(3)], ids=["same", "cast"])
def test_a_refused_fill_writes_nothing(value: Tensor) -> None:
    """torch fills an expanded tensor with a number, but not with a tensor: known before the first write."""
    expanded = torch.zeros(1).expand(4)
    assert outcome(lambda: expanded.fill_(value)) is RuntimeError
    first = torch.zeros(8)
    watched = watch(first, expanded)
    with pytest.raises(RuntimeError, match=r"dsts\[1\]"):
        paramkit.foreach_fill_([first[2:5], expanded], [1.0, value])
    watched.assert_unwritten()
    paramkit.foreach_fill_([first[2:5], expanded], [1.0, 2.0])
    assert first.sum() == 3 and expanded.tolist() == [2.0] * 4
    empty = torch.zeros(1).expand(4)[:0].expand(0)
    paramkit.foreach_fill_([empty, first], [value, value])
    assert first.tolist() == [3.0] * 8


@pytest.mark.parametrize("seed", range(6))
def test_mixed_fills(seed: int) -> None:
    """Numbers and 0-d tensors side by side, any dtype and strides."""
    rng = random.Random(seed)
    expected, got, values = [], [], []
    for _ in range(rng.choice((1, 2, 60))):
        layout = random_layout(rng, random_shape(rng))
        dtype = rng.choice(cases.DTYPES)
        expected.append(place(layout, dtype))
        got.append(place(layout, dtype))
        number = rng.randint(1, 8)
        values.append(
            rng.choice((number, float(number), True, torch.tensor(number), torch.tensor(2.0)))
        )
    for dst, value in zip(expected, values, strict=True):
        dst.fill_(value)
    paramkit.foreach_fill_(got, values)
    for index, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert_same_storage(ours, theirs, f"seed {seed}, fill {index} with {values[index]!r}")


def test_as_torch_foreach_copy() -> None:
    dsts, srcs = cases.small_tensors(50, 33)
    twins = [dst.clone() for dst in dsts]
    torch._foreach_copy_(twins, srcs)
    paramkit.foreach_copy_(dsts, srcs)
    for dst, twin in zip(dsts, twins, strict=True):
        assert_same_bits(dst, twin)


@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_and_tuples(kind: Callable[[list[Tensor]], object]) -> None:
    a, b = torch.zeros(2), torch.zeros(3)
    paramkit.foreach_copy_(kind([a, b]), kind([torch.ones(2), torch.full((3,), 2.0)]))  # type: ignore[arg-type]
    assert a.tolist() == [1, 1]
    assert b.tolist() == [2, 2, 2]
    paramkit.foreach_fill_(kind([a, b]), 5.0)  # type: ignore[arg-type]
    assert a.tolist() == [5, 5]
    paramkit.foreach_fill_(kind([a, b]), kind([6.0, 7]))  # type: ignore[arg-type]
    assert (a.tolist(), b.tolist()) == ([6, 6], [7, 7, 7])


def test_non_blocking_means_nothing_on_cpu() -> None:
    dst = torch.zeros(3)
    paramkit.foreach_copy_([dst], [torch.ones(3)], non_blocking=True)
    paramkit.foreach_copy_([dst], [torch.ones(3)], True)
    assert paramkit.copy_(dst, torch.ones(3), non_blocking=True) is dst
    assert dst.tolist() == [1, 1, 1]


def test_many_tensors_of_many_sizes() -> None:
    """Sizes from nothing to a megabyte in one list, so that chunks split and merge."""
    sizes = [0, 1, 2, 3, 64, 1000, 0, 70_001, 5, 300_007, 1, 0, 4096] * 8
    srcs = [torch.randint(0, 2**31, (size,), dtype=torch.int32) for size in sizes]
    dsts = [place(Layout((size,), (1,), 1, size + 33), torch.int32) for size in sizes]
    snapshot = watch(*dsts)
    paramkit.foreach_copy_(dsts, srcs)
    for dst, src in zip(dsts, srcs, strict=True):
        assert torch.equal(dst, src)
    snapshot.assert_only_inside()
    paramkit.foreach_fill_(dsts, list(range(len(dsts))))
    for number, dst in enumerate(dsts):
        assert bool((dst == number).all())
    snapshot.assert_only_inside()


def long_lists(rng: random.Random, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Dense, strided, cast and broadcast pairs in turn, all of which the kernels can do."""
    # Together large enough for several threads, however many they are.
    large = 1 << 20 if count < 4096 else 1 << 21
    memory = torch.zeros(count, 2 * (large // (4 * count)))
    dsts, srcs = [], []
    for index in range(count):
        source = torch.rand(memory.shape[1] // rng.choice((2, 3, 4)))
        row = memory[index]
        kind = rng.randrange(4)
        dsts.append(row[: 2 * source.numel() : 2] if kind == 1 else row[: source.numel()])
        if kind == 2:
            source = source.double()
        srcs.append(source[:1] if kind == 3 else source)
    return dsts, srcs


def odd_pair(odd: str, dsts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One that is not the kernels' alone, or reads what an earlier pair writes."""
    dst, src = torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])
    if odd == "empty":
        return torch.zeros(0), torch.zeros(0)
    if odd == "sparse":
        return dst.to_sparse(), src.to_sparse()
    if odd == "graph":
        return dst, src.requires_grad_()
    if odd == "alias":  # an early destination is a late source
        return torch.zeros_like(dsts[5]), dsts[5]
    if odd == "alias back":  # and an early source a late destination
        return dsts[-1], torch.rand(dsts[-1].shape)
    return dst, src


@pytest.mark.parametrize("count", [300, 5000])
@pytest.mark.parametrize("odd", ["none", "empty", "alias", "alias back", "graph", "sparse"])
def test_long_lists_in_pieces(backend: str, count: int, odd: str) -> None:
    """Lists that several threads take apart; from the first pair that is not plain on, one does."""
    if backend in TRANSFERS and odd.startswith("alias"):
        pytest.skip("host and device memory have nothing in common")
    at = count * 2 // 3  # in the second thread's part
    results: list[list[Tensor]] = []
    torch.manual_seed(count)
    _, values = long_lists(random.Random(count), count)
    for write in (loop, paramkit.foreach_copy_):
        dsts = long_lists(random.Random(count), count)[0]
        srcs = list(values)
        dsts[at], srcs[at] = odd_pair(odd, dsts)
        if odd == "alias back":
            srcs[5] = dsts[at].flatten()[:1]
        versions = [dst._version for dst in dsts]
        write(dsts, srcs)
        assert all(dst._version > was for dst, was in zip(dsts, versions, strict=True))
        assert dsts[at].requires_grad == (odd == "graph")
        results.append([dst.detach().to_dense() if dst.is_sparse else dst.detach() for dst in dsts])
    for index, (theirs, ours) in enumerate(zip(*results, strict=True)):
        assert torch.equal(ours, theirs), f"pair {index}"


def test_an_error_in_a_long_list() -> None:
    """It names the pair, wherever it is, and the other thread's writes do not happen either."""
    dsts, srcs = long_lists(random.Random(1), 5000)
    for index in (0, 2600, 4999):
        wrong = list(srcs)
        wrong[index] = torch.rand(7)
        before = [dst.clone() for dst in dsts]
        with pytest.raises(RuntimeError, match=rf"srcs\[{index}\]"):
            paramkit.foreach_copy_(dsts, wrong)
        assert all(torch.equal(dst, was) for dst, was in zip(dsts, before, strict=True))
    with torch.no_grad():
        paramkit.foreach_copy_(dsts, srcs)


def test_a_list_with_a_leaf_among_thousands() -> None:
    """Refused whole, wherever the leaf is; written under no_grad."""
    count = 5000
    dsts = list(torch.zeros(count, 2).unbind())
    dsts[4000] = torch.zeros(2, requires_grad=True)
    srcs = list(torch.rand(count, 2).unbind())
    with pytest.raises(RuntimeError, match="leaf Variable"):
        paramkit.foreach_copy_(dsts, srcs)
    assert not dsts[0].any()
    with torch.no_grad():
        paramkit.foreach_copy_(dsts, srcs)
    assert torch.equal(torch.stack([dst.detach() for dst in dsts]), torch.stack(srcs))


def test_long_lists_in_inference_mode() -> None:
    """Inference tensors may be written there, by whichever thread."""
    with torch.inference_mode():
        dsts, srcs = list(torch.zeros(5000, 2).unbind()), list(torch.rand(5000, 2).unbind())
        paramkit.foreach_copy_(dsts, srcs)
        assert torch.equal(torch.stack(dsts), torch.stack(srcs))
        paramkit.plan(dsts, srcs).apply()


def test_all_empty() -> None:
    dsts = [torch.empty(0), torch.empty(2, 0)]
    paramkit.foreach_copy_(dsts, [torch.empty(0), torch.empty(2, 0)])
    paramkit.foreach_fill_(dsts, 1.0)


def test_one_scalar_for_all_kinds() -> None:
    for value in (2, 2.5, True, torch.tensor(3.0), torch.tensor(3, dtype=torch.int8)):
        expected = [
            torch.zeros(3, dtype=dtype) for dtype in (torch.float32, torch.int16, torch.bool)
        ]
        got = [dst.clone() for dst in expected]
        for dst in expected:
            dst.fill_(value)
        paramkit.foreach_fill_(got, value)
        for ours, theirs in zip(got, expected, strict=True):
            assert_same_bits(ours, theirs, what=repr(value))


def test_slices_of_conv_weights() -> None:
    weights = cases.conv_weights(30)
    snapshot = watch(*cases.centre_views(weights))
    paramkit.foreach_fill_(cases.centre_views(weights), 0.5)
    for weight in weights:
        assert bool((weight[:, :, 1, 1] == 0.5).all())
        assert weight.sum().item() == 0.5 * 64
    snapshot.assert_only_inside()


# Aliases across pairs: the loop's result, in the loop's order.

Chain = Callable[[Tensor], tuple[list[Tensor], list[Tensor]]]
CHAINS: dict[str, Chain] = {
    "a to b, b to c": lambda t: ([t[4:8], t[8:12]], [t[0:4], t[4:8]]),
    "b to c, a to b": lambda t: ([t[8:12], t[4:8]], [t[4:8], t[0:4]]),
    "swap": lambda t: ([t[0:4], t[4:8]], [t[4:8], t[0:4]]),
    "same destination twice": lambda t: ([t[0:4], t[0:4]], [t[4:8], t[8:12]]),
    "overlapping destinations": lambda t: ([t[0:4], t[2:6]], [t[8:12], t[12:16]]),
    "inner after outer": lambda t: ([t[0:8], t[2:4]], [t[8:16], t[10:12]]),
    "columns then rows": lambda t: (
        [t.view(4, 4)[:, 1], t.view(4, 4)[1]],
        [t.view(4, 4)[3], t.view(4, 4)[:, 2]],
    ),
    "chain of one": lambda t: (
        [t[i + 1 : i + 2] for i in range(15)],
        [t[i : i + 1] for i in range(15)],
    ),
    "scalar source written before": lambda t: ([t[0], t[4:8]], [t[15], t[0].expand(4)]),
    "through another dtype": lambda t: (
        [t[0:4], t.view(torch.int32)[4:8]],
        [t[8:12], t.view(torch.int32)[0:4]],
    ),
    "with a cast between": lambda t: ([t[0:4], t[4:8]], [t[8:12].to(torch.bfloat16), t[0:4]]),
}


@pytest.mark.usefixtures("one_memory")
@pytest.mark.parametrize("name", sorted(CHAINS))
def test_aliases_behave_as_the_loop(name: str) -> None:
    expected, got = torch.arange(16.0), torch.arange(16.0)
    loop(*CHAINS[name](expected))
    dsts, srcs = CHAINS[name](got)
    paramkit.foreach_copy_(dsts, srcs)
    assert_same_bits(got, expected, what=name)


@pytest.mark.usefixtures("one_memory")
def test_long_chain_across_chunks() -> None:
    """Each tensor feeds the next: any pass that runs pairs side by side gets it wrong."""
    expected = [torch.full((5000,), float(i)) for i in range(60)]
    got = [tensor.clone() for tensor in expected]
    loop(expected[1:], expected[:-1])
    paramkit.foreach_copy_(got[1:], got[:-1])
    for ours, theirs in zip(got, expected, strict=True):
        assert_same_bits(ours, theirs)


def test_last_fill_of_overlapping_views_wins() -> None:
    whole = torch.zeros(10)
    paramkit.foreach_fill_([whole, whole[2:6], whole[4:8]], [1.0, 2.0, 3.0])
    assert whole.tolist() == [1, 1, 2, 2, 3, 3, 3, 3, 1, 1]


def test_fill_value_that_an_earlier_fill_writes() -> None:
    """A 0-d tensor value is read when its turn comes, as in the loop."""
    expected, got = torch.arange(6.0), torch.arange(6.0)
    for dst, value in zip([expected[0], expected[1:4]], [expected[5], expected[0]], strict=True):
        dst.fill_(value)
    paramkit.foreach_fill_([got[0], got[1:4]], [got[5], got[0]])
    assert_same_bits(got, expected)


@pytest.mark.usefixtures("one_memory")
@pytest.mark.parametrize("seed", range(8))
def test_random_aliases(seed: int) -> None:
    """Random slices of one storage on both sides."""
    rng = random.Random(seed)
    expected, got = torch.arange(400.0), torch.arange(400.0)

    def pairs(whole: Tensor, rng: random.Random) -> tuple[list[Tensor], list[Tensor]]:
        dsts, srcs = [], []
        while len(dsts) < 40:
            length, step = rng.randint(1, 40), rng.choice((1, 1, 2))
            first, second = rng.randint(0, 400 - 80), rng.randint(0, 400 - 80)
            dst = whole[first : first + length * step : step]
            src = whole[second : second + length * step : step]
            if outcome(lambda dst=dst, src=src: dst.clone().copy_(src)) is None:
                low, high = sorted((first, second))
                if low + length * step <= high:  # a pair by itself does not overlap
                    dsts.append(dst)
                    srcs.append(src)
        return dsts, srcs

    loop(*pairs(expected, random.Random(seed)))
    dsts, srcs = pairs(got, rng)
    paramkit.foreach_copy_(dsts, srcs)
    assert_same_bits(got, expected, what=f"seed {seed}")


# The same with enough bytes for several threads: what shares memory must still run in order.

BIG = 1 << 20
LARGE: dict[str, Chain] = {
    "chain": lambda t: ([t[BIG : 2 * BIG], t[2 * BIG : 3 * BIG]], [t[:BIG], t[BIG : 2 * BIG]]),
    "back": lambda t: ([t[2 * BIG : 3 * BIG], t[BIG : 2 * BIG]], [t[BIG : 2 * BIG], t[:BIG]]),
    "swap": lambda t: ([t[:BIG], t[BIG : 2 * BIG]], [t[BIG : 2 * BIG], t[:BIG]]),
    "overlapping destinations": lambda t: (
        [t[: 2 * BIG], t[BIG : 3 * BIG]],
        [t[BIG : 2 * BIG].repeat(2), t[: 2 * BIG].clone()],
    ),
    # The second pair reads and writes by turns inside the range that the first one reads.
    "read behind a longer read": lambda t: (
        [t[4 * BIG : 6 * BIG - 2], t[1 : 2 * BIG : 2]],
        [t[: 2 * BIG - 2], t[0 : 2 * BIG : 2]],
    ),
    # The same with a slow first pair and a quick second one, which would overtake it.
    "transposed read of rows written next": lambda t: (
        [t[4 * BIG : 6 * BIG].view(2048, 1024), t[: 2 * BIG + 1024].view(-1, 512)[1::2]],
        [t[: 2 * BIG].view(1024, 2048).t(), t[: 2 * BIG + 1024].view(-1, 512)[::2]],
    ),
    "columns across rows": lambda t: (
        [t[: 4 * BIG].view(1024, -1)[:, 1::2], t[4 * BIG :].view(1024, -1)[:, :2048]],
        [t[4 * BIG :].view(1024, -1)[:, ::2], t[: 4 * BIG].view(1024, -1)[:, 2048:]],
    ),
    "fill from inside": lambda t: (
        [t[:BIG], t[BIG : 2 * BIG], t[5:6]],
        [t[3 * BIG].expand(BIG), t[5].expand(BIG), t[2 * BIG : 2 * BIG + 1]],
    ),
}


@pytest.mark.usefixtures("one_memory")
@pytest.mark.parametrize("name", sorted(LARGE))
def test_large_aliases_behave_as_the_loop(name: str) -> None:
    expected, got = (
        torch.arange(8 * BIG, dtype=torch.int32),
        torch.arange(8 * BIG, dtype=torch.int32),
    )
    loop(*LARGE[name](expected))
    dsts, srcs = LARGE[name](got)
    paramkit.foreach_copy_(dsts, srcs)
    assert torch.equal(got, expected), name


@pytest.mark.usefixtures("one_memory")
@pytest.mark.parametrize("seed", range(4))
def test_large_random_aliases(seed: int) -> None:
    """Random strided slices of one storage, megabytes of them, in random order."""

    def pairs(whole: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        rng = random.Random(seed)
        dsts, srcs = [], []
        for _ in range(12):
            length, step = rng.randint(1000, 200_000), rng.choice((1, 2, 3))
            start = rng.randrange(step) if step > 1 else 0
            first = rng.randint(0, whole.numel() - length * step - step)
            dsts.append(whole[first : first + length * step : step][:length])
            if step > 1 and rng.random() < 0.5:
                # Interleaved with the destination: one range, no shared element.
                second = first + (1 if start == 0 else -1)
                second = max(second, 0)
                srcs.append(whole[second : second + length * step : step][:length])
            else:
                second = (first + length * step + rng.randint(0, 50_000)) % (whole.numel() // 2)
                other = whole[second : second + length]
                low, high = sorted(((first, length * step), (second, length)))
                srcs.append(other.clone() if low[0] + low[1] > high[0] else other)
        return dsts, srcs

    expected, got = torch.arange(2 * BIG), torch.arange(2 * BIG)
    loop(*pairs(expected))
    paramkit.foreach_copy_(*pairs(got))
    assert torch.equal(got, expected), f"seed {seed}"


@pytest.mark.parametrize("name", sorted(CHAINS))
def test_plans_of_aliases_are_refused_or_behave_as_the_loop(name: str) -> None:
    """A plan may reject lists that share memory, but never give another result than the loop's."""
    expected, got = torch.arange(16.0), torch.arange(16.0)
    loop(*CHAINS[name](expected))
    dsts, srcs = CHAINS[name](got)
    error = outcome(lambda: paramkit.plan(dsts, srcs).apply())
    if error is None:
        assert_same_bits(got, expected, what=name)
    else:
        assert issubclass(error, paramkit.PlanError)
        assert_same_bits(got, torch.arange(16.0), what=name)


def test_a_subclass_may_call_back_into_paramkit() -> None:
    """A pair that runs Python code in its turn, which copies by itself, disturbs no other pair."""

    class Nested(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if getattr(func, "__name__", "") == "copy_":
                inner = [torch.zeros(5), torch.zeros(7)]
                paramkit.foreach_copy_(inner, [torch.ones(5), torch.ones(7)])
                assert inner[1].sum() == 7
            return super().__torch_function__(func, types, args, kwargs or {})

    dsts = [torch.zeros(3), torch.zeros(4).as_subclass(Nested), torch.zeros(6)]
    paramkit.foreach_copy_(dsts, [torch.ones(3), torch.ones(4), torch.ones(6)])
    for dst in dsts:
        assert bool((dst.as_subclass(Tensor) == 1).all())


# Routes: one odd pair must not take the others off the fast route.


def test_odd_pairs_go_native_alone(backend: str) -> None:
    conj = torch.tensor([1 + 2j, 3 - 1j]).conj()
    dsts = [torch.zeros(2, dtype=torch.complex64), torch.zeros(100), torch.zeros(6, 9)[:, 1:6]]
    srcs = [conj, torch.rand(100), torch.rand(6, 5)]
    with paramkit.backend.trace() as trace:
        paramkit.foreach_copy_(dsts, srcs)
    if backend == "native":
        assert trace.routes == {"native": 3}
    else:
        assert trace.routes == {"native": 1, **routes_of(backend, copy=1, rows=1)}
    for dst, src in zip(dsts, srcs, strict=True):
        assert torch.equal(dst, src)


def test_sparse_pair_in_a_list(backend: str) -> None:
    sparse = torch.tensor([[0.0, 1.0], [2.0, 0.0]]).to_sparse()
    dsts = [torch.zeros(2, 2).to_sparse(), torch.zeros(4)]
    with paramkit.backend.trace() as trace:
        paramkit.foreach_copy_(dsts, [sparse, torch.ones(4)])
    assert torch.equal(dsts[0].to_dense(), sparse.to_dense())
    assert dsts[1].tolist() == [1, 1, 1, 1]
    assert trace.routes.get("native", 0) == (2 if backend == "native" else 1)


def test_routes_of_a_list_of_every_layout(backend: str) -> None:
    names = sorted(cases.LAYOUTS)
    pairs = [cases.LAYOUTS[name](torch.float32, cases.values) for name in names]
    with paramkit.backend.trace() as trace:
        paramkit.foreach_copy_([dst for dst, _ in pairs], [src for _, src in pairs])
    assert trace.routes == routes_of(backend, copy=2, transpose=2, rows=2)
    for name, (dst, src) in zip(names, pairs, strict=True):
        assert_same_bits(dst, src, what=name)


def test_routes_of_slice_fills(backend: str) -> None:
    views = cases.centre_views(cases.conv_weights(25))
    with paramkit.backend.trace() as trace:
        paramkit.foreach_fill_(views, 0.5)
    assert trace.routes == {"native" if backend == "native" else "fill": 25}
