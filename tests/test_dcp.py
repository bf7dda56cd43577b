"""Checkpoints of torch.distributed.checkpoint as sources: bit by bit what torch's own loading gives."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import paramkit
from paramkit import PlanError, Rule, SourceError, open_source
from paramkit.cli import main
from paramkit.sources.dcp import Chunk, Chunked, is_checkpoint

MODEL = [Rule("model.{*p}", "{*p}"), Rule("optim.{*p}", None)]


def save(state: dict[str, Any], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no process group: just so
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def torch_loads(folder: Path) -> dict[str, Any]:
    """All of a checkpoint by torch's own means, nested as it was saved."""
    out = folder.parent / f"{folder.name}.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder, out)
    loaded: dict[str, Any] = torch.load(out, weights_only=False)
    return loaded


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same(got: Tensor, expected: Tensor, name: str = "") -> None:
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
    assert torch.equal(bits(got), bits(expected)), name


def refused(source: Any, findings: int = 1) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(source)
    assert len(caught.value.findings) == findings, str(caught.value)
    return str(caught.value)


class Loads(Counter[Any]):
    """How often DCP's reader was asked for each chunk, (name, offsets), and how often at all."""

    calls = 0

    def once(self, chunks: int) -> None:
        """So many chunks were loaded, each once. Counts from here on anew."""
        assert set(self.values()) == {1}, self
        assert len(self) == chunks, self
        self.clear()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loads]:
    seen = Loads()
    real = FileSystemReader.read_data

    def read_data(self: Any, plan: Any, planner: Any) -> Any:
        seen.update((i.storage_index.fqn, tuple(i.storage_index.offset)) for i in plan.items)
        seen.calls += 1
        return real(self, plan, planner)

    monkeypatch.setattr(FileSystemReader, "read_data", read_data)
    yield seen


# ---- plain tensors, one process ------------------------------------------------------------------


def everything() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "f32": torch.randn(5, 7),
        "bf16": torch.randn(4, 3).bfloat16(),
        "f16": torch.randn(3).half(),
        "fp8": torch.randn(6, 2).to(torch.float8_e4m3fn),
        "e5m2": torch.randn(6).to(torch.float8_e5m2),
        "f64": torch.randn(2, 2, dtype=torch.float64),
        "i64": torch.arange(6).view(2, 3),
        "u8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "c64": torch.randn(2, 3, dtype=torch.complex64),
        "scalar": torch.tensor(7),
        "nan": torch.tensor([0x7FC00001, 0x7F800001, -(1 << 31)], dtype=torch.int32).view(
            torch.float32
        ),
        "empty": torch.empty(0, 3),
        "transposed": torch.randn(4, 6).t(),
        "gaps": torch.randn(4, 6)[:, ::2],
        "channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.randn(1, 3).expand(4, 3),
        "slice": torch.randn(100)[10:20],
    }


@pytest.mark.parametrize("mmap", [False, True])
def test_every_dtype_and_layout(tmp_path: Path, mmap: bool) -> None:
    state = everything()
    folder = save(dict(state), tmp_path / "ck")
    opened: dict[str, Any] = open_source(folder, mmap=mmap)
    assert opened.keys() == state.keys()
    for name, tensor in state.items():
        assert type(opened[name]) is Chunk
        assert_same(opened[name].load(), tensor, name)
    targets = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in state.items()}
    paramkit.transplant(targets, str(folder))
    theirs = torch_loads(folder)
    for name, tensor in targets.items():
        assert_same(tensor, theirs[name], name)


