"""The examples do with torchrun what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.ranks import ROOT, torchrun

EXAMPLES = ROOT / "examples"
TIMEOUT = 240.0


def test_fsdp2_from_safetensors() -> None:
    said = torchrun(EXAMPLES / "fsdp2_from_safetensors.py", 2, timeout=TIMEOUT)
    # Float32 in the files, bfloat16 in the model: half the bytes are written.
    assert "rank 0: 10 tensors written by 10 writes: 2,097,152 elements, 4.0 MiB" in said
    read = re.findall(r"^rank (\d) read ([\d,]+) of 16,777,216 bytes$", said, re.MULTILINE)
    assert read == [("0", "8,388,608"), ("1", "8,388,608")]  # half each, not a byte more
    assert said.count("checked: 10 parameters have the values of the checkpoint") == 1
    if _has_rich():
        assert said.count("loading") == 1 and "100%" in said  # progress on one rank alone


def test_tp_grouped_qkv() -> None:
    said = torchrun(EXAMPLES / "tp_grouped_qkv.py", 4, timeout=TIMEOUT)
    # The shards are cut through the middle of a head, and of a group.
    for rank in range(4):
        assert f"rank {rank}: 36 rows of qkv, 4.5 heads; different: nothing" in said
    assert said.count("checked: every shard has the bits of the single-process transplant") == 1


@pytest.mark.parametrize(
    ("world", "options"), [(4, ("--checksum", "both")), (3, ())], ids=["sharded", "one trainer"]
)
def test_trainer_to_replicas(world: int, options: tuple[str, ...]) -> None:
    said = torchrun(EXAMPLES / "trainer_to_replicas.py", world, *options, timeout=TIMEOUT)
    rows = [line.split() for line in said.splitlines() if re.match(r" *\d+ ", line)]
    assert [int(row[0]) for row in rows] == list(range(1, 11))
    assert [int(row[2]) for row in rows] == list(range(1, 11))  # versions
    losses = [float(row[1]) for row in rows]
    assert len(set(losses)) > 5  # it trains
    # 4 layers of three matrices of 512 x 128 in bfloat16, to two replicas, from each trainer its share.
    assert {row[3] for row in rows} == {f"{4 * 3 * 512 * 128 * 2 * 2 / (world - 2) / 2**20:.2f}"}
    for rank in (world - 2, world - 1):
        assert f"replica on rank {rank}: version 10, whole, bits as expected" in said


def test_every_example_is_tested_and_says_how_to_run_it() -> None:
    tested = Path(__file__).read_text(encoding="utf-8")
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert len(scripts) >= 3
    for path in scripts:
        text = path.read_text(encoding="utf-8")
        assert f"examples/{path.name}" in text.split('"""')[1], f"{path.name}: how is it run?"
        assert f'"{path.name}"' in tested, f"{path.name} has no test here"


def _has_rich() -> bool:
    from importlib.util import find_spec

    return find_spec("rich") is not None
