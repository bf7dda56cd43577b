"""Plans from files: read piece by piece into little staging memory, the same bits as from memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import paramkit
from paramkit import PlanError, Rule, SourceError, TornError, stream
from paramkit.sources.lazy import Stored, StoredFile
from paramkit.stream import Streamed
from tests.guards import (
    Layout,
    assert_same_bits,
    assert_same_storage,
    nothing_written,
    place,
    random_layout,
    watch,
)

HEADS, GROUP, DIM, WIDTH = 4, 3, 8, 40
STAGING = 4096


def random_bits(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """Finite values, with every bit of the significand in use."""
    seeded = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=seeded, dtype=torch.float64).to(dtype)
    return torch.randint(-100, 100, shape, generator=seeded).to(dtype)


def source() -> dict[str, Tensor]:
    """Tensors larger and smaller than the staging, empty ones, several dtypes."""
    g, r, d, w = HEADS, GROUP, DIM, WIDTH
    return {
        "plain": random_bits((100, 70), seed=1),
        "turned": random_bits((64, 90), seed=2),
        "q": random_bits((g * r * d, w), seed=3),
        "k": random_bits((g * d, w), seed=4),
        "v": random_bits((g * d, w), seed=5),
        "gate_up": random_bits((2 * 33, w), seed=6),
        "mixed": random_bits((g * (r + 2) * d, w), seed=7),
        "experts": random_bits((3, 30, 20), seed=8),
        "e.0": random_bits((20, 30), seed=9),
        "e.1": random_bits((20, 30), seed=10),
        "half": random_bits((50, 61), torch.bfloat16, seed=11),
        "double": random_bits((31, 17), torch.float64, seed=12),
        "codes": random_bits((5001,), torch.int8, seed=13),
        "tall": random_bits((60, 12), seed=14),
        "kv": random_bits((2 * 6, 50), seed=15),
        "number": random_bits((), seed=16),
        "none": torch.empty(0, 7),
        "none too": torch.empty(3, 0, dtype=torch.float16),
    }


def model() -> dict[str, Tensor]:
    """Destinations inside patterned storages, some of them strided."""
    g, r, d, w = HEADS, GROUP, DIM, WIDTH
    shapes: dict[str, tuple[Any, ...]] = {
        "plain": ((100, 70), torch.float32, (1, 103)),
        "turned": ((90, 64), torch.float32),
        "qkv": ((g * (r + 2) * d, w), torch.float32),
        "gate": ((33, w), torch.float32),
        "up": ((33, w), torch.float32, (w + 5, 1)),
        "mq": ((g * r * d, w), torch.float32),
        "mk": ((g * d, w), torch.float32),
        "mv": ((g * d, w), torch.bfloat16),
        "x.0": ((30, 20), torch.float32),
        "x.1": ((20, 30), torch.float32),
        "x.2": ((30, 20), torch.float64),
        "stack": ((30, 2, 20), torch.float32),
        "half": ((50, 61), torch.float32),
        "double": ((31, 17), torch.float16),
        "codes": ((5001,), torch.int64, (2,)),
        "tall": ((80, 12), torch.float32),
        "wide": ((4 * 6, 50), torch.float32),
        "number": ((), torch.float32),
        "none": ((0, 7), torch.float32),
        "none too": ((3, 0), torch.float32),
    }
    return {
        name: place(Layout.dense(shape, *strides), dtype)
        for name, (shape, dtype, *strides) in shapes.items()
    }


SIZES = {"g": HEADS, "d": DIM}
MODEL_RULES = [
    Rule("turned", "turned", "i o -> o i"),
    Rule("q", "qkv", "(g r d) e -> (g s d) e", at={"s": "0:r"}, **SIZES),
    Rule("k", "qkv", "(g d) e -> (g s d) e", at={"s": GROUP}, **SIZES),
    Rule("v", "qkv", "(g d) e -> (g s d) e", at={"s": GROUP + 1}, **SIZES),
    Rule("gate_up", "gate", "(s o) i -> o i", at={"s": 0}),
    Rule("gate_up", "up", "(s o) i -> o i", at={"s": 1}),
    Rule("mixed", "mq", "(g s d) e -> (g r d) e", at={"s": "0:r"}, r=GROUP, **SIZES),
    Rule("mixed", "mk", "(g s d) e -> (g d) e", at={"s": GROUP}, s=GROUP + 2, **SIZES),
    Rule("mixed", "mv", "(g s d) e -> (g d) e", at={"s": GROUP + 1}, s=GROUP + 2, **SIZES),
    Rule("experts", "x.0", "x a b -> a b", at={"x": 0}),
    Rule("experts", "x.1", "x a b -> b a", at={"x": 1}),
    Rule("experts", "x.2", "x a b -> a b", at={"x": 2}),
    Rule("e.{e}", "stack", "i o -> o e i"),
    Rule("tall", "tall", rows="overlap", fill={"normal": 0.5, "seed": 3}),
    Rule("kv", "wide", "(n d) e -> (n r d) e", at={"r": "*"}, n=2),
]


def sharded(tensors: dict[str, Tensor], folder: Path) -> Path:
    """Three files and an index."""
    parts = {f"part-{k}.safetensors": list(tensors)[k::3] for k in range(3)}
    for file, names in parts.items():
        save_file({n: tensors[n].contiguous() for n in names}, folder / file)
    where = {n: file for file, names in parts.items() for n in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def stored(tensors: dict[str, Tensor], kind: str, folder: Path) -> Path:
    if kind == "sharded":
        return sharded(tensors, folder)
    path = folder / {"safetensors": "m.safetensors"}.get(kind, "m.pt")
    if kind == "safetensors":
        save_file({n: t.contiguous() for n, t in tensors.items()}, path)
    elif kind == "pt":
        torch.save(tensors, path)
    else:  # a checkpoint of strided views, two in one storage
        odd: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            order = tuple(reversed(range(tensor.dim())))
            odd[name] = tensor.permute(order).contiguous().permute(order)
        both = torch.cat([tensors["e.0"], tensors["e.1"]], dim=1)
        odd["e.0"], odd["e.1"] = both.split(30, dim=1)
        torch.save(odd, path)
    return path


class Reads:
    """What was asked of files: how often each byte, and how much."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ranges: list[tuple[str, int, int]] = []
        before = StoredFile.read_many

        def read_many(file: StoredFile, ranges: Iterable[tuple[int, Tensor]]) -> None:
            ranges = list(ranges)
            self.ranges += [(file.path.name, o, o + len(out)) for o, out in ranges]
            before(file, ranges)

        patch.setattr(StoredFile, "read_many", read_many)

    def counts(self) -> list[Tensor]:
        """For each file how often each byte was read."""
        ends = max((end for _, _, end in self.ranges), default=0)
        count = {name: torch.zeros(ends, dtype=torch.int32) for name, _, _ in self.ranges}
        for name, begin, end in self.ranges:
            count[name][begin:end] += 1
        return list(count.values())


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


