"""The harness of tests on several processes: results, errors, and that nothing outlives a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import ranks

LONG = 600.0  # seconds that no test waits for


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    assert ranks.leftover() == []


def running(word: str) -> list[int]:
    """Processes that have a word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def sleepers(seconds: str, count: int) -> None:
    """Start processes that a kill of their parent, or of its group, does not reach."""
    for _ in range(count):
        subprocess.Popen(["sleep", seconds], start_new_session=True)
        # The shell ends at once: its child has no parent in the test.
        subprocess.run(f"sleep {seconds} &", shell=True, check=True)


# ---- results -------------------------------------------------------------------------------------


def summed(rank: int, more: int) -> tuple[int, float, int]:
    value = torch.tensor([float(rank + more)])
    dist.all_reduce(value)
    return rank, value.item(), torch.get_num_threads()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_gives_its_result(world: int) -> None:
    found = ranks.run(summed, world, 1)
    assert found == [(r, sum(range(1, world + 1)), 1) for r in range(world)]


def tensors(rank: int, given: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"given": given + rank, "large": torch.full((1 << 22,), rank, dtype=torch.int32)}


def test_results_may_be_large_and_hold_tensors() -> None:
    for rank, found in enumerate(ranks.run(tensors, 2, torch.arange(3))):
        assert found["given"].tolist() == [rank, rank + 1, rank + 2]
        assert found["large"].shape == (1 << 22,) and (found["large"] == rank).all()


def surroundings(rank: int) -> tuple[str | None, str | None, str | None, str]:
    env = os.environ
    here = str(Path.cwd())
    return env.get("PARAMKIT_TEST_A"), env.get("PARAMKIT_TEST_B"), env.get("HOME"), here


def test_the_environment_at_the_call_reaches_the_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ranks.run(surroundings, 1)  # the server runs, with the environment of before
    monkeypatch.setenv("PARAMKIT_TEST_A", "set later")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    expected = ("set later", "of the call", None, str(tmp_path))
    assert ranks.run(surroundings, 2, env={"PARAMKIT_TEST_B": "of the call"}) == [expected] * 2
    assert "PARAMKIT_TEST_B" not in os.environ


def test_the_server_has_everything_and_one_thread() -> None:
    server = ranks._started()
    # What threads hold at a fork stays locked in the ranks.
    assert server.hello == {"missing": {}, "threads": 1}
    ranks.run(surroundings, 2)
    assert ranks._started() is server


def test_a_target_that_cannot_be_imported_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be imported"):
        ranks.run(lambda rank: rank, 2)
    with pytest.raises(ValueError, match="ranks below"):
        ranks.run(surroundings, 2, dies={2})


# ---- errors --------------------------------------------------------------------------------------


def fails(rank: int, failing: list[int]) -> None:
    os.system("echo said by a child")
    if rank in failing:
        raise ValueError(f"on purpose, {rank}")


@pytest.mark.parametrize("failing", [[1], [0, 2]])
def test_errors_are_told_with_their_ranks(failing: list[int]) -> None:
    with pytest.raises(ranks.RankError) as caught:
        ranks.run(fails, 3, failing)
    assert sorted(caught.value.failed) == failing
    for rank, text in caught.value.failed.items():
        assert f"ValueError: on purpose, {rank}" in text and "in fails" in text
        assert "said by a child" in text and text in str(caught.value)
        assert f"rank {rank}:" in str(caught.value)


def unpicklable(rank: int) -> Any:
    return rank if rank == 0 else (lambda: rank)


def test_a_result_that_cannot_be_sent_is_an_error() -> None:
    with pytest.raises(ranks.RankError) as caught:
        ranks.run(unpicklable, 2)
    assert list(caught.value.failed) == [1] and "pickle" in caught.value.failed[1]


def leaves(rank: int) -> None:
    if rank == 1:
        raise RuntimeError("the first")
    dist.all_reduce(torch.ones(1))


def test_the_others_do_not_wait_for_a_rank_that_failed() -> None:
    with pytest.raises(ranks.RankError, match="the first") as caught:
        ranks.run(leaves, 2, timeout=LONG, group_timeout=LONG)
    assert sorted(caught.value.failed) == [0, 1]


# ---- ranks that hang or die ----------------------------------------------------------------------


def hangs(rank: int, seconds: str) -> None:
    print("said before")
    if rank != 1:
        sleepers(seconds, 1)
        time.sleep(LONG)


def test_ranks_that_hang_are_killed_and_their_stacks_shown() -> None:
    with pytest.raises(ranks.RankError, match=r"still running after 3 s") as caught:
        ranks.run(hangs, 3, "600.1", timeout=3)
    assert sorted(caught.value.failed) == [0, 2]
    for text in caught.value.failed.values():
        assert "in hangs" in text and "said before" in text
    assert running("600.1") == []


def waits(rank: int) -> None:
    if rank == 0:
        dist.recv(torch.zeros(1), src=1)  # in C++, without the interpreter's lock
    time.sleep(LONG)


def test_the_stack_of_a_rank_that_waits_for_another() -> None:
    with pytest.raises(ranks.RankError) as caught:
        ranks.run(waits, 2, timeout=3)
    assert "in waits" in caught.value.failed[0] and "in recv" in caught.value.failed[0]


def ends(rank: int, how: str) -> str:
    if rank == 1:
        if how == "die":
            ranks.die(rank)
        if how == "exit":
            os._exit(3)
        os.kill(os.getpid(), getattr(signal, how))
    return "alive"


HOWS = {
    "die": "ended with 3",
    "exit": "ended with 3",
    "SIGKILL": "by SIGKILL",
    "SIGSEGV": "by SIGSEGV",
}


