"""The processes behind `tests.ranks`: what forks the ranks, and what ends all that they leave.

    the tests      ask, through a socket pair for every run
      server       one; has imported torch once, runs one thread, does nothing else
        supervisor one a run: forks the ranks, watches the clock, and kills what is still there
          rank     ...
            what the rank started itself

Server and supervisors are "subreapers": a process whose parent has ended becomes the child of the next one
above it, whatever its group or session. So all that a run started stays below its supervisor, and can be
found and killed. A supervisor does that when the run is over, when the time is, when the other end of its
socket is closed (the tests were interrupted or killed), and when its server is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import faulthandler
import json
import os
import pickle
import random
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

PRELOADED = (
    "torch",
    "torch.distributed",
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch._dynamo",  # what the first DTensor imports: seconds, in every rank
    "paramkit.distributed",
    "pytest",
    "hypothesis",
)
# Of the runtime that Python runs on, a sanitizer's, which a fork does right by.
RUNTIME_THREADS = int(os.environ.get("PARAMKIT_TESTS_RUNTIME_THREADS", "0"))
TICK = 0.01  # seconds between two looks at the ranks
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass
class Job:
    """A run: of a function on several ranks, or of a command."""

    folder: str  # for results and output; the asking process removes it
    timeout: float
    environ: dict[str, str]
    cwd: str
    path: list[str]  # sys.path
    world: int = 1
    module: str = ""
    name: str = ""
    args: bytes = b""  # pickled: only a rank imports what they need
    group_timeout: float = 30.0
    command: Sequence[str] = ()


class Ended(NamedTuple):
    """How a process of a run ended."""

    status: int | None  # exit status; minus the signal; None: killed by the supervisor
    late: bool


# ---- processes -----------------------------------------------------------------------------------


def below(pid: int) -> list[int]:
    """The processes below one, the nearest first; without those that have ended and are not reaped."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in parentheses, may hold spaces and parentheses.
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(path.parent.name))
    found, at = [pid], 0
    while at < len(found):
        found += children.get(found[at], [])
        at += 1
    return found[1:]


def send(pids: Iterable[int], number: int) -> None:
    """A signal for each process that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_below(pid: int, seconds: float = 10.0) -> None:
    """Kill what is below a process until nothing is: what is killed may have forked meanwhile."""
    until = time.monotonic() + seconds
    while found := below(pid):
        send(found, signal.SIGKILL)
        if pid == os.getpid():
            reap()
        if time.monotonic() > until:
            raise TimeoutError(f"cannot kill {found}")
        time.sleep(0.002)


def reap() -> dict[int, int]:
    """The children that have ended -> exit status, or minus the signal."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


# ---- the server ----------------------------------------------------------------------------------


def serve(fd: int) -> None:
    """Fork a supervisor for every socket that comes, until the other side closes or ends."""
    control = socket.socket(fileno=fd)
    parent = os.getppid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    missing = {}
    for module in PRELOADED:
        try:
            import_module(module)
        except Exception as error:  # the rank that needs it says more
            missing[module] = f"{type(error).__name__}: {error}"
    # A fork takes one thread along, and every lock that the others hold.
    hello = {"missing": missing, "threads": len([*Path("/proc/self/task").iterdir()])}
    control.sendall(json.dumps(hello).encode())
    supervisors: set[int] = set()
    # A process that the tests forked may hold the other end open: so the parent is looked at as well.
    while os.getppid() == parent:
        supervisors -= reap().keys()
        if not supervisors:
            kill_below(os.getpid())  # of a supervisor that was killed itself
        if not select.select([control], [], [], 0.5)[0]:
            continue
        fds = socket.recv_fds(control, 1, 1)[1]
        if not fds:
            break
        pid = os.fork()
        if pid == 0:
            control.close()
            _exits(_supervise, fds[0])
        supervisors.add(pid)
        os.close(fds[0])
    # A supervisor sees the end too, and clears up; one that does not is killed.
    until = time.monotonic() + 2.0
    while supervisors and time.monotonic() < until:
        time.sleep(TICK)
        supervisors -= reap().keys()
    kill_below(os.getpid())
    os._exit(0)  # with torch loaded, an orderly end takes seconds


