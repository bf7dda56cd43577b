"""No memory: every allocation fails once, and then nothing was written, nothing is kept, and the next call works."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import paramkit
from paramkit.backend import checks, staging
from tests.conftest import emulated, need_extension
from tests.faulty import build, run, run_plain
from tests.guards import assert_same_bits, nothing_written


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_extension()
    return build(tmp_path_factory.mktemp("faulty"))


# What is tried: each case makes its tensors, what is to be called, and what it should have written.
CASES = """
import gc, itertools, sys, threading
import torch, paramkit
from tests.faulty import Faults
from tests.guards import Layout, place, storage_bytes

faults = Faults()
module = paramkit.backend.active().__file__

def pairs(count, width=8):
    dsts, srcs = [], []
    for i in range(count):
        n = 2 + i % width
        kind = i % 6
        src = torch.randn(3 * n, n)
        if kind == 1: src = torch.randn(n, 3 * n).t()
        if kind == 2: src = torch.randn(1, n)
        if kind == 3: src = torch.randn(3 * n, 2 * n)[:, ::2]
        if kind == 5: src = torch.randn(1, 1)
        dtype = torch.bfloat16 if kind == 4 else torch.float32
        dsts.append(place(Layout.dense((3 * n, n)), dtype))
        srcs.append(src)
    return dsts, srcs

class Case:
    def __init__(self, dsts, call, want):
        self.dsts, self.call, self.want = dsts, call, want

def wanted(dsts, srcs):
    with torch.no_grad():
        return [s.to(d.dtype).expand(d.shape).clone() for d, s in zip(dsts, srcs)]

def foreach(count):
    def make():
        dsts, srcs = pairs(count)
        return Case(dsts, lambda: paramkit.foreach_copy_(dsts, srcs), wanted(dsts, srcs))
    return make
def large():
    dsts = [torch.full((600, 700), -1.0) for _ in range(3)]
    srcs = [torch.randn(700, 600).t() for _ in range(3)]
    return Case(dsts, lambda: paramkit.foreach_copy_(dsts, srcs), wanted(dsts, srcs))
def long():  # which several threads look at
    whole, more = torch.zeros(5000, 8), torch.randn(5000, 8)
    dsts, srcs = list(whole.unbind()), list(more.unbind())
    return Case([whole], lambda: dsts and paramkit.foreach_copy_(dsts, srcs), [more])
def in_order():
    whole = torch.arange(64.0)
    dsts = [whole[8 * k + 8 : 8 * k + 16] for k in range(6)]
    srcs = [whole[8 * k : 8 * k + 8] for k in range(6)]
    twin = whole.clone()
    for k in range(6):
        twin[8 * k + 8 : 8 * k + 16] = twin[8 * k : 8 * k + 8].clone()
    return Case([whole], lambda: paramkit.foreach_copy_(dsts, srcs), [twin])
def fills():
    dsts = [place(Layout.dense((3, k + 1)), torch.float32) for k in range(9)]
    values = [0.5, 1, True, torch.tensor(2.0)] * 2 + [3.0]
    return Case(dsts, lambda: paramkit.foreach_fill_(dsts, values),
                [torch.full(d.shape, float(v)) for d, v in zip(dsts, values)])
def one_copy():
    dsts, srcs = pairs(1)
    return Case(dsts, lambda: paramkit.copy_(dsts[0], srcs[0]), wanted(dsts, srcs))
def one_fill():
    dst = torch.zeros(5)
    return Case([dst], lambda: paramkit.fill_(dst, 7), [torch.full((5,), 7.0)])
def model():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
def loading():
    ours, theirs = model(), model()
    state = theirs.state_dict()
    return Case(list(ours.state_dict().values()), lambda: paramkit.load_state_dict(ours, state), list(state.values()))
def list_plan():
    dsts, srcs = pairs(12)
    return Case(dsts, lambda: paramkit.plan(dsts, srcs).apply(), wanted(dsts, srcs))
def replay():
    dsts, srcs = pairs(12)
    plan = paramkit.plan(dsts, srcs)
    return Case(dsts, plan.apply, wanted(dsts, srcs))
def told():
    dsts, srcs = pairs(12)
    plan = paramkit.plan(dsts, srcs)
    return Case(dsts, lambda: plan.apply(progress=lambda done, total: None), wanted(dsts, srcs))
def rebound():
    ours, theirs, others = model(), model(), model()
    plan = paramkit.plan(ours, theirs)
    source = others.state_dict()
    return Case(list(ours.state_dict().values()), lambda: ours and plan.apply(source), list(source.values()))
def recorded():
    ours = torch.nn.Linear(6, 7)
    want = ours.weight.detach().clone()
    want[1:3, ::2], want[5], want[0, 0] = 2.0, torch.arange(6.0), 9.0
    value = torch.arange(6.0)
    def call():
        with paramkit.writes(ours) as w:
            w["weight"][1:3, ::2] = 2.0
            w[ours.weight][5, ...] = value
            w["weight"][0, 0] = 9.0
    return Case([ours.weight.detach()], call, [want])

