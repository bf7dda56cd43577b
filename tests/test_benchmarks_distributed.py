"""The benchmark of several processes: cases run in their tiny form, verdicts, and what a bad rank leaves.

Nothing here looks at a time.
"""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks import table
from benchmarks.distributed.cases import CASES
from benchmarks.distributed.ranks import launch
from benchmarks.distributed.registry import GROUP
from benchmarks.distributed.result import lines, result, rows
from benchmarks.distributed.targets import PYTHON, READ, STAGING, TARGETS
from benchmarks.targets import wanted

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)

SECONDS = 120.0  # until the processes are killed

# The table of what is promised.
PROMISED = {
    "small from rank 0": ">= 5x",
    "large from rank 0": ">= 1.2x; staging <= 256 MiB",
    "files into 2-D": ">= 2x; bytes read, of its share <= 1x",
    "sync step": ">= 10x; Python time <= 1%",
    "reshard small": ">= 1.5x",
    "reshard medium": ">= 1.5x",
    "reshard large": ">= 1.5x",
}


def test_the_targets_are_those_promised() -> None:
    assert {case.name: wanted(case.targets) for case in CASES} == PROMISED
    assert set(TARGETS) == set(PROMISED)


def test_every_case_leaves_what_torch_does(tmp_path: Path) -> None:
    """On four ranks; a case whose sides leave other bits raises, and is in error."""
    found = launch([case.name for case in CASES], "tiny", tmp_path, SECONDS)
    made = [row for case in CASES for row in rows(case, found[case.name])]
    assert [row["name"] for row in made if row["verdict"]] == list(PROMISED)
    for row in made:
        assert row["verdict"] != "error", row["detail"]
        assert set(row["sides"]) == {"paramkit", "torch"} and row["bytes"] > 0
        assert row["ratio"]["value"] > 0
    facts = {row["name"]: row["facts"] for row in made}
    assert 0 < facts["large from rank 0"][STAGING.what] <= STAGING.value
    assert facts["sync step"][PYTHON.what] > 0
    # Gaps of such short rows are read along, so it is more than the share here.
    assert facts["files into 2-D"][READ.what] >= 1
    told = result(made, {"cpu": "some", "load": 0.0}, "tiny")
    path = tmp_path / "result.json"
    path.write_text(json.dumps(told))
    shown = table.rows(table.load(path)["cases"])
    assert len(shown) == len(made)
    assert any(line.startswith("files into 2-D: bytes read") for line in lines(made))
    assert {row["group"] for row in made} == {GROUP}
    assert not multiprocessing.active_children()
    assert not list(tmp_path.glob("ranks-*"))


def test_processes_that_do_not_end_are_killed(tmp_path: Path) -> None:
    found = launch(["sync step"], "tiny", tmp_path, 1.0)
    assert found == {"sync step": {"error": "no end after 1 s"}}
    assert not multiprocessing.active_children()


def test_an_error_of_a_rank_is_the_error_of_the_case(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "sync step")
    found = launch([case.name], "no such size", tmp_path, SECONDS)
    (row,) = rows(case, found[case.name])
    assert row["verdict"] == "error" and "no such size" in row["detail"]
    assert not multiprocessing.active_children()