# The same bits.


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """Written from memory, by torch's own copies."""
    out = model()
    with paramkit.backend.force("native"):
        paramkit.transplant(out, source(), MODEL_RULES)
    return out


@pytest.mark.parametrize("staging", [STAGING, 5000, 9999, 65536, None])
@pytest.mark.parametrize("kind", ["safetensors", "pt", "strided pt", "sharded"])
def test_the_same_bits_as_from_memory(
    kind: str, staging: int | None, tmp_path: Path, expected: dict[str, Tensor]
) -> None:
    path, destinations = stored(source(), kind, tmp_path), model()
    plan = paramkit.plan(destinations, path, MODEL_RULES, staging=staging)
    seen = watch(*destinations.values())
    seen.assert_unwritten()
    plan.apply()
    for name, tensor in destinations.items():
        assert_same_storage(tensor, expected[name], name)  # guard bytes included
    assert plan.verify() == []
    for tensor in destinations.values():
        tensor.zero_()
    plan.apply()
    for name, tensor in destinations.items():
        assert_same_bits(tensor, expected[name], what=name)
    seen.assert_only_inside()


@pytest.mark.usefixtures("backend")
def test_on_every_backend(tmp_path: Path, expected: dict[str, Tensor]) -> None:
    path, destinations = stored(source(), "safetensors", tmp_path), model()
    paramkit.transplant(destinations, path, MODEL_RULES, staging=6000)
    for name, tensor in destinations.items():
        assert_same_storage(tensor, expected[name], name)


