"""`paramkit inspect`: what it says about a checkpoint, and that it reads headers only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from paramkit import open_source, plan
from paramkit.cli import main
from paramkit.cli.inspect import folded_together
from paramkit.cli.odd import odd_things
from paramkit.sources import StoredFile


def layers(count: int, prefix: str = "") -> dict[str, torch.Tensor]:
    out = {f"{prefix}tok.weight": torch.randn(10, 4)}
    for i in range(count):
        out[f"{prefix}h.{i}.up.weight"] = torch.randn(8, 4)
        out[f"{prefix}h.{i}.norm.weight"] = torch.randn(4)
    return out


def told(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["inspect", *map(str, argv)]) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


def odd(tensors: dict[str, Any]) -> list[tuple[str, list[str]]]:
    return [(o.kind, o.names) for o in odd_things(tensors)]


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.safetensors"
    save_file(layers(12), path, {"format": "pt", "note": "two\nlines"})
    lines = told(capsys, path).splitlines()
    assert lines[0] == f"{path}: 25 tensors, 472 elements, 1.8 KiB"
    assert sorted(lines[1:3]) == ["  format: pt", "  note: two lines"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[4:]}
    assert rows["h.{0..11}.up.weight"] == ["(8,", "4)", "float32", "12", "1.5", "KiB"]
    assert rows["tok.weight"][-2:] == ["160", "bytes"]
    assert "odd:" not in lines


def test_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    w = torch.randn(4, 3)
    torch.save({"a": w, "b": w, "c": w.t(), "n": torch.arange(3)}, tmp_path / "m.pt")
    data = json.loads(told(capsys, tmp_path / "m.pt", "--json"))
    assert data["ties"] == [["a", "b"]]
    assert data["dtypes"]["float32"] == {"tensors": 3, "elements": 36, "bytes": 144}
    assert data["tensors"]["c"]["shape"] == [3, 4] and data["tensors"]["c"]["strides"] == [1, 3]
    assert [o["kind"] for o in data["odd"]] == ["strides", "overlap"]
    (file,) = data["files"]
    assert file == {
        "path": str(tmp_path / "m.pt"),
        "bytes": (tmp_path / "m.pt").stat().st_size,
        "tensors": 4,
    }


def test_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors", {"same": "1", "other": "1"})
    save_file({"b": torch.ones(3)}, tmp_path / "2.safetensors", {"same": "1", "other": "2"})
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        text = told(capsys, path)
        assert "same: 1" in text and "other" not in text
        assert f"{tmp_path / '1.safetensors'}  1 tensor" in text


def test_the_format_before_16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.pt"
    torch.save(layers(3), path, _use_new_zipfile_serialization=False)
    assert "h.{0..2}.up.weight" in told(capsys, path)
    assert json.loads(told(capsys, path, "--json"))["files"][0]["path"] == str(path)


def test_only_headers_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"w": torch.ones(1 << 18)}, tmp_path / "m.safetensors")
    monkeypatch.setattr(StoredFile, "read_many", None)
    real, most = StoredFile.bytes, 0

    def counting(self: StoredFile, offset: int, length: int) -> bytes:
        nonlocal most
        most = max(most, offset + length)
        return real(self, offset, length)

    monkeypatch.setattr(StoredFile, "bytes", counting)
    told(capsys, tmp_path / "m.safetensors")
    assert 8 < most < 200


def test_layers_that_are_missing() -> None:
    tensors = layers(12)
    assert odd(tensors) == []
    del tensors["h.7.up.weight"]
    assert odd(tensors) == [("gap", ["h.7.up.weight"])]
    del tensors["h.7.norm.weight"]
    assert odd(tensors) == [("gap", ["h.7"])]
    experts = {f"h.{i}.e.{e}.w": torch.ones(1) for i in range(3) for e in range(8) if e != 5}
    assert odd(experts) == [("gap", ["h.0.e.5", "h.1.e.5", "h.2.e.5"])]


@pytest.mark.parametrize(
    "names",
    [
        ["net.0.w", "net.2.w", "net.4.w"],  # activations between
        ["f.0.w", "f.2.w", "f.5.w", "f.7.w", "f.10.w"],
        [f"h.{i}.mamba" for i in range(16) if i % 8 != 4] + ["h.4.attn", "h.12.attn"],
        ["h.5.w", "h.6.w", "h.7.w"],  # one of several files
        ["a.0.w", "a.1000000.w"],
    ],
)
def test_gaps_that_may_be_meant(names: list[str]) -> None:
    found = odd(dict.fromkeys(names, torch.ones(1)))
    assert [o for o in found if o[1] != ["h.4.mamba", "h.12.mamba"]] == []


def test_mixed_dtypes_in_one_line_for_whole_layers() -> None:
    tensors = layers(12)
    for name in ("h.3.up.weight", "h.3.norm.weight"):
        tensors[name] = tensors[name].half()
    (found,) = odd_things(tensors)
    assert found.kind == "dtypes" and len(found.names) == 24
    assert "float16 in h.3." in found.text and "the same for 1 other name" in found.text


def test_offsets_that_are_not_aligned(tmp_path: Path) -> None:
    head = {
        "b": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(11))
    assert odd(open_source(path, mmap=False)) == [("offset", ["w"])]


def test_odd_names() -> None:
    names = ["a b", "c\x1b[31m", "d..e", "", "fine.w"]
    found = odd(dict.fromkeys(names, torch.ones(1)))
    assert found == [("name", ["a b", "c\x1b[31m", ""]), ("name", ["d..e"])]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net._orig_mod."])
def test_the_rule_that_strips_a_prefix_does(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = layers(2, prefix)
    (found,) = odd_things(source)
    rules = tmp_path / "r.yaml"
    rules.write_text(f"rules:\n  - {found.hint.partition(': ')[2]}\n")
    target = {n: torch.zeros_like(t) for n, t in layers(2, prefix.partition("_")[0]).items()}
    if prefix == "module.":
        target = {n.removeprefix("module."): t for n, t in target.items()}
    plan(target, source, rules).apply()
    assert all(bool(t.any()) for t in target.values())


def test_a_layer_called_module_within_is_no_wrapper() -> None:
    assert odd({"net.module.w": torch.ones(1)}) == []


def test_ties_fold_by_layer() -> None:
    groups = [[f"a.{i}.w", f"b.{i}.w"] for i in range(3)]
    assert folded_together(groups) == [["a.{0..2}.w", "b.{0..2}.w"]]
    crossed = [["a.0.w", "b.1.w"], ["a.1.w", "b.0.w"]]
    assert folded_together(crossed) == crossed


def test_names_cannot_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a\x1b[31m": torch.ones(1), "b\nc": torch.ones(1)}, path, {"x": "\x07"})
    text = told(capsys, path)
    assert "\x1b" not in text and "\x07" not in text
    assert "a\\x1b[31m" in text and "b\\nc" in text
    assert "a\x1b[31m" in json.loads(told(capsys, path, "--json"))["tensors"]


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_long_names_are_shortened_to_the_width(
    columns: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    name = "encoder.{}.a_very_long_component_of_a_name.another_long_component.self.query.weight"
    path = tmp_path / "m.safetensors"
    save_file({name.format(i): torch.ones(3) for i in range(12)}, path)
    row = told(capsys, path).splitlines()[-1]
    assert "{0..11}" in row and ("another" in row) == (columns == "200")
    assert len(row) <= max(80, int(columns))


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"<html>"])
def test_what_cannot_be_read(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert main(["inspect", str(path)]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("paramkit: error: the source file ") and str(path) in err
