"""Files as sources: what they give lazily and mapped, and a clear error for everything that is wrong."""

from __future__ import annotations

import gc
import json
import os
import signal
import struct
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from paramkit.errors import SourceError
from paramkit.sources import Lazy, Stored, StoredFile, open_source, reading

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a.bias": torch.arange(3, dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    return path


@pytest.fixture(params=[True, False], ids=["mmap", "pread"])
def mmap(request: pytest.FixtureRequest) -> bool:
    return request.param


def bits(tensor: Tensor | Lazy) -> Tensor:
    if isinstance(tensor, Lazy):
        tensor = tensor.load()
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same(opened: dict[str, Any], expected: dict[str, Tensor]) -> None:
    assert opened.keys() == expected.keys()
    for name, tensor in expected.items():
        assert opened[name].dtype == tensor.dtype, name
        assert opened[name].shape == tensor.shape, name
        assert torch.equal(bits(opened[name]), bits(tensor)), name


def refused(path: Any, mmap: bool = False, findings: int = 1) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(path, mmap=mmap)
    text = str(caught.value)
    if isinstance(path, Path):
        assert str(path) in text  # the file is named
    assert len(caught.value.findings) == findings, text
    return text


# ---- one safetensors file ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_file(saved: Path, kind: type, mmap: bool) -> None:
    opened = open_source(kind(saved), mmap=mmap)
    assert_same(opened, TENSORS)
    assert all(isinstance(t, Tensor if mmap else Stored) for t in opened.values())
    assert_same(open_source(kind(saved)), TENSORS)


def all_dtypes() -> list[torch.dtype]:
    from paramkit.sources.safetensors_file import DTYPES

    return list(DTYPES.values())


@pytest.mark.parametrize("dtype", all_dtypes(), ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype, mmap: bool) -> None:
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (24 * dtype.itemsize,))
    tensor = raw.to(torch.uint8).view(dtype).view(2, 3, 4)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    assert_same(open_source(tmp_path / "x.safetensors", mmap=mmap), {"x": tensor})


def test_only_the_header_is_read(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    opened = open_source(saved, mmap=False)
    with saved.open("r+b") as file:  # after opening, so what is read is read now
        file.seek(header_of(bytes(data)))
        file.write(b"\x11" * (len(data) - header_of(bytes(data))))
    assert set(bits(opened["a.bias"]).tolist()) == {0x11}


def test_a_range_of_a_tensor(saved: Path) -> None:
    tensor = open_source(saved, mmap=False)["a.weight"]
    assert isinstance(tensor, Stored)
    guarded = torch.full((28,), 0xAB, dtype=torch.uint8)
    tensor.read_into(6, 26, guarded[4:24])
    assert torch.equal(guarded[4:24], bits(TENSORS["a.weight"])[6:26])
    assert (guarded[:4] == 0xAB).all() and (guarded[24:] == 0xAB).all()
    for begin, end, out in [(40, 52, 12), (-1, 3, 4), (5, 4, 0), (0, 8, 4)]:
        with pytest.raises(ValueError, match=r"expected|not within"):
            tensor.read_into(begin, end, torch.empty(max(out, 0), dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"float32"):
        tensor.read_into(0, 4, torch.empty(4))


@pytest.mark.parametrize("padding", [52, 60, 316, 0x4B50])
def test_headers_whose_length_looks_like_something_else(tmp_path: Path, padding: int) -> None:
    # 60 is "<", as a web page begins; 0x4B50 is "PK", as a zip archive does.
    path = tmp_path / "m.safetensors"
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})
    header = header.replace(" ", "").ljust(padding)
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\x07")
    assert bits(open_source(path, mmap=False)["a"]).tolist() == [7]


