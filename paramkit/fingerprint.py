"""A checksum for each tensor, the same wherever and however its values are kept."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .blocks import boxes, cut, gather
from .destinations import layout_finding, memory_key
from .errors import Finding, SourceError, dtype_text
from .sources import Lazy, StoredFile, open_source
from .typing import Source

__all__ = ["ALGORITHMS", "fingerprint"]

ALGORITHMS = tuple(
    sorted(name for name in hashlib.algorithms_guaranteed if not name.startswith("shake"))
)
"""What every Python has. The shake functions have no length of their own and are left out."""

# Read, or brought into order, at a time. sha256 takes 1.5 GB/s: a larger block gains nothing.
BLOCK = 1 << 20
# A tensor that lies in a file in another order than its own is gathered in pieces. Each piece reads a run of every
# stored row, so larger pieces mean longer runs.
PIECE = 16 << 20
SMALL = 1 << 20  # bytes in all, below which no thread is worth starting
MAX_THREADS = 16

# Bytes are copied as integers: no dtype is without a kernel, and no bit of a NaN is touched.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
_SWAPS = sys.byteorder == "big"


def fingerprint(model_or_source: Source, *, algorithm: str = "sha256") -> dict[str, str]:
    r"""A checksum of each tensor: equal for equal dtype, shape and bits, and in practice only for those.

    A digest is the hash of these bytes, one after the other:

    1. the dtype without "torch.", a space, the shape as Python prints a list of it, a line feed, in ASCII:
       `b"bfloat16 [2, 3]\n"`, and `b"float32 []\n"` for a tensor without dimensions;
    2. the elements in row-major order (the last index runs fastest), each in little-endian order, of a complex number
       the real part first; a bool is a byte.

    Nothing else counts: not the name, the device, the strides, where the memory begins, whether a conjugation is done
    or pending, `requires_grad`, or what kind of source it is. Bits count as they are: 0.0 and -0.0 differ, and so do
    two NaNs of different payload.

    Tensors are read in blocks of 1 MiB by up to 16 threads (`torch.get_num_threads()`), without a copy of the whole;
    those of a file by offset, and where they lie there in another order, in pieces of 16 MiB. Tied tensors are hashed
    once.

    Args:
        model_or_source: a module (its parameters and persistent buffers), a mapping from names to tensors, or the path
            or paths of files of weights: what `paramkit.plan` takes as a source, iterators excepted.
        algorithm: one of `hashlib`'s guaranteed names but shake: "sha256", "sha1", "blake2b", ..

    Returns:
        name -> hexadecimal digest, in the source's order.

    Raises:
        ValueError: an unknown algorithm.
        SourceError: a source that cannot be opened or read, that changes while it is read, or tensors without plain
            values (meta, sparse, quantized, nested, shards); all of them are listed.

    Example:
        >>> import numpy as np
        >>> prints = fingerprint({"w": torch.tensor([1.0, 2.0])}, algorithm="sha1")
        >>> prints
        {'w': '558bc1c6ce27a52cb7ccf497ab47f73c571af101'}
        >>> hashlib.sha1(b"float32 [2]\n" + np.array([1, 2], "<f4").tobytes()).hexdigest() == prints["w"]
        True
        >>> layer = torch.nn.Conv2d(8, 8, 3)
        >>> before = fingerprint(layer)
        >>> fingerprint(layer.to(memory_format=torch.channels_last)) == before
        True
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}; got {algorithm!r}")
    tensors = open_source(model_or_source, mmap=False)
    findings = [f for f in (_finding(n, t) for n, t in tensors.items()) if f is not None]
    if findings:
        count = "one tensor has" if len(findings) == 1 else f"{len(findings)} tensors have"
        raise SourceError(f"{count} no values that could be hashed.", findings)

    keys = {name: _key(tensor) for name, tensor in tensors.items()}
    distinct: dict[object, Tensor | Lazy] = {}
    for name, key in keys.items():
        distinct.setdefault(key, tensors[name])
    digests = _hash_all(distinct, algorithm)
    for file in {id(f): f for f in map(_file_of, tensors.values()) if f is not None}.values():
        file.check()  # what was read must be one state of the file
    return {name: digests[key] for name, key in keys.items()}


def _finding(name: str, tensor: Tensor | Lazy) -> Finding | None:
    if isinstance(tensor, Lazy):
        return None
    wrapped: bool = is_traceable_wrapper_subclass(tensor)  # a plain bool: no class is both for mypy
    if wrapped:
        kind = type(tensor).__name__
        hint = "pass full_tensor()" if hasattr(tensor, "full_tensor") else "pass plain tensors"
        return Finding(name, "layout", f"a {kind}, made of other tensors", "plain values", hint)
    if tensor.is_quantized:
        return Finding(
            name, "layout", "a quantized tensor", "plain values", "pass its int_repr() and scales"
        )
    if tensor.layout is torch.strided and not tensor.is_nested and _is_cow(tensor):
        return None
    return layout_finding(name, tensor, destination=False)


def _key(tensor: Tensor | Lazy) -> object:
    """Equal for tied tensors. To ask a copy-on-write tensor for its address would give it memory of its own."""
    return id(tensor) if _is_cow(tensor) else memory_key(tensor)


def _is_cow(tensor: Tensor | Lazy) -> bool:
    return isinstance(tensor, Tensor) and bool(torch._C._is_cow_tensor(tensor))  # type: ignore[attr-defined]


def _file_of(tensor: Tensor | Lazy) -> StoredFile | None:
    return getattr(tensor, "file", None) if isinstance(tensor, Lazy) else None