def _exits(function: Any, *args: Any) -> None:
    """Call, and end the process: a forked one must not go on with the code of the other."""
    code = 70
    try:
        function(*args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


# ---- a supervisor --------------------------------------------------------------------------------


class _Abandoned(Exception):
    """Nobody waits for the result."""


_held: list[
    Connection
] = []  # closed by the end of the process, not before: it says that all is over


def _supervise(fd: int) -> None:
    connection = Connection(fd)
    _held.append(connection)
    server = os.getppid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    job: Job = connection.recv()
    try:
        connection.send(_watched(job, connection, server))
    except (_Abandoned, BrokenPipeError):
        kill_below(os.getpid())
        shutil.rmtree(job.folder, ignore_errors=True)
    except BaseException:
        connection.send(traceback.format_exc())
    finally:
        kill_below(os.getpid())


def _watched(job: Job, connection: Connection, server: int) -> list[Ended]:
    """Start the processes of a run, and see to their end."""
    _output(Path(job.folder, "supervisor.out"))
    os.chdir(job.cwd)
    os.environ.clear()
    os.environ.update(job.environ)
    sys.path[:] = job.path
    said, says = os.pipe()  # a byte from each rank that has its result
    goes, go = os.pipe()  # a byte for each rank: it may end
    if job.command:
        pids = [_command(job)]
    else:
        _import_target(job)
        pids = [
            _fork_rank(job, rank, connection, (said, go), (says, goes)) for rank in range(job.world)
        ]
    until = time.monotonic() + job.timeout
    ended: dict[int, int] = {}
    done: set[int] = set()
    released = False
    while not ended.keys() >= set(pids) and time.monotonic() < until:
        ready = select.select([said, connection], [], [], TICK)[0]
        if connection in ready or os.getppid() != server:
            raise _Abandoned
        if said in ready:
            done |= set(os.read(said, 256))
        ended |= reap()
        # A rank that has finished stays until all have: its end would be another one's error.
        if not released and all(r in done or pid in ended for r, pid in enumerate(pids)):
            whole = len(done) == len(pids)
            os.write(go, (b"y" if whole else b"n") * len(pids))
            released = True
    late = [pid for r, pid in enumerate(pids) if pid not in ended and (r not in done or released)]
    if late:
        _show_stacks(job, late)
    kill_below(os.getpid())
    return [Ended(ended.get(pid), pid in late) for pid in pids]


def _output(path: Path) -> None:
    """Everything printed from now on goes to a file, also from C++."""
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def _import_target(job: Job) -> None:
    """Once, for all ranks."""
    try:
        import_module(job.module)
    except BaseException:
        return  # each rank tries again, and says what is wrong
    threads = len([*Path("/proc/self/task").iterdir()]) - 1
    if threads > RUNTIME_THREADS:
        raise RuntimeError(
            f"importing {job.module} leaves {threads} threads running: ranks cannot be forked"
        )


def _fork_rank(
    job: Job, rank: int, connection: Connection, closed: tuple[int, ...], pipes: tuple[int, int]
) -> int:
    supervisor = os.getpid()
    pid = os.fork()
    if pid == 0:
        connection.close()
        for fd in closed:
            os.close(fd)
        _exits(_rank, job, rank, supervisor, *pipes)
    return pid


def _command(job: Job) -> int:
    with Path(job.folder, "0.out").open("wb") as out:
        process = subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    process.returncode = 0  # reaped here: it must not be waited for once more
    return process.pid


def _show_stacks(job: Job, pids: list[int]) -> None:
    """Python's stacks of processes, in their output."""
    if job.command:
        # With PYTHONFAULTHANDLER set it is what SIGABRT does, before it ends the process.
        send(below(os.getpid()), signal.SIGABRT)
    else:
        send(pids, signal.SIGUSR1)
    before, until = -1, time.monotonic() + 3.0
    while time.monotonic() < until:
        time.sleep(0.2)
        size = sum(p.stat().st_size for p in Path(job.folder).glob("*.out"))
        if size == before:
            break
        before = size


# ---- a rank --------------------------------------------------------------------------------------


def _rank(job: Job, rank: int, supervisor: int, says: int, goes: int) -> None:
    os.setpgid(0, 0)  # a test that signals its own group signals nobody else
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:
        return
    _output(Path(job.folder, f"{rank}.out"))
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    try:
        value = _called(job, rank)
        sys.stdout.flush()
        _keep(job, rank, "value", value)
    except BaseException:
        _keep(job, rank, "error", traceback.format_exc())
        return
    os.write(says, bytes([rank]))
    # With a rank that is gone, leaving the group might wait for it.
    if os.read(goes, 1) == b"y":
        try:
            _leave()
        except BaseException:
            _keep(job, rank, "error", traceback.format_exc())


def _called(job: Job, rank: int) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # The ranks are forked from one process: without this, so are their random numbers, unlike elsewhere.
    random.seed(rank)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{job.folder}/store", job.world),
        rank=rank,
        world_size=job.world,
        timeout=datetime.timedelta(seconds=job.group_timeout),
    )
    dist.barrier()  # or one that fails at once is gone while the others still connect to it
    target: Any = import_module(job.module)
    for part in job.name.split("."):
        target = getattr(target, part)
    return target(rank, *pickle.loads(job.args))


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _keep(job: Job, rank: int, kind: str, value: Any) -> None:
    """Write the result: first elsewhere, so that a rank which dies meanwhile has none."""
    part = Path(job.folder, f"{rank}.part")
    with part.open("wb") as file:
        pickle.dump((kind, value), file, protocol=pickle.HIGHEST_PROTOCOL)
    part.rename(part.with_suffix(".result"))
