"""What `patch_torch` gives, and what it costs: ``python -m benchmarks.dropin [--json OUT]``.

Large and middling writes are timed in one process, patched and not, in turns. What a tiny write costs more cannot be
seen so: the kernels stay in torch's dispatcher once they were there. So it is timed in pairs of processes, one that
never patched beside one that is patched, and each pair gives a ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from tests import cases as inputs

Call = Callable[[], object]


def tiny_writes() -> dict[str, Call]:
    """What must not get slower: writes that stay with torch, and the smallest that do not."""
    one, row, page = torch.zeros(1), torch.zeros(64), torch.zeros(16, 16)
    ones = {n: torch.ones(n) for n in (1, 16, 64, 256)}
    pairs = [torch.zeros(16) for _ in range(2)]
    sources = [torch.ones(16) for _ in range(2)]
    large = torch.zeros(1024)

    def set_row() -> None:
        page[3] = ones[16]

    def set_number() -> None:
        page[3] = 2.0

    return {
        "copy_ of 1": lambda: one.copy_(ones[1]),
        "copy_ of 64": lambda: row.copy_(ones[64]),
        "copy_ of 256 (taken)": lambda: large[:256].copy_(ones[256]),
        "row of 16 = tensor": set_row,
        "row of 16 = number": set_number,
        "fill_ of 64": lambda: row.fill_(2.0),
        "_foreach_copy_ of 2 x 16": lambda: torch._foreach_copy_(pairs, sources),
    }


def large_writes(tiny: bool) -> dict[str, Call]:
    """What should get faster, in the words of code that knows nothing of paramkit."""
    n = 64 if tiny else 4096
    square, other = torch.zeros(n, n), torch.rand(n, n)
    half, narrow = torch.zeros(n, n, dtype=torch.bfloat16), torch.rand(n, n // 2)
    smalls = inputs.small_tensors(10 if tiny else 1000, 64)
    images = torch.rand(8, 16, n // 16, n // 16)
    model = inputs.encoder(layers=2 if tiny else 40)
    state = {name: torch.rand_like(value) for name, value in model.state_dict().items()}

    def columns() -> None:
        square[:, ::2] = narrow

    def columns_number() -> None:
        square[:, ::2] = 1.0

    def rows() -> None:
        square[1:-1, 3:-3] = other[1:-1, 3:-3]

    return {
        "copy_, dense": lambda: square.copy_(other),
        "copy_, transposed": lambda: square.copy_(other.t()),
        "copy_, float32 -> bfloat16": lambda: half.copy_(other),
        "rows = rows": rows,
        "every other column = tensor": columns,
        "every other column = number": columns_number,
        ".t().contiguous()": lambda: other.t().contiguous(),
        ".to(channels_last)": lambda: images.to(memory_format=torch.channels_last),
        ".to(bfloat16)": lambda: other.to(torch.bfloat16),
        "_foreach_copy_ of 1000 x 64": lambda: torch._foreach_copy_(*smalls),
        "load_state_dict of 480": lambda: model.load_state_dict(state),
    }


def middle_writes() -> dict[str, Call]:
    """Of 512 bytes to 64 KB: what is taken here must have paid for being looked at."""
    writes: dict[str, Call] = {}

    def copy(name: str, dst: torch.Tensor, src: torch.Tensor) -> None:
        writes[name] = lambda: dst.copy_(src)

    def fill(name: str, dst: torch.Tensor) -> None:
        writes[name] = lambda: dst.fill_(1)

    dtypes = {
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "float8_e4m3fn": torch.float8_e4m3fn,
        "int64": torch.int64,
        "complex64": torch.complex64,
    }
    for n in (16, 32, 128):
        page = torch.rand(n, n)
        for name, dtype in dtypes.items():
            copy(f"{n} x {n}, float32 -> {name}", page.to(dtype), page)
        copy(f"{n} x {n}, float16 -> float32", page.clone(), page.half())
        copy(f"{n} x {n}, dense", page.clone(), page)
        copy(f"{n} x {n}, transposed", page.clone(), page.t())
        copy(f"{n} x {n}, one column for all", page.clone(), page[:, :1])
        copy(f"{n} x {n}, half of each row", page.clone()[:, : n // 2], page[:, : n // 2])
    for n in (64, 512, 2048):
        rows = torch.rand(n, 8)
        copy(f"{n} rows of 3", rows.clone()[:, :3], rows[:, :3])
        copy(f"{n} rows of 3, packed", rows[:, :3].contiguous(), rows[:, :3])
        copy(f"{n} rows of 4", rows.clone()[:, :4], rows[:, :4])
    for size in (512, 4096, 65536):
        for dtype in (torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.float8_e4m3fn):
            name = str(dtype).removeprefix("torch.")
            fill(f"fill_ of {size} bytes, {name}", torch.zeros(size // dtype.itemsize, dtype=dtype))
    return writes


def sample(call: Call, inner: int) -> float:
    """Nanoseconds of one call, the mean of `inner`."""
    start = time.perf_counter_ns()
    for _ in range(inner):
        call()
    return (time.perf_counter_ns() - start) / inner


def quartiles(values: Sequence[float]) -> list[float]:
    return [float(f"{q:.5g}") for q in statistics.quantiles(values, n=4, method="inclusive")]


def measure_in_turns(writes: dict[str, Call], inner: int, turns: int) -> dict[str, dict[str, Any]]:
    """For each write the quartiles of both times, and of the ratio of two neighbours."""
    import paramkit

    found = {}
    for name, call in writes.items():
        times: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(turns):
            for on in (turn % 2 == 0, turn % 2 == 1):
                if on:
                    with paramkit.patch_torch():
                        times[on].append(sample(call, inner))
                else:
                    times[on].append(sample(call, inner))
        ratios = [off / on for off, on in zip(times[False][1:], times[True][1:], strict=True)]
        found[name] = {
            "torch_ns": quartiles(times[False][1:]),
            "patched_ns": quartiles(times[True][1:]),
            "ratio": quartiles(ratios),
        }
    return found


def tiny_times(patched: bool, inner: int, samples: int) -> dict[str, float]:
    """In this process, for each tiny write the least of its samples: what is left is the call's own."""
    if patched:
        import paramkit

        paramkit.patch_torch()
    writes = tiny_writes()
    least = dict.fromkeys(writes, float("inf"))
    with torch.no_grad():
        for _ in range(samples):
            for name, call in writes.items():
                least[name] = min(least[name], sample(call, inner))
    return least


