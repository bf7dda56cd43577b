"""Damaged files by the thousand: a clear error or the right tensors, and nothing else.

The safetensors library is the reference: what it refuses is refused here. The other way round, what only
we refuse is one of a few things that the format does not have.
"""

from __future__ import annotations

import copy
import json
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from paramkit.errors import SourceError
from paramkit.sources import Stored, open_source, opening
from paramkit.sources.safetensors_file import MAX_HEADER

# What the library lets pass, and we do not.
STRICTER = re.compile(
    r"is there twice"  # the last one wins in the library
    r"|is described by"  # a field that the format does not have, or a list in the place of an object
    r"|it begins with"  # white space before the brace
    r"|elements that share bytes"
    r"|sizes that memory can have|at most 64"  # the library opens the file, and fails at the tensor
)


def packed(header: bytes | str, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def theirs(path: Path) -> dict[str, tuple[torch.dtype, torch.Size, Tensor]] | None:
    """What the library reads, as dtype, shape and bytes by name; None where it refuses."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            # Copied as bytes: a copy of a bool that is neither 0 nor 1 is another one.
            return {n: (t.dtype, t.shape, as_bytes(t).clone()) for n, t in tensors.items()}
    except Exception:  # of several types
        return None


def compare(path: Path, content: bytes) -> str:
    """Read it both ways. Returns "same", "refused" or "stricter"."""
    path.write_bytes(content)
    expected = theirs(path)
    try:
        ours = open_source(path, mmap=False)
    except SourceError as error:
        assert str(path) in str(error)
        assert len(str(error)) < 2000 + len(str(path))
        with pytest.raises(SourceError):
            open_source(path, mmap=True)
        if expected is None:
            return "refused"
        assert STRICTER.search(str(error)), f"the library reads it: {content!r}\n{error}"
        return "stricter"
    assert expected is not None, f"the library refuses it: {content!r}"
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert isinstance(tensor, Stored)
        assert (tensor.dtype, tensor.shape) == expected[name][:2]
        assert torch.equal(as_bytes(tensor.load()), expected[name][2])
    return "same"


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def some_header(rng: random.Random) -> tuple[dict[str, Any], bytes]:
    """A header that is right, and data for it."""
    sizes = {"F32": 4, "BF16": 2, "U8": 1, "I64": 8, "BOOL": 1, "F8_E4M3": 1, "C64": 8}
    header: dict[str, Any] = {}
    if rng.random() < 0.4:
        header["__metadata__"] = {"format": "pt"}
    at = 0
    for k in range(rng.randint(0, 4)):
        tag = rng.choice(list(sizes))
        shape = [rng.choice((0, 1, 2, 3)) for _ in range(rng.randint(0, 3))]
        size = sizes[tag] * torch.Size(shape).numel()
        header[f"layer.{k}"] = {"dtype": tag, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return header, bytes(rng.randrange(2) for _ in range(at))


ODD = [0, 1, -1, -0.0, 2, 7, 8, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 1.0, 1e3, True, False,
       None, "", "F32", "F4", "F6_E2M3", "F8_E8M0", "C128", "é", [], [0], [0, 4], {}, {"dtype": "F32"},
       [[1]], "x" * 300]  # fmt: skip


def mutate(rng: random.Random, header: dict[str, Any]) -> None:
    """Replace, remove, add or repeat something at any depth."""
    names = list(header)
    where: Any = header
    if names and rng.random() < 0.9:
        where = header[rng.choice(names)]
        if isinstance(where, dict) and rng.random() < 0.6:
            inner = [v for v in where.values() if isinstance(v, list) and v]
            where = rng.choice(inner) if inner else where
    value = copy.deepcopy(rng.choice(ODD))
    if isinstance(where, list):
        action = rng.randrange(4)
        if action == 0 or not where:
            where.append(value)
        elif action == 1:
            where.pop()
        elif action == 2:
            at = rng.randrange(len(where))
            where[at] = where[at] + rng.choice((-1, 1, 4)) if type(where[at]) is int else value
        else:
            where[rng.randrange(len(where))] = value
    elif isinstance(where, dict):
        keys = list(where)
        if keys and rng.random() < 0.3:
            del where[rng.choice(keys)]
        elif keys and rng.random() < 0.8:
            where[rng.choice(keys)] = value
        else:
            where[rng.choice(("extra", "dtype", "__metadata__", "layer.0"))] = value


def bend(rng: random.Random, raw: bytes) -> bytes:
    """Change some bytes of a text."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data)) if data else 0
        action = rng.randrange(5)
        if action == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif action == 1 and data:
            del data[at]
        elif action == 2:
            data[at:at] = rng.choice(
                (b"0", b"9", b"-", b" ", b"}", b"]", b",", b"\0", b'"', b"e1", b".0", b"\\ud800")
            )
        elif action == 3 and data:
            end = rng.randrange(at, min(len(data), at + 40)) + 1
            data[at:at] = data[at:end]
        elif data:
            data[at] = rng.choice(b'0123456789-{}[],:" ')
    return bytes(data)


@pytest.mark.parametrize("seed", range(6))
def test_mutated_headers(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "m.safetensors"
    counts = dict.fromkeys(("same", "refused", "stricter"), 0)
    for _ in range(700):
        header, data = some_header(rng)
        how = rng.randrange(6)
        if how in (0, 1, 2):
            for _ in range(rng.randint(1, 2)):
                mutate(rng, header)
        raw = json.dumps(header, separators=rng.choice(((",", ":"), (", ", ": ")))).encode()
        if how in (2, 3):
            raw = bend(rng, raw)
        raw += b" " * rng.choice((0, 0, 7))
        content = packed(raw, data)
        if how == 4:
            content = content[: rng.randrange(len(content) + 1)]
        if how == 5:
            content = bend(rng, content)
        counts[compare(path, content)] += 1
    # It bites, and it does not refuse everything.
    assert counts["same"] > 15 and counts["refused"] > 200, counts


@pytest.mark.parametrize(
    "edit",
    [
        '{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}',
        '{"a":{"dtype":"F32","shape":[0],"data_offsets":[-0,0]}}',
        '{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4e0]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[18446744073709551612,18446744073709551616]}}',
        '{"a":{"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[9223372036854775808,0],"data_offsets":[0,0]}}',
        '{"a":{"dtype":"F32","shape":[0,9223372036854775807],"data_offsets":[0,0]}}',
        '{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[' + ",".join(["1"] * 65) + '],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"f32","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":null,"shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":"1","data_offsets":[0,4]}}',
        '{"a":["F32",[1],[0,4]]}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"scale":2}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"I32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
        '{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
        '{"a":{"dtype":"U8","shape":[3],"data_offsets":[1,4]}}',
        '{"__metadata__":{"a":1},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"__metadata__":[],"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"__metadata__":{"x":{}},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        ' {"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '\ufeff{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}\0\0',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}{}',
        '{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a\nb":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,4]}}',
        '{"a":' * 100_000,
        '{"a":' + "[" * 100_000,
        '{"a":{"dtype":"F32","shape":' + "[" * 200 + "]" * 200 + ',"data_offsets":[0,4]}}',
        "[]", "null", '"a"', "{", "", "}", "{]",
    ],
)  # fmt: skip
def test_headers_that_must_be_refused(tmp_path: Path, edit: str) -> None:
    assert compare(tmp_path / "m.safetensors", packed(edit, b"\0\0\x80\x3f")) != "same"


@pytest.mark.parametrize(
    "header",
    [
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}      ',
        '{"__metadata__":null,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"__metadata__":{},"a":{"data_offsets":[0,4],"shape":[1,1],"dtype":"I32"}}',
        '{"b":{"dtype":"U8","shape":[3],"data_offsets":[1,4]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        '{"":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"\\u00e9\\ud83d\\ude00":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"z":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"z":{"dtype":"F32","shape":[0],"data_offsets":[4,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[0,4]}}',
    ],
)  # fmt: skip
def test_headers_that_must_be_read(tmp_path: Path, header: str) -> None:
    assert compare(tmp_path / "m.safetensors", packed(header, b"\0\1\0\1")) == "same"


def test_huge_headers(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for length in (9, 1 << 20, MAX_HEADER, MAX_HEADER + 1, 1 << 40, 2**63 - 1, 2**63, 2**64 - 1):
        assert compare(path, packed("{}", length=length)) == "refused"
    # A sparse file is as long as the header says it is.
    for length in (MAX_HEADER - 1, MAX_HEADER + 1):
        path.write_bytes(packed("{}", length=length))
        with path.open("r+b") as file:
            file.truncate(8 + length)
        with pytest.raises(SourceError, match="header"):
            open_source(path, mmap=False)


# ---- indexes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_mutated_indexes(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {f"t{k}": torch.full((2,), float(k)) for k in range(4)}
    for k in range(2):
        names = [f"t{2 * k}", f"t{2 * k + 1}"]
        save_file({n: tensors[n] for n in names}, folder / f"m{k}.safetensors")
        save_file({n: -tensors[n] for n in names}, tmp_path / f"m{k}.safetensors")  # outside
    right = {"metadata": {}, "weight_map": {f"t{k}": f"m{k // 2}.safetensors" for k in range(4)}}
    path = folder / "model.safetensors.index.json"

    opened: list[Path] = []
    real = opening.open_file

    def recording(file: Path, mmap: bool) -> Any:
        opened.append(file)
        return real(file, mmap)

    monkeypatch.setattr(opening, "open_file", recording)
    odd = [*ODD, "../m0.safetensors", f"{tmp_path}/m0.safetensors", "m0.safetensors", "./m0.safetensors", "m1.bin",
           "/etc/passwd", "..", ".", "x/../m0.safetensors", "model.safetensors.index.json", "a\0b", "~/m"]  # fmt: skip
    counts = {"read": 0, "refused": 0}
    for _ in range(500):
        index = json.loads(json.dumps(right))
        raw = json.dumps(index).encode()
        how = rng.randrange(3)
        if how == 0:
            names = list(index["weight_map"])
            index["weight_map"][rng.choice([*names, "t9", ""])] = copy.deepcopy(rng.choice(odd))
            raw = json.dumps(index).encode()
        elif how == 1:
            raw = bend(rng, raw)
        elif rng.random() < 0.5:
            raw = raw[: rng.randrange(len(raw))]
        path.write_bytes(raw)
        try:
            result = open_source(path, mmap=False)
        except SourceError as error:
            assert error.findings
            str(error).encode()  # can be printed
            counts["refused"] += 1
            continue
        counts["read"] += 1
        assert result.keys() == tensors.keys()
        for name, tensor in result.items():
            assert isinstance(tensor, Stored)
            assert torch.equal(tensor.load(), tensors[name])
    assert counts["read"] > 40 and counts["refused"] > 100, counts
    # Nothing outside the folder was so much as looked at.
    assert opened
    for file in opened:
        assert file.is_relative_to(folder) and ".." not in file.parts, file


# ---- checkpoints of torch.save -------------------------------------------------------------------


def flip(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def double(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at : at + 64] + data[at:]


def test_a_record_that_says_it_is_encrypted(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(3)}, path)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(b"m/byteorder"))
    data[at + 8] |= 1
    path.write_bytes(data)
    for mmap in (False, True):
        with pytest.raises(SourceError, match="encryption"):
            open_source(path, mmap=mmap)


@pytest.mark.parametrize("damage", [flip, cut, double], ids=lambda f: f.__name__)
@pytest.mark.parametrize("mmap", [False, True], ids=["pread", "mmap"])
def test_damaged_checkpoints(
    tmp_path: Path, damage: Callable[[random.Random, bytes], bytes], mmap: bool
) -> None:
    rng = random.Random(1)
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(3, 4), "b": torch.ones(2, dtype=torch.int64)}, path)
    right = path.read_bytes()
    refused = 0
    for _ in range(300):
        path.write_bytes(damage(rng, right))
        try:
            opened = open_source(path, mmap=mmap)
            for tensor in opened.values():
                # Every byte can be had.
                tensor.load() if isinstance(tensor, Stored) else tensor.clone()
        except SourceError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 20
