"""Plans and what becomes of their tensors, their calls and their process: callbacks, garbage, the end."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import sysconfig
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import paramkit
from paramkit import PlanError
from tests.conftest import need_extension
from tests.filled import COUNT, eight, eight_values, held, plan_of
from tests.guards import nothing_written, watch
from tests.threads import Paused, together

# A callback that takes the memory away.


def to_double(model: nn.ParameterDict) -> None:
    model.double()


def new_data(model: nn.ParameterDict) -> None:
    model[f"w{COUNT - 1}"].data = torch.full_like(model[f"w{COUNT - 1}"], -5.0)


def emptied(model: nn.ParameterDict) -> None:
    model[f"w{COUNT - 1}"].untyped_storage().resize_(0)


def replaced(model: nn.ParameterDict) -> None:
    model[f"w{COUNT - 1}"] = nn.Parameter(torch.full_like(model[f"w{COUNT - 1}"], -5.0))


def retied(model: nn.ParameterDict) -> None:
    model[f"w{COUNT - 1}"] = model["w0"]


def resized(model: nn.ParameterDict) -> None:
    with torch.no_grad():
        model[f"w{COUNT - 1}"].detach().resize_(5)
        model[f"w{COUNT - 1}"].set_(model[f"w{COUNT - 1}"].detach().clone())  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(("file", change) for change in (to_double, new_data, emptied, replaced, retied, resized)),
        *(("memory", change) for change in (to_double, emptied, retied)),
    ],
)
def test_a_callback_that_changes_the_model(
    route: str, tmp_path: Path, kind: str, change: Callable[[nn.ParameterDict], None]
) -> None:
    """It is told at once, and what is gone is not written any more."""
    numel = (10 << 20) // COUNT + 1 if kind == "memory" else 1500
    model = eight(numel, -1.0)
    last = f"w{COUNT - 1}"
    plan = plan_of(model, kind, 2.0, tmp_path)
    kept = torch.empty(0).set_(model[last].detach())  # type: ignore[call-overload]  the memory, not the tensor
    calls: list[int] = []

    def progress(written: int, total: int) -> None:
        calls.append(written)
        assert written < total
        change(model)

    with pytest.raises(PlanError, match="callback"):
        plan.apply(progress=progress)
    assert len(calls) == 1
    if change is not emptied:
        assert kept.unique().tolist() == [-1.0]
    state = paramkit.torn(model)
    assert state is not None
    assert last in state.unwritten
    with (
        nothing_written(*(p for p in model.parameters() if p.untyped_storage().nbytes())),
        pytest.raises(PlanError),
    ):
        plan.apply()


# A model that goes.


def test_a_model_freed_while_a_plan_lives(route: str, tmp_path: Path) -> None:
    for kind in ("memory", "file"):
        model = eight(100)
        tensors = [weakref.ref(p) for p in model.parameters()]
        plan = plan_of(model, kind, 1.0, tmp_path)
        plan.apply()
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None
        for call in (plan.apply, plan.refresh, partial(plan.apply, eight_values(100, 2.0))):
            with pytest.raises(PlanError, match="no longer exists"):
                call()
        assert all(ref() is not None for ref in tensors)  # they are the plan's until it lets go
        plan.release()
        gc.collect()
        assert all(ref() is None for ref in tensors)


def test_a_model_freed_while_a_plan_writes_it(route: str, tmp_path: Path) -> None:
    model = eight(1500)
    tensors = list(model.parameters())
    seen = watch(*tensors)
    plan = plan_of(model, "file", 1.0, tmp_path)
    paused = Paused(lambda progress: plan.apply(progress=progress))
    del model
    gc.collect()
    paused.go_on()
    assert {x for p in tensors for x in p.detach().unique().tolist()} == {1.0}
    seen.assert_only_inside()
    with pytest.raises(PlanError, match="no longer exists"):
        plan.apply()


def test_a_source_freed_while_a_plan_lives(route: str) -> None:
    """The plan holds the tensors of its source, not the module."""
    model, source = eight(100), eight(100, 3.0)
    gone = weakref.ref(source)
    plan = paramkit.plan(model, source)
    del source
    gc.collect()
    assert gone() is None
    plan.apply()
    assert held(model) == {3.0}


def python(text: str, *arguments: str, limit: float = 240) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, "-c", text, *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=limit)


def test_the_garbage_collector_may_claim_inside_a_claim(route: str) -> None:
    """What it frees may be a block of `swapped` that nobody holds any more, and that is put back then."""
    run = python(
        """
