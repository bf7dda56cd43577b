"""Fingerprints against a plain reading of their definition, over layouts, sources, files and byte orders."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from paramkit import SourceError, blocks
from paramkit.fingerprint import ALGORITHMS, fingerprint
from paramkit.sources import Lazy, open_source
from tests.cases import DTYPES, random_bits
from tests.guards import Layout, bits, nothing_written, place, random_layout, random_shape

MODULE = sys.modules["paramkit.fingerprint"]  # the name in the package may be the function


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # torch calls complex32 experimental
        warnings.filterwarnings("ignore", "ComplexHalf")
        yield


def by_definition(tensor: Tensor, algorithm: str = "sha256") -> str:
    """What the docstring says, from the bytes of the storage, gathered by index."""
    lead = f"{tensor.dtype} {list(tensor.shape)}\n".removeprefix("torch.")
    return hashlib.new(algorithm, lead.encode() + bits(tensor).numpy().tobytes()).hexdigest()


def of(tensor: Any, algorithm: str = "sha256") -> str:
    return fingerprint({"x": tensor}, algorithm=algorithm)["x"]


# ---- the definition ------------------------------------------------------------------------------


def test_digests_that_must_never_change() -> None:
    known = {
        "w": (
            torch.tensor([1.0, 2.0]),
            "d65b9661e158415bfd2911755ab48fae2eac257925c10f8409919c7a9ef07438",
        ),
        "scalar": (torch.tensor(True), hashlib.sha256(b"bool []\n\x01").hexdigest()),
        "empty": (torch.empty(2, 0, 3), hashlib.sha256(b"float32 [2, 0, 3]\n").hexdigest()),
        "bf16": (
            torch.tensor([[1.0], [-2.0]], dtype=torch.bfloat16),
            hashlib.sha256(b"bfloat16 [2, 1]\n\x80\x3f\x00\xc0").hexdigest(),
        ),
        "complex": (
            torch.tensor([1 - 2j]),
            hashlib.sha256(b"complex64 [1]\n\0\0\x80\x3f\0\0\0\xc0").hexdigest(),
        ),
        "int": (
            torch.tensor([0x0102, -1], dtype=torch.int16),
            hashlib.sha256(b"int16 [2]\n\x02\x01\xff\xff").hexdigest(),
        ),
    }
    assert fingerprint({k: t for k, (t, _) in known.items()}) == {
        k: digest for k, (_, digest) in known.items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_in_every_layout(dtype: torch.dtype) -> None:
    values = random_bits((6, 10, 7), dtype)
    want = by_definition(values)
    assert of(values) == want
    steps = place(Layout.dense((6, 10, 7), (300, 20, 2)), dtype)
    permuted = place(Layout.dense((6, 10, 7), (1, 42, 6)), dtype)
    for view in (steps, permuted):
        integer = MODULE._INTEGERS[dtype.itemsize]
        view.view(integer).copy_(values.view(integer))
        with nothing_written(view):
            assert of(view) == want, view.stride()


def test_random_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few elements, so that every way to cut comes up."""
    for seed in range(300):
        rng = random.Random(seed)
        monkeypatch.setattr(MODULE, "BLOCK", rng.choice((16, 32, 48, 1 << 20)))
        dtype = rng.choice(DTYPES)
        tensor = place(random_layout(rng, random_shape(rng)), dtype, seed)
        assert of(tensor) == by_definition(tensor), seed


def test_views_that_share_elements() -> None:
    row = torch.randn(5)
    assert of(row.expand(3, 5)) == of(row.repeat(3, 1))
    assert of(row.as_strided((3, 3), (1, 1))) == of(torch.stack([row[i : i + 3] for i in range(3)]))