def test_names_are_joined_and_what_is_no_tensor_is_left_out(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optim = torch.optim.Adam(model.parameters())
    model(torch.ones(4)).sum().backward()
    optim.step()
    state = {"model": model.state_dict(), "optim": optim.state_dict(), "step": 3}
    folder = save({**state, "l": [torch.ones(2), None]}, tmp_path / "ck")
    opened: dict[str, Any] = open_source(folder)
    names = {f"model.{name}" for name in model.state_dict()} | {"l.0"}
    names |= {f"optim.state.{i}.{k}" for i in range(4) for k in ("step", "exp_avg", "exp_avg_sq")}
    assert opened.keys() == names
    assert {"step", "optim.param_groups.0.lr", "l.1"} <= set(opened["l.0"].file.others)

    fresh = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    before = [p.detach().clone() for p in fresh.parameters()]
    with pytest.raises(PlanError) as caught:
        paramkit.transplant(fresh, folder, MODEL)
    assert [f.name for f in caught.value.findings] == ["l.0"]
    assert all(torch.equal(a, b) for a, b in zip(before, fresh.parameters(), strict=True))
    report = paramkit.transplant(fresh, folder, [*MODEL, Rule("l.{i}", None)])
    assert len(report.summary.dropped) == 13
    for name, tensor in fresh.state_dict().items():
        assert_same(tensor, model.state_dict()[name], name)


def test_missing_and_unexpected_names(tmp_path: Path) -> None:
    folder = save({"a": torch.ones(2), "wieght": torch.ones(3)}, tmp_path / "ck")
    target = {"a": torch.zeros(2), "weight": torch.zeros(3)}
    with pytest.raises(PlanError) as caught:
        paramkit.transplant(target, folder)
    found = {(f.name, f.kind) for f in caught.value.findings}
    assert found == {("weight", "missing"), ("wieght", "unexpected")}
    assert not target["a"].any()


def test_rules_that_rename_split_and_permute(tmp_path: Path, loads: Loads) -> None:
    torch.manual_seed(1)
    qkv, up = torch.randn(2 * 3 * 4, 8), torch.randn(8, 6)
    folder = save({"model": {"h": [{"qkv": qkv, "up": up}]}}, tmp_path / "ck")
    rules = [
        Rule("model.h.{i}.up", "layers.{i}.up", "a b -> b a"),
        *(
            Rule(
                "model.h.{i}.qkv",
                f"layers.{{i}}.{n}",
                "(h t d) e -> (h d) e",
                at={"t": t},
                t=3,
                h=2,
            )
            for t, n in enumerate("qkv")
        ),
    ]
    target = {"layers.0.up": torch.zeros(6, 8)}
    target |= {f"layers.0.{n}": torch.zeros(8, 8, dtype=torch.float64) for n in "qkv"}
    paramkit.plan(target, folder, rules, casting="safe").apply()
    loads.once(2)
    assert_same(target["layers.0.up"], up.t())
    for t, n in enumerate("qkv"):
        assert_same(target[f"layers.0.{n}"], qkv.view(2, 3, 4, 8)[:, t].reshape(8, 8).double(), n)


def test_one_call_reads_what_fits_together(tmp_path: Path, loads: Loads) -> None:
    state = {f"w.{i}": torch.randn(50) for i in range(20)}
    folder = save(dict(state), tmp_path / "ck")
    target = {name: torch.zeros(50) for name in state}
    paramkit.transplant(target, folder)
    loads.once(20)
    assert loads.calls == 1


@pytest.mark.parametrize("staging", [4096, 10_000, 1 << 20])
@pytest.mark.parametrize("pattern", [None, "a b -> b a"])
def test_a_chunk_larger_than_the_staging_is_loaded_once(
    tmp_path: Path, loads: Loads, staging: int, pattern: str | None
) -> None:
    state = {f"w.{i}": torch.randn(60, 70) for i in range(3)} | {"w.b": torch.randn(5, 4)}
    folder = save(dict(state), tmp_path / "ck")
    turned = {n: t.t() if pattern else t for n, t in state.items()}
    target = {name: torch.zeros(t.shape) for name, t in turned.items()}
    opened: dict[str, Any] = open_source(folder)
    plan = paramkit.plan(target, opened, [Rule("w.{i}", "w.{i}", pattern)], staging=staging)
    assert not loads
    for turn in range(2):
        plan.apply()
        loads.once(4)
        for name, tensor in target.items():
            assert_same(tensor, turned[name], f"{name} {turn}")
            tensor.zero_()
    assert plan.verify() == list(state)
    loads.once(4)
    assert not opened["w.0"].file._held


def test_modes_of_the_caller_do_not_matter(tmp_path: Path, loads: Loads) -> None:
    state = {f"w.{i}": torch.randn(60, 70) for i in range(4)} | {"b": torch.randn(3)}
    folder = save(dict(state), tmp_path / "ck")
    target = {name: torch.zeros(t.shape) for name, t in state.items()}
    with torch.inference_mode():
        plan = paramkit.plan(target, folder, staging=5000)
        plan.apply()
    loads.once(5)
    for name, tensor in target.items():
        assert_same(tensor, state[name], name)
        tensor.zero_()
    plan.apply()
    with torch.device("meta"):
        opened: dict[str, Any] = open_source(folder)
        out = torch.zeros(60 * 70 * 4, dtype=torch.uint8, device="cpu")
        opened["w.1"].read_into(0, 8, out[:8])
        opened["w.1"].read_into(8, len(out), out[8:])
        assert_same(opened["w.2"].read_view((3, 2), (70, 1), 71), state["w.2"][1:4, 1:3])
    assert torch.equal(out, bits(state["w.1"]))
    for name, tensor in target.items():
        assert_same(tensor, state[name], name)
        assert not tensor.is_inference()


def test_what_is_read_in_part_is_let_go(tmp_path: Path, loads: Loads) -> None:
    state = {f"w.{i}": torch.randn(60, 70) for i in range(4)}
    folder = save(dict(state), tmp_path / "ck")
    opened: dict[str, Any] = open_source(folder)
    checkpoint = opened["w.0"].file
    out = torch.empty(8, dtype=torch.uint8)
    for name in state:
        for begin in (0, 80, 8):
            opened[name].read_into(begin, begin + 8, out)
            assert torch.equal(out, bits(state[name])[begin : begin + 8])
        assert [key.fqn for key in checkpoint._held] == [name]  # that of one tensor at a time
    loads.once(4)
    checkpoint.check()
    assert not checkpoint._held
    # A part of every tensor is wanted: nothing is left behind.
    target = {f"w.{i}": torch.zeros(3, 70) for i in range(4)}
    rules = [Rule("w.{i}", "w.{i}", "(k r) c -> r c", at={"k": 1}, k=20)]
    rules += [
        Rule("w.{i}", None, "(k r) c ->", at={"k": f"{a}:{b}"}, k=20) for a, b in ((0, 1), (2, 20))
    ]
    paramkit.transplant(target, opened, rules)
    loads.once(4)
    assert not checkpoint._held
    for name, tensor in target.items():
        assert_same(tensor, state[name][3:6], name)


def test_threads_read_side_by_side(tmp_path: Path, loads: Loads) -> None:
    state = {f"w.{i}": torch.randn(100, 100) for i in range(8)}
    folder = save(dict(state), tmp_path / "ck")
    opened: dict[str, Any] = open_source(folder)
    wrong: list[str] = []

    def read(name: str) -> None:
        flat = bits(state[name])
        for begin in range(0, len(flat), 1000):
            out = torch.empty(1000, dtype=torch.uint8)
            opened[name].read_into(begin, begin + 1000, out)
            if not torch.equal(out, flat[begin : begin + 1000]):
                wrong.append(name)

    threads = [threading.Thread(target=read, args=(name,)) for name in state]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    loads.once(8)
    assert not opened["w.0"].file._held


def test_fingerprints_are_those_of_the_tensors(tmp_path: Path, loads: Loads) -> None:
    state = {f"w.{i}": torch.randn(300, 400 + i) for i in range(5)}
    folder = save(dict(state), tmp_path / "ck")
    assert paramkit.fingerprint(folder) == paramkit.fingerprint(state)
    loads.once(5)


# ---- readers -------------------------------------------------------------------------------------


def test_a_reader_is_a_source(tmp_path: Path) -> None:
    state = {"w": torch.randn(4, 3)}
    folder = save(dict(state), tmp_path / "ck")
    target = {"w": torch.zeros(4, 3)}
    paramkit.transplant(target, FileSystemReader(folder))
    assert_same(target["w"], state["w"])
    assert str(tmp_path / "none") in refused(FileSystemReader(tmp_path / "none"))


def test_a_reader_of_safetensors(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    state = {"w": torch.randn(4, 3).bfloat16(), "b": torch.randn(3)}
    save_file(state, tmp_path / "model.safetensors")
    target = {"w": torch.zeros(4, 3).bfloat16(), "b": torch.zeros(3)}
    paramkit.transplant(target, HuggingFaceStorageReader(str(tmp_path)))
    for name, tensor in state.items():
        assert_same(target[name], tensor, name)


def test_a_reader_of_another_storage(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        TensorProperties,
        TensorStorageMetadata,
    )
    from torch.distributed.checkpoint.storage import StorageReader
    from torch.futures import Future

    whole = torch.arange(12.0).view(4, 3)

    class InMemory(StorageReader):
        broken = False

        def reset(self, checkpoint_id: Any = None) -> None: ...

        def read_metadata(self, *args: Any, **options: Any) -> Metadata:
            chunks = [ChunkStorageMetadata(torch.Size([k, 0]), torch.Size([2, 3])) for k in (0, 2)]
            entry = TensorStorageMetadata(
                TensorProperties(dtype=torch.float32), torch.Size([4, 3]), chunks
            )
            return Metadata({"w": entry})

        def set_up_storage_reader(
            self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any
        ) -> None: ...

        def prepare_local_plan(self, plan: Any) -> Any:
            return plan

        def prepare_global_plan(self, plans: Any) -> Any:
            return plans

        def read_data(self, plan: Any, planner: Any) -> Future[None]:
            for item in plan.items if not self.broken else []:
                start = item.storage_index.offset[0]
                into = planner.resolve_tensor(item)
                into.copy_(whole[start : start + 2])
                planner.commit_tensor(item, into)
            done: Future[None] = Future()
            done.set_result(None)
            return done

        @classmethod
        def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
            return True

    reader = InMemory()
    target = {"w": torch.zeros(4, 3)}
    paramkit.transplant(target, reader)
    assert_same(target["w"], whole)
    reader.broken = True
    target["w"].zero_()
    with pytest.raises(SourceError, match="not there"):
        paramkit.transplant(target, reader)
    assert not target["w"].any()


def test_nothing_of_it_is_imported_before_it_is_needed() -> None:
    code = "import paramkit, sys; paramkit.open_source({}); print('torch.distributed.checkpoint' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- what is wrong with a folder -----------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save({"w": torch.randn(40, 30), "b": torch.randn(30), "n": 3}, tmp_path / "ck")


def test_without_metadata(saved: Path) -> None:
    (saved / ".metadata").rename(saved / "__0.metadata")
    assert "use_collectives=False" in refused(saved)
    (saved / "__0.metadata").unlink()
    assert "without metadata" in refused(saved) and "cut off" in refused(saved)


@pytest.mark.parametrize("cut", [0, 1, 10, 200, -1])
def test_metadata_that_is_cut(saved: Path, cut: int) -> None:
    path = saved / ".metadata"
    path.write_bytes(path.read_bytes()[:cut])
    text = refused(saved)
    assert "metadata that cannot be read" in text and str(path) in text


def test_metadata_of_something_else(saved: Path) -> None:
    (saved / ".metadata").write_bytes(pickle.dumps({"w": 3}))
    assert "dict" in refused(saved)
    (saved / ".metadata").write_bytes(b"key: value\n")
    assert "metadata that cannot be read" in refused(saved)


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_metadata_runs_no_code(saved: Path, tmp_path: Path) -> None:
    metadata = FileSystemReader(saved).read_metadata()
    metadata.planner_data = Touches(tmp_path / "touched")
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    text = refused(saved)
    assert "posix.mkdir" in text and "FileSystemReader" in text
    assert not (tmp_path / "touched").exists()
    assert open_source(FileSystemReader(saved)).keys() == {"w", "b"}  # trusted by who passes it
    assert (tmp_path / "touched").exists()


def change(saved: Path, **changes: Any) -> None:
    """Change the description of `w`, or its place."""
    metadata = FileSystemReader(saved).read_metadata()
    entry = metadata.state_dict_metadata["w"]
    index = next(key for key in metadata.storage_data if key.fqn == "w")
    for key, value in changes.items():
        if key == "chunks":
            entry.chunks = [type(entry.chunks[0])(torch.Size(o), torch.Size(s)) for o, s in value]
        elif key in ("dtype", "layout"):
            setattr(entry.properties, key, value)
        elif key == "place":
            del metadata.storage_data[index]
        else:
            setattr(metadata.storage_data[index], key, value)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"chunks": []}, "chunks of 0 elements"),
        ({"chunks": [((0, 0), (39, 30))]}, "chunks of 1170 elements"),
        ({"chunks": [((1, 0), (40, 30))]}, "(40, 30) at (1, 0)"),
        ({"chunks": [((0,), (40,))]}, "(40,) at (0,)"),
        ({"place": None}, "no place in the metadata"),
        ({"relative_path": "../ck/__0_0.distcp"}, "out of the folder"),
        ({"relative_path": "/etc/hostname"}, "out of the folder"),
        ({"relative_path": "__9_9.distcp"}, "no such file"),
        ({"length": 1 << 40}, "which has"),
        ({"dtype": torch.quint8}, "quantized"),
        ({"layout": torch.sparse_coo}, "sparse"),
    ],
)
def test_metadata_that_does_not_fit(saved: Path, changes: dict[str, Any], text: str) -> None:
    change(saved, **changes)
    target = {"w": torch.zeros(40, 30), "b": torch.zeros(30)}
    assert text in refused(saved)
    with pytest.raises(SourceError):
        paramkit.transplant(target, saved)
    assert not target["b"].any()