ALL = {"foreach 40": foreach(40), "large": large, "long": long, "in order": in_order, "fills": fills, "copy": one_copy,
       "fill": one_fill, "load_state_dict": loading, "list plan": list_plan, "replay": replay, "progress": told,
       "rebound": rebound, "writes": recorded}

def in_a_thread(call):
    # Scratch memory is kept for each thread: a new one has none.
    caught = []
    def work():
        try:
            call()
        except BaseException as error:
            caught.append(error.with_traceback(None))
            error.__context__ = error.__cause__ = None
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return caught[0] if caught else None

def swept(make, arms):
    failures = torn = lost = 0
    for arm in arms:
        case = make()
        before = [storage_bytes(d).clone() for d in case.dsts]
        counts = [sys.getrefcount(d) for d in case.dsts]
        def call():
            arm()
            try:
                case.call()
            finally:
                faults.disarm_now = faults.failed()
        error = in_a_thread(call)
        if error is not None:
            assert faults.disarm_now, repr(error)
            assert isinstance(error, (MemoryError, RuntimeError)), repr(error)
            failures += 1
            same = [torch.equal(storage_bytes(d), b) for d, b in zip(case.dsts, before)]
            torn += not all(same)
            del error
            case.call()
        for d, w in zip(case.dsts, case.want):
            assert torch.equal(d, w), "wrong values"
        del d, w
        lost += [sys.getrefcount(d) for d in case.dsts] != counts
    return failures, torn, lost
"""

NEW = (
    CASES
    + """
for name, make in ALL.items():
    make().call()  # what is made once for the process
    arms = faults.each_new(module)
    if name == "list plan":
        # Up to the one by which pybind11 registers the object: the process ends there, in pybind11.
        dsts, srcs = pairs(12)
        same = paramkit.plan(dsts, srcs)._compiled
        made = (same.destinations(), same.sources(), same.writes(), [], True, False)
        count = faults.count_new(module, lambda: paramkit.backend.active().Plan(*made))
        arms = itertools.islice(arms, count - 1)
    print(name, *swept(make, arms), sep="\\t", flush=True)
"""
)


def rows_of(text: str) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(map(int, numbers))
        for name, *numbers in (line.split("\t") for line in text.splitlines())
    }


def test_every_allocation_of_the_extension(faulty: Path) -> None:
    """Each `new` of the extension's own code, in turn: all is written, or nothing."""
    rows = rows_of(run(faulty, NEW))
    assert sum(failures for failures, *_ in rows.values()) > 100, rows
    for name, (failures, torn, lost) in rows.items():
        # A replay allocates nothing.
        assert torn == 0 and (failures == 0) == (name == "replay"), (name, rows)
        assert lost == 0, (name, rows)


STAGING = (
    CASES
    + """
how = sys.argv[2]
compiled = paramkit.backend.active()
LEAST = 1 << 15  # slots, and a device's side of them; descriptors are smaller
def sized(n, rows):
    def make():
        dsts = [place(Layout.dense((rows, 500 + k)), torch.float32) for k in range(n)]
        srcs = [torch.randn(500 + k, rows).t() for k in range(n)]
        return Case(dsts, lambda: paramkit.foreach_copy_(dsts, srcs), wanted(dsts, srcs))
    return make
def planned():
    dsts = [place(Layout.dense((300, 500 + k)), torch.bfloat16) for k in range(3)]
    srcs = [torch.randn(500 + k, 300).t() for k in range(3)]
    plan = paramkit.plan(dsts, srcs)
    return Case(dsts, plan.apply, wanted(dsts, srcs))
def modelled():
    ours, theirs = torch.nn.Linear(500, 300), torch.nn.Linear(500, 300)
    plan = paramkit.plan(ours, theirs)
    return Case([ours.weight.detach(), ours.bias.detach()], lambda: plan.apply() and ours.weight,
                [theirs.weight.detach().clone(), theirs.bias.detach().clone()])
tried = {"a small list": sized(1, 100), "a list": sized(3, 300), "a plan": planned, "a model": modelled}
with paramkit.backend.force("cpu"):
    compiled.open_cuda(sys.argv[1], how)
    for name, make in tried.items():
        for total in (3 << 16, 96 << 20):  # in many rounds, in one
            with paramkit.backend.staging(total):
                # Slots are kept once they are there: other bytes let them go.
                def arms():
                    for arm in faults.each_tensor(LEAST):
                        with paramkit.backend.staging(total * 2):
                            paramkit.copy_(torch.zeros(600, 600), torch.ones(600, 600))
                        yield arm
                print(f"{name} {total}", *swept(make, arms()), sep="\\t", flush=True)
    compiled.close_emulated_cuda()
"""
)