def test_mapped_files_give_the_same(tmp_path: Path, expected: dict[str, Tensor]) -> None:
    path, destinations = stored(source(), "safetensors", tmp_path), model()
    paramkit.transplant(destinations, path, MODEL_RULES, mmap=True)
    for name, tensor in destinations.items():
        assert_same_storage(tensor, expected[name], name)


def test_a_file_of_empty_tensors(tmp_path: Path) -> None:
    path = stored({"a": torch.empty(0, 3), "b": torch.empty(2, 0)}, "safetensors", tmp_path)
    destinations = {"a": torch.empty(3, 0), "b": torch.empty(2, 0)}
    plan = paramkit.plan(destinations, path, [Rule("a", "a", "i o -> o i")], staging=STAGING)
    assert plan.apply().summary.elements == 0
    assert plan.verify() == []


def test_widest_elements_into_the_least_staging(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    value = torch.randn(700, 3, dtype=torch.complex128)
    torch.save({"z": value}, path)
    destination = place(Layout.dense((3, 700)), torch.complex128)
    seen = watch(destination)
    paramkit.transplant({"z": destination}, path, [Rule("z", "z", "i o -> o i")], staging=STAGING)
    assert_same_bits(destination, value.t())
    seen.assert_only_inside()


# What is read, and into how much memory.


def streamed(plan: paramkit.Plan) -> Streamed:
    compiled = plan._compiled
    assert isinstance(compiled, Streamed)
    return compiled


@pytest.mark.parametrize("kind", ["safetensors", "pt", "sharded"])
@pytest.mark.parametrize("staging", [STAGING, 20_000, None])
def test_every_byte_is_read_once(
    kind: str, staging: int | None, tmp_path: Path, reads: Reads
) -> None:
    plan = paramkit.plan(model(), stored(source(), kind, tmp_path), MODEL_RULES, staging=staging)
    assert reads.ranges == []
    plan.apply()
    assert max(int(count.max()) for count in reads.counts()) == 1
    distinct = sum(int(count.sum()) for count in reads.counts())
    # A little between tensors may be read along.
    assert 0 <= distinct - sum(t.nbytes for t in source().values()) <= 64 * len(source())


def test_a_narrow_part_of_a_large_tensor_is_not_read_whole(tmp_path: Path, reads: Reads) -> None:
    path = stored({"w": random_bits((512, 1024))}, "safetensors", tmp_path)
    destinations = {"w": torch.zeros(128, 1024)}
    rules = [
        Rule("w", "w", "(s o) i -> o i", at={"s": 1}, s=4),
        Rule("w", None, "(s o) i ->", at={"s": 0}, s=4),
        Rule("w", None, "(s o) i ->", at={"s": "2:4"}, s=4),
    ]
    paramkit.transplant(destinations, path, rules)
    assert sum(end - begin for _, begin, end in reads.ranges) == 128 * 1024 * 4


@pytest.mark.parametrize("staging", [4096, 4100, 5000, 8191, 65536, 1 << 20])
def test_the_staging_bound_is_kept(staging: int, tmp_path: Path) -> None:
    plan = paramkit.plan(
        model(), stored(source(), "safetensors", tmp_path), MODEL_RULES, staging=staging
    )
    compiled = streamed(plan)
    assert compiled._staging.untyped_storage().nbytes() <= staging
    for step in compiled.steps:
        for read in step.reads:
            assert read.at >= 0
            assert step.half + read.at + read.end - read.begin <= compiled._staging.numel()
    halves = {step.half for step in compiled.steps if step.reads}
    if staging <= 65536:
        assert len(halves) == 2  # one is read while the other is written from
    assert compiled._staging.data_ptr() % 64 == 0


def test_small_files_need_no_more_staging_than_they_have_bytes(tmp_path: Path) -> None:
    path = stored({"a": torch.rand(10)}, "safetensors", tmp_path)
    plan = paramkit.plan({"a": torch.zeros(10)}, path)
    assert streamed(plan)._staging.untyped_storage().nbytes() <= 64 + 64


def test_staging_is_checked() -> None:
    for wrong, error in ((4095, ValueError), (-1, ValueError), (1e6, TypeError), (True, TypeError)):
        with pytest.raises(error, match="staging"):
            paramkit.plan({}, {}, staging=wrong)  # type: ignore[arg-type]


def test_no_memory_for_staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored({"a": torch.rand(90, 70)}, "safetensors", tmp_path)
    real = torch.empty

    def refusing(size: Any, **options: Any) -> Tensor:
        if isinstance(size, int) and size > 1000:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(size, **options)

    monkeypatch.setattr(torch, "empty", refusing)
    with pytest.raises(MemoryError, match="Pass a smaller staging="):
        paramkit.plan({"a": torch.zeros(90, 70)}, path, staging=STAGING)


def test_a_destination_that_moves_while_a_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another thread, say: it is not written where it was."""
    path = stored({"a": torch.rand(90, 70)}, "safetensors", tmp_path)
    a = torch.zeros(70, 90)
    plan = paramkit.plan({"a": a}, path, [Rule("a", "a", "i o -> o i")], staging=STAGING)
    before, read_all = a.data, stream._read_all

    def moving(asked: Any) -> None:
        read_all(asked)
        a.data = torch.zeros(70, 90)

    monkeypatch.setattr(stream, "_read_all", moving)
    with pytest.raises(TornError, match="moved while the plan ran"):
        plan.apply()
    assert not before.any() and not a.any()


@pytest.mark.parametrize("kind", ["safetensors", "pt", "sharded"])
def test_planning_reads_headers_only(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ties and overflow too wait for `apply`."""
    path = stored(source() | {"tied": source()["plain"]}, kind, tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("data was read")

    with monkeypatch.context() as patch:
        patch.setattr(StoredFile, "read_many", refuse)
        patch.setattr(StoredFile, "read", refuse)
        patch.setattr(Stored, "read_into", refuse)
        plan = paramkit.plan(
            model(),
            path,
            [*MODEL_RULES, Rule("tied", "plain"), Rule("plain", "plain")],
            overflow="error",
        )
        plan.explain()
    plan.apply()
    assert plan.verify() == []


def test_explain_of_a_plan_from_a_file(tmp_path: Path) -> None:
    path = stored(source(), "safetensors", tmp_path)
    plan = paramkit.plan(model(), path, MODEL_RULES, staging=STAGING)
    text = plan.explain()
    for part in ("qkv", "i o -> o i", "bfloat16", "fill {'normal': 0.5, 'seed': 3}", "int8"):
        assert part in text
    plan.apply()
    assert plan.explain() == text


# Again, and from another file.


def two_files(folder: Path) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    for k in range(2):
        values = {"w": random_bits((70, 90), seed=k), "b": random_bits((3000,), seed=k + 10)}
        path = folder / f"{k}.safetensors"
        save_file(values, path)
        yield path, values


def test_apply_another_file(tmp_path: Path) -> None:
    (first, _), (second, values) = two_files(tmp_path)
    destinations = {
        "w": place(Layout.dense((90, 70)), torch.float32),
        "b": place(Layout.dense((3000,)), torch.float32),
    }
    plan = paramkit.plan(destinations, first, [Rule("w", "w", "i o -> o i")], staging=STAGING)
    seen = watch(*destinations.values())
    plan.apply()
    plan.apply(second)
    assert_same_bits(destinations["w"], values["w"].t())
    assert_same_bits(destinations["b"], values["b"])
    assert plan.verify() == []
    assert plan.verify(first) == ["w", "b"]  # which is the source in use from now on
    plan.apply(values)  # from memory, by the same plan
    assert plan.verify(second) == []
    destinations["b"][2999] += 1
    assert plan.verify() == ["b"]
    seen.assert_only_inside()


def test_another_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    (first, values), _ = two_files(tmp_path)
    destinations = {name: torch.zeros_like(t) for name, t in values.items()}
    plan = paramkit.plan(destinations, first, staging=STAGING)
    third = tmp_path / "third.safetensors"
    save_file({"w": values["w"].t().contiguous(), "b": values["b"].double()}, third)
    with nothing_written(*destinations.values()), pytest.raises(PlanError) as caught:
        plan.apply(third)
    assert {(f.name, f.kind) for f in caught.value.findings} == {("w", "shape"), ("b", "dtype")}
    plan.apply()
    assert_same_bits(destinations["w"], values["w"])


def test_a_file_and_memory_in_one_source(tmp_path: Path) -> None:
    """A mapping may hold lazy tensors beside others."""
    (path, values), _ = two_files(tmp_path)
    mixed = {"w": paramkit.open_source(path, mmap=False)["w"], "b": values["b"]}
    destinations = {name: torch.zeros_like(t) for name, t in values.items()}
    paramkit.transplant(destinations, mixed, staging=STAGING)
    for name, tensor in destinations.items():
        assert_same_bits(tensor, values[name])


# Files that change.


def test_a_file_that_is_not_what_it_was(tmp_path: Path) -> None:
    (path, values), (second, _) = two_files(tmp_path)
    other = tmp_path / "other.safetensors"

    def cut() -> None:
        os.truncate(path, path.stat().st_size - 1)

    def touched() -> None:
        os.utime(path, ns=(1, 1))

    def replaced() -> None:
        other.replace(path)

    for change, said in ((touched, "written to"), (cut, "bytes"), (replaced, "another file")):
        save_file(values, path)
        other.write_bytes(second.read_bytes())
        destinations = {name: torch.zeros_like(t) for name, t in values.items()}
        plan = paramkit.plan(destinations, path, staging=STAGING)
        change()
        for call in (plan.apply, plan.verify, lambda plan=plan: plan.apply(atomic=True)):
            with nothing_written(*destinations.values()), pytest.raises(SourceError) as caught:
                call()
            assert said in str(caught.value)
            assert str(path) in str(caught.value)
        plan.refresh(second)  # what is in order can take its place
        plan.apply()


def test_a_file_that_is_deleted_can_still_be_read(tmp_path: Path) -> None:
    (path, values), _ = two_files(tmp_path)
    destinations = {name: torch.zeros_like(t) for name, t in values.items()}
    plan = paramkit.plan(destinations, path, staging=STAGING)
    path.unlink()
    plan.apply()
    assert_same_bits(destinations["w"], values["w"])


def test_a_file_cut_while_it_is_read_is_no_sigbus(tmp_path: Path) -> None:
    """In a process of its own, which would be killed."""
    (path, _), _ = two_files(tmp_path)
    program = f"""
import os, torch, paramkit
model = torch.nn.Module()
model.w = torch.nn.Parameter(torch.zeros(70, 90))
model.b = torch.nn.Parameter(torch.zeros(3000))
def cut(done, total):
    os.truncate({str(path)!r}, 5000)
for atomic in (True, False):
    data = open({str(path)!r}, "rb").read() if atomic else data
    open({str(path)!r}, "wb").write(data)
    try:
        paramkit.transplant(model, {str(path)!r}, staging=4096, progress=cut, atomic=atomic)
    except paramkit.PlanError as error:
        print(type(error).__name__, "truncated" in str(error), any(p.any() for p in model.parameters()),
              paramkit.torn(model) is not None)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "SourceError True False False",
        "TornError True True True",
    ]


def test_a_file_written_to_while_it_is_read(tmp_path: Path) -> None:
    """Noticed at the end: none of what came from it can be trusted."""
    (path, values), _ = two_files(tmp_path)
    model = torch.nn.Module()
    for name, tensor in values.items():
        model.register_parameter(name, torch.nn.Parameter(torch.zeros_like(tensor)))

    def rewrite(done: int, total: int) -> None:
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(bytes(4))
        os.utime(path, ns=(5, 5))

    with pytest.raises(paramkit.TornError, match="written to") as caught:
        paramkit.transplant(model, path, staging=STAGING, progress=rewrite)
    assert caught.value.state is not None
    assert caught.value.state.written == ()
    assert set(caught.value.state.unwritten) == {"w", "b"}
    assert paramkit.torn(model) is not None


# At random.


@pytest.mark.parametrize("seed", range(12))
def test_random_layouts_on_both_sides(seed: int, tmp_path: Path) -> None:
    """Strided views in a checkpoint, strided destinations, a second source for the same elements."""
    rng = random.Random(seed)
    rules, names = [], "abcd"
    destinations, twins, checkpoint = {}, {}, {}
    for k in range(6):
        shape = tuple(rng.randint(1, 14) for _ in range(rng.randint(1, 4)))
        order = list(range(len(shape)))
        rng.shuffle(order)
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.float64, torch.int16])
        name, layout = str(k), random_layout(rng, [shape[a] for a in order])
        destinations[name], twins[name] = place(layout, dtype), place(layout, dtype)
        for source in (name, f"again {name}"):
            checkpoint[source] = place(random_layout(rng, shape), dtype)
            checkpoint[source].copy_(random_bits(shape, dtype, seed=100 * seed + k))
            sides = (" ".join(names[a] for a in axes) for axes in (range(len(shape)), order))
            rules.append(Rule(source, name, " -> ".join(sides)))
    path = tmp_path / "m.pt"
    torch.save(checkpoint, path)
    paramkit.transplant(twins, checkpoint, rules)
    plan = paramkit.plan(destinations, path, rules, staging=rng.choice([4096, 5003, 20_000]))
    plan.apply()
    for name, tensor in destinations.items():
        assert_same_storage(tensor, twins[name], name)
    assert plan.verify() == []

    wrong = str(rng.randrange(6))
    changed = checkpoint[f"again {wrong}"]
    index = tuple(rng.randrange(n) for n in changed.shape)
    changed[index] += 64
    torch.save(checkpoint, tmp_path / "other.pt")
    with nothing_written(*destinations.values()), pytest.raises(PlanError) as caught:
        plan.apply(tmp_path / "other.pt")
    assert [(f.name, f.kind) for f in caught.value.findings] == [(wrong, "conflict")]


class Seen(TorchDispatchMode):
    """Counts the copies that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.copies += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


def rows(tmp_path: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], Path, dict[str, Tensor]]:
    """Destinations between guard bytes, a file of tensors of theirs, larger together than the staging, and those."""
    tensors = {f"w.{k}": random_bits((3, 500 + k), seed=k) for k in range(6)}
    save_file(tensors, tmp_path / "rows.safetensors")
    dsts = {n: place(Layout.dense(tuple(t.shape)), dtype) for n, t in tensors.items()}
    return dsts, tmp_path / "rows.safetensors", tensors


@pytest.mark.usefixtures("backend")
def test_rows_of_one_dtype_are_read_straight_to_where_they_belong(tmp_path: Path) -> None:
    dsts, path, tensors = rows(tmp_path, torch.float32)
    plan = paramkit.plan(dsts, path, staging=STAGING)
    steps = plan._compiled.steps
    # The first step goes through staging, so that a file that cannot be read is told before a write.
    assert len(steps) > 3 and steps[0].straight is None
    assert all(step.straight is not None for step in steps[1:])
    versions = [t._version for t in dsts.values()]
    outside = watch(*dsts.values())
    with paramkit.backend.trace() as trace:
        plan.apply()
    outside.assert_only_inside()
    assert sum(trace.routes.values()) == len(steps[0].write_of)  # no kernel wrote the others
    for (name, dst), before in zip(dsts.items(), versions, strict=True):
        assert_same_bits(dst, tensors[name])
        assert dst._version > before
    assert plan.verify() == []
    dsts["w.5"][2, -1] += 1
    assert plan.verify() == ["w.5"]


@pytest.mark.usefixtures("backend")
def test_what_has_to_be_rearranged_or_seen_is_not_read_straight(tmp_path: Path) -> None:
    dsts, path, tensors = rows(tmp_path, torch.bfloat16)
    plan = paramkit.plan(dsts, path, staging=STAGING)
    assert all(step.straight is None for step in plan._compiled.steps)
    dsts = {
        n: place(Layout.dense(tuple(t.shape)[::-1]), torch.float32).T for n, t in tensors.items()
    }
    plan = paramkit.plan(dsts, path, staging=STAGING)
    assert all(step.straight is None for step in plan._compiled.steps)
    # Under a mode every write is an operation that it sees.
    dsts, path, tensors = rows(tmp_path, torch.float32)
    plan = paramkit.plan(dsts, path, staging=STAGING)
    with Seen() as seen:
        plan.apply()
    assert seen.copies == sum(len(step.write_of) for step in plan._compiled.steps)
    for name, dst in dsts.items():
        assert_same_bits(dst, tensors[name])
