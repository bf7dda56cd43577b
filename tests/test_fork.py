"""Processes: forks after use, workers of a DataLoader, and processes started anew."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import paramkit
from paramkit import PlanError
from tests.guards import Layout, place, watch
from tests.threads import Paused, Work, together

LARGE = 1 << 20  # elements: more than one thread's share
LIMIT = 60.0  # seconds


def in_child(call: Callable[[], object], limit: float = LIMIT) -> None:
    """Call in a forked child; fails where the child fails, or hangs."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = ""
        try:
            call()
        except BaseException:
            text = traceback.format_exc()
        os.write(write, text.encode()[:60_000])
        os._exit(0)
    os.close(write)
    until = time.monotonic() + limit
    ended = 0
    while not ended and time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)
    if not ended:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read().decode()
    assert ended, f"the child hangs {told}"
    assert (told, status) == ("", 0)


def pair(value: float, count: int = 3) -> tuple[nn.ParameterList, list[Tensor]]:
    layout = Layout.dense((LARGE,))
    model = nn.ParameterList(nn.Parameter(place(layout, torch.float32)) for _ in range(count))
    return model, [torch.full((LARGE,), value + k) for k in range(count)]


def named(values: list[Tensor]) -> dict[str, Tensor]:
    return {str(k): v for k, v in enumerate(values)}


def assert_holds(model: nn.ParameterList, values: list[Tensor]) -> None:
    for p, value in zip(model, values, strict=True):
        assert torch.equal(p, value)


def use_all(model: nn.ParameterList, values: list[Tensor]) -> None:
    """Every way of writing, with what takes several threads elsewhere, and torch's own beside them."""
    seen = watch(*model)
    paramkit.transplant(model, named(values))
    assert_holds(model, values)
    with torch.no_grad():
        paramkit.foreach_fill_(list(model), -1.0)
        paramkit.foreach_copy_(list(model), values)
        assert_holds(model, values)
        paramkit.copy_(model[0], values[1])
    paramkit.load_state_dict(model, named(values))
    with paramkit.writes(model) as w:
        w["0"][...] = 7.0
    plan = paramkit.plan(model, named(values))
    plan.apply(atomic=True)
    assert plan.verify() == []
    with plan.swapped():
        pass
    # A conversion; complex numbers are torch's own to copy.
    others = [torch.zeros(LARGE, dtype=torch.bfloat16), torch.zeros(LARGE, dtype=torch.complex64)]
    paramkit.plan(others, [values[0]] * 2).apply()
    assert_holds(model, values)
    seen.assert_only_inside()


def test_a_child_after_use(route: str) -> None:
    """The threads of the pool that the parent used are not there in the child, and OpenMP would wait for them."""
    torch.set_num_threads(2)
    model, values = pair(1.0)
    use_all(model, values)
    plan = paramkit.plan(model, named(values))

    def child() -> None:
        _, others = pair(10.0)
        plan.apply(named(others))
        assert_holds(model, others)
        assert plan.verify() == []
        use_all(model, values)

    in_child(child)
    in_child(lambda: in_child(child))
    assert torch.get_num_threads() == 2
    assert plan.verify() == []  # what children write is theirs
    use_all(model, values)


def test_a_child_of_one_thread_keeps_its_threads() -> None:
    """Only where there is a pool that the child does not have it gets one thread."""
    text = (
        "import os, signal, torch, paramkit\n"
        "paramkit.fill_(torch.zeros(4), 1.0)\n"
        "tasks = len(os.listdir('/proc/self/task'))\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    signal.alarm(30)\n"
        "    n = torch.get_num_threads()\n"
        "    a = torch.zeros(1 << 22)\n"
        "    paramkit.fill_(a, 2.0)\n"
        "    assert n == (2 if tasks == 1 else 1) and a[-1] == 2.0, (n, tasks)\n"
        "    os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
        "print('tasks', tasks)\n"
    )
    environ = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", text], env=environ, capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stdout) == (0, "tasks 1\n"), run.stderr