def test_data_that_is_not_there(saved: Path) -> None:
    (data,) = saved.glob("*.distcp")
    raw = data.read_bytes()
    data.write_bytes(raw[: len(raw) - 10])
    assert "which has" in refused(saved)
    data.unlink()
    text = refused(saved)
    assert str(data) in text and "parts of 2 tensors" in text


def test_data_that_is_damaged(saved: Path) -> None:
    (data,) = saved.glob("*.distcp")
    data.write_bytes(bytes(data.stat().st_size))
    target = {"w": torch.zeros(40, 30), "b": torch.zeros(30)}
    plan = paramkit.plan(target, saved)  # only the metadata is read
    with pytest.raises(SourceError) as caught:
        plan.apply()
    assert data.name in str(caught.value)
    assert not target["w"].any() and not target["b"].any()


def test_data_that_changed_since(saved: Path) -> None:
    target = {"w": torch.zeros(40, 30), "b": torch.zeros(30)}
    plan = paramkit.plan(target, saved)
    (data,) = saved.glob("*.distcp")
    os.utime(data, (1, 1))
    with pytest.raises(SourceError, match="written to"):
        plan.apply()
    assert not target["b"].any()
    data.unlink()
    with pytest.raises(SourceError, match="gone"):
        plan.apply()


def test_which_folders_are_checkpoints(saved: Path, tmp_path: Path) -> None:
    assert is_checkpoint(saved)
    other = tmp_path / "other"
    other.mkdir()
    assert not is_checkpoint(other)
    (other / ".metadata").write_bytes(b"of some other tool")
    assert is_checkpoint(other)
    torch.save({"w": torch.ones(2)}, other / "model.pt")
    assert open_source(other).keys() == {"w"}
    (other / "__0_0.distcp").write_bytes(b"")
    assert is_checkpoint(other)