import gc, sys, threading, time, torch, paramkit

with paramkit.backend.force(sys.argv[1]):
    Claim = paramkit.backend.active().Claim
    shared, calls, inside, failed = torch.zeros(4), 0, 0, []

    def claim(phase, info):
        global calls
        with Claim([torch.zeros(4)], []):
            calls += 1

    def work():
        global inside
        try:
            for _ in range(150):
                with Claim([shared], [torch.zeros(4)]):
                    inside += 1
                    time.sleep(0.0002)
                    assert inside == 1, "a mix"
                    inside -= 1
        except BaseException as error:
            failed.append(error)

    sys.setswitchinterval(1e-5)
    gc.callbacks.append(claim)
    gc.set_threshold(1)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.callbacks.remove(claim)
print("ok" if calls > 200 and not failed else (calls, failed))
""",
        route,
        limit=120,
    )
    assert (run.returncode, run.stdout) == (0, "ok\n"), run.stdout + run.stderr


def test_control_c_in_a_process(route: str) -> None:
    """SIGINT while a long write runs: it is done, and then interrupted; the model is whole."""
    text = """
import os, signal, sys, threading, torch, paramkit

with paramkit.backend.force(sys.argv[1]):
    model = torch.nn.ParameterList(torch.zeros(8 << 20) for _ in range(4))
    source = {str(k): torch.ones(8 << 20) for k in range(4)}
    plan = paramkit.plan(model, source)
    found = None
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    value = 1.0
    try:
        while True:
            plan.apply()
    except KeyboardInterrupt:
        found = paramkit.torn(model)
    whole = all(bool((p == 1).all()) for p in model)
    assert whole or found is not None, "half written, and nobody says so"
    plan.apply()
    assert plan.verify() == [] and paramkit.torn(model) is None
print("ok")
"""
    run = python(text, route)
    assert (run.returncode, run.stdout) == (0, "ok\n"), run.stderr


# The end of the interpreter.


END = """
import os, sys, threading, time, torch, paramkit

def endless(call):
    threading.Thread(target=lambda: [call() for _ in iter(int, 1)], daemon=True).start()

with paramkit.backend.force(sys.argv[1]):
    numel = int(sys.argv[2])
    children = 0
    for turn in range(int(sys.argv[3])):
        pid = os.fork()
        if pid == 0:
            break
        _, status = os.waitpid(pid, 0)
        if status:
            print("status", status)
        children += status == 0
    else:
        print("ended", children)
        sys.stdout.flush()
        os._exit(0)
    for _ in range(3):
        dsts = [torch.zeros(numel) for _ in range(4)]
        srcs = [torch.ones(numel) for _ in range(4)]
        plan = paramkit.plan(dsts, srcs)
        endless(plan.apply)
        endless(lambda dsts=dsts, srcs=srcs: paramkit.foreach_copy_(dsts, srcs))
    time.sleep(0.05 + 0.01 * turn)
"""


@pytest.mark.parametrize("numel", [64, 2 << 20])
def test_the_interpreter_ends_while_threads_write(numel: int) -> None:
    """Daemon threads in the middle of copies: no crash, and the process's own exit status."""
    need_extension()
    run = python(END, "cpu", str(numel), "6")
    assert (run.returncode, run.stdout) == (0, "ended 6\n"), run.stderr[-3000:]


# Without the GIL.


FREE = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


@pytest.mark.skipif(not FREE, reason="this Python has a GIL")
def test_free_threaded(route: str) -> None:
    """The extension says that it needs the GIL, so that importing it switches the GIL on."""
    model = eight(1 << 18)
    plans = [paramkit.plan(model, eight_values(1 << 18, float(k))) for k in range(4)]
    assert route == "native" or sys._is_gil_enabled()  # type: ignore[attr-defined]
    for _ in range(20):
        together([plan.apply for plan in plans])
        assert len(held(model)) == 1