def test_location_tells_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    one, again = open_source(saved, mmap=False), open_source(saved, mmap=False)
    (tmp_path / "link.safetensors").symlink_to(saved)
    linked = open_source(tmp_path / "link.safetensors", mmap=False)
    for name in TENSORS:
        assert one[name].location() == again[name].location() == linked[name].location()
    file = StoredFile(saved)
    views = [
        Stored(file, 80, (2, 3), torch.int8),
        Stored(file, 80, (3, 2), torch.int8),
        Stored(file, 80, (2, 3), torch.uint8),
        Stored(file, 81, (2, 3), torch.int8),
        Stored(file, 80, (2, 3), torch.int8, (1, 2)),
    ]
    assert len({v.location() for v in views}) == 5


# ---- what is wrong with one file -----------------------------------------------------------------


def test_missing_file(tmp_path: Path, saved: Path) -> None:
    assert "did you mean" in refused(tmp_path / "modle.safetensors")
    assert "has no such file" in refused(tmp_path / "zzzz.safetensors")
    assert "there is no folder" in refused(tmp_path / "no" / "model.safetensors")
    assert "did you mean" in refused(tmp_path / "model.safetensor")
    refused(f"{tmp_path}/a\0b.safetensors")
    refused(str(tmp_path / ("x" * 300)) + ".safetensors")


def test_no_regular_file(tmp_path: Path, mmap: bool) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "not a regular file" in refused(tmp_path / "pipe.safetensors", mmap)
    with pytest.raises(SourceError, match="no regular file"):
        StoredFile(tmp_path / "pipe.safetensors")
    with pytest.raises(SourceError, match="no regular file"):
        StoredFile(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.bin", "a checkpoint of torch.save"),
        ("m.pt", "a checkpoint of torch.save"),
        ("m.safetensors.index.json", "an index that cannot be read"),
        ("m.txt", "a .txt file"),
        ("m.json", "a .json file"),
        ("m", "without a suffix"),
    ],
)
def test_other_formats(tmp_path: Path, name: str, message: str, mmap: bool) -> None:
    (tmp_path / name).write_bytes(b"something")
    assert message in refused(tmp_path / name, mmap)


def header_of(data: bytes) -> int:
    return 8 + struct.unpack("<Q", data[:8])[0]


