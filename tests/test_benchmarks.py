"""The benchmarks' frame: cases are well-formed, both sides are checked, results become tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import table
from benchmarks.__main__ import main
from benchmarks.cases import CASES, Case, Work
from benchmarks.measure import run_case, verdict


def test_cases_have_names_and_targets() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert case.mode in ("interleaved", "hot")
        assert case.target > 0
        assert case.what


def made(wrong: bool = False, mode: str = "interleaved") -> Case:
    def make() -> Work:
        dst = torch.zeros(8)
        return Work(
            ours=lambda: dst.fill_(2.0 if wrong else 1.0),
            peer=lambda: dst.fill_(1.0),
            dsts=[dst],
            bytes=32,
        )

    return Case(name="made", what="made for the test", target=0.01, mode=mode, make=make)


@pytest.mark.parametrize("mode", ["interleaved", "hot"])
def test_a_case_is_timed(mode: str) -> None:
    outcome = run_case(made(mode=mode), quick=True)
    assert outcome.verdict == "met"
    assert outcome.ours is not None
    assert outcome.ours.samples >= 5
    assert outcome.ours.q1 <= outcome.ours.median <= outcome.ours.q3
    assert outcome.bytes == 32


def test_a_wrong_result_is_no_figure() -> None:
    outcome = run_case(made(wrong=True), quick=True)
    assert outcome.verdict == "error"
    assert "differs" in outcome.error
    assert outcome.ours is None


def test_verdicts() -> None:
    assert verdict(1.0, 1.1, 0.95) == "met"
    assert verdict(0.94, 0.96, 0.95) == "noise"
    assert verdict(0.94, 0.94, 0.95) == "missed"
    assert verdict(0.5, 2.0, 0.95) == "missed"


def test_durations() -> None:
    assert table.duration(418) == "418 ns"
    assert table.duration(4180) == "4.18 us"
    assert table.duration(41.8e6) == "41.8 ms"
    assert table.duration(999.6) == "1.00 us"


@pytest.mark.filterwarnings("ignore:paramkit runs on torch")
def test_from_command_line_to_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "results" / "here.json"
    assert main(["--only", "fill 4 KiB", "--quick", "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    assert [row["name"] for row in result["results"]] == ["fill 4 KiB"]
    assert result["machine"]["torch"] == torch.__version__
    capsys.readouterr()
    assert table.main([str(target)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("| case | paramkit |")
    assert "| fill 4 KiB |" in text


def test_choosing_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "replay*hot"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["--only", "no such case"]) == 2
