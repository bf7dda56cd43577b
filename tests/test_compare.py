"""Comparing sets of tensors, against the same worked out by hand on whole tensors."""

from __future__ import annotations

import math
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from paramkit import PlanError, Rule, SourceError
from paramkit import compare as module
from paramkit.compare import Compared, compare
from paramkit.sources import Stored, open_source


def one(a: Tensor, b: Tensor, **options: Any) -> Compared:
    (found,) = compare({"x": a}, {"x": b}, **options)
    return found


@pytest.fixture(params=["memory", "safetensors", "pt"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Tensors as they are, or in a file and lazy."""

    def make(tensors: dict[str, Tensor], side: str) -> dict[str, Any]:
        if request.param == "memory":
            return dict(tensors)
        path = tmp_path / f"{side}.{request.param}"
        if request.param == "pt":
            torch.save(tensors, path)
        else:
            save_file({n: t.clone().contiguous() for n, t in tensors.items()}, path)
        found = open_source(path, mmap=False)
        assert all(isinstance(t, Stored) for t in found.values())
        return found

    return make


@pytest.fixture(params=[1 << 6, 1 << 22])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that every tensor has several, and the usual ones."""
    monkeypatch.setattr(module, "PIECE", request.param)
    monkeypatch.setattr(module, "BLOCK", max(3, request.param >> 6))
    if request.param < 4096:
        monkeypatch.setattr(module, "SCRATCH", 48)


@pytest.mark.usefixtures("small")
def test_random_tensors(opened: Any) -> None:
    """Any shape and layout, with some elements changed: counted, and the largest difference found."""
    rng = random.Random(5)
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    expected = {}
    for k in range(40):
        shape = [rng.randint(1, 9) for _ in range(rng.randint(0, 4))]
        x = torch.randn(shape, dtype=rng.choice((torch.float32, torch.float64)))
        y = x.clone()
        flat = y.view(-1)
        for i in rng.sample(range(flat.numel()), rng.choice((0, 1, flat.numel() // 2))):
            flat[i] += rng.choice((-2.5, 0.25, 1e-3))
        if len(shape) > 1 and rng.random() < 0.5:
            order = rng.sample(range(len(shape)), len(shape))
            back = sorted(range(len(shape)), key=order.__getitem__)
            y = y.permute(order).contiguous().permute(back)
        a[f"t.{k}"], b[f"t.{k}"] = x, y
        apart = (x.double() - y.double()).abs()
        expected[f"t.{k}"] = (int((apart != 0).sum()), float(apart.max()))
    for c in compare(opened(a, "a"), opened(b, "b")):
        count, largest = expected[c.name]
        assert (c.status, c.differing) == ("changed" if count else "equal", count)
        assert (c.largest or 0.0) == largest


@pytest.mark.usefixtures("small")
def test_rules_against_the_same_in_torch(opened: Any) -> None:
    a = {f"h.{i}.{n}": torch.randn(6, 4) for i in range(3) for n in "qkv"}
    a |= {f"e.{i}": torch.randn(3, 5) for i in range(4)}
    rules = [
        Rule(f"h.{{i}}.{n}", "l.{i}.qkv", "h e -> e (s h)", at={"s": k})
        for k, n in enumerate("qkv")
    ]
    rules.append(Rule("e.{e}", "experts", "o i -> e i o"))
    b = {
        f"l.{i}.qkv": torch.cat([a[f"h.{i}.{n}"] for n in "qkv"]).t().contiguous() for i in range(3)
    }
    b["experts"] = torch.stack([a[f"e.{i}"].t() for i in range(4)])
    assert {c.status for c in compare(opened(a, "a"), opened(b, "b"), rules)} == {"equal"}
    b["l.1.qkv"][2, 3] += 0.5
    b["experts"] = b["experts"].transpose(1, 2).contiguous().transpose(1, 2)
    b["experts"][3, 4, 2] = 9
    found = {c.name: c for c in compare(opened(a, "a"), opened(b, "b"), rules)}
    assert found["l.0.qkv"].status == "equal"
    assert (found["l.1.qkv"].status, found["l.1.qkv"].differing) == ("changed", 1)
    assert found["l.1.qkv"].largest == pytest.approx(0.5)
    assert found["experts"].differing == 1


def test_rules_that_fill_and_leave_parts() -> None:
    rules = [
        Rule("q", "w", "h e -> (s h) e", at={"s": 0}, s=2),
        Rule(None, "w", "-> (s h) e", at={"s": 1}, fill=0, s=2, h=2, e=3),
        Rule("tok", "tok", rows="overlap"),
    ]
    q, tok = torch.randn(2, 3), torch.randn(4, 3)
    b = {"w": torch.cat([q, torch.zeros(2, 3)]), "tok": torch.cat([tok, torch.ones(2, 3)])}
    found = {c.name: c for c in compare({"q": q, "tok": tok}, b, rules)}
    assert found["w"].status == "equal"
    assert found["tok"].status == "resized" and "(4, 3) is equal" in found["tok"].note
    b["w"][3, 1] = 2
    assert compare({"q": q, "tok": tok}, b, rules)[0].differing == 1


def test_rules_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(PlanError, match="no match"):
        compare({"a": torch.ones(2)}, {"a": torch.ones(2)}, [Rule("b", "c")])


def test_not_a_number() -> None:
    x = torch.tensor([1.0, math.nan, math.inf, -0.0])
    assert one(x, x.clone()).status == "equal"
    other = x.clone()
    other.view(torch.int32)[1] += 1  # another payload
    found = one(x, other)
    assert (found.status, found.differing, found.nan_differs, found.largest) == (
        "changed",
        1,
        0,
        None,
    )
    found = one(x, torch.tensor([math.nan, math.nan, math.inf, 0.0]))
    assert (found.differing, found.nan_differs, found.largest) == (2, 1, 0.0)
    found = one(x, torch.tensor([1.0, math.nan, -math.inf, -0.0]))
    assert (found.differing, found.largest) == (1, math.inf)
    assert one(x, torch.tensor([1.0, math.nan, 3.0, -0.0]), atol=1e30).status == "changed"
    # After a conversion any NaN is any NaN.
    assert one(other, other.bfloat16()).status == "cast-equal"


def test_conversions_in_either_direction() -> None:
    x = torch.tensor([1.0, 1.0 + 2**-20, 3e38])
    assert one(x, x.bfloat16()).note == "A converted is B"
    assert one(x.bfloat16(), x).note == "B converted is A"
    assert one(x.bfloat16(), x.bfloat16().float()).note == "exact both ways"
    assert one(torch.arange(5), torch.arange(5.0)).status == "cast-equal"
    found = one(x, (x + torch.tensor([0.0, 0.5, 0.0])).bfloat16())
    assert found.status == "changed" and found.a_dtype != found.b_dtype
    assert found.largest is not None and found.largest > 2e35  # of 3e38, which bfloat16 rounds
    with_parts = torch.tensor([1 + 2j, 3 + 0j])
    assert one(torch.tensor([1.0, 3.0]), with_parts).status == "changed"
    assert one(torch.tensor([1.0, 3.0]), with_parts.real + 0j).status == "cast-equal"


@pytest.mark.parametrize(
    ("dtype", "x", "y", "apart"),
    [
        (torch.int64, 1 << 62, (1 << 62) + 1, 1.0),
        (torch.int64, -5, 7, 12.0),
        (torch.uint64, (1 << 63) + 2, (1 << 63) + 5, 3.0),
        (torch.uint8, 3, 250, 247.0),
        (torch.bool, False, True, 1.0),
        (torch.complex128, 3 + 4j, 0j, 5.0),
        (torch.float8_e4m3fn, 1.0, 1.5, 0.5),
        (torch.float64, 1e300, -1e300, 2e300),
    ],
)
def test_largest_difference(dtype: torch.dtype, x: Any, y: Any, apart: float) -> None:
    # From a dtype that holds the number exactly: not every dtype can be made from a list.
    plain = {torch.float8_e4m3fn: torch.float32}.get(dtype, dtype)
    a, b = (torch.tensor([0, v], dtype=plain).to(dtype) for v in (x, y))
    found = one(a, b)
    assert (found.differing, found.largest) == (1, apart)


def test_close_within_a_tolerance() -> None:
    x = torch.zeros(3)
    assert one(x, x + 0.5, atol=0.5).status == "close"
    assert one(x, x + 0.5, atol=0.49).status == "changed"


@pytest.mark.usefixtures("small")
def test_other_shapes(opened: Any) -> None:
    x = torch.randn(4, 6, 5)
    b = {
        "flat": x.reshape(24, 5),
        "moved": x.permute(2, 0, 1).contiguous(),
        "other": torch.randn(6, 4, 5),
        "square": torch.randn(7, 7),
        "rows": torch.randn(9, 3),
        "empty": torch.zeros(0, 3),
    }
    a = {"flat": x, "moved": x, "other": x, "square": b["square"].t().contiguous()}
    a |= {"rows": b["rows"][:5].clone(), "empty": torch.zeros(3, 0)}
    found = {c.name: c for c in compare(opened(a, "a"), opened(b, "b"))}
    assert {n: (c.status, c.note) for n, c in found.items()} == {
        "flat": ("reshaped", "equal when flattened"),
        "moved": ("reshaped", "equal when permuted (2, 0, 1)"),
        "other": ("reshaped", "other values"),
        "square": ("changed", "equal when transposed"),
        "rows": ("resized", "the common (5, 3) is equal"),
        "empty": ("reshaped", "empty"),
    }


def test_ties_and_the_same_file_are_not_read_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = torch.randn(50)
    torch.save({"a": w, "b": w}, tmp_path / "a.pt")
    torch.save({"a": w + 1, "b": w + 1}, tmp_path / "b.pt")
    reads: list[int] = []
    real = Stored.read_into

    def counting(self: Stored, begin: int, end: int, out: Tensor) -> None:
        reads.append(end - begin)
        real(self, begin, end, out)

    monkeypatch.setattr(Stored, "read_into", counting)
    a = open_source(tmp_path / "a.pt", mmap=False)
    assert {c.status for c in compare(a, open_source(tmp_path / "a.pt", mmap=False))} == {"equal"}
    assert not reads
    again = {"a": w, "b": w}
    assert {c.status for c in compare(a, again)} == {"equal"}
    assert reads == [200]


def test_progress_ends_at_the_total() -> None:
    a = {"a": torch.randn(5000), "b": torch.randn(3, 2), "c": torch.ones(4)}
    b = {"a": a["a"] + 1, "b": torch.randn(2, 3), "c": torch.ones(4), "d": torch.ones(2)}
    seen: list[tuple[int, int]] = []
    compare(a, b, progress=lambda done, total: seen.append((done, total)))
    total = sum(t.nbytes for t in b.values())
    assert seen[-1] == (total, total)
    assert [d for d, _ in seen] == sorted({d for d, _ in seen})


def test_what_cannot_be_compared_is_listed() -> None:
    sparse = torch.eye(3).to_sparse()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are deprecated, and still there
        quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    with pytest.raises(SourceError) as caught:
        compare({"s": sparse, "fine": torch.ones(2)}, {"q": quantized})
    assert [f.name for f in caught.value.findings] == ["s", "q"]


def test_a_file_that_changes_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(9)}, path)
    a = open_source(path, mmap=False)
    save_file({"w": torch.ones(9)}, path)
    with pytest.raises(SourceError, match="not what it was"):
        compare(a, {"w": torch.ones(9)})