DAMAGE = {
    "zero bytes": (lambda d: b"", "an empty file (0 bytes)"),
    "a few bytes": (lambda d: d[:5], "5 bytes"),
    "cut in the header": (lambda d: d[: header_of(d) // 2], "truncated in the header"),
    "cut in the data": (lambda d: d[:-8], "tensors are cut off"),
    "cut after the header": (lambda d: d[: header_of(d)], "4 of 4 tensors are cut off"),
    "bytes too many": (lambda d: d + b"1234", "4 bytes too many"),
    "header no JSON": (lambda d: d[:8] + b"x" * (header_of(d) - 8) + d[header_of(d) :], "header that cannot be read"),
    "header length": (lambda d: struct.pack("<Q", 2**60) + d[8:], "announced in a file of"),
    "unknown dtype": (lambda d: d.replace(b'"F32"', b'"F99"'), "newer format"),
    "overlapping offsets": (lambda d: d.replace(b"[0,8]", b"[8,8]"), "corrupt"),
    "zip inside": (lambda d: b"PK\x03\x04\0\0\x08\x08" + d, "a pickled checkpoint"),
    "pickle inside": (lambda d: b"\x80\x02\x8a\x0al\xfc\x9c\x46" + d, "rename it to .pt"),
    "LFS pointer": (lambda d: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "web page": (lambda d: b"<!DOCTYPE html><html>not found</html>", "a web page"),
    "header is a list": (lambda d: struct.pack("<Q", 8) + json.dumps([1, 2]).encode().ljust(8), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(saved: Path, name: str, mmap: bool) -> None:
    damage, message = DAMAGE[name]
    data = saved.read_bytes()
    damaged = damage(data)
    assert damaged != data
    saved.write_bytes(damaged)
    assert message in refused(saved, mmap)


def test_every_truncation_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for length in range(len(data)):
        saved.write_bytes(data[:length])
        refused(saved)


# ---- reading -------------------------------------------------------------------------------------


@pytest.fixture
def big(tmp_path: Path) -> tuple[StoredFile, Tensor]:
    """A file of several blocks, and its bytes."""
    content = torch.randint(0, 256, (5 * reading.BLOCK + 12345,), dtype=torch.uint8)
    path = tmp_path / "big.bin"
    path.write_bytes(content.numpy().tobytes())
    return StoredFile(path), content


@pytest.mark.parametrize("helpers", [0, 1, 3])
def test_read_ranges_of_every_size(
    big: tuple[StoredFile, Tensor], helpers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_helpers", lambda: helpers)
    file, content = big
    for offset, length in [(0, 0), (0, 1), (5, reading.SPLIT - 1), (7, reading.SPLIT), (3, 3 * reading.BLOCK + 1),
                           (0, len(content))]:  # fmt: skip
        memory = torch.full((length + 32,), 0xAB, dtype=torch.uint8)
        file.read(offset, memory[16 : 16 + length])
        assert torch.equal(memory[16 : 16 + length], content[offset : offset + length])
        assert (memory[:16] == 0xAB).all() and (memory[16 + length :] == 0xAB).all()


@pytest.mark.parametrize("gap", [0, 1, reading.GAP, reading.GAP + 1])
@pytest.mark.parametrize("count", [1, 3, 1023, 1025, 3000])
def test_read_many(big: tuple[StoredFile, Tensor], gap: int, count: int) -> None:
    file, content = big
    size = 40
    count = min(count, (len(content) - size) // (size + gap))
    starts = [k * (size + gap) for k in range(count)]
    memory = torch.full((count, size + 16), 0xAB, dtype=torch.uint8)
    order = torch.randperm(count).tolist()
    file.read_many([(starts[k], memory[k, 8 : 8 + size]) for k in order])
    for k in range(count):
        assert torch.equal(memory[k, 8 : 8 + size], content[starts[k] : starts[k] + size])
    assert (memory[:, :8] == 0xAB).all() and (memory[:, 8 + size :] == 0xAB).all()


def test_read_many_with_ranges_that_overlap(big: tuple[StoredFile, Tensor]) -> None:
    file, content = big
    spans = [(0, 100), (50, 10), (50, 100), (0, 100), (99, 0), (150, 10)]
    outs = [torch.empty(n, dtype=torch.uint8) for _, n in spans]
    file.read_many([(at, out) for (at, _), out in zip(spans, outs)])
    for (at, n), out in zip(spans, outs):
        assert torch.equal(out, content[at : at + n])


def test_neighbours_in_memory_too_are_one_piece(
    big: tuple[StoredFile, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, content = big
    calls = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: calls.append(a) or real(*a))
    memory = torch.full((3000 * 40 + 20,), 0xAB, dtype=torch.uint8)
    file.read_many([(7 + 40 * k, memory[10 + 40 * k : 50 + 40 * k]) for k in range(3000)])
    assert [len(buffers) for _, buffers, _ in calls] == [1]
    assert torch.equal(memory[10:-10], content[7 : 7 + 3000 * 40])
    assert (memory[:10] == 0xAB).all() and (memory[-10:] == 0xAB).all()


def test_neighbours_are_read_by_one_call(
    big: tuple[StoredFile, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: calls.append(a) or real(*a))
    out = torch.empty(500, 100, dtype=torch.uint8)
    big[0].read_many([(164 * k, out[k]) for k in range(500)])
    assert len(calls) == 1


def test_partial_reads_are_continued(
    big: tuple[StoredFile, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, content = big
    real = os.preadv

    def some(fd: int, buffers: list[Any], offset: int) -> int:
        # A part of the first piece, or the first piece and a part of the second.
        views = [memoryview(b) for b in buffers[:2]]
        return real(fd, [*views[:-1], views[-1][: len(views[-1]) // 2 + 1]], offset)

    monkeypatch.setattr(os, "preadv", some)
    outs = [torch.empty(n, dtype=torch.uint8) for n in (1, 77, 1000, 3)]
    starts = (0, 1, 78, 1078)
    file.read_many(list(zip(starts, outs)))
    assert torch.equal(torch.cat(outs), content[:1081])


def test_truncated_while_reading_is_an_error(big: tuple[StoredFile, Tensor]) -> None:
    file, content = big
    out = torch.empty(len(content), dtype=torch.uint8)
    os.truncate(file.path, len(content) // 2)
    with pytest.raises(SourceError, match="truncated") as caught:
        file.read(0, out)
    assert str(file.path) in str(caught.value)
    with pytest.raises(SourceError, match="truncated"):
        file.read(len(content) - 10, out[:10])


@pytest.mark.parametrize("at", [0, 4])
def test_an_error_of_the_disk_is_an_error_of_the_source(
    big: tuple[StoredFile, Tensor], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, content = big
    real = os.preadv

    def failing(fd: int, buffers: list[Any], offset: int) -> int:
        if offset >= at * reading.BLOCK:
            raise OSError(5, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(SourceError, match=r"Input/output error.*check the disk"):
        file.read(0, torch.empty(len(content), dtype=torch.uint8))


def test_after_an_interrupt_nobody_writes_any_more(
    big: tuple[StoredFile, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, content = big
    monkeypatch.setattr(reading, "_helpers", lambda: 1)
    real, here = os.preadv, threading.get_ident()
    helping, interrupted = threading.Event(), threading.Event()

    def slow(fd: int, buffers: list[Any], offset: int) -> int:
        if threading.get_ident() == here:
            assert helping.wait(10)
            interrupted.set()
            raise KeyboardInterrupt
        helping.set()
        assert interrupted.wait(10)
        threading.Event().wait(0.05)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    out = torch.zeros(len(content), dtype=torch.uint8)
    with pytest.raises(KeyboardInterrupt):
        file.read(0, out)
    before = out.clone()
    threading.Event().wait(0.2)
    assert torch.equal(out, before)


def test_many_threads_read_one_file(big: tuple[StoredFile, Tensor]) -> None:
    file, content = big

    def read(seed: int) -> bool:
        offset = seed * 100_003 % (len(content) // 2)
        out = torch.empty(len(content) // 2, dtype=torch.uint8)
        file.read(offset, out)
        return torch.equal(out, content[offset : offset + len(out)])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(24)))


def test_reading_in_a_forked_child(big: tuple[StoredFile, Tensor]) -> None:
    file, content = big
    out = torch.empty(len(content), dtype=torch.uint8)
    file.read(0, out)  # the threads exist
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # if it waits for threads that are the parent's
        out.numpy()[:] = 0  # torch's own threads are the parent's too
        file.read(0, out)
        os._exit(0 if out.numpy().tobytes() == content.numpy().tobytes() else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    "out",
    [torch.empty(8), torch.empty(2, 4, dtype=torch.uint8), torch.empty(16, dtype=torch.uint8)[::2],
     torch.empty(8, dtype=torch.uint8, device="meta")],
)  # fmt: skip
def test_read_wants_plain_bytes(big: tuple[StoredFile, Tensor], out: Tensor) -> None:
    with pytest.raises(ValueError, match="expected a contiguous"):
        big[0].read(0, out)


def test_check_notices_every_change(saved: Path) -> None:
    data = saved.read_bytes()

    def opened() -> StoredFile:
        saved.write_bytes(data)
        file = StoredFile(saved)
        file.check()
        return file

    file = opened()
    os.truncate(saved, 10)
    with pytest.raises(SourceError, match="got 10 bytes"):
        file.check()
    file = opened()
    os.utime(saved, ns=(0, 1))
    with pytest.raises(SourceError, match="written to"):
        file.check()
    file = opened()
    (saved.parent / "new").write_bytes(data)
    (saved.parent / "new").replace(saved)
    with pytest.raises(SourceError, match="another file under this path"):
        file.check()
    file = opened()
    saved.unlink()
    file.check()  # still open, and what it was
    out = torch.empty(len(data), dtype=torch.uint8)
    file.read(0, out)
    assert out.numpy().tobytes() == data


def test_a_file_is_closed_with_its_last_tensor(saved: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    gc.collect()  # what other tests left open
    before = count()
    opened = open_source(saved, mmap=False)
    assert count() == before + 1
    last = opened["count"]
    del opened
    assert last.load().item() == 7
    del last
    assert count() == before


def test_a_refused_file_is_closed(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-1])
    gc.collect()  # what other tests left open
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    refused(saved)
    gc.collect()  # the error held the file, by its traceback
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


def test_too_many_open_files(saved: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        with pytest.raises(SourceError, match="ulimit -n"):
            for _ in range(64):
                held.append(open_source(saved, mmap=False))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- several files -------------------------------------------------------------------------------


def test_list_of_files(saved: Path, tmp_path: Path, mmap: bool) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"b": torch.ones(2)}, other)
    torch.save({"c": torch.ones(3)}, tmp_path / "c.pt")
    opened = open_source([saved, str(other), tmp_path / "c.pt"], mmap=mmap)
    assert_same(opened, {**TENSORS, "b": torch.ones(2), "c": torch.ones(3)})
    text = refused([saved, saved, tmp_path / "absent.safetensors"], mmap, findings=5)
    assert "count | conflict" in text and "no such file" in text


SHARDS = {
    "model-00001-of-00002": {"a": torch.ones(2), "b": torch.zeros(3)},
    "model-00002-of-00002": {"c": torch.arange(4)},
}


@pytest.fixture(params=["safetensors", "bin"])
def sharded(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The index of a model in two files."""
    kind = request.param
    for name, tensors in SHARDS.items():
        if kind == "safetensors":
            save_file(tensors, tmp_path / f"{name}.{kind}")
        else:
            torch.save(tensors, tmp_path / f"{name}.{kind}")
    where = {t: f"{name}.{kind}" for name, tensors in SHARDS.items() for t in tensors}
    stem = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    path = tmp_path / f"{stem}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 52}, "weight_map": where}))
    return path


WHOLE = {name: tensor for tensors in SHARDS.values() for name, tensor in tensors.items()}


def test_index_and_folder(sharded: Path, mmap: bool) -> None:
    assert_same(open_source(sharded, mmap=mmap), WHOLE)
    assert_same(open_source(str(sharded.parent), mmap=mmap), WHOLE)
    assert list(open_source(sharded, mmap=mmap)) == list(WHOLE)


def test_index_whose_files_are_links(sharded: Path, tmp_path: Path) -> None:
    # As in a model hub's cache: every file is a link to a blob in another folder.
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    snapshot.mkdir()
    blobs.mkdir()
    for path in [p for p in tmp_path.iterdir() if p.is_file()]:
        blob = path.replace(blobs / f"{abs(hash(path.name))}")
        (snapshot / path.name).symlink_to(f"../blobs/{blob.name}")
    assert_same(open_source(snapshot, mmap=False), WHOLE)


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    edit(content["weight_map"])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "file",
    ["/etc/passwd", "../model.safetensors", "x/../../m.safetensors", "..", "", ".", "a\0b", "C:\\x.bin",
     "..\\m.bin", 3, None, ["a"], {"a": "b"}],
)  # fmt: skip
def test_index_may_not_name_files_elsewhere(sharded: Path, file: object) -> None:
    change(sharded, lambda m: m.update(b=file))
    text = refused(sharded, findings=2)  # b is also in a file, where the index does not say so
    assert "b | file" in text
    assert "correct weight_map" in text


def test_index_lists_all_that_does_not_match(sharded: Path) -> None:
    other = next(p.name for p in sharded.parent.iterdir() if "00002-of" in p.name)

    def edit(weight_map: dict[str, str]) -> None:
        weight_map["b"] = other  # in the first file
        weight_map["d"] = other  # in none
        weight_map["e"] = "absent" + Path(other).suffix
        del weight_map["a"]

    change(sharded, edit)
    # Without a and b no name is left in the first file, so it is not opened.
    text = refused(sharded, findings=3)
    assert "b | missing" in text and "d | missing" in text and "no such file" in text
    change(sharded, lambda m: (m.clear(), m.update(a=other.replace("00002-of", "00001-of"))))
    text = refused(sharded)
    assert "b | unexpected" in text and "not in the index" in text


def test_index_reports_each_damaged_file(sharded: Path) -> None:
    for path in sharded.parent.iterdir():
        if path != sharded:
            path.write_bytes(path.read_bytes()[:-30])
    assert refused(sharded, findings=2).count(" | file | ") == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "JSON"), (b"{", "JSON"), (b"[]", "got list"), (b"3", "got int 3"), (b"{}", "without weight_map"),
        (b'{"weight_map": {}}', "empty weight_map"), (b'{"weight_map": ["a"]}', "weight_map list"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "'a' is there twice"), (b"[" * 100_000, "brackets"),
        (b'{"weight_map": ' * 50_000, "brackets"), (b"\xff\xfe", "utf-8"), (b'{"a": NaN}', "NaN"),
        (b"<html>", "a web page"), (b"version https://git-lfs", "Git LFS"), (b'{"\\ud800": 1}', "half"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON"),
    ],
)  # fmt: skip
def test_damaged_index(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    assert message in refused(path)


def test_folder(tmp_path: Path, saved: Path, mmap: bool) -> None:
    assert_same(open_source(tmp_path, mmap=mmap), TENSORS)
    torch.save({"zzz": 3}, tmp_path / "training_args.bin")  # only safetensors files count
    (tmp_path / "config.json").write_text("{}")
    assert_same(open_source(tmp_path, mmap=mmap), TENSORS)
    save_file({"b": torch.ones(2)}, tmp_path / "other.safetensors")
    assert_same(open_source(tmp_path, mmap=mmap), {**TENSORS, "b": torch.ones(2)})
    save_file({"b": torch.ones(2)}, tmp_path / "third.safetensors")
    with pytest.raises(SourceError, match=r"b \| conflict \| got in .*other.* and in .*third"):
        open_source(tmp_path, mmap=mmap)


def test_folder_of_pickles(tmp_path: Path, mmap: bool) -> None:
    assert "a folder without weights" in refused(tmp_path, mmap)
    torch.save({"w": torch.ones(2)}, tmp_path / "weights.pt")
    torch.save({"state": {0: torch.ones(2)}}, tmp_path / "optimizer.pt")
    torch.save({"x": torch.ones(2)}, tmp_path / "rng_state_0.pth")
    assert_same(open_source(tmp_path, mmap=mmap), {"w": torch.ones(2)})
    torch.save({"p": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    assert_same(open_source(tmp_path, mmap=mmap), {"p": torch.ones(3)})


def test_folder_with_indexes(sharded: Path) -> None:
    index = sharded.read_text()
    sharded.unlink()
    (sharded.parent / "diffusion.safetensors.index.json").write_text(index)
    assert_same(open_source(sharded.parent, mmap=False), WHOLE)
    (sharded.parent / "other.safetensors.index.json").write_text(index)
    assert "several indexes" in refused(sharded.parent)
    (sharded.parent / "pytorch_model.bin.index.json").write_text(index)
    assert_same(open_source(sharded.parent, mmap=False), WHOLE)


# ---- checkpoints of torch.save -------------------------------------------------------------------


def checkpoint() -> dict[str, Tensor]:
    base = torch.arange(60, dtype=torch.float32)
    out = {
        "plain": base.view(3, 20),
        "transposed": base.view(3, 20).t(),
        "slice": base.view(3, 20)[1:, 3:9:2],
        "expanded": base[5:6].expand(4, 7),
        "again": base.view(3, 20),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "bool": torch.tensor([True, False]),
        "double": torch.randn(7, dtype=torch.float64),
        "complex": torch.randn(3, dtype=torch.complex64),
    }
    for name in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "uint16"):
        out[name] = torch.randint(0, 100, (9,)).to(getattr(torch, name))
    return out


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pkl"])
def test_checkpoint(tmp_path: Path, suffix: str, mmap: bool) -> None:
    path = tmp_path / f"m{suffix}"
    tensors = checkpoint()
    torch.save(tensors, path)
    opened = open_source(path, mmap=mmap)
    assert_same(opened, tensors)
    for name, tensor in tensors.items():
        assert opened[name].stride() == tensor.stride(), name
        if not mmap:
            assert isinstance(opened[name], Stored), name
            assert opened[name].load().stride() == tensor.stride()


def test_checkpoint_is_not_read_on_opening(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.zeros(3 << 20, dtype=torch.uint8)}, path)
    opened = open_source(path, mmap=False)
    assert isinstance(opened["w"], Stored)
    with path.open("r+b") as file:
        file.seek(opened["w"].offset + 5)
        file.write(b"\x33")
    out = torch.empty(7, dtype=torch.uint8)
    opened["w"].read_into(0, 7, out)
    assert out.tolist() == [0, 0, 0, 0, 0, 0x33, 0]


def test_tied_tensors_of_a_checkpoint_have_one_location(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save(checkpoint(), path)
    opened = open_source(path, mmap=False)
    assert opened["plain"].location() == opened["again"].location()
    others = [t.location() for name, t in opened.items() if name != "again"]
    assert len(set(others)) == len(others)


def test_parameters_of_a_checkpoint_are_plain(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "m.pt"
    linear = nn.Linear(3, 2)
    torch.save(OrderedDict(linear.named_parameters()), path)
    opened = open_source(path, mmap=mmap)
    assert_same(opened, {n: p.detach() for n, p in linear.named_parameters()})
    assert not any(t.requires_grad for t in opened.values())


def test_a_large_state_dict_with_its_metadata(tmp_path: Path, mmap: bool) -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert_same(open_source(tmp_path / "m.pt", mmap=mmap), model.state_dict())


def odd_checkpoints() -> dict[str, Tensor]:
    return {
        "sparse": torch.eye(3).to_sparse(),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
    }


@pytest.mark.parametrize("name", odd_checkpoints())
def test_checkpoints_with_odd_tensors_are_loaded(tmp_path: Path, name: str, mmap: bool) -> None:
    odd = odd_checkpoints()[name]
    torch.save({"odd": odd, "w": torch.ones(2)}, tmp_path / "m.pt")
    opened = open_source(tmp_path / "m.pt", mmap=mmap)
    assert isinstance(opened["odd"], Tensor) and opened["odd"].layout == odd.layout
    assert torch.equal(opened["odd"].to_dense().resolve_conj(), odd.to_dense().resolve_conj())
    assert torch.equal(opened["w"], torch.ones(2))


def rewritten(path: Path, order: Callable[[list[str]], list[str]], **options: Any) -> None:
    """The same archive, written by another tool."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name in order(list(records)):
            archive.writestr(name, records[name])


@pytest.mark.parametrize(
    ("order", "options"),
    [
        (lambda names: names, {"compression": zipfile.ZIP_DEFLATED}),
        (lambda names: names, {}),
        (lambda names: names[::-1], {}),
        (sorted, {}),
    ],
)
def test_archives_that_were_written_again(
    tmp_path: Path, order: Callable[[list[str]], list[str]], options: dict[str, Any]
) -> None:
    # Of equal sizes, so that offsets in another order would still be those of some record.
    tensors = {f"t{k}": torch.full((16,), float(k)) for k in range(12)}
    path = tmp_path / "m.pt"
    torch.save(tensors, path)
    rewritten(path, order, **options)
    assert_same(open_source(path, mmap=False), tensors)


def test_the_format_before_torch_1_6(tmp_path: Path, mmap: bool) -> None:
    tensors = {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    torch.save(tensors, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    assert_same(open_source(tmp_path / "m.pt", mmap=mmap), tensors)


def test_without_offsets_the_file_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.load

    def older(path: Path, map_location: str, **options: Any) -> Any:
        if map_location == "meta":  # as torch before 2.13: no offsets
            return {n: torch.empty_like(t, device="meta") for n, t in real(path).items()}
        return real(path, map_location=map_location, **options)

    torch.save({"w": torch.ones(5)}, tmp_path / "m.pt")
    monkeypatch.setattr(torch, "load", older)
    assert_same(open_source(tmp_path / "m.pt", mmap=False), {"w": torch.ones(5)})


class Payload:
    """A pickle that creates a file when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mknod, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_objects_are_refused_and_never_run(
    tmp_path: Path, zipped: bool, mmap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark, path = tmp_path / "was-run", tmp_path / "m.pt"
    content = {"w": torch.ones(2), "x": Payload(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    text = refused(path, mmap)
    assert not mark.exists()
    assert "refused" in text and "posix.mknod" in text
    assert "weights_only" not in text and "add_safe_globals" not in text
    torch.load(path, weights_only=False)
    assert mark.exists()  # the payload was one


def test_a_pickled_module_is_refused(tmp_path: Path, mmap: bool) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    assert "torch.nn.modules.linear.Linear" in refused(tmp_path / "m.pt", mmap)


def test_torchscript_is_refused(tmp_path: Path, mmap: bool) -> None:
    with pytest.warns(DeprecationWarning):
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "m.pt"))
    assert "torch.jit.load" in refused(tmp_path / "m.pt", mmap)


W = torch.ones(2)
NESTED: dict[str, tuple[Any, str | None]] = {
    "state_dict": ({"state_dict": {"w": W}, "epoch": 3, "args": {"lr": 0.1}}, None),
    "model": ({"model": {"w": W}, "optimizer": {"state": {0: {"exp_avg": W}}}}, None),
    "lightning": ({"state_dict": {"w": W}, "optimizer_states": [{"a": W}], "lr_schedulers": []}, None),
    "beside": ({"model": {"w": W}, "ema": {"w": W}}, "ema | conflict"),
    "two": ({"model": {"w": W}, "state_dict": {"w": W}}, "several sets of tensors"),
    "bare beside": ({"model": {"w": W}, "scale": W}, "scale | conflict | got a tensor"),
    "unknown key": ({"net": {"w": W}}, 'pass source["net"]'),
    "numbers beside": ({"w": W, "epoch": 3}, "epoch | type | got int 3"),
    "inner": ({"model": {"w": W, "v": "1.0"}}, 'the entry "model"'),
    "list": ([W], "got list"),
    "tensor": (W, "got torch.Tensor"),
    "numbers as names": ({0: W}, "source[0]"),
}  # fmt: skip


@pytest.mark.parametrize("name", NESTED)
def test_nested_checkpoints(tmp_path: Path, name: str, mmap: bool) -> None:
    content, message = NESTED[name]
    torch.save(content, tmp_path / "m.pt")
    if message is None:
        assert_same(open_source(tmp_path / "m.pt", mmap=mmap), {"w": W})
        return
    with pytest.raises(SourceError) as caught:
        open_source(tmp_path / "m.pt", mmap=mmap)
    assert message in str(caught.value)
    assert str(tmp_path / "m.pt") in str(caught.value)


def test_safetensors_under_a_name_of_torch(saved: Path, mmap: bool) -> None:
    renamed = saved.rename(saved.with_suffix(".bin"))
    assert "rename it to .safetensors" in refused(renamed, mmap)


def cuts(data: bytes) -> Iterator[int]:
    return iter([*range(0, len(data), 37), len(data) - 1])


def test_every_truncation_of_a_checkpoint_is_refused(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(40), "b": torch.ones(3)}, path)
    data = path.read_bytes()
    for length in cuts(data):
        path.write_bytes(data[:length])
        refused(path, mmap)
