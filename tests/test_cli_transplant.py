"""`paramkit plan` and `paramkit transplant`: from file to file, as the same done with torch, or not at all."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import paramkit
from paramkit.cli import main
from paramkit.cli.options import byte_size, float_dtype
from paramkit.cli.transplant import _terminated_cleanly
from paramkit.sources import StoredFile

RULES = """
sizes: {parts: }
rules:
  - {src: "h.{i}.q", dst: "l.{i}.qk", pattern: "h e -> e (s h)", at: {s: 0}, sizes: {s: parts}}
  - {src: "h.{i}.k", dst: "l.{i}.qk", pattern: "h e -> e (s h)", at: {s: 1}, sizes: {s: parts}}
  - {src: "h.{i}.e.{j}", dst: "l.{i}.e", pattern: "o i -> j i o"}
  - {src: "unused"}
"""


def source() -> dict[str, torch.Tensor]:
    out = {"tok": torch.randn(10, 4), "ids": torch.arange(7), "unused": torch.ones(2)}
    for i in range(12):
        out |= {f"h.{i}.q": torch.randn(6, 4), f"h.{i}.k": torch.randn(6, 4)}
        out |= {f"h.{i}.e.{j}": torch.randn(3, 2) for j in range(2)}
    return out


def expected(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {"tok": given["tok"], "ids": given["ids"]}
    for i in range(12):
        out[f"l.{i}.qk"] = torch.cat([given[f"h.{i}.q"], given[f"h.{i}.k"]]).t()
        out[f"l.{i}.e"] = torch.stack([given[f"h.{i}.e.{j}"].t() for j in range(2)])
    return out


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a source and rules in it."""
    monkeypatch.chdir(tmp_path)
    save_file(source(), "a.safetensors", {"made by": "hand"})
    Path("r.yaml").write_text(RULES)
    return tmp_path


def assert_same(path: str | Path, want: dict[str, torch.Tensor]) -> None:
    got = load_file(path)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


@contextmanager
def nothing_made(folder: Path) -> Iterator[None]:
    def state() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in folder.iterdir()}

    before = state()
    yield
    assert state() == before


def run(*argv: str) -> int:
    return main(list(argv))


@pytest.mark.parametrize("format_", ["safetensors", "pt", "old"])
@pytest.mark.parametrize("more", [[], ["--mmap"], ["--staging", "4K"]])
@pytest.mark.usefixtures("backend")
def test_against_torch(folder: Path, format_: str, more: list[str]) -> None:
    given = load_file("a.safetensors")
    path = "a.safetensors"
    if format_ != "safetensors":
        path = "a.pt"
        torch.save(given, path, _use_new_zipfile_serialization=format_ == "pt")
    made = ("transplant", path, "-o", "o.safetensors", "--rules", "r.yaml", "--set", "parts=2")
    assert run(*made, *more) == 0
    assert_same("o.safetensors", expected(given))


def test_the_metadata_is_kept(folder: Path) -> None:
    assert run("transplant", "a.safetensors", "-o", "o.safetensors") == 0
    with safe_open("o.safetensors", "pt") as file:
        assert file.metadata() == {"made by": "hand", "format": "pt"}


def test_the_way_back(folder: Path) -> None:
    rules = ("--rules", "r.yaml", "--set", "parts=2")
    assert run("transplant", "a.safetensors", "-o", "o.safetensors", *rules) == 0
    back = ("--inverse", "--like", "a.safetensors", "--allow-missing", "unused")
    assert run("transplant", "o.safetensors", "-o", "b.safetensors", *rules, *back) == 0
    given = load_file("a.safetensors")
    del given["unused"]  # dropped on the way there: there is nothing to write it from
    assert_same("b.safetensors", given)


def test_a_dtype_is_for_floats_alone(folder: Path) -> None:
    assert run("transplant", "a.safetensors", "-o", "o.safetensors", "--dtype", "bf16") == 0
    given = load_file("a.safetensors")
    assert_same(
        "o.safetensors", {n: t.bfloat16() if t.is_floating_point() else t for n, t in given.items()}
    )


