"""`patch_torch`: torch's own functions on the kernels, with the results, errors and bookkeeping of torch."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paramkit
from paramkit import backend
from tests import cases
from tests.conftest import CAPABILITIES, need_extension
from tests.guards import (
    Layout,
    assert_same_bits,
    assert_same_storage,
    bits,
    place,
    random_layout,
    random_shape,
    random_source,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=CAPABILITIES, autouse=True)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    need_extension()
    with backend.force("cpu") as extension:
        if request.param not in extension.capabilities():
            pytest.skip(f"this machine has no {request.param}")
    with backend.force(f"cpu:{request.param}"):
        yield request.param


def routes(call: Callable[[], object]) -> dict[str, int]:
    with backend.trace() as traced:
        call()
    return traced.routes


# What is written, and by which family: each gives twins of a destination and the write.
def _dense() -> Tensor:
    return place(Layout.dense((40, 50)), torch.float32)


def _columns() -> Tensor:
    return place(Layout.dense((40, 50), (100, 2)), torch.float32)


def _set(dst: Tensor, index: object, value: object) -> None:
    dst[index] = value  # type: ignore[index]


WRITES: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], object]]] = {
    "dense copy_": (_dense, lambda dst: dst.copy_(torch.rand(40, 50))),
    "strided copy_": (_columns, lambda dst: dst.copy_(torch.rand(40, 50))),
    "transposed copy_": (_dense, lambda dst: dst.copy_(torch.rand(50, 40).t())),
    "cast copy_": (_dense, lambda dst: dst.copy_(torch.rand(40, 50).bfloat16())),
    "broadcast copy_": (_dense, lambda dst: dst.copy_(torch.rand(50))),
    "rows = tensor": (_dense, lambda dst: _set(dst, slice(3, 20), torch.rand(17, 50))),
    "columns = tensor": (
        _dense,
        lambda dst: _set(dst, (slice(None), slice(3, 20, 2)), torch.rand(40, 9)),
    ),
    "rows = number": (_dense, lambda dst: _set(dst, slice(3, 20), 3.5)),
    "columns = number": (_dense, lambda dst: _set(dst, (slice(None), slice(3, 20, 2)), 7)),
    "rows = 0-dim tensor": (_dense, lambda dst: _set(dst, slice(3, 20), torch.tensor(2.5))),
    "fill_": (_columns, lambda dst: dst.fill_(1.25)),
    "fill_ with a tensor": (_columns, lambda dst: dst.fill_(torch.tensor(1.25))),
    "_foreach_copy_": (
        _dense,
        lambda dst: torch._foreach_copy_([dst[:20], dst[20:]], [torch.rand(20, 50)] * 2),
    ),
    "data.copy_": (_dense, lambda dst: dst.data.copy_(torch.rand(40, 50))),
    "resize_ and set": (
        _dense,
        lambda dst: dst[5:30, 5:30].copy_(torch.ones(25, 25, dtype=torch.int64)),
    ),
}


@pytest.mark.parametrize("name", WRITES)
def test_write_takes_the_kernels(name: str) -> None:
    make, write = WRITES[name]
    theirs, ours = make(), make()
    torch.manual_seed(3)
    assert routes(lambda: write(theirs)) == {}, "torch itself does not come by here"
    torch.manual_seed(3)
    with paramkit.patch_torch():
        taken = routes(lambda: write(ours))
    assert sum(taken.values()) >= 1 and "native" not in taken
    assert_same_storage(ours, theirs)
    assert ours._version == theirs._version
    assert routes(lambda: write(ours)) == {}, "reversed"


def test_what_torch_copies_itself() -> None:
    """.to, .contiguous, .clone of a strided tensor, cat's out-of-place friends: values and strides of torch."""
    source = torch.rand(64, 96)
    calls: dict[str, Callable[[], Tensor]] = {
        "to": lambda: source.to(torch.bfloat16),
        "contiguous": lambda: source.t().contiguous(),
        "clone": lambda: source[:, ::2].clone(memory_format=torch.contiguous_format),
        "channels last": lambda: source.view(2, 4, 8, 96).contiguous(
            memory_format=torch.channels_last
        ),
    }
    for name, call in calls.items():
        expected = call()
        with paramkit.patch_torch():
            got: list[Tensor] = []
            assert routes(lambda call=call, got=got: got.append(call())), name  # type: ignore[misc]
        assert got[0].stride() == expected.stride()
        assert_same_bits(got[0], expected, what=name)


