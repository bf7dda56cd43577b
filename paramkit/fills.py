"""What a rule fills a destination with: a number, seeded normal values, or the mean of rows.

None of them is a tensor while a plan is made. A number becomes one element when the plan is compiled;
normal values and means are made piece by piece when the plan runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from .backend import checks
from .errors import dtype_text
from .sources.lazy import Lazy

__all__ = ["Constant", "Fill", "Mean", "Normal", "beside"]

_KEYS = ("normal", "mean", "seed")


@dataclass(frozen=True)
class Fill:
    """What to fill with.

    Attributes:
        kind: "value", "mean" or "normal".
        value: the number of a "value", the standard deviation of a "normal".
        mean: of a "normal".
        seed: of a "normal". Every destination has values of its own, which depend on the seed, the
            destination's name and the place in it; not on device, dtype's layout or staging.
    """

    kind: str
    value: float | int | bool | complex = 0
    mean: float = 0.0
    seed: int = 0

    @staticmethod
    def read(given: object) -> Fill:
        """A fill as it is written in a rule.

        Raises:
            TypeError, ValueError: naming what cannot be read.

        >>> Fill.read("zeros"), Fill.read({"normal": 0.02})
        (Fill(kind='value', value=0, mean=0.0, seed=0), Fill(kind='normal', value=0.02, mean=0.0, seed=0))
        """
        if isinstance(given, Fill):
            return given
        if isinstance(given, (bool, int, float, complex)):
            return Fill("value", given)
        if isinstance(given, str):
            if given == "zeros":
                return Fill("value", 0)
            if given == "mean":
                return Fill("mean")
            raise ValueError(
                f'fill must be a number, "zeros", "mean" or {{"normal": std}}, got {given!r}'
            )
        if isinstance(given, Mapping):
            unknown = [k for k in given if k not in _KEYS]
            if unknown or "normal" not in given:
                raise ValueError(
                    f'fill must have "normal" and may have "mean" and "seed", got {dict(given)}'
                )
            for key in ("normal", "mean"):
                value = given.get(key, 0.0)
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise TypeError(f"fill: {key} must be a number, got {value!r}")
            seed = given.get("seed", 0)
            if isinstance(seed, bool) or not isinstance(seed, int):
                raise TypeError(f"fill: seed must be an int, got {seed!r}")
            if not given["normal"] >= 0:
                raise ValueError(
                    f"fill: normal, the standard deviation, must be >= 0, got {given['normal']}"
                )
            return Fill("normal", float(given["normal"]), float(given.get("mean", 0.0)), seed)
        raise TypeError(
            f'fill must be a number, "zeros", "mean" or {{"normal": std}}, got {type(given).__name__}'
        )

    def plain(self) -> Any:
        """As it may be written in a rule or a rule file.

        >>> Fill.read({"normal": 1, "seed": 3}).plain()
        {'normal': 1.0, 'seed': 3}
        """
        if self.kind == "value":
            return self.value
        if self.kind == "mean":
            return "mean"
        out: dict[str, Any] = {"normal": self.value}
        if self.mean:
            out["mean"] = self.mean
        if self.seed:
            out["seed"] = self.seed
        return out

    def misfit(self, dtype: torch.dtype, casting: str = "same_kind") -> str:
        """Why a tensor of that dtype cannot hold it, or "".

        >>> Fill.read(0.5).misfit(torch.int64), Fill.read(300).misfit(torch.uint8)
        ('a fraction in a tensor of int64', 'beyond what uint8 can hold')
        """
        kind = dtype_text(dtype)
        whole = not (dtype.is_floating_point or dtype.is_complex)
        if self.kind != "value":
            fractions = whole and casting != "unsafe"
            return f"values with fractions in a tensor of {kind}" if fractions else ""
        number = self.value.real
        if self.value.imag and not dtype.is_complex:
            return f"a complex number in a tensor of {kind}"
        if whole:
            if number != number or abs(number) == float("inf"):
                return f"no number that {kind} can hold"
            if int(number) != number and casting != "unsafe":
                return f"a fraction in a tensor of {kind}"
            limits = None if dtype == torch.bool else torch.iinfo(dtype)
            beyond = limits is not None and not limits.min <= int(number) <= limits.max
        else:
            most = torch.finfo(dtype).max
            beyond = any(most < abs(n) < float("inf") for n in (number, self.value.imag))
        return f"beyond what {kind} can hold" if beyond else ""

    def __str__(self) -> str:
        return f"fill {self.plain()}"


class Constant:
    """A number beside a destination, one element once the plan is compiled.

    It looks like a 0-dim tensor of the destination's dtype on its device.
    """

    layout = torch.strided
    shape: tuple[int, ...] = ()
    is_meta = False

    def __init__(self, value: Any, destination: Tensor) -> None:
        self.value, self.dtype, self.device = value, destination.dtype, destination.device
        self._destination = destination

    def beside(self) -> Tensor:
        """The element itself, on the destination's device.

        Raises:
            RuntimeError: while a CUDA graph is captured.
        """
        return beside(checks.element_of(self.value, self._destination), self._destination)

    def stride(self) -> tuple[int, ...]:
        return ()

    def dim(self) -> int:
        return 0

    def numel(self) -> int:
        return 1

    def element_size(self) -> int:
        return self.dtype.itemsize


class Normal(Lazy):
    """Seeded normal values, in row-major order of the region that they fill.

    The values come in blocks of 65,536, each from a generator of its own, seeded from the seed, the
    destination's name and the block's number: so they are the same for every device and staging size,
    and any part can be made alone. They are made in float64 and rounded once to the dtype.

    Args:
        fill: standard deviation, mean and seed.
        name: of the destination.
        shape: of the region.
        dtype: of the destination.
    """

    BLOCK = 1 << 16

    def __init__(self, fill: Fill, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self._fill, self._name = fill, name

    def read_into(self, begin: int, end: int, out: Tensor) -> None:
        size = self.dtype.itemsize * self.BLOCK
        for block in range(begin // size, -(-end // size)):
            first = block * size
            start, stop = max(begin, first), min(end, first + size)
            made = self._block(block).view(torch.uint8)
            out[start - begin : stop - begin].copy_(made[start - first : stop - first])

    def _block(self, number: int) -> Tensor:
        text = f"{self._fill.seed}|{self._name}|{number}"
        return _normal(text, self._fill.mean, float(self._fill.value.real), self.dtype)


@lru_cache(maxsize=2)  # a small staging buffer asks for a block in many pieces
def _normal(text: str, mean: float, std: float, dtype: torch.dtype) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
    generator = torch.Generator().manual_seed(seed)
    # Always float64: torch's float32 values depend on the instruction set.
    values = torch.empty(Normal.BLOCK, dtype=torch.float64)
    return values.normal_(mean, std, generator=generator).to(dtype)


class Mean(Lazy):
    """The mean of a tensor's first rows, in float64, rounded once to the destination's dtype.

    Args:
        source: a tensor or a lazy one, of shape (m, ...).
        rows: n <= m.
        dtype: of the destination.
    """

    # Rows taken together: more would not be faster, and need more memory.
    CHUNK = 1 << 20

    def __init__(self, source: Any, rows: int, dtype: torch.dtype) -> None:
        super().__init__(tuple(source.shape[1:]), dtype)
        self.source, self._rows = source, rows
        self._taken: Tensor | None = None

    def read_into(self, begin: int, end: int, out: Tensor) -> None:
        # Asked for in pieces, the first one first: the source is read once for all of them, and again when they
        # are asked for again, as its values may be others by then.
        taken = self._values() if begin == 0 or self._taken is None else self._taken
        out.copy_(taken.reshape(-1).view(torch.uint8)[begin:end])
        self._taken = None if end == self.nbytes else taken

    def _values(self) -> Tensor:
        source = self.source
        wide = torch.complex128 if source.dtype.is_complex else torch.float64
        total = torch.zeros(self.shape, dtype=wide)
        step = max(1, self.CHUNK // max(1, prod(self.shape) * source.element_size()))
        for first in range(0, self._rows, step):
            last = min(self._rows, first + step)
            total += _rows(source, first, last).to(wide).sum(0)
        return (total / self._rows if self._rows else total).to(self.dtype)


def _rows(source: Any, first: int, last: int) -> Tensor:
    """Rows of a tensor or of a lazy one, on the CPU."""
    if isinstance(source, Tensor):
        return source.detach()[first:last].cpu()
    strides = source.stride()
    rows: Tensor = source.read_view((last - first, *source.shape[1:]), strides, first * strides[0])
    return rows


def beside(one: Tensor, dst: Tensor) -> Tensor:
    """A number's element on the device of its destination, which then fills without asking the host.

    Raises:
        RuntimeError: while a CUDA graph is captured from the device's stream.
    """
    if dst.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "plan: a plan that fills CUDA tensors keeps its numbers on the device, which cannot be done while a "
            "graph is captured: make the plan before the capture"
        )
    return one if dst.is_meta else one.to(dst.device)
