"""Tests on several processes of a gloo group, each run with a hard timeout.

    def summed(rank: int, more: int) -> float: ...     # in a test module

    assert ranks.run(summed, 4, 1) == [10.0] * 4

Importing torch takes seconds; so the processes are forked from a server that has imported it once, and has
done nothing with it (`tests.ranks_server`). Whatever happens in a test, no process outlives it.

Forked processes have one seed of string hashes: an order that differs from rank to rank elsewhere, as that
of a set of names, is the same here. `torchrun` starts them one by one.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from tests.ranks_server import Ended, Job, kill_below

__all__ = ["RankError", "die", "leftover", "new_group", "run", "stop", "torchrun"]

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "PARAMKIT_TEST_RANKS"
MARK = "PARAMKIT_TEST_MARK"
START = 120.0  # seconds for the imports of the server
GRACE = 30.0  # seconds beyond a timeout for stacks and kills
SHOWN = 6000  # characters of a rank's output


class RankError(AssertionError):
    """What went wrong on the ranks, with their tracebacks and what they printed.

    Attributes:
        failed: rank -> what went wrong there, in one text.
    """

    def __init__(self, message: str, failed: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.failed = dict(failed or {})


def run(
    target: Callable[..., Any],
    world: int = 2,
    *args: Any,
    timeout: float = 60.0,
    group_timeout: float = 30.0,
    env: Mapping[str, str] | None = None,
    dies: Collection[int] = (),
) -> list[Any]:
    """Call `target(rank, *args)` in each of `world` processes of a gloo group.

    A process has the environment, the folder and the `sys.path` that are set here, one torch thread, and
    torch's seed 0.

    Args:
        target: a function of a module that can be imported.
        world: how many processes, at most 255.
        args: pickled.
        timeout: seconds; then all processes are killed, and their stacks are shown.
        group_timeout: seconds, of the process group.
        env: set in the processes, beside what is set here.
        dies: ranks that must end without a result (`die`, a signal); theirs is None.

    Returns:
        What each rank returned, pickled, in the order of ranks.

    Raises:
        RankError: a rank raised, died or hung, or one of `dies` did not die.
        ValueError: a target or a rank that cannot be.
    """
    if "<" in target.__qualname__ or target.__module__ == "__main__":
        raise ValueError(
            f"target: {target.__module__}.{target.__qualname__} cannot be imported; "
            "a function at the top of a module can"
        )
    if not 1 <= world <= 255 or not set(dies) <= set(range(world)):
        raise ValueError(f"world: {world}, dies: {sorted(dies)}; expected 1..255, and ranks below")
    folder = Path(tempfile.mkdtemp(prefix="ranks"))
    try:
        job = Job(
            folder=str(folder),
            timeout=timeout,
            environ={**os.environ, **(env or {}), FOLDER: str(folder)},
            cwd=str(Path.cwd()),
            path=_path(),
            world=world,
            module=target.__module__,
            name=target.__qualname__,
            args=pickle.dumps(args),
            group_timeout=group_timeout,
        )
        return _results(job, _supervised(job), dies)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def torchrun(script: str | Path, world: int, *args: str, timeout: float = 120.0) -> str:
    """Run a script with torchrun, from the root of the repository.

    Returns:
        What it printed.

    Raises:
        RankError: it failed, or took longer than `timeout` seconds: then with the stacks.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world}", str(Path(script).resolve()), *args]
    folder = Path(tempfile.mkdtemp(prefix="ranks"))
    more = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONFAULTHANDLER": "1",
    }
    try:
        job = Job(
            folder=str(folder),
            timeout=timeout,
            environ={**os.environ, **more},
            cwd=str(ROOT),
            path=_path(),
            command=command,
        )
        (ended,) = _supervised(job)
        said = _said(folder / "0.out", whole=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if ended.late:
        raise RankError(f"{script} took longer than {timeout} s:\n{said[-SHOWN:]}")
    if ended.status:
        raise RankError(f"{script} {_end(ended)}:\n{said[-SHOWN:]}")
    return said


def leftover() -> list[int]:
    """Processes that runs of this process have started and that are still there.

    They are known by a mark in their environment, not by their parents: what the server lost is found too.
    """
    own = _server.process.pid if _server else None
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            pid = int(path.parent.name)
            if pid != own and f"{MARK}={_mark()}".encode() in path.read_bytes().split(b"\0"):
                found.append(pid)
    return found


def stop() -> None:
    """End the server, and all below it. The next run starts another one."""
    global _server
    server, _server = _server, None
    if server is None or server.owner != os.getpid():
        return
    server.control.close()
    try:
        server.process.wait(5.0)
    except subprocess.TimeoutExpired:
        kill_below(server.process.pid)
        server.process.kill()
        server.process.wait()


# ---- in a rank -----------------------------------------------------------------------------------


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


def die(rank: int, code: int = 3) -> None:
    """In a process of `run`: end at once, as a killed process does."""
    print(f"rank {rank} dies", flush=True)
    os._exit(code)


# ---- this side -----------------------------------------------------------------------------------


class _Server(NamedTuple):
    process: subprocess.Popen[bytes]
    control: socket.socket
    owner: int  # a fork of this process must not talk on the same socket
    hello: dict[str, Any]


_server: _Server | None = None


def _mark() -> str:
    return f"of {os.getpid()}"


def _path() -> list[str]:
    """`sys.path`, in which `tests` and `paramkit` are those of this repository."""
    return [str(ROOT), *(str(Path(p or ".").resolve()) for p in sys.path if p != str(ROOT))]


def _started() -> _Server:
    global _server
    if _server and _server.owner == os.getpid() and _server.process.poll() is None:
        return _server
    stop()
    ours, theirs = socket.socketpair()
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
        "from tests import ranks_server; ranks_server.serve(int(sys.argv[2]))"
    )
    # Libraries that make their threads when they are loaded make none.
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
    with theirs, tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(_path()), str(theirs.fileno())],
            cwd=ROOT,
            env={**os.environ, **threads, MARK: _mark()},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,  # Ctrl-C is for the tests: they see to the rest
        )
        try:
            theirs.close()
            ours.settimeout(START)
            hello = ours.recv(1 << 16)
            if not hello:
                raise TimeoutError
            ours.settimeout(None)
            _server = _Server(process, ours, os.getpid(), json.loads(hello))
        except BaseException as error:
            process.kill()
            process.wait()
            ours.close()
            if not isinstance(error, TimeoutError):
                raise
            out.seek(0)
            raise RankError(f"the fork server did not start:\n{out.read()[-SHOWN:]}") from None
    return _server


