"""A written file: what any reader of the format finds in it, and that no half of one is ever left."""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from paramkit.errors import PlanError
from paramkit.output import SafetensorsOutput, layout
from paramkit.sources import open_source
from paramkit.sources.safetensors_file import DTYPES
from tests.disks import small_disk

ENTRIES = [
    ("a", torch.uint8, (3,)),
    ("layer.0.w", torch.bfloat16, (2, 5)),
    ("empty", torch.float64, (0, 4)),
    ("b", torch.float64, ()),
    ("é", torch.float32, (2, 1, 3)),
]


@pytest.fixture(params=["no name", "a name"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With files that have no name until the end, and without, as on some network file systems."""
    if request.param == "a name":
        real = os.open

        def refusing(path: Any, flags: int, *args: Any, **options: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "not supported")
            return real(path, flags, *args, **options)

        monkeypatch.setattr(os, "open", refusing)
    return request.param


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """The folder and the process's open files are as before."""

    def state() -> tuple[dict[str, bytes], int]:
        files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        return files, len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    before = state()
    yield
    assert state() == before


def random_bytes(tensor: Tensor) -> None:
    raw = tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor
    if tensor.numel():
        raw.copy_(torch.randint(0, 2 if tensor.dtype == torch.bool else 256, raw.shape))


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8).clone()


def write(path: Path, entries: Any = ENTRIES, **options: Any) -> dict[str, Tensor]:
    with SafetensorsOutput(path, entries, **options) as out:
        for tensor in out.tensors.values():
            random_bytes(tensor)
        expected = {name: as_bytes(tensor) for name, tensor in out.tensors.items()}
        out.commit()
    assert out.tensors == {}
    assert path.stat().st_size == out.size
    return expected


def test_the_library_reads_the_same_bits(tmp_path: Path, how: str) -> None:
    path = tmp_path / "out.safetensors"
    expected = write(path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {name for name, *_ in ENTRIES}
        for name, dtype, shape in ENTRIES:
            tensor = file.get_tensor(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
            assert torch.equal(as_bytes(tensor), expected[name])
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]
    assert open_source(path, mmap=False).keys() == expected.keys()


def test_every_dtype(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    expected = write(path, [(tag, dtype, (3, 5)) for tag, dtype in DTYPES.items()])
    for tag, tensor in open_source(path).items():
        assert tensor.dtype == DTYPES[tag]
        assert torch.equal(as_bytes(tensor), expected[tag])
        assert tensor.data_ptr() % tensor.element_size() == 0


def test_tensors_are_aligned_zero_and_in_the_order_given(tmp_path: Path) -> None:
    with SafetensorsOutput(tmp_path / "o.safetensors", ENTRIES) as out:
        assert list(out.tensors) == [name for name, *_ in ENTRIES]
        for name, dtype, shape in ENTRIES:
            tensor = out.tensors[name]
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
            assert tensor.is_contiguous() and not tensor.any()
            assert tensor.data_ptr() % tensor.element_size() == 0


def test_metadata(tmp_path: Path) -> None:
    path = tmp_path / "o.safetensors"
    write(path, metadata={"α": "β\n", "format": "pt"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"α": "β\n", "format": "pt"}
    write(path, [], metadata={})
    with safe_open(path, framework="pt") as file:
        assert not file.metadata() and list(file.keys()) == []


def test_a_file_is_replaced_and_a_link_followed(tmp_path: Path, how: str) -> None:
    path, real = tmp_path / "link.safetensors", tmp_path / "real.safetensors"
    real.write_bytes(b"old")
    path.symlink_to(real)
    with SafetensorsOutput(path, ENTRIES) as out:
        assert real.read_bytes() == b"old"
        out.commit()
    assert path.is_symlink() and real.stat().st_size == out.size


def test_the_mode_is_that_of_any_new_file(tmp_path: Path, how: str) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "o.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "o.safetensors").stat().st_mode) == 0o640


def test_the_longest_name(tmp_path: Path, how: str) -> None:
    write(tmp_path / ("é" * 121 + ".safetensors"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, None])
@pytest.mark.parametrize("old", [True, False])
def test_without_commit_nothing_is_left(
    tmp_path: Path, how: str, error: type[BaseException] | None, old: bool
) -> None:
    path = tmp_path / "o.safetensors"
    if old:
        path.write_bytes(b"the old one")
    with nothing_left(tmp_path):
        if error is None:
            with SafetensorsOutput(path, ENTRIES) as out:
                out.tensors["a"].fill_(1)
        else:
            with pytest.raises(error), SafetensorsOutput(path, ENTRIES) as out:
                out.tensors["a"].fill_(1)
                raise error
    with pytest.raises(RuntimeError, match="belongs into the block"):
        out.commit()


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, torch\n"
        "from paramkit.output import SafetensorsOutput\n"
        "with SafetensorsOutput(sys.argv[1], [('a', torch.float32, (1 << 16,))]) as out:\n"
        "    named = out._name is not None\n"
        "    out.tensors['a'].fill_(1.0)\n"
        "    if named: sys.exit(3)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "o.safetensors")], check=False)
    if run.returncode == 3:
        pytest.skip("this file system has no files without a name")
    assert run.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_on_commit_leaves_what_was_there(
    tmp_path: Path, how: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "o.safetensors"
    path.write_bytes(b"the old one")

    def failing(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with nothing_left(tmp_path), pytest.raises(OSError, match="Input/output"):  # noqa: SIM117
        with SafetensorsOutput(path, ENTRIES) as out:
            monkeypatch.setattr(os, call, failing)
            out.commit()


@pytest.mark.parametrize(
    ("number", "text"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota"), (errno.EFBIG, "ulimit -f")],
)
def test_a_full_disk_is_an_error_at_the_start(
    tmp_path: Path, how: str, number: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    out = SafetensorsOutput(tmp_path / "o.safetensors", ENTRIES)
    with nothing_left(tmp_path), pytest.raises(OSError, match=text) as caught, out:
        pytest.fail("the block must not run")
    assert caught.value.errno == number
    assert f"{out.size:,} bytes are needed" in str(caught.value)
    assert str(tmp_path / "o.safetensors") in str(caught.value)


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        with nothing_left(disk), pytest.raises(OSError, match="the disk is full"):  # noqa: SIM117
            with SafetensorsOutput(disk / "o.safetensors", [("a", torch.uint8, (2 << 20,))]):
                pytest.fail("the block must not run")
        write(disk / "o.safetensors", [("a", torch.uint8, (1 << 19,))])


def test_without_fallocate_the_room_is_taken_by_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    path = tmp_path / "o.safetensors"
    with SafetensorsOutput(path, [("a", torch.uint8, ((5 << 20) + 3,))]) as out:
        assert os.fstat(out._fd).st_blocks * 512 >= out.size  # no holes
        out.commit()
    assert path.stat().st_size == out.size
    assert not open_source(path)["a"].any()


def resident() -> int:
    """Resident bytes of file mappings of this process."""
    text = Path("/proc/self/status").read_text()
    found = re.search(r"RssFile:\s+(\d+) kB", text)
    shared = re.search(r"RssShmem:\s+(\d+) kB", text)
    assert found and shared
    return (int(found[1]) + int(shared[1])) * 1024


def test_trim_lets_go_of_memory_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "o.safetensors"
    size = 8 << 20
    with SafetensorsOutput(path, [(f"t{k}", torch.uint8, (size,)) for k in range(4)]) as out:
        start = resident()
        for k, tensor in enumerate(out.tensors.values()):
            tensor.fill_(k + 1)
            assert resident() > start + size // 2
            out.trim()
            assert resident() < start + size // 2
        assert all((t == k + 1).all() for k, t in enumerate(out.tensors.values()))
        out.commit()
    assert all((t == k + 1).all() for k, t in enumerate(open_source(path).values()))


def test_a_view_may_outlive_the_block(tmp_path: Path) -> None:
    with SafetensorsOutput(tmp_path / "o.safetensors", ENTRIES) as out:
        kept = out.tensors["b"]
        kept.fill_(3.0)
        out.commit()
    assert kept.item() == 3.0


@pytest.mark.parametrize("same", ["path", "link", "hard link"])
def test_an_input_is_never_replaced(tmp_path: Path, same: str) -> None:
    source, path = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    write(source)
    if same == "path":
        path = tmp_path / "." / "in.safetensors"
    elif same == "link":
        path.symlink_to(source)
    else:
        path.hardlink_to(source)
    with nothing_left(tmp_path), pytest.raises(PlanError, match="the same file as the input"):
        SafetensorsOutput(path, ENTRIES, inputs=[tmp_path / "absent", source])


def test_bad_places(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="got a folder"):
        SafetensorsOutput(tmp_path, ENTRIES)
    with pytest.raises(PlanError, match="a pipe or a device"):
        SafetensorsOutput("/dev/null", ENTRIES)
    with pytest.raises(FileNotFoundError, match="absent"):  # noqa: SIM117
        with SafetensorsOutput(tmp_path / "absent" / "o.safetensors", ENTRIES):
            pytest.fail("the block must not run")


def test_all_that_is_wrong_with_the_entries_is_listed() -> None:
    bad: list[Any] = [
        ("a", torch.float32, (2,)),
        ("a", torch.float32, (2,)),
        ("b", torch.complex128, (2,)),
        ("c", torch.float32, (2, -1)),
        ("__metadata__", torch.float32, ()),
        ("\ud800", torch.float32, ()),
        (3, torch.float32, ()),
    ]
    with pytest.raises(PlanError) as caught:
        layout(bad, {"x": 3, "y": "ok"})  # type: ignore[dict-item]
    assert [f.name for f in caught.value.findings] == [
        "a", "b", "c", "'__metadata__'", "'\\ud800'", "3", "metadata['x']",
    ]  # fmt: skip
    with pytest.raises(PlanError, match="at most 100000000"):
        layout([("x" * 100_000_001, torch.uint8, ())], {})
