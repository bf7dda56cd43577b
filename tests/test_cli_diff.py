"""`paramkit diff`: what it prints and its exit codes; how tensors compare is in test_compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from paramkit.cli import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two checkpoints in it that differ in all ways."""
    monkeypatch.chdir(tmp_path)
    a = {f"h.{i}.w": torch.randn(4, 6) for i in range(12)}
    a |= {f"h.{i}.n": torch.ones(4) for i in range(12)}
    a |= {
        "tok": torch.randn(9, 4),
        "t": torch.randn(5, 3),
        "gone": torch.ones(1),
        "same": torch.ones(3),
    }
    b = {name: tensor.clone() for name, tensor in a.items() if name != "gone"}
    for i in range(1, 12):
        b[f"h.{i}.w"][0, 0] += i
        b[f"h.{i}.n"] = b[f"h.{i}.n"].bfloat16()
    b["tok"] = b["tok"][:7].clone()
    b["t"] = b["t"].t().contiguous()
    b["new"] = torch.ones(1)
    save_file(a, "a.safetensors")
    save_file(b, "b.safetensors")
    return tmp_path


def run(*argv: str) -> int:
    return main(["diff", *argv])


def test_the_text(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run("a.safetensors", "b.safetensors") == 1
    out, err = capsys.readouterr()
    assert not err
    assert out.splitlines() == [
        "A: a.safetensors: 28 tensors, 1.5 KiB",
        "B: b.safetensors: 28 tensors, 1.4 KiB",
        "",
        "cast-equal, 11 tensors:",
        "  h.{1..11}.n  (4,)  float32 -> bfloat16  exact both ways",
        "",
        "changed, 11 tensors:",
        "  h.{1..11}.w  (4, 6)  float32  max 11 in h.11.w, 11 of 264 elements",
        "",
        "reshaped, 1 tensor:",
        "  t  (5, 3) -> (3, 5)  float32  equal when transposed",
        "",
        "resized, 1 tensor:",
        "  tok  (9, 4) -> (7, 4)  float32  the common (7, 4) is equal",
        "",
        "only in A, 1 tensor:",
        "  gone  (1,)  float32",
        "",
        "only in B, 1 tensor:",
        "  new  (1,)  float32",
        "",
        "different: 3 equal, 11 cast-equal, 11 changed, 1 reshaped, 1 resized, 1 only in A, "
        "1 only in B",
    ]
    monkeypatch.setenv("COLUMNS", "50")
    assert run("a.safetensors", "b.safetensors", "--all") == 1
    out = capsys.readouterr().out
    assert "equal, 3 tensors:\n  h.0.n  (4,)    float32\n  h.0.w  (4, 6)  float32\n" in out
    assert "\n      max 11 in h.11.w, 11 of 264 elements\n" in out


def test_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("a.safetensors", "b.safetensors", "--json") == 1
    data = json.loads(capsys.readouterr().out)
    assert data["equal"] is False and data["counts"]["changed"] == 11
    by_name = {t["name"]: t for t in data["tensors"]}
    assert len(by_name) == len(data["tensors"]) == 29
    assert by_name["h.3.w"] == {
        "name": "h.3.w",
        "status": "changed",
        "a": {"shape": [4, 6], "dtype": "float32"},
        "b": {"shape": [4, 6], "dtype": "float32"},
        "differing": 1,
        "max_abs": pytest.approx(3.0),
        "nan_differs": 0,
    }
    assert "b" not in by_name["gone"] and by_name["new"]["b"]["shape"] == [1]


def test_an_infinite_difference_is_still_json(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"w": torch.tensor([float("inf")])}, "a.safetensors")
    save_file({"w": torch.tensor([1.0])}, "b.safetensors")
    assert run("a.safetensors", "b.safetensors", "--json") == 1

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    (tensor,) = json.loads(capsys.readouterr().out, parse_constant=refuse)["tensors"]
    assert tensor["max_abs"] == "inf"


def test_exit_codes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("a.safetensors", "a.safetensors") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "equal: 28 equal"
    assert run("a.safetensors", "absent.safetensors") == 2
    assert "does not exist" in capsys.readouterr().err
    w = torch.tensor([1.0, 2.0])
    save_file({"w": w}, "x.safetensors")
    save_file({"w": w + 0.25}, "y.safetensors")
    save_file({"w": w.half()}, "z.safetensors")
    assert run("x.safetensors", "y.safetensors") == 1
    assert run("x.safetensors", "y.safetensors", "--atol", "0.25") == 0
    assert run("x.safetensors", "y.safetensors", "--atol", "0.2") == 1
    assert run("x.safetensors", "z.safetensors") == 1
    assert run("x.safetensors", "z.safetensors", "--allow-cast") == 0


def test_numbers_that_are_the_same_in_other_bits(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"w": torch.tensor([0.0, float("nan"), 1.0])}, "x.safetensors")
    save_file({"w": torch.tensor([-0.0, float("nan"), float("nan")])}, "y.safetensors")
    assert run("x.safetensors", "y.safetensors") == 1
    assert "the same numbers, 1 NaN in one alone, 2 of 3 elements" in capsys.readouterr().out


def test_with_rules(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    q, k = torch.randn(3, 4), torch.randn(3, 4)
    save_file({"q": q, "k": k}, "x.safetensors")
    save_file({"qk": torch.cat([q, k]), "more": torch.ones(1)}, "y.safetensors")
    part = '{src: %s, dst: qk, pattern: "h e -> (s h) e", at: {s: %d}, sizes: {s: 2}}'
    Path("r.yaml").write_text(f"rules: [{part % ('q', 0)}, {part % ('k', 1)}]")
    assert run("x.safetensors", "y.safetensors", "--rules", "r.yaml") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "different: 1 equal, 1 only in B"
    Path("r.yaml").write_text("rules: [{src: nothing, dst: qk}]")
    assert run("x.safetensors", "y.safetensors", "--rules", "r.yaml") == 2
    assert "no match" in capsys.readouterr().err