atexit.register(stop)


def _supervised(job: Job) -> list[Ended]:
    """Have a supervisor run a job; return or raise when nothing of it is there any more."""
    server = _started()
    job.environ[MARK] = _mark()
    ours, theirs = socket.socketpair()
    with ours, Connection(os.dup(ours.fileno())) as connection:
        with theirs:
            socket.send_fds(server.control, [b"r"], [theirs.fileno()])
        try:
            connection.send(job)
            if not connection.poll(job.timeout + GRACE):
                raise RankError(f"no answer {GRACE} s after the timeout of {job.timeout} s")
            answer = connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            said = _said(Path(job.folder, "supervisor.out"))
            raise RankError(f"the supervisor of the run is gone\n{said}") from None
        finally:
            # Also after Ctrl-C: the supervisor sees the end of the stream, kills, and closes its own.
            _wait_for_end(ours, connection)
    if isinstance(answer, str):
        raise RankError(f"the run failed:\n{answer}")
    return list(answer)


def _wait_for_end(ours: socket.socket, connection: Connection) -> None:
    with contextlib.suppress(OSError):
        ours.shutdown(socket.SHUT_WR)
    until = time.monotonic() + GRACE
    while time.monotonic() < until:
        if connection.poll(0.1):
            try:
                connection.recv_bytes()
            except (EOFError, OSError):
                return
    stop()  # kills whatever is there


def _results(job: Job, ended: list[Ended], dies: Collection[int]) -> list[Any]:
    found: list[Any] = []
    wrong: dict[int, str] = {}
    for rank, end in enumerate(ended):
        kind, value = _result(Path(job.folder, f"{rank}.result"))
        found.append(value if kind == "value" else None)
        if kind == "error":
            why = str(value)
        elif end.late:
            why = f"still running after {job.timeout} s"
        elif rank in dies:
            if kind == "none":
                continue
            why = "was to end without a result, and has one"
        elif kind == "value" and not end.status:
            continue
        else:
            why = f"{_end(end)} and {'a' if kind == 'value' else 'no'} result"
        wrong[rank] = f"{why}\n{_said(Path(job.folder, f'{rank}.out'))}"
    if wrong:
        raise RankError("\n".join(f"---- rank {r}: {text}" for r, text in wrong.items()), wrong)
    return found


def _result(path: Path) -> tuple[str, Any]:
    if not path.exists():
        return "none", None
    try:
        with path.open("rb") as file:
            kind, value = pickle.load(file)
    except Exception as error:
        return "error", f"its result cannot be read: {type(error).__name__}: {error}"
    return kind, value


def _end(ended: Ended) -> str:
    if ended.status is not None and ended.status < 0:
        return f"was killed by {signal.Signals(-ended.status).name}"
    return f"ended with {ended.status}"


def _said(path: Path, whole: bool = False) -> str:
    said = path.read_text(errors="replace") if path.exists() else ""
    return said if whole else said[-SHOWN:]
