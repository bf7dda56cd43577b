"""The harness of tests on several processes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests import ranks


def summed(rank: int, more: int) -> tuple[int, float, str | None]:
    value = torch.tensor([float(rank + more)])
    dist.all_reduce(value)
    return rank, value.item(), os.environ.get("PARAMKIT_TEST_ONLY")


def test_every_rank_gives_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMKIT_TEST_ONLY", "yes")
    for world in (2, 4):
        found = ranks.run(summed, world, 1)
        assert found == [(r, sum(range(1, world + 1)), "yes") for r in range(world)]
    assert ranks.leftover() == []


def fails(rank: int) -> None:
    print("said before")
    if rank == 1:
        raise ValueError("on purpose")


def test_an_error_is_told_with_its_rank() -> None:
    with pytest.raises(ranks.RankError, match=r"(?s)rank 1.*on purpose") as caught:
        ranks.run(fails, 2)
    assert "said before" in str(caught.value) and "rank 0:" not in str(caught.value)


def hangs(rank: int) -> None:
    if rank == 0:
        os.system("sleep 60 &")
        time.sleep(60)


def test_a_rank_that_hangs_is_killed_and_its_stack_shown() -> None:
    before = time.monotonic()
    with pytest.raises(ranks.RankError, match="still running") as caught:
        ranks.run(hangs, 2, timeout=4, group_timeout=3)
    assert time.monotonic() - before < 20
    assert "in hangs" in str(caught.value)
    assert ranks.leftover() == []


def dies(rank: int) -> str:
    if rank == 1:
        ranks.die(rank)
    return "alive"


def test_a_rank_may_die_on_purpose_and_no_other() -> None:
    assert ranks.run(dies, 2, dies={1}) == ["alive", None]
    with pytest.raises(ranks.RankError, match="ended with 3"):
        ranks.run(dies, 2)


def regroups(rank: int) -> float | None:
    if rank == 1:
        return None
    ranks.new_group("second", 0 if rank == 0 else 1, 2)
    value = torch.ones(1)
    dist.all_reduce(value)
    return value.item()


def test_a_new_group_of_fewer_ranks() -> None:
    assert ranks.run(regroups, 3) == [2.0, None, 2.0]


def test_torchrun_gives_the_output_and_ends_in_time(tmp_path: Path) -> None:
    good = tmp_path / "good.py"
    good.write_text("import os; print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])")
    said = ranks.torchrun(good, 2)
    assert "rank 0 of 2" in said and "rank 1 of 2" in said
    before = time.monotonic()
    slow = tmp_path / "slow.py"
    slow.write_text("import time; time.sleep(60)")
    with pytest.raises(ranks.RankError, match="longer than"):
        ranks.torchrun(slow, 2, timeout=6)
    assert time.monotonic() - before < 20