@pytest.mark.parametrize("how", HOWS)
def test_a_rank_may_die_on_purpose_and_no_other(how: str) -> None:
    assert ranks.run(ends, 2, how, timeout=LONG, dies={1}) == ["alive", None]
    with pytest.raises(ranks.RankError, match=HOWS[how]) as caught:
        ranks.run(ends, 2, how, timeout=LONG)
    assert list(caught.value.failed) == [1]


def test_a_rank_that_was_to_die_must() -> None:
    with pytest.raises(ranks.RankError, match="was to end without a result") as caught:
        ranks.run(ends, 2, "die", dies={0, 1})
    assert list(caught.value.failed) == [0]
    with pytest.raises(ranks.RankError, match="on purpose"):
        ranks.run(fails, 2, [1], dies={1})


def regroups(rank: int) -> float | None:
    if rank == 1:
        return None
    ranks.new_group("second", 0 if rank == 0 else 1, 2)
    value = torch.ones(1)
    dist.all_reduce(value)
    return value.item()


def test_a_new_group_of_fewer_ranks() -> None:
    assert ranks.run(regroups, 3) == [2.0, None, 2.0]


# ---- nothing stays -------------------------------------------------------------------------------


def starts(rank: int, seconds: str) -> int:
    sleepers(seconds, 2)
    return len(running(seconds))


def test_what_a_rank_started_is_killed_with_the_run() -> None:
    assert min(ranks.run(starts, 2, "600.2")) >= 2
    assert running("600.2") == []


def lasts(rank: int, seconds: str, folder: str) -> None:
    sleepers(seconds, 1)
    Path(folder, f"{rank}.pid").write_text(f"{os.getpid()} {os.getppid()}")
    time.sleep(LONG)


ASKS = """
from tests import ranks, test_ranks
ranks.run(test_ranks.lasts, 2, {seconds!r}, {folder!r}, timeout=600.0)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_all_ends_with_the_process_that_asked(number: signal.Signals, tmp_path: Path) -> None:
    seconds = f"600.3{int(number)}"
    env = {**os.environ, "PYTHONPATH": str(ranks.ROOT), "TMPDIR": str(tmp_path)}
    asks = subprocess.Popen(
        [sys.executable, "-c", ASKS.format(seconds=seconds, folder=str(tmp_path))],
        env=env,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # Where the suite runs in the background, interrupts are ignored, and so by what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        until(lambda: len(running(seconds)) == 2 * 2 and len([*tmp_path.glob("*.pid")]) == 2)
        assert len([*tmp_path.glob("ranks*")]) == 1
        pids = [int(p) for f in tmp_path.glob("*.pid") for p in f.read_text().split()]
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    finally:
        asks.send_signal(number)
        asks.communicate()
    assert asks.returncode == -number
    if number == signal.SIGINT:  # it has cleared up before it ended
        assert running(seconds) == []
    until(lambda: not running(seconds) and not any(Path(f"/proc/{p}").exists() for p in pids))
    until(lambda: not [*tmp_path.glob("ranks*")])


def ends_another(rank: int, seconds: str, which: str) -> None:
    sleepers(seconds, 1)
    supervisor = os.getppid()
    server = int(Path(f"/proc/{supervisor}/stat").read_text().rpartition(")")[2].split()[1])
    dist.barrier()
    if rank == 0:
        os.kill(supervisor if which == "supervisor" else server, signal.SIGKILL)
    time.sleep(LONG)


@pytest.mark.parametrize("which", ["supervisor", "server"])
def test_all_ends_without_its_supervisor_or_its_server(which: str) -> None:
    seconds = "600.4" if which == "server" else "600.5"
    with pytest.raises(ranks.RankError, match="supervisor of the run is gone"):
        ranks.run(ends_another, 2, seconds, which, timeout=LONG)
    until(lambda: not running(seconds) and not ranks.leftover())
    assert ranks.run(summed, 2, 0)[0][1] == 1.0  # with another server if need be


def test_leftover_sees_a_process_of_a_run() -> None:
    child = subprocess.Popen(
        ["sleep", "600.6"], env={**os.environ, ranks.MARK: ranks._mark()}, start_new_session=True
    )
    try:
        until(lambda: ranks.leftover() == [child.pid])
    finally:
        child.kill()
        child.wait()


# ---- torchrun ------------------------------------------------------------------------------------

SCRIPT = """
import os, subprocess, sys, time
rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
import tests
print("rank", rank, "of", world, sys.argv[1:], flush=True)
subprocess.Popen(["sleep", "600.7"], start_new_session=True)
if "last" in sys.argv:
    time.sleep(600)
sys.exit(7 if "fail" in sys.argv and rank == "1" else 0)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_torchrun_gives_the_output(script: Path) -> None:
    said = ranks.torchrun(script, 2, "an argument")
    # The two print at once, and their words may mix.
    assert said.count("rank") == said.count("['an argument']") == 2
    assert running("600.7") == []


def test_torchrun_tells_a_failure(script: Path) -> None:
    with pytest.raises(ranks.RankError, match=r"(?s)script.py ended with 1.*exitcode *: 7"):
        ranks.torchrun(script, 2, "fail")
    assert running("600.7") == []


def test_torchrun_ends_in_time(script: Path) -> None:
    # It may not have come to the script yet, on a busy machine.
    with pytest.raises(ranks.RankError, match=r"(?s)longer than 6 s.*most recent call first"):
        ranks.torchrun(script, 2, "last", timeout=6)
    assert running("600.7") == [] and running(str(script)) == []