def test_a_recipe_by_its_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {f"h.{i}.{p}_proj.weight": torch.randn(8, 4) for i in range(2) for p in "qk"}
    save_file(weights, "a.safetensors")
    made = (
        "transplant",
        "a.safetensors",
        "-o",
        "o.safetensors",
        "--rules",
        "rotary_halves_to_pairs",
    )
    assert run(*made, "--set", "heads=2", "kv_heads=2") == 0
    rules = paramkit.recipes.load("rotary_halves_to_pairs", heads=2, kv_heads=2)
    want = {n: torch.zeros(8, 4) for n in weights}
    paramkit.transplant(want, weights, rules)
    assert_same("o.safetensors", want)
    assert run(*made, "--force") == 1
    assert "heads" in capsys.readouterr().err


def test_the_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = (
        "transplant",
        "a.safetensors",
        "--rules",
        "r.yaml",
        "--set",
        "parts=2",
        "--dtype",
        "bf16",
    )
    assert run(*made, "-o", "o.safetensors") == 0
    text = capsys.readouterr().out
    assert text.startswith("o.safetensors: 26 tensors, ") and "1 dropped: unused" in text
    assert "float32 -> bfloat16" in text
    assert run(*made, "-o", "p.safetensors", "--json") == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert not err and data["tensors"] == 26 and data["dropped"] == ["unused"]
    assert data["file_bytes"] == Path("p.safetensors").stat().st_size
    assert {c["dst_dtype"] for c in data["casts"]} == {"bfloat16"}


def test_what_nothing_writes_is_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(
        {"tok": torch.zeros(10, 4), "new.0.w": torch.ones(2), "new.1.w": torch.ones(2)},
        "t.safetensors",
    )
    made = ("transplant", "a.safetensors", "-o", "o.safetensors", "--like", "t.safetensors")
    assert run(*made, "--allow-unexpected", "h.*", "ids", "unused", "--allow-missing", "new.*") == 0
    assert_same("o.safetensors", {"tok": load_file("a.safetensors")["tok"]})
    assert "2 left out, because nothing writes them: new.{0..1}.w" in capsys.readouterr().out


def test_rows_that_would_be_left_as_they_are_need_a_fill(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"tok": torch.ones(2, 3)}, "a.safetensors")
    save_file({"tok": torch.ones(5, 3)}, "t.safetensors")
    made = ("transplant", "a.safetensors", "-o", "o.safetensors", "--like", "t.safetensors")
    Path("r.yaml").write_text("rules: [{src: tok, dst: tok, rows: overlap}]")
    with nothing_made(folder):
        assert run(*made, "--rules", "r.yaml") == 1
    assert "tok | missing | got written in part" in capsys.readouterr().err
    Path("r.yaml").write_text("rules: [{src: tok, dst: tok, rows: overlap, fill: 0.5}]")
    assert run(*made, "--rules", "r.yaml") == 0
    want = torch.full((5, 3), 0.5)
    want[:2] = 1
    assert_same("o.safetensors", {"tok": want})


def test_an_output_that_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("o.safetensors").write_bytes(b"precious")
    made = ("transplant", "a.safetensors", "-o", "o.safetensors")
    with nothing_made(folder):
        assert run(*made) == 1
    assert "--force replaces it" in capsys.readouterr().err
    assert run(*made, "--force") == 0
    assert_same("o.safetensors", load_file("a.safetensors"))


@pytest.mark.parametrize("how", ["path", "link", "like", "shard"])
def test_an_input_is_never_replaced(
    how: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src, out, more = "a.safetensors", "a.safetensors", []
    if how == "link":
        out = "b.safetensors"
        os.link(src, out)
    elif how == "like":
        save_file(source(), "t.safetensors")
        out, more = "t.safetensors", ["--like", "t.safetensors"]
    elif how == "shard":
        src = "."
        save_file({"z": torch.ones(1)}, "z.safetensors")
        out = "z.safetensors"
    with nothing_made(folder):
        assert run("transplant", src, "-o", out, "--force", *more) == 1
    assert "the same file as the input" in capsys.readouterr().err


def test_overflow(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"w": torch.tensor([1.0, 1e30])}, "a.safetensors")
    made = ("transplant", "a.safetensors", "-o", "o.safetensors", "--dtype", "float16")
    with nothing_made(folder):
        assert run(*made, "--overflow", "error") == 1
    assert "overflow" in capsys.readouterr().err
    assert run(*made) == 0
    assert load_file("o.safetensors")["w"].isinf().tolist() == [False, True]