def test_every_dtype() -> None:
    for to, of in itertools.product(cases.DTYPES, cases.DTYPES):
        # What a NaN is as an integer, C leaves open; torch's own loops differ in that.
        source = place(Layout.dense((9, 80), (160, 2)), of)
        source.copy_(torch.randint(0, 100, (9, 80), generator=torch.Generator().manual_seed(1)))
        theirs, ours = (place(Layout.dense((9, 80), (80, 1)), to) for _ in range(2))
        error, mine = None, None
        try:
            theirs.copy_(source)
        except (RuntimeError, NotImplementedError) as raised:
            error = raised
        with paramkit.patch_torch():
            try:
                ours.copy_(source)
            except (RuntimeError, NotImplementedError) as raised:
                mine = raised
        assert type(mine) is type(error) and str(mine) == str(error), (to, of)
        assert_same_bits(ours, theirs, any_nan=to != of, what=f"{to} <- {of}")


def test_random_views() -> None:
    rng = random.Random(11)
    taken: Counter[str] = Counter()
    for _ in range(150):
        shape = random_shape(rng)
        layout, source_layout = random_layout(rng, shape), random_source(rng, shape)
        to, of = rng.choice(cases.DTYPES), rng.choice((torch.float32, torch.int64, torch.bfloat16))
        if to.is_complex:
            of = to
        source = place(source_layout, of, seed=rng.randrange(99))
        theirs, ours = place(layout, to), place(layout, to)
        theirs.copy_(source)
        with paramkit.patch_torch():
            taken.update(routes(lambda ours=ours, source=source: ours.copy_(source)))  # type: ignore[misc]
        assert_same_bits(ours, theirs, any_nan=to != of)
    assert sum(taken.values()) > 25


def test_small_writes_stay_with_torch() -> None:
    dst, ones = torch.zeros(128), torch.ones(128)
    with paramkit.patch_torch():
        assert routes(lambda: dst[:127].copy_(ones[:127])) == {}
        assert routes(lambda: dst.copy_(ones)) == {"copy": 1}


def test_what_the_kernels_do_not_take() -> None:
    """Overlap, conjugates, quantized, sparse, expanded fills, subclasses: torch's own, with its results."""

    class Loud(Tensor):
        pass

    def itself() -> Tensor:
        t = torch.arange(4096.0)
        return t.copy_(t)

    base = torch.arange(4096.0)
    complexes = torch.rand(400, dtype=torch.complex64)
    calls: dict[str, Callable[[], Tensor]] = {
        "itself": itself,
        "conjugate": lambda: torch.zeros(400, dtype=torch.complex64).copy_(complexes.conj()),
        "negative": lambda: torch.zeros(400).copy_(complexes.conj().imag),
        "quantized": lambda: (
            torch.quantize_per_tensor(base, 0.5, 3, torch.qint8).copy_(base).int_repr()
        ),
        "sparse": lambda: (
            torch.zeros(20, 20).to_sparse().copy_(torch.eye(20).to_sparse()).to_dense()
        ),
        "expanded fill": lambda: torch.zeros(1).expand(4096).fill_(2.0),
        "subclass": lambda: torch.zeros(4096).as_subclass(Loud).copy_(base),
        "empty": lambda: torch.zeros(0, 4096).copy_(base),
        "vmap": lambda: torch.vmap(lambda row: torch.zeros_like(row).copy_(row))(
            base.view(4, 1024)
        ),
    }
    for name, call in calls.items():
        expected = call()
        with paramkit.patch_torch():
            got = call()
        assert type(got) is type(expected), name
        assert_same_bits(got.as_subclass(Tensor), expected.as_subclass(Tensor), what=name)


def _resized() -> Tensor:
    tensor = torch.zeros(4096)
    tensor.untyped_storage().resize_(0)
    return tensor