@pytest.mark.parametrize("how", ["to device", pytest.param("to host", marks=pytest.mark.slow)])
def test_staging_that_cannot_be_had(faulty: Path, emulator: Path, how: str) -> None:
    """Pinned slots, and the device's side of one: where there is no memory for them nothing has been written."""
    rows = rows_of(run(faulty, STAGING, emulator, how))
    for name, (failures, torn, lost) in rows.items():
        # One of each at least: the host's and the device's.
        assert failures >= 2 and torn == lost == 0, (name, rows)


@pytest.mark.parametrize("how", ["to device", "to host"])
def test_more_staging_than_there_can_be(emulator: Path, how: str) -> None:
    need_extension()
    dst, src = torch.full((1200, 1200), -1.0), torch.randn(1200, 1200)
    model, other = torch.nn.Linear(1200, 1200), torch.nn.Linear(1200, 1200)
    with emulated(emulator, how):
        plan = paramkit.plan(model, other)
        with staging(1 << 60), nothing_written(dst, *model.parameters()):
            for call in (lambda: paramkit.copy_(dst, src), plan.apply):
                with pytest.raises(RuntimeError, match="allocate memory"):
                    call()
        paramkit.copy_(dst, src)
        plan.apply()
    assert_same_bits(dst, src)
    assert_same_bits(model.weight.detach(), other.weight.detach())
    assert paramkit.torn(model) is None


LIMITED = """
import resource, sys
import torch, paramkit
from paramkit.cli import main
from pathlib import Path

path, out = Path(sys.argv[1]), Path(sys.argv[2])
model = torch.nn.Linear(1000, 1000)
before = model.weight.detach().clone()
paramkit.transplant(model, path)  # all that is made once
after = model.weight.detach().clone()
with torch.no_grad():
    model.weight.copy_(before)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

def limited(bytes):
    resource.setrlimit(resource.RLIMIT_AS, (used + bytes, resource.RLIM_INFINITY))

def tried(what, call):
    try:
        call()
    except (MemoryError, RuntimeError, paramkit.PlanError) as error:
        print(what, type(error).__name__, "memory" in str(error) or isinstance(error, MemoryError),
              bool(torch.equal(model.weight, before)), paramkit.torn(model) is None, sep="\t")
    else:
        print(what, "done", sep="\t")

limited(2 << 20)  # less than the 4 MiB of a parameter
tried("transplant", lambda: paramkit.transplant(model, path))
tried("atomic", lambda: paramkit.plan(model, {"weight": after, "bias": model.bias.detach().clone()}).apply(atomic=True))
tried("old format", lambda: paramkit.transplant(model, out.with_name("old.pt")))
code = main(["transplant", str(path), "-o", str(out)])
sys.stdout = sys.__stdout__  # which the command gives up on an error of the system
print("command", code, out.exists(), sep="\t")
limited(1 << 30)
tried("again", lambda: paramkit.transplant(model, path))
print("equal", bool(torch.equal(model.weight, after)), sep="\t")
"""


@pytest.mark.parametrize("backend", [pytest.param("native", marks=pytest.mark.slow), "cpu"])
def test_a_limit_of_memory(tmp_path: Path, backend: str) -> None:
    """RLIMIT_AS: buffers that cannot be had, really."""
    if backend == "cpu":
        need_extension()
    values = {"weight": torch.randn(1000, 1000), "bias": torch.randn(1000)}
    save_file(values, tmp_path / "m.safetensors")
    torch.save(values, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    said = run_plain(
        LIMITED,
        tmp_path / "m.safetensors",
        tmp_path / "out.safetensors",
        PARAMKIT_BACKEND=backend,
    )
    rows = {name: rest for name, *rest in (line.split("\t") for line in said.splitlines())}
    assert rows["transplant"] == ["MemoryError", "True", "True", "True"], rows
    assert rows["atomic"][1:] == ["True", "True", "True"], rows
    assert rows["old format"][1:] == ["True", "True", "True"], rows
    assert rows["command"] == ["1", "False"], rows
    assert rows["again"] == ["done"] and rows["equal"] == ["True"], rows


def test_a_staging_buffer_that_cannot_be_had(tmp_path: Path) -> None:
    """A staging of more bytes than there are addresses is no more than what is needed; one tensor may be that."""
    save_file({"w": torch.ones(100)}, tmp_path / "m.safetensors")
    model = {"w": torch.zeros(100)}
    paramkit.transplant(model, tmp_path / "m.safetensors", staging=1 << 60)
    assert model["w"].sum() == 100


def test_no_memory_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback asks torch once for each pair of dtypes: where memory fails it asks again."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    checks.conversion_error.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", fail)
        with pytest.raises(MemoryError):
            checks.conversion_error(torch.float32, torch.float64)
    assert checks.conversion_error(torch.float32, torch.float64) is None
