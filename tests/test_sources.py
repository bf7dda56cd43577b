"""Sources: what can be opened, and a clear error for everything else."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from paramkit.errors import SourceError
from paramkit.sources import open_source


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.tied = nn.Linear(3, 2)
        self.tied.weight = self.fc.weight
        self.shared = self.fc
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.register_buffer("nothing", None)
        self.own = nn.Parameter(torch.zeros(2))


def test_module_gives_what_its_state_dict_names_in_its_order() -> None:
    model = Model()
    opened = open_source(model)
    assert list(opened) == list(model.state_dict())
    assert opened["fc.weight"] is model.fc.weight
    assert opened["tied.weight"] is model.fc.weight
    assert opened["shared.weight"] is model.fc.weight


def test_module_hooks_do_not_run_and_parametrizations_appear_by_their_own_names() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    model.register_state_dict_post_hook(lambda *_: pytest.fail("a hook ran"))
    names = set(open_source(model))
    assert "parametrizations.weight.original0" in names
    assert "bias" in names


def test_a_module_within_itself_ends() -> None:
    model = nn.Module()
    model.child = nn.Linear(2, 2)
    model.child.parent = model
    assert list(open_source(model)) == ["child.weight", "child.bias"]


def test_mapping_is_taken_as_it_is() -> None:
    tensor = torch.zeros(2)
    assert open_source({"a": tensor, "b.c": nn.Parameter(tensor)})["a"] is tensor
    assert open_source({}) == {}


def test_mapping_lists_all_that_is_no_tensor() -> None:
    bad = {
        "ok": torch.zeros(1),
        "numpy": np.zeros(2),
        "number": 3,
        "state_dict": {"a": torch.zeros(1)},
        "fc._extra_state": None,
        7: torch.zeros(1),
        "module": nn.Linear(1, 1),
    }
    with pytest.raises(SourceError) as caught:
        open_source(bad)
    text = str(caught.value)
    assert len(caught.value.findings) == 6
    assert "6 of 7 entries" in text
    for part in (
        "torch.from_numpy",
        "int 3",
        'pass source["state_dict"]',
        "extra state",
        "source[7]",
    ):
        assert part in text


@pytest.mark.parametrize(
    "source", [3, None, b"x", [], [1], torch.zeros(2), {1, 2}, ["a.safetensors", 3]]
)
def test_other_types_are_refused(source: object) -> None:
    with pytest.raises(SourceError, match=r"nn\.Module, a mapping|at least one path"):
        open_source(source)


# ---- files ---------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("kind", [str, Path])
def test_file(saved: Path, kind: type) -> None:
    opened = open_source(kind(saved))
    assert opened.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert opened[name].dtype == tensor.dtype
        assert torch.equal(opened[name], tensor)


def test_sharded_files(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"b": torch.ones(2)}, other)
    assert set(open_source([saved, str(other)])) == {*TENSORS, "b"}
    with pytest.raises(SourceError, match=r"count \| conflict"):
        open_source([saved, saved])


def refused(path: Path | str) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(path)
    text = str(caught.value)
    assert str(path) in text  # the file is named
    assert len(caught.value.findings) == 1
    return text


def test_missing_file(tmp_path: Path, saved: Path) -> None:
    assert "did you mean" in refused(tmp_path / "modle.safetensors")
    assert "has no such file" in refused(tmp_path / "zzzz.safetensors")
    assert "there is no folder" in refused(tmp_path / "no" / "model.safetensors")


def test_folder(tmp_path: Path, saved: Path) -> None:
    assert "pass the file itself; in it: model.safetensors" in refused(tmp_path)
    (tmp_path / "bare").mkdir()
    assert "holds no .safetensors file" in refused(tmp_path / "bare")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.bin", "torch.load"),
        ("m.pt", "torch.load"),
        ("m.safetensors.index.json", "list of the .safetensors files"),
        ("m.txt", "a .txt file"),
        ("m", "without a suffix"),
    ],
)
def test_other_formats(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"something")
    assert message in refused(tmp_path / name)


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
    "pickle inside": (lambda d: b"PK\x03\x04" + d, "torch.load"),
    "LFS pointer": (lambda d: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "web page": (lambda d: b"<!DOCTYPE html><html>not found</html>", "a web page"),
    "header is a list": (lambda d: struct.pack("<Q", 8) + json.dumps([1, 2]).encode().ljust(8), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(saved: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    data = saved.read_bytes()
    damaged = damage(data)
    assert damaged != data
    saved.write_bytes(damaged)
    assert message in refused(saved)


def test_every_truncation_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for length in range(len(data)):
        saved.write_bytes(data[:length])
        refused(saved)