def measure_tiny(tiny: bool) -> dict[str, dict[str, Any]]:
    """Quartiles over pairs of processes, one that never patched and one that is patched."""
    pairs = 2 if tiny else 12  # quartiles need two
    times: dict[str, list[dict[str, float]]] = {"never": [], "patched": []}
    for turn in range(pairs):
        for kind in ("never", "patched") if turn % 2 else ("patched", "never"):
            command = [sys.executable, "-m", "benchmarks.dropin", "--worker", kind]
            done = subprocess.run(
                command + ["--tiny"] * tiny, check=True, capture_output=True, text=True
            )
            times[kind].append(json.loads(done.stdout))
    found = {}
    for name in tiny_writes():
        never, patched = ([each[name] for each in times[kind]] for kind in ("never", "patched"))
        found[name] = {
            "never_ns": quartiles(never),
            "patched_ns": quartiles(patched),
            "cost": quartiles([p / n for p, n in zip(patched, never, strict=True)]),
        }
    return found


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for group in ("large", "middle"):
        title = f"{group.capitalize()} writes"
        table = Table("write", "torch", "patched", "torch / patched", title=title)
        for name, row in result[group].items():
            times = [f"{row[side][1] / 1e3:.2f} us" for side in ("torch_ns", "patched_ns")]
            q1, median, q3 = row["ratio"]
            table.add_row(name, *times, f"{median:.2f}x ({q1:.2f} to {q3:.2f})")
        console.print(table)
    table = Table("write", "never patched", "patched", "cost", title="Tiny writes")
    for name, row in result["tiny"].items():
        times = [f"{row[side][1]:.0f} ns" for side in ("never_ns", "patched_ns")]
        q1, median, q3 = (100 * (cost - 1) for cost in row["cost"])
        table.add_row(name, *times, f"{median:+.1f} % ({q1:+.1f} to {q3:+.1f})")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dropin", description="Times torch's own calls under patch_torch."
    )
    parser.add_argument("--json", metavar="OUT", type=Path, help="write the result as JSON")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # for the tests
    parser.add_argument("--worker", choices=("never", "patched"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        inner, samples = (10, 2) if options.tiny else (2000, 60)
        print(json.dumps(tiny_times(options.worker == "patched", inner, samples)))
        return 0
    result: dict[str, Any] = {"machine": machine.describe()}
    with torch.no_grad():
        turns = 4 if options.tiny else 40
        result["large"] = measure_in_turns(large_writes(options.tiny), 1, turns)
        result["middle"] = measure_in_turns(middle_writes(), 1 if options.tiny else 300, turns)
    result["tiny"] = measure_tiny(options.tiny)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