# ---- commands ------------------------------------------------------------------------------------


def test_inspect_and_diff(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(saved), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    (file,) = saved.glob("*.distcp")
    assert data["files"] == [{"path": str(file), "bytes": file.stat().st_size, "tensors": 2}]
    assert data["tensors"]["w"] == {"shape": [40, 30], "dtype": "float32", "bytes": 4800}
    assert [(o["kind"], o["names"]) for o in data["odd"]] == [("other", ["n"])]
    theirs = torch_loads(saved)
    other = save({"w": theirs["w"], "b": theirs["b"] + 1}, tmp_path / "other")
    assert main(["diff", str(saved), str(saved), "-q"]) == 0
    assert main(["diff", str(saved), str(other), "-q", "--json"]) == 1
    *_, out = capsys.readouterr().out.partition("\n")
    assert '"changed": 1' in out and '"equal": 1' in out


def test_from_folder_to_file(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    assert main(["transplant", str(saved), "-o", str(out), "-q"]) == 0
    theirs = torch_loads(saved)
    for name, tensor in open_source(out).items():
        assert_same(tensor, theirs[name], name)
    (data,) = saved.glob("*.distcp")
    assert main(["transplant", str(saved), "-o", str(data), "-q"]) != 0  # not over its own source


# ---- saved by several ranks ----------------------------------------------------------------------


def sharded() -> dict[str, tuple[Tensor, list[Any]]]:
    """name -> tensor, placements."""
    from torch.distributed.tensor import Replicate, Shard

    torch.manual_seed(3)
    return {
        "model.rows": (torch.randn(8, 6), [Shard(0)]),
        "model.uneven": (torch.randn(7, 5), [Shard(0)]),
        "model.columns": (torch.randn(6, 9).bfloat16(), [Shard(1)]),
        "model.qkv": (torch.randn(2 * 3 * 2, 4), [Shard(0)]),
        "model.one": (torch.randn(1, 4), [Shard(0)]),  # nothing on the second rank
        "model.bias": (torch.randn(5), [Replicate()]),
        "model.cube": (torch.randn(3, 4, 5), [Shard(2)]),
        "optim.exp": (torch.randn(8, 6), [Shard(0)]),
    }


def save_sharded(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    state: dict[str, Any] = {n: distribute_tensor(t, mesh, p) for n, (t, p) in sharded().items()}
    dcp.save({**state, "model.plain": torch.arange(4)}, checkpoint_id=folder)


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.ranks import run

    folder = tmp_path_factory.mktemp("ranks") / "ck"
    run(save_sharded, 2, str(folder))
    return folder


def test_shards_are_whole_tensors(by_ranks: Path, loads: Loads) -> None:
    opened: dict[str, Any] = open_source(by_ranks)
    expected = {name: tensor for name, (tensor, _) in sharded().items()}
    expected["model.plain"] = torch.arange(4)
    theirs = torch_loads(by_ranks)
    loads.clear()
    assert opened.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (tuple(opened[name].shape), opened[name].dtype) == (
            tuple(tensor.shape),
            tensor.dtype,
        )
        assert_same(opened[name].load(), tensor, name)
        assert_same(opened[name].load(), theirs[name], name)
    whole = {"model.one", "model.bias", "model.plain"}
    assert {name for name, t in opened.items() if type(t) is Chunk} == whole
    assert all(type(t) is Chunked for n, t in opened.items() if n not in whole)
    target = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in expected.items()}
    loads.clear()
    paramkit.transplant(target, by_ranks)
    loads.once(3 + 2 * (len(expected) - 3))
    for name, tensor in expected.items():
        assert_same(target[name], tensor, name)


@pytest.mark.parametrize("staging", [4096, 1 << 20])
def test_shards_through_rules(by_ranks: Path, loads: Loads, staging: int) -> None:
    source = {name.removeprefix("model."): tensor for name, (tensor, _) in sharded().items()}
    rules = [
        Rule("model.uneven", "turned", "a b -> b a"),
        Rule("model.columns", "halves.{h}", "a (h b) -> a b", h=3),
        *(
            Rule("model.qkv", n, "(h t d) e -> (h d) e", at={"t": t}, t=3, h=2)
            for t, n in enumerate("qkv")
        ),
        *(Rule(f"model.{n}", n) for n in ("rows", "one", "bias", "cube", "plain")),
        Rule("optim.{*p}", None),
    ]
    target = {
        "turned": torch.zeros(5, 7),
        **{f"halves.{k}": torch.zeros(6, 3) for k in range(3)},
        **{n: torch.zeros(4, 4) for n in "qkv"},
        **{n: torch.zeros(source[n].shape) for n in ("rows", "one", "bias", "cube")},
        "plain": torch.zeros(4, dtype=torch.int64),
    }
    paramkit.plan(target, by_ranks, rules, staging=staging).apply()
    loads.once(2 * 5 + 3)
    assert_same(target["turned"], source["uneven"].t())
    for k in range(3):
        assert_same(target[f"halves.{k}"], source["columns"][:, 3 * k : 3 * k + 3].float())
    for t, n in enumerate("qkv"):
        assert_same(target[n], source["qkv"].view(2, 3, 2, 4)[:, t].reshape(4, 4), n)
    for n in ("rows", "one", "bias", "cube"):
        assert_same(target[n], source[n], n)
    assert_same(target["plain"], torch.arange(4))


def test_shards_are_compared_and_hashed(by_ranks: Path, loads: Loads, tmp_path: Path) -> None:
    expected = {name: tensor for name, (tensor, _) in sharded().items()}
    expected["model.plain"] = torch.arange(4)
    chunks = 3 + 2 * (len(expected) - 3)
    assert paramkit.fingerprint(by_ranks) == paramkit.fingerprint(expected)
    loads.once(chunks)
    path = tmp_path / "whole.pt"
    torch.save(expected, path)
    assert main(["diff", str(path), str(by_ranks), "-q"]) == 0
    loads.once(chunks)
    assert main(["diff", str(by_ranks), str(path), "-q"]) == 0
    loads.once(chunks)


def test_a_lost_file_of_one_rank(by_ranks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ck"
    folder.mkdir()
    for path in by_ranks.iterdir():
        if not path.name.startswith("__1_"):
            (folder / path.name).write_bytes(path.read_bytes())
    text = refused(folder)
    assert "__1_0.distcp" in text and "no such file" in text