def test_pending_conjugation_and_sign() -> None:
    for dtype in (torch.complex32, torch.complex64, torch.complex128):
        x = torch.randn(40, 30, dtype=torch.complex64).to(dtype)
        assert x.conj().is_conj()
        assert of(x.conj()) == of(x.conj().resolve_conj()) != of(x)
        assert of(x.t().conj()) == of(x.t().conj().resolve_conj().contiguous())
    imaginary = torch.randn(40, 30, dtype=torch.complex64).conj().imag
    assert imaginary.is_neg()
    assert of(imaginary) == of(imaginary.resolve_neg().contiguous())


def test_what_counts() -> None:
    x = torch.randn(4, 6)
    assert of(x) != of(x.view(6, 4)) != of(x.view(24))
    assert of(x.view(24)) != of(x.view(24, 1))
    assert of(x) != of(x.view(torch.int32))
    assert of(torch.tensor([0.0])) != of(torch.tensor([-0.0]))
    nans = torch.tensor([0x7FC00000, 0x7FC00001, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert len({of(nan) for nan in nans}) == 3
    assert len({of(nan) for nan in nans.double()}) >= 2
    changed = x.clone()
    changed[3, 5] = torch.nextafter(changed[3, 5], torch.tensor(9.0))
    assert of(changed) != of(x)


def test_what_does_not_count() -> None:
    x = torch.randn(3, 4)
    assert of(nn.Parameter(x)) == of(x) == of(x.clone().requires_grad_()) == of(x.t().clone().t())
    with torch.inference_mode():
        inference = x + 0
    assert of(inference) == of(x)
    with torch.inference_mode():
        assert of(x) == by_definition(x)

    class Named(Tensor):
        pass

    assert of(x.as_subclass(Named)) == of(x)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_algorithms(algorithm: str) -> None:
    x = torch.randn(70, 70)
    assert of(x, algorithm) == by_definition(x, algorithm)
    assert of(x.t(), algorithm) == by_definition(x.t(), algorithm)


@pytest.mark.parametrize("algorithm", ["shake_128", "crc32", "SHA256", "", None, 256])
def test_unknown_algorithm(algorithm: Any) -> None:
    with pytest.raises(ValueError, match=r"algorithm must be one of .*sha256.*; got") as error:
        fingerprint({}, algorithm=algorithm)
    assert repr(algorithm) in str(error.value)


def test_other_byte_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of the other byte order the memory holds each part reversed, and the digest is the same."""
    for dtype in DTYPES:
        x = random_bits((5, 9), dtype)
        part = x.element_size() // (2 if dtype.is_complex else 1)
        swapped = x.view(torch.uint8).view(-1, part).flip(1).reshape(-1).view(dtype).view(5, 9)
        want = of(x)
        monkeypatch.setattr(MODULE, "_SWAPS", True)
        assert of(swapped) == want, dtype
        monkeypatch.setattr(MODULE, "_SWAPS", False)


# ---- sources -------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 5, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(7)
        self.head = nn.Linear(7, 9, bias=False)
        self.tied = nn.Linear(7, 9, bias=False)
        self.tied.weight = self.head.weight
        self.turned = nn.Parameter(torch.randn(4, 8, dtype=torch.bfloat16).t())
        self.steps = nn.Parameter(torch.randn(8, 12)[::2, 1::3])
        self.register_buffer("scratch", torch.ones(3), persistent=False)


def test_the_same_for_every_source(tmp_path: Path) -> None:
    model = Small()
    state = model.state_dict()
    want = {name: by_definition(tensor) for name, tensor in state.items()}
    assert "norm.num_batches_tracked" in want and "scratch" not in want
    assert fingerprint(model) == want
    assert list(fingerprint(model)) == list(want)
    assert fingerprint(state) == want
    torch.save(state, tmp_path / "a.pt")  # keeps strides, offsets and ties
    assert any(not t.is_contiguous() for t in open_source(tmp_path / "a.pt", mmap=False).values())
    assert fingerprint(tmp_path / "a.pt") == want
    dense = {name: t.clone(memory_format=torch.contiguous_format) for name, t in state.items()}
    safetensors.torch.save_file(dense, tmp_path / "a.safetensors")
    assert fingerprint(str(tmp_path / "a.safetensors")) == want
    halves = [dict(list(dense.items())[:4]), dict(list(dense.items())[4:])]
    for i, half in enumerate(halves):
        safetensors.torch.save_file(half, tmp_path / f"part{i}.safetensors")
    assert fingerprint([tmp_path / "part0.safetensors", tmp_path / "part1.safetensors"]) == want
    assert fingerprint(open_source(tmp_path / "a.pt", mmap=False)) == want
    assert fingerprint(open_source(tmp_path / "a.pt", mmap=True)) == want


def test_nothing_to_hash() -> None:
    assert fingerprint({}) == {}
    assert fingerprint(nn.ReLU()) == {}


@pytest.mark.filterwarnings("ignore:.*(beta state|deprecated|prototype stage)")
def test_one_error_for_all_that_have_no_values() -> None:
    source = {
        "good": torch.ones(2),
        "meta": torch.empty(2, device="meta"),
        "sparse": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "jagged": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "lazy": nn.LazyLinear(3).weight,
        "two": TwoTensor(torch.ones(2), torch.ones(2)),
    }
    with pytest.raises(SourceError, match="8 tensors have no values") as error:
        fingerprint(source)
    kinds = {f.name: f.kind for f in error.value.findings}
    assert kinds == dict.fromkeys(list(source)[1:], "layout") | {"meta": "meta", "lazy": "meta"}
    with pytest.raises(SourceError, match="one tensor has no values"):
        fingerprint({"meta": torch.empty(2, device="meta")})
    with pytest.raises(SourceError, match="not named tensors"):
        fingerprint({"a": 1})
    with pytest.raises(SourceError):
        fingerprint(3)


class Memory(Lazy):
    """A lazy tensor whose bytes are in memory, which notes what is read of them."""

    __slots__ = ("data", "reads")

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.shape, tensor.dtype, tensor.stride())
        raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        begin = tensor.storage_offset() * tensor.element_size()
        self.data = raw[begin : begin + self.nbytes]
        self.reads: list[tuple[int, int]] = []

    def read_into(self, begin: int, end: int, out: Tensor) -> None:
        self._check_range(begin, end, out)
        self.reads.append((begin, end))
        out.copy_(self.data[begin:end])


def test_lazy_tensors_of_random_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a few elements, so that every way to gather comes up; nothing is read beyond the tensor."""
    for seed in range(300):
        rng = random.Random(seed)
        monkeypatch.setattr(MODULE, "BLOCK", rng.choice((16, 64, 1 << 20)))
        monkeypatch.setattr(MODULE, "PIECE", rng.choice((16, 64, 512, 16 << 20)))
        monkeypatch.setattr(blocks, "FEW", rng.choice((0, 16, 4096)))
        dtype = rng.choice(DTYPES)
        tensor = place(random_layout(rng, random_shape(rng)), dtype, seed)
        lazy = Memory(tensor)
        assert of(lazy) == by_definition(tensor), seed
        if tensor.numel():
            longest = max(end - begin for begin, end in lazy.reads)
            assert longest <= max(MODULE.BLOCK if lazy.is_contiguous() else MODULE.PIECE, 16)


def test_lazy_tensors_that_repeat_elements() -> None:
    row = torch.randn(5)
    for view in (row.expand(300, 5), row.as_strided((3, 3), (1, 1)), torch.randn(()).expand(9)):
        assert of(Memory(view)) == by_definition(view)


def test_a_transposed_lazy_tensor_is_read_in_runs() -> None:
    tensor = torch.randn(3000, 2048).t()  # 24 MiB, in two pieces
    lazy = Memory(tensor)
    assert of(lazy) == of(tensor)
    read = sum(end - begin for begin, end in lazy.reads)
    assert read <= 2 * lazy.nbytes
    assert len(lazy.reads) <= 2 * 3000


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.randn(300), "b": torch.randn(300)}
    safetensors.torch.save_file(tensors, path)
    opened = open_source(path, mmap=False)
    assert fingerprint(opened) == fingerprint(tensors)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + b"\0")
    with pytest.raises(SourceError, match="not what it was"):
        fingerprint(opened)
    path.write_bytes(raw[:-800])
    with pytest.raises(SourceError):
        fingerprint(opened)


