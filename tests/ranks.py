"""Tests on several processes of a gloo group, each run with a hard timeout.

Importing torch takes seconds; so the processes are forked from a server that has imported it once, and
has done nothing with it. Whatever happens in a test, no process outlives it.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import faulthandler
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["RankError", "leftover", "new_group", "run", "torchrun"]

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "PARAMKIT_TEST_RANKS"
MARK = "PARAMKIT_TEST_MARK"
_PRELOADED = [
    "torch",
    "torch.distributed",
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "paramkit.distributed",
]
_started: list[Any] = []


class RankError(AssertionError):
    """What went wrong on the ranks, with their tracebacks and what they printed."""


def run(
    target: Callable[..., Any],
    world: int = 2,
    *args: Any,
    timeout: float = 60.0,
    group_timeout: float = 30.0,
    env: Mapping[str, str] | None = None,
    dies: Collection[int] = (),
) -> list[Any]:
    """Call `target(rank, *args)` in each of `world` processes.

    Args:
        target: a function of a module.
        world: how many.
        args: pickled.
        timeout: seconds; then all processes are killed, and their stacks are shown.
        group_timeout: seconds, of the process group.
        env: set in the processes, beside what is set here.
        dies: ranks that end without a result; theirs is None.

    Raises:
        RankError: a rank raised, died or hung.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    folder = Path(tempfile.mkdtemp(prefix="ranks"))
    environment = {**os.environ, **(env or {}), FOLDER: str(folder)}
    job = (target.__module__, target.__qualname__, args, world, group_timeout, environment)
    processes = [
        context.Process(target=_child, args=(rank, str(folder), *job), daemon=True)
        for rank in range(world)
    ]
    try:
        for process in processes:
            process.start()
            _started.append(process)
        late = not _joined(processes, timeout)
        if late:
            _ask_for_stacks(processes)
        return _results(folder, processes, timeout if late else None, dies)
    finally:
        for process in processes:
            _kill(process)
        shutil.rmtree(folder, ignore_errors=True)


def new_group(name: str, rank: int, world: int, timeout: float = 30.0) -> None:
    """In a process of `run`: leave the group, and make another of fewer ranks."""
    import torch.distributed as dist

    # The old one is not shut down: with a rank that is gone it might wait.
    dist.distributed_c10d._world = dist.distributed_c10d._World()
    store = dist.FileStore(str(Path(os.environ[FOLDER]) / name), world)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout),
    )


def torchrun(script: str | Path, world: int, *args: str, timeout: float = 120.0) -> str:
    """Run a script with torchrun, from the root of the repository.

    Returns:
        What it printed.

    Raises:
        RankError: it failed, or took longer than `timeout` seconds.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world}", str(script), *args]
    mark = f"{os.getpid()}.{time.monotonic_ns()}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), MARK: mark}
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            late = False
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            # torchrun gives each of its processes a session of its own.
            for pid in _marked(mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        said = out.read()
    if late:
        raise RankError(f"{script} took longer than {timeout} s:\n{said[-6000:]}")
    if process.returncode:
        raise RankError(f"{script} ended with {process.returncode}:\n{said[-6000:]}")
    return said


def _marked(mark: str) -> list[int]:
    """Processes that have a mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def leftover() -> list[int]:
    """Processes that `run` started and that are still there."""
    return [p.pid for p in _started if p.is_alive() and p.pid is not None]


# ---- this side -----------------------------------------------------------------------------------


def _joined(processes: Iterable[Any], timeout: float) -> bool:
    until = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    return not any(p.is_alive() for p in processes)


def _ask_for_stacks(processes: Iterable[Any]) -> None:
    for process in processes:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.3)


def _results(
    folder: Path, processes: list[Any], timeout: float | None, dies: Collection[int]
) -> list[Any]:
    found: list[Any] = []
    wrong: list[str] = []
    for rank, process in enumerate(processes):
        path = folder / f"{rank}.result"
        kind, value = pickle.loads(path.read_bytes()) if path.exists() else ("none", None)
        found.append(value)
        if rank in dies and kind == "none" and not process.is_alive():
            continue
        if kind == "value":
            continue
        if kind == "error":
            why = str(value)
        elif process.is_alive():
            why = f"still running after {timeout} s"
        else:
            why = f"ended with {process.exitcode} and no result"
        out = (folder / f"{rank}.out").read_text(errors="replace")[-6000:]
        wrong.append(f"---- rank {rank}: {why}\n{out}")
    if wrong:
        raise RankError("\n".join(wrong))
    return found


def _kill(process: Any) -> None:
    if process.pid is None:
        return
    if process.is_alive():
        _kill_group(process.pid)
        process.join(5)
    _kill_group(process.pid)  # what it started itself


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


# ---- that side -----------------------------------------------------------------------------------


def _child(
    rank: int,
    folder: str,
    module: str,
    name: str,
    args: tuple[Any, ...],
    world: int,
    group_timeout: float,
    environment: dict[str, str],
) -> None:
    os.setpgid(0, 0)
    # The server is the parent, and ends with the process that runs the tests.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    out = os.open(f"{folder}/{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = sys.stderr = open(out, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    os.environ.clear()
    os.environ.update(environment)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        said: tuple[str, Any] = (
            "value",
            _called(rank, folder, module, name, args, world, group_timeout),
        )
        data = pickle.dumps(said)
    except BaseException:
        data = pickle.dumps(("error", traceback.format_exc()))
    path = Path(folder, f"{rank}.result")
    path.with_suffix(".part").write_bytes(data)
    path.with_suffix(".part").rename(path)
    sys.stdout.flush()
    # Threads of a group whose other ranks are gone would be waited for.
    os._exit(0)


def _called(
    rank: int,
    folder: str,
    module: str,
    name: str,
    args: tuple[Any, ...],
    world: int,
    group_timeout: float,
) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", world),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=group_timeout),
    )
    target: Any = import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    result = target(rank, *args)
    # A rank that has finished stays until all have: its end would be another one's error.
    Path(folder, f"{rank}.done").touch()
    until = time.monotonic() + group_timeout
    while time.monotonic() < until:
        ended = [
            Path(folder, f"{r}.{what}").exists()
            for r in range(world)
            for what in ("done", "result")
        ]
        if all(any(ended[2 * r : 2 * r + 2]) for r in range(world)) or _some_died(folder, world):
            break
        time.sleep(0.002)
    return result


def _some_died(folder: str, world: int) -> bool:
    return any(Path(folder, f"{r}.dead").exists() for r in range(world))


def die(rank: int, code: int = 3) -> None:
    """In a process of `run`: end at once, as a killed process does."""
    Path(os.environ[FOLDER], f"{rank}.dead").touch()
    os._exit(code)