def test_a_child_that_is_first_to_use_it() -> None:
    """torch made its pool in the parent, paramkit is used in the child alone."""
    text = (
        "import os, signal, torch, paramkit\n"
        "torch.set_num_threads(2)\n"
        "torch.zeros(1 << 22).add_(1)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    signal.alarm(30)\n"
        "    a = torch.empty(1 << 22)\n"
        "    paramkit.fill_(a, 2.0)\n"
        "    os._exit(0 if a[-1] == 2.0 and torch.get_num_threads() == 1 else 1)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    run = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_a_child_while_another_thread_writes(route: str) -> None:
    """In the child nobody goes on with that write: the plan, and the tensors, can be used there."""
    model, values = pair(1.0, 12)
    plan = paramkit.plan(model, named(values))
    paused = Paused(lambda progress: plan.apply(progress=progress))
    with pytest.raises(PlanError, match="in use already"):
        plan.apply()
    waiting = Work(paramkit.plan(model, named(values)).apply)  # a thread that waits in the parent
    assert not waiting.finishes(0.1)

    def child() -> None:
        other, _ = pair(0.0, 12)
        plan.apply()
        assert plan.verify() == []
        paramkit.plan(model, other).apply()
        # And its own threads wait for each other as ever.
        both = [paramkit.plan(model, named([v + k for v in values])) for k in range(2)]
        together([p.apply for p in both])
        assert len({p[0].item() - v[0].item() for p, v in zip(model, values, strict=True)}) == 1

    in_child(child)
    paused.go_on()
    waiting.result()
    assert_holds(model, values)


def test_a_child_inside_a_write(route: str) -> None:
    """Forked by a callback: it goes on with its own write, in its own memory."""
    model, values = pair(1.0, 12)
    done: list[int] = []

    def progress(written: int, total: int) -> None:
        if not done:
            done.append(written)

            def child() -> None:
                paramkit.plan(model, named([v + 1 for v in values])).apply()
                assert_holds(model, [v + 1 for v in values])

            in_child(child)

    paramkit.plan(model, named(values)).apply(progress=progress)
    assert done
    assert_holds(model, values)


def test_files_are_read_in_a_child(route: str, tmp_path: Path) -> None:
    """The threads that help to read exist in the parent alone."""
    from safetensors.torch import save_file

    model, values = pair(3.0)
    path = tmp_path / "m.safetensors"
    save_file(named(values), path)
    plan = paramkit.plan(model, path)
    plan.apply()

    def child() -> None:
        plan.apply()
        assert plan.verify() == []
        fresh, _ = pair(0.0)
        paramkit.transplant(fresh, path)
        assert_holds(fresh, values)

    in_child(child)


# Workers.


class Patches(Dataset[Tensor]):
    """Puts samples together with paramkit: a write into a part of a buffer, and one by a plan."""

    def __init__(self, length: int = 8) -> None:
        self.length = length
        self.model: nn.Linear | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        if self.model is None:
            self.model = nn.Linear(512, 600)  # so large that threads would be used
        state = {
            "weight": torch.full((600, 512), float(index)),
            "bias": torch.full((600,), float(index)),
        }
        paramkit.transplant(self.model, state)
        out = torch.zeros(600, 514)
        with torch.no_grad():
            paramkit.copy_(out[:, 1:-1], self.model.weight)
        with paramkit.writes({"out": out}) as w:
            w["out"][:, 0] = self.model.bias.detach()
            w["out"][:, 513] = -1.0
        return out


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_workers_of_a_data_loader(context: str) -> None:
    torch.set_num_threads(2)
    paramkit.transplant(*({"x": torch.full((LARGE,), x)} for x in (0.0, 1.0)))  # used in the parent
    data = Patches()
    loader = DataLoader(data, num_workers=2, multiprocessing_context=context, timeout=LIMIT)
    got = [batch[0] for batch in loader]
    assert len(got) == len(data)
    for index, out in enumerate(got):
        assert out[:, :-1].unique().tolist() == [float(index)]
        assert out[:, -1].unique().tolist() == [-1.0]


def write_shared(model: nn.Module, value: float) -> None:
    source = {n: torch.full_like(p, value) for n, p in model.named_parameters()}
    plan = paramkit.plan(model, source)
    plan.apply()
    assert plan.verify() == []


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_shared_model_is_written_by_another_process(method: str) -> None:
    """torch.multiprocessing hands over the memory; what the process writes is seen here."""
    from torch import multiprocessing as mp

    model = nn.Linear(600, 500).share_memory()
    write_shared(model, 1.0)
    plan = paramkit.plan(model, {n: torch.zeros_like(p) for n, p in model.named_parameters()})
    process = mp.get_context(method).Process(target=write_shared, args=(model, 2.0))
    process.start()
    process.join(LIMIT)
    assert process.exitcode == 0
    assert {x for p in model.parameters() for x in p.detach().unique().tolist()} == {2.0}
    plan.apply()  # the memory is where it was
    assert not any(p.any() for p in model.parameters())


def test_a_plan_is_not_for_another_process() -> None:
    """It holds addresses: to hand it over is refused in words."""
    plan = paramkit.plan(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(TypeError, match="a plan holds addresses"):
        multiprocessing.reduction.ForkingPickler.dumps(plan)  # type: ignore[attr-defined]