def _inference() -> Tensor:
    with torch.inference_mode():
        return torch.zeros(4096)


ERRORS: dict[str, Callable[[], object]] = {
    "shape": lambda: torch.zeros(40, 50).copy_(torch.ones(41, 50)),
    "slice shape": lambda: _set(torch.zeros(40, 50), slice(0, 10), torch.ones(11, 50)),
    "expanded destination": lambda: torch.zeros(1).expand(4096).copy_(torch.ones(4096)),
    "partial overlap": lambda: (lambda t: t[1:].copy_(t[:-1]))(torch.zeros(4096)),
    "meta source": lambda: torch.zeros(4096).copy_(torch.zeros(4096, device="meta")),
    "leaf": lambda: torch.zeros(4096, requires_grad=True).copy_(torch.ones(4096)),
    "leaf's view": lambda: _set(torch.zeros(4096, requires_grad=True), slice(0, 4000), 1.0),
    "inference tensor": lambda: _inference().copy_(torch.ones(4096)),
    "overflow": lambda: torch.zeros(4096, dtype=torch.int8).fill_(300),
    "value of two": lambda: torch.zeros(4096).fill_(torch.zeros(2)),
    "no tensor": lambda: torch.zeros(4096).copy_("x"),  # type: ignore[arg-type]
    "lists of lengths": lambda: torch._foreach_copy_([torch.zeros(4096)], []),
    "empty lists": lambda: torch._foreach_copy_([], []),
    "list with a shape": lambda: torch._foreach_copy_(
        [torch.zeros(40)] * 2, [torch.ones(40), torch.ones(41)]
    ),
    "sparse source": lambda: torch.zeros(20, 20).copy_(torch.eye(20).to_sparse()),
    "sparse destination": lambda: torch.eye(20).to_sparse().copy_(torch.ones(20, 20)),
    "complex to float8": lambda: torch.zeros(4096, dtype=torch.float8_e4m3fn).fill_(1j),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_torchs(name: str) -> None:
    with pytest.raises(Exception) as expected:
        ERRORS[name]()
    with paramkit.patch_torch(), pytest.raises(expected.type) as got:
        ERRORS[name]()
    assert type(got.value) is type(expected.value)
    # The end of a c10 error may hold addresses of frames.
    assert str(got.value).splitlines()[0] == str(expected.value).splitlines()[0]


EMPTIED: dict[str, Callable[[], object]] = {
    "destination": lambda: _resized().copy_(torch.ones(4096)),
    "source": lambda: torch.zeros(4096).copy_(_resized()),
    "both": lambda: _resized().copy_(_resized()),
    "conversion": lambda: _resized().copy_(torch.ones(4096, dtype=torch.float64)),
    "rows": lambda: _set(_resized(), slice(0, 2000), torch.ones(2000)),
    "fill_": lambda: _resized().fill_(1.0),
    "list": lambda: torch._foreach_copy_(
        [torch.zeros(4096), _resized()], [torch.ones(4096), torch.ones(4096)]
    ),
}


def end_of(call: Callable[[], object]) -> tuple[int, str]:
    """What a call raises in a forked child, or "written"; and the child's status, should it be killed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # nobody is to report it
        try:
            call()
            text = "written"
        except Exception as error:  # its text is compared
            text = f"{type(error).__name__}: {error}".splitlines()[0]
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    return os.waitpid(pid, 0)[1], text


@pytest.mark.parametrize("name", EMPTIED)
def test_storage_without_memory(name: str) -> None:
    """torch ends the process on some of these: they are handed on untouched, and end as they do there."""
    expected = end_of(EMPTIED[name])
    with paramkit.patch_torch():
        assert end_of(EMPTIED[name]) == expected
    assert expected[1] != "written"


def test_list_is_written_in_order_up_to_an_error() -> None:
    """As torch's loop: sources that are written before, one destination twice, an error half-way."""

    def run() -> Tensor:
        memory = torch.arange(4096.0)
        a, b, c = memory[:1000], memory[1000:2000], memory[2000:3000]
        torch._foreach_copy_([b, c, a, a], [a, b, torch.full((1000,), 7.0), torch.full((1,), 8.0)])
        with pytest.raises(RuntimeError, match="size of tensor"):
            torch._foreach_copy_([b, c, a], [torch.zeros(1000), torch.zeros(7), torch.zeros(1000)])
        return memory

    expected = run()
    with paramkit.patch_torch():
        assert_same_bits(run(), expected)


def test_list_with_tensors_for_torch_between() -> None:
    def run() -> list[Tensor]:
        dsts = [torch.zeros(300) for _ in range(6)]
        complexes = torch.arange(300.0) * 1j
        srcs = [torch.full((300,), float(i)) for i in range(6)]
        srcs[2] = complexes.conj().imag  # carries the negative bit
        srcs[5] = dsts[0]
        torch._foreach_copy_(dsts, srcs)
        return dsts

    expected = run()
    with paramkit.patch_torch():
        got: list[Tensor] = []
        taken = routes(lambda: got.extend(run()))
    for mine, theirs in zip(got, expected, strict=True):
        assert_same_bits(mine, theirs)
    assert taken["copy"] >= 5


def test_autograd_sees_the_same() -> None:
    def run() -> tuple[Tensor, ...]:
        weight = torch.arange(2000.0, requires_grad=True)
        base = torch.zeros(2000)
        base.copy_(weight * 2)
        base[:1000] = weight[1000:]
        base[1500:] = 3.0
        (base * torch.arange(2000.0)).sum().backward()
        saved = torch.ones(2000, requires_grad=True)
        product = saved * saved
        with torch.no_grad():
            saved[:] = torch.zeros(2000)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()
        assert weight.grad is not None
        return weight.grad, base.detach(), torch.tensor(base._version)

    expected = run()
    with paramkit.patch_torch():
        got: list[Tensor] = []
        taken = routes(lambda: got.extend(run()))
    assert taken
    for mine, theirs in zip(got, expected, strict=True):
        assert_same_bits(mine, theirs)


def test_inference_tensors_are_written() -> None:
    with paramkit.patch_torch(), torch.inference_mode():
        dst = torch.zeros(64, 64)
        assert routes(lambda: dst[:, ::2].copy_(torch.ones(64, 32)))
        assert routes(lambda: dst[:, 1::2].fill_(2.0))
    assert dst.sum() == 64 * 32 * 3


def test_modes_see_the_same_calls() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    def run() -> list[str]:
        seen.clear()
        with Record():
            torch.zeros(4096).copy_(torch.ones(4096))
            torch._foreach_copy_([torch.zeros(4096)], [torch.ones(4096)])
        return list(seen)

    seen: list[str] = []
    expected = run()
    with paramkit.patch_torch():
        assert run() == expected


# --- on and off ---------------------------------------------------------------------------------


def on() -> bool:
    return bool(routes(lambda: torch.zeros(4096).copy_(torch.ones(4096))))


def test_nesting_in_any_order() -> None:
    original = nn.Module.load_state_dict
    first, second = paramkit.patch_torch(), paramkit.patch_torch()
    with paramkit.patch_torch() as third:
        assert third.active and on()
        first.remove()
        first.remove()
        assert not first.active and on() and nn.Module.load_state_dict is not original
    assert not third.active and on()
    second.remove()
    assert not on() and nn.Module.load_state_dict is original


def test_removed_patch_is_not_entered() -> None:
    patch = paramkit.patch_torch()
    assert "active" in repr(patch)
    patch.remove()
    assert "removed" in repr(patch)
    with pytest.raises(RuntimeError, match=r"call patch_torch\(\) again"), patch:
        pass
    assert not on()


def test_ends_on_an_error() -> None:
    with pytest.raises(KeyError), paramkit.patch_torch():
        raise KeyError
    assert not on()


def test_native_route_is_torchs_own(instructions: str) -> None:
    with paramkit.patch_torch():
        with backend.force("native"):
            assert not on()
            with paramkit.patch_torch():
                assert not on()
        assert on()
    with backend.force("native"), paramkit.patch_torch():
        assert not on()
        with backend.force(f"cpu:{instructions}"):
            assert on()
    assert not on()


def test_threads_patch_and_write() -> None:
    """Patches that come and go in some threads never change what others write."""
    problems: list[str] = []
    start = threading.Barrier(4)

    def toggle() -> None:
        start.wait()
        for _ in range(150):
            with paramkit.patch_torch():
                pass

    def write(seed: int) -> None:
        dst, src = torch.zeros(60, 60), torch.full((60, 30), float(seed))
        start.wait()
        for i in range(150):
            dst[:, ::2] = src + i
            torch._foreach_copy_([dst[:, 1]], [dst[:, 0]])
            if not bool((dst[:, ::2] == seed + i).all()) or not bool((dst[:, 1] == seed + i).all()):
                problems.append(f"{seed}: {i}")

    workers = [threading.Thread(target=toggle) for _ in range(2)]
    workers += [threading.Thread(target=write, args=(seed,)) for seed in (1000, 2000)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not problems
    assert not on()


# --- load_state_dict ----------------------------------------------------------------------------


def test_load_state_dict_is_fused() -> None:
    model, trained = cases.encoder(3), cases.encoder(3)
    versions = [p._version for p in model.parameters()]
    with paramkit.patch_torch():
        taken = routes(lambda: model.load_state_dict(trained.state_dict()))
        keys = model.load_state_dict(trained.state_dict(), strict=False)
    assert taken.get("copy", 0) > 10 and "native" not in taken
    assert keys == ([], []) and "matched" in repr(keys)
    for mine, theirs in zip(model.parameters(), trained.parameters(), strict=True):
        assert_same_bits(mine, theirs)
    assert [p._version for p in model.parameters()] == [v + 2 for v in versions]


def _tripled(module, state, prefix, *rest):  # type: ignore[no-untyped-def]
    state[f"{prefix}bias"] = state[f"{prefix}bias"] * 3


class _Halved(nn.Linear):
    def _load_from_state_dict(self, state_dict, prefix, *rest):  # type: ignore[no-untyped-def]
        super()._load_from_state_dict({k: v / 2 for k, v in state_dict.items()}, prefix, *rest)


@pytest.mark.parametrize(
    "kind", ["missing", "unexpected", "shape", "hook", "assign", "swap", "own", "mode"]
)
def test_load_state_dict_says_what_torch_says(kind: str) -> None:
    """A partial write before an error included, and which memory the parameters have afterwards."""

    def run() -> tuple[object, list[Tensor], list[bool]]:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 20))
        state = {name: torch.full_like(t, 2.0) for name, t in model.state_dict().items()}
        strict, assign = True, kind == "assign"
        if kind == "missing":
            del state["0.bias"]
        elif kind == "unexpected":
            state["2.bias"], strict = torch.ones(3), False
        elif kind == "shape":
            state["1.weight"] = torch.ones(3)
        elif kind == "hook":
            model[0].register_load_state_dict_pre_hook(_tripled)
        elif kind == "own":
            model = nn.Sequential(_Halved(30, 30))
            state = {name: torch.full_like(t, 2.0) for name, t in model.state_dict().items()}
        addresses = [p.data_ptr() for p in model.parameters()]
        graph = (
            model(torch.ones(1, 30)) if kind == "swap" else None
        )  # holds them: not to be swapped
        torch.__future__.set_swap_module_params_on_conversion(kind == "swap")
        try:
            if kind == "mode":
                with torch.device("cpu"):
                    said: object = model.load_state_dict(state)
            else:
                said = model.load_state_dict(state, strict, assign)
        except RuntimeError as error:
            said = str(error)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        del graph
        after = list(model.parameters())
        return said, after, [p.data_ptr() == a for p, a in zip(after, addresses, strict=True)]

    expected, theirs, stayed = run()
    with paramkit.patch_torch():
        said, ours, ours_stayed = run()
    assert said == expected
    assert ours_stayed == stayed
    assert all(stayed) == (kind != "assign")
    assert kind != "swap" or "swap" in str(expected)
    for mine, reference in zip(ours, theirs, strict=True):
        assert_same_bits(mine, reference)