def test_casting(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = ("transplant", "a.safetensors", "-o", "o.safetensors", "--dtype", "bf16")
    with nothing_made(folder):
        assert run(*made, "--casting", "safe") == 1
    assert "dtype" in capsys.readouterr().err


def test_a_source_cut_while_it_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = StoredFile.read_many, 0

    def cutting(self: StoredFile, ranges: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.truncate("a.safetensors", 400)
        real(self, ranges)  # type: ignore[arg-type]

    save_file({f"w.{k}": torch.ones(1000) for k in range(9)}, "a.safetensors")
    monkeypatch.setattr(StoredFile, "read_many", cutting)
    assert run("transplant", "a.safetensors", "-o", "o.safetensors", "--staging", "4K") == 1
    assert {p.name for p in folder.iterdir()} == {"a.safetensors", "r.yaml"}
    err = capsys.readouterr().err
    assert "o.safetensors was not made" in err and "truncated" in err and "atomic" not in err


def test_sigterm_ends_the_ordinary_way() -> None:
    import signal

    with pytest.raises(SystemExit) as caught, _terminated_cleanly():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ---- plan ----------------------------------------------------------------------------------------


def test_plan_shows_the_writes_and_reads_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StoredFile, "read_many", None)
    asked = ("plan", "a.safetensors", "--rules", "r.yaml", "--set", "parts=2")
    with nothing_made(folder):
        assert run(*asked) == 0
        text = capsys.readouterr().out
        assert "l.{0..11}.qk  h.{0..11}.q " in text and "h e -> e (s h)" in text
        assert "50 writes into 26 of 26 tensors" in text
        assert "dropped from the source (1): unused" in text
        assert run(*asked, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["destinations"]["l.0.qk"] == {"shape": [4, 12], "dtype": "float32"}
    assert len(data["writes"]) == 50 and data["dropped"] == ["unused"]
    assert data["writes"][0].keys() >= {"destination", "source", "pattern", "sizes"}


def test_plan_lists_all_that_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"tok": torch.ones(4, 10), "new": torch.ones(1)}, "t.safetensors")
    assert run("plan", "a.safetensors", "--like", "t.safetensors", "--no-identity") == 1
    err = capsys.readouterr().err
    assert err.startswith("paramkit: error: the plan has ")
    for text in ("new | missing", "tok | missing", "h.{0..11}.q | unexpected"):
        assert text in err


def test_two_rules_for_one_place(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(2, 3)}, "a.safetensors")
    part = '{src: %s, dst: ab, pattern: "h e -> (s h) e", at: {s: 0}, sizes: {s: 1}}'
    Path("r.yaml").write_text(f"rules: [{part % 'a'}, {part % 'b'}]")
    with nothing_made(folder):
        assert run("transplant", "a.safetensors", "-o", "o.safetensors", "--rules", "r.yaml") == 1
    assert "conflict" in capsys.readouterr().err


# ---- wrong command lines -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        "plan",
        "plan a.safetensors --casting maybe",
        "plan a.safetensors --dtype int8",
        "plan a.safetensors --rules r.yaml --set parts",
        "plan a.safetensors --rules r.yaml --set parts=1 parts=2",
        "plan a.safetensors --set parts=2",
        "plan a.safetensors --inverse",
        "plan a.safetensors --like a.safetensors --allow-missing {",
        "transplant a.safetensors",
        "transplant a.safetensors -o o.pt",
        "transplant a.safetensors -o o.safetensors --staging 16Q",
        "transplant a.safetensors -o o.safetensors --staging 1K",
        "transplant a.safetensors -o o.safetensors --staging -5",
        "inspect",
        "diff a.safetensors",
        "diff a.safetensors a.safetensors --atol -1",
        "diff a.safetensors a.safetensors --atol nan",
    ],
)
def test_wrong_command_lines(wrong: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with nothing_made(folder):
        try:
            code = main(wrong.split())
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    out, err = capsys.readouterr()
    assert code == 2 and not out and "error: " in err


@pytest.mark.parametrize("command", ["inspect", "plan", "transplant", "diff"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  paramkit {command} " in text


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("64M", 64 << 20), ("1.5GiB", 3 << 29), ("8 kb", 8192), ("2t", 2 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert byte_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "1e6", "16 Mi B", "4095", "0", "-4K", "1_000_000", "٤٠٩٦"]
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        byte_size(text)


def test_dtypes() -> None:
    assert float_dtype("torch.float16") == float_dtype("fp16") == torch.float16
    with pytest.raises(argparse.ArgumentTypeError, match="bfloat16"):
        float_dtype("int8")