# ---- threads, memory -----------------------------------------------------------------------------


def test_tied_tensors_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[tuple[int, ...]] = []
    original = MODULE._hash
    monkeypatch.setattr(
        MODULE, "_hash", lambda t, *rest: hashed.append(tuple(t.shape)) or original(t, *rest)
    )
    model = Small()
    prints = fingerprint(model)
    assert hashed.count((9, 7)) == 1
    assert prints["tied.weight"] == prints["head.weight"]
    weight = torch.randn(2, 3)
    assert len(set(fingerprint({"a": weight, "b": weight.detach(), "c": weight.t()}).values())) == 2
    assert hashed.count((2, 3)) == 1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    generator = random.Random(threads)
    tensors = {
        f"w{i}": torch.randn(generator.choice((3, 1000, 300_000)))[:: generator.choice((1, 2))]
        for i in range(30)
    }
    assert fingerprint(tensors) == {name: by_definition(t) for name, t in tensors.items()}
    assert not [t for t in threading.enumerate() if t.name.startswith("paramkit-hash")]


class Fails(Memory):
    __slots__ = ("error",)

    def __init__(self, tensor: Tensor, error: BaseException) -> None:
        super().__init__(tensor)
        self.error = error

    def read_into(self, begin: int, end: int, out: Tensor) -> None:
        raise self.error