# ---- threads -------------------------------------------------------------------------------------


def _hash_all(tensors: dict[object, Tensor | Lazy], algorithm: str) -> dict[object, str]:
    """key -> digest. The largest come first, so that no thread is left alone with one at the end."""
    rest = deque(sorted(tensors.items(), key=lambda item: -_size(item[1])))
    devices = {t.device for t in tensors.values()}
    # A thread has streams of its own: elsewhere it would not wait for what the caller has just enqueued.
    streams = {d: torch.cuda.current_stream(d) for d in devices if d.type == "cuda"}
    digests: dict[object, str] = {}
    stop = threading.Event()
    gather = threading.Lock()

    def work() -> None:
        buffer = torch.empty(BLOCK, dtype=torch.uint8)
        try:
            while not stop.is_set():
                try:
                    key, tensor = rest.popleft()
                except IndexError:
                    return
                stream = streams.get(tensor.device)
                context: AbstractContextManager[Any] = (
                    torch.cuda.stream(stream) if stream is not None else nullcontext()
                )
                with context:
                    digest = _hash(tensor, algorithm, buffer, gather, stop)
                if digest is not None:
                    digests[key] = digest
        except BaseException:
            stop.set()
            raise

    threads = min(torch.get_num_threads(), len(rest), MAX_THREADS)
    if threads < 2 or sum(map(_size, tensors.values())) < SMALL:
        threads = 1
    if any(d.type not in ("cpu", "cuda") for d in devices):
        threads = 1
    if threads <= 1:
        work()
        return digests
    with ThreadPoolExecutor(threads - 1, "paramkit-hash") as pool:
        futures = [pool.submit(work) for _ in range(threads - 1)]
        try:
            work()
            for future in futures:
                future.result()
        except BaseException:  # an interrupt, too
            stop.set()
            raise
    return digests


def _size(tensor: Tensor | Lazy) -> int:
    return tensor.numel() * tensor.element_size()


def _hash(
    tensor: Tensor | Lazy,
    algorithm: str,
    buffer: Tensor,
    gather: AbstractContextManager[Any],
    stop: threading.Event,
) -> str | None:
    """The digest of one tensor; None where `stop` was set meanwhile."""
    state = hashlib.new(algorithm, usedforsecurity=False)
    name = dtype_text(tensor.dtype)
    state.update(f"{name} {list(tensor.shape)}\n".encode("ascii"))
    if not tensor.numel():
        return state.hexdigest()
    size = _part_size(tensor.dtype)
    if not isinstance(tensor, Lazy):
        with torch.no_grad():
            done = _feed(state.update, _blocks(tensor, buffer), size, stop)
    elif tensor.is_contiguous():
        done = _feed(state.update, _stored(tensor, buffer), size, stop)
    else:
        with gather:  # its memory is taken once, not once a thread
            done = _feed(state.update, _gathered(tensor), size, stop)
    return state.hexdigest() if done else None


def _part_size(dtype: torch.dtype) -> int:
    """Bytes of what has a byte order."""
    return dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize


def _feed(
    update: Callable[[Any], None], blocks: Iterator[Tensor], size: int, stop: threading.Event
) -> bool:
    for block in blocks:
        for at in range(0, len(block), BLOCK):
            if stop.is_set():
                return False
            part = block[at : at + BLOCK]
            update((part.view(-1, size).flip(1).contiguous() if _SWAPS else part).numpy())
    return True


# ---- bytes in row-major order: uint8 CPU tensors [n], valid until the next one is asked for -------


def _blocks(tensor: Tensor, buffer: Tensor) -> Iterator[Tensor]:
    tensor = tensor.detach()
    if type(tensor) is not Tensor:
        tensor = tensor.as_subclass(Tensor)
    pending = tensor.is_conj() or tensor.is_neg()
    here = tensor.device.type == "cpu" and not _is_cow(tensor)  # numpy() would be a write to it
    if here and not pending and tensor.is_contiguous():
        yield tensor.reshape(-1).view(torch.uint8)
        return
    integer, size = _INTEGERS[tensor.element_size()], tensor.element_size()
    for box in boxes(tensor.shape, BLOCK // size):
        block = cut(tensor, box)
        used = buffer[: block.numel() * size]
        if pending:
            used.view(tensor.dtype).view(block.shape).copy_(block)
        else:
            used.view(integer).view(block.shape).copy_(block.view(integer))
        yield used


def _stored(tensor: Lazy, buffer: Tensor) -> Iterator[Tensor]:
    for begin in range(0, tensor.nbytes, BLOCK):
        used = buffer[: min(BLOCK, tensor.nbytes - begin)]
        tensor.read_into(begin, begin + len(used), used)
        yield used


def _gathered(tensor: Lazy) -> Iterator[Tensor]:
    """A tensor that lies elsewhere with gaps or in another order."""
    size = tensor.element_size()
    integer = _INTEGERS[size]
    room = max(min(tensor.numel() * size, PIECE), size)
    out = torch.empty(room, dtype=torch.uint8)
    scratch = torch.empty(max(min(tensor.nbytes, PIECE), size), dtype=torch.uint8)
    for box in boxes(tensor.shape, room // size):
        shape = [n for _, n in box]
        begin = sum(start * step for (start, _), step in zip(box, tensor.strides))
        used = out[: torch.Size(shape).numel() * size]
        gather(tensor, begin, tensor.strides, used.view(integer).view(shape), scratch)
        yield used