def test_somebody_elses_wrapper_is_kept() -> None:
    """Another library wraps load_state_dict meanwhile: its wrapper stays, and ours below it passes on."""
    original = nn.Module.load_state_dict
    seen: list[str] = []
    patch = paramkit.patch_torch()
    ours = nn.Module.load_state_dict

    def theirs(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        seen.append("called")
        return ours(self, *args, **kwargs)

    try:
        nn.Module.load_state_dict = theirs  # type: ignore[method-assign]
        patch.remove()
        assert nn.Module.load_state_dict is theirs
        model = nn.Linear(40, 40)
        assert routes(lambda: model.load_state_dict(nn.Linear(40, 40).state_dict())) == {}
        with paramkit.patch_torch():
            assert routes(lambda: model.load_state_dict(nn.Linear(40, 40).state_dict()))
        assert nn.Module.load_state_dict is theirs
        assert seen == ["called", "called"], "gone past"
    finally:
        nn.Module.load_state_dict = original  # type: ignore[method-assign]


# --- in a process of its own ----------------------------------------------------------------------


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def once(instructions: str) -> None:
    """What runs in a process of its own need not be run for every instruction set."""
    if instructions != "scalar":
        pytest.skip("once is enough")


@pytest.mark.usefixtures("once")
def test_says_nothing_and_ends_quietly() -> None:
    done = python(
        """
        import warnings
        warnings.simplefilter("error")
        import torch, paramkit
        assert paramkit.status().backend == "cpu"
        patch = paramkit.patch_torch()
        kept = torch.zeros(4096).copy_(torch.ones(4096))
        print(int(kept.sum()))
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "4096\n", "")


@pytest.mark.usefixtures("once")
def test_without_the_extension_everything_is_torchs() -> None:
    done = python(
        """
        import torch, paramkit
        original = torch.nn.Module.load_state_dict
        with paramkit.patch_torch():
            model = torch.nn.Linear(40, 40)
            model.load_state_dict(torch.nn.Linear(40, 40).state_dict())
            torch.zeros(4096).copy_(torch.ones(4096))
        assert torch.nn.Module.load_state_dict is original
        assert not torch._C._dispatch_has_kernel_for_dispatch_key("aten::copy_", "CPU")
        print("fine")
        """,
        PARAMKIT_BACKEND="native",
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


@pytest.mark.usefixtures("once")
def test_a_child_can_patch_whatever_the_parent_was_at() -> None:
    done = python(
        """
        import os, sys, threading
        import paramkit
        from paramkit import dropin
        held, over = threading.Event(), threading.Event()
        def hold():
            with dropin._lock, sys.modules["paramkit.plan"]._entering:
                held.set()
                over.wait()
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        child = os.fork()
        if child == 0:
            import torch
            with paramkit.patch_torch():
                paramkit.plan({"w": torch.zeros(2)}, {"w": torch.ones(2)}).apply()
            os._exit(3)
        status = os.waitpid(child, 0)[1]
        over.set()
        thread.join()
        print(os.waitstatus_to_exitcode(status))
        """
    )
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize(
    ("name", "key"),
    [("copy_", "CPU"), ("copy_", "CompositeExplicitAutograd"), ("fill_.Scalar", "CPU")],
)
def test_another_librarys_kernel_is_not_hidden(name: str, key: str) -> None:
    done = python(
        f"""
        import torch, paramkit
        from torch import library as registry
        library = registry.Library("aten", "IMPL")
        library.impl("{name}", lambda dst, value, non_blocking=False: dst, "{key}")
        original = torch.nn.Module.load_state_dict
        try:
            paramkit.patch_torch()
        except RuntimeError as error:
            print(str(error).splitlines()[0])
        assert torch.nn.Module.load_state_dict is original
        with paramkit.backend.force("native"), paramkit.patch_torch():
            try:
                with paramkit.backend.force("cpu"):
                    print("not reached")
            except RuntimeError as error:
                print(str(error).splitlines()[0])
            print(paramkit.backend.status().backend)
        del library
        with paramkit.patch_torch():
            one, other = torch.zeros(4096), torch.ones(4096)
            with paramkit.backend.trace() as trace:
                one.copy_(other)
        print(trace.routes)
        """
    )
    assert done.returncode == 0, done.stderr
    first, forced, route, taken = done.stdout.splitlines()
    assert f"another library has a kernel of its own for aten::{name.partition('.')[0]}" in first
    assert (forced, route) == (first, "native"), "a refused route is not kept"
    assert taken == "{'copy': 1}"


@pytest.mark.usefixtures("once")
def test_a_decision_that_the_patch_cannot_follow_is_not_kept() -> None:
    """Each use says so, until the patch ends; not only the first, with torch silently left as it is."""
    done = python(
        """
        import torch, paramkit
        from torch import library as registry
        with paramkit.backend.force("native"):
            patch = paramkit.patch_torch()
        library = registry.Library("aten", "IMPL")
        library.impl("copy_", lambda dst, value, non_blocking=False: dst, "CPU")
        dst, src = torch.zeros(2), torch.full((2,), 3.0)
        for _ in range(2):
            try:
                paramkit.copy_(dst, src)
            except RuntimeError as error:
                print(str(error).splitlines()[0])
        patch.remove()
        del library
        paramkit.copy_(dst, src)
        print(dst.tolist())
        """
    )
    assert done.returncode == 0, done.stderr
    first, second, after = done.stdout.splitlines()
    assert first == second
    assert "another library has a kernel of its own" in first
    assert after == "[3.0, 3.0]"


def test_bits_of_a_large_copy() -> None:
    """Enough for all threads and for stores that pass by the cache."""
    source = torch.arange(9_000_001, dtype=torch.int32)
    with paramkit.patch_torch():
        dst = place(Layout.dense((3_000_000, 3)), torch.int32)
        assert routes(lambda: dst.copy_(source[1:].view(3_000_000, 3)))
    assert torch.equal(dst.flatten(), source[1:])
    assert bits(dst).numel() == 36_000_000


def test_long_list_with_many_copies_for_torch() -> None:
    """Batches that end, begin small and grow again, in order."""

    def run() -> list[Tensor]:
        memory = torch.zeros(600, 5)
        dsts = list(memory.unbind())
        srcs = [torch.full((5,), float(i)) for i in range(600)]
        for i in (*range(0, 90, 2), 91, 92, 300):
            srcs[i] = (torch.arange(5.0) * 1j * i).conj().imag  # carries the negative bit
        for i in range(400, 600, 7):
            srcs[i] = dsts[i - 1]  # written before
        torch._foreach_copy_(dsts, srcs)
        return dsts

    expected = run()
    with paramkit.patch_torch():
        got: list[Tensor] = []
        taken = routes(lambda: got.extend(run()))
    assert sum(taken.values()) > 500
    for mine, theirs in zip(got, expected, strict=True):
        assert_same_bits(mine, theirs)


# What other libraries have to say.


@pytest.mark.parametrize("load", ["paramkit", "patched"])
@pytest.mark.parametrize("wraps", [True, False])
def test_a_replaced_load_state_dict_is_not_gone_past(
    load: str, wraps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.nn.Module.load_state_dict

    def twice(self: torch.nn.Module, state: Any, *more: Any, **options: Any) -> Any:
        return original(self, {name: 2 * value for name, value in state.items()}, *more, **options)

    other = functools.wraps(original)(twice) if wraps else twice
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", other)
    model = torch.nn.Linear(20, 20, bias=False)
    if load == "paramkit":
        paramkit.load_state_dict(model, {"weight": torch.ones(20, 20)})
    else:
        with paramkit.patch_torch():
            model.load_state_dict({"weight": torch.ones(20, 20)})
        assert torch.nn.Module.load_state_dict is other
    assert model.weight.sum() == 800
    monkeypatch.undo()
    with paramkit.patch_torch(), paramkit.backend.trace() as trace:  # ours is no other library's
        paramkit.load_state_dict(model, {"weight": torch.ones(20, 20)})
    assert trace.routes and model.weight.sum() == 400


def test_a_patch_cannot_be_copied() -> None:
    with paramkit.patch_torch() as patch:
        for copying in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied"):
                copying(patch)