@pytest.mark.parametrize("error", [SourceError("gone."), KeyboardInterrupt()])
def test_an_error_stops_every_thread(error: BaseException) -> None:
    """Whichever thread it comes to; the error is the caller's."""
    torch.set_num_threads(3)
    for place_of_it in range(8):
        tensors: dict[str, Any] = {f"w{i}": Memory(torch.randn(100_000)) for i in range(8)}
        tensors[f"w{place_of_it}"] = Fails(torch.randn(100_000), error)
        with pytest.raises(type(error)):
            fingerprint(tensors)
        assert not [t for t in threading.enumerate() if t.name.startswith("paramkit-hash")]


def test_copy_on_write_stays_shared() -> None:
    base = torch.randn(100)
    lazy_copy = torch._lazy_clone(base)
    assert torch._C._is_cow_tensor(lazy_copy)
    assert of(lazy_copy) == by_definition(base.clone())
    assert torch._C._is_cow_tensor(lazy_copy)


class Largest(TorchDispatchMode):
    """The largest memory that an operator makes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view and "detach" not in str(func):
            self.nbytes = max(self.nbytes, out.untyped_storage().nbytes())
        return out


def test_no_copy_of_the_whole() -> None:
    torch.set_num_threads(1)  # the mode is this thread's
    base = torch.randn(1500, 2000)
    for view in (base, base.t(), base[::2, ::3], base[:, :1].expand(1500, 2000)):
        with Largest() as mode:
            fingerprint({"x": view})
        assert 0 < mode.nbytes <= MODULE.BLOCK


_PEAK = """
import resource, sys, torch
from paramkit.fingerprint import fingerprint
path = sys.argv[1]
fingerprint({"x": torch.ones(2 << 20)})  # threads and code are there
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fingerprint(path)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_peak_memory_of_a_file(tmp_path: Path) -> None:
    """Of 128 MiB in one file, half of them transposed: two pieces of 16 MiB and some blocks at a time."""
    tensors = {"a": torch.ones(16 << 20), "b": torch.ones(4096, 4096).t()}
    torch.save(tensors, tmp_path / "a.pt")
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path / "a.pt")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 48 << 10  # KiB
