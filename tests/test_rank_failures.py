"""One error on every rank, whatever goes wrong on one; and what is left is said, and can be repaired."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import paramkit
import paramkit.distributed as pkd
from paramkit import Rule
from tests import ranks
from tests.guards import nothing_written
from tests.layouts import assert_holds, local_of

LINEAR = {"w": (6, 4), "b": (6,)}


def tensors(value: float, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.full(shape, value) for name, shape in (shapes or LINEAR).items()}


@contextmanager
def nothing_sent() -> Iterator[None]:
    """No messages: agreement alone."""

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was sent")

    kept = dist.batch_isend_irecv, dist.broadcast
    dist.batch_isend_irecv = dist.broadcast = refused
    try:
        yield
    finally:
        dist.batch_isend_irecv, dist.broadcast = kept


def told(work: Callable[[], object]) -> tuple[str, int | None, str]:
    """The error of something that fails: its text, its rank, and what caused it here."""
    with pytest.raises((pkd.SyncError, KeyboardInterrupt)) as caught:
        work()
    error, cause = caught.value, caught.value.__cause__
    if isinstance(error, KeyboardInterrupt):  # it stays one where it came
        error, cause = cause, error  # type: ignore[assignment]
    assert isinstance(error, pkd.SyncError)
    return str(error), error.rank, "" if cause is None else type(cause).__name__


# ---- before anything is sent ---------------------------------------------------------------------


def differ(rank: int) -> list[tuple[str, int | None, str]]:
    """Every way in which ranks may disagree; rank 2 is the odd one."""
    odd = rank == 2
    out = []

    def case(model: Any, source: Any, rules: Any = (), **options: Any) -> None:
        kept = [t for m in (model, source) if isinstance(m, dict) for t in m.values()]
        kept = [t for t in kept if isinstance(t, Tensor)]
        with nothing_written(*map(local_of, kept)), nothing_sent():
            out.append(told(lambda: pkd.plan(model, source, rules, **options)))

    full = tensors(1.0) if rank == 0 else None
    case(tensors(0.0, w=(6, 4), b=(5,) if odd else (6,)), full)
    case(tensors(0.0, w=(6, 4), **{"c" if odd else "b": (6,)}), full)
    case(tensors(0.0, **({"b": (6,), "w": (6, 4)} if odd else LINEAR)), full)
    model = tensors(0.0)
    model["b"] = model["b"].bfloat16() if odd else model["b"]
    case(model, full)
    case(tensors(0.0), tensors(1.0, w=(6, 4), b=(7,) if odd else (6,)))
    case(tensors(0.0), full, [Rule("w", "w", "i o -> i o")] if odd else ())
    case(tensors(0.0), full, casting="unsafe" if odd else "safe")
    case(tensors(0.0), full, allow_missing=["b"] if odd else ())
    case(tensors(0.0), full, staging=8192 if odd else 16384)
    case(tensors(0.0), tensors(1.0), src=1 if odd else 0)
    case(tensors(0.0), full, casting="wrong" if odd else "safe")
    case(tensors(0.0), full, staging="much" if odd else 8192)
    case(tensors(0.0), full, src=9 if odd else 0)
    case(tensors(0.0), "nowhere.safetensors" if odd else full)
    case([torch.zeros(3)] if odd else tensors(0.0), full)
    case(tensors(0.0), {"w": 3} if odd else full)
    case(None, full)
    case(tensors(0.0), None)
    case(tensors(0.0), tensors(1.0, w=(6, 4)) if rank == 0 else None)
    case(tensors(0.0), tensors(1.0, w=(4, 6), b=(6,)) if rank == 0 else None)
    version = torch.__version__
    torch.__version__ = "2.99.1" if odd else version
    case(tensors(0.0), full)
    torch.__version__ = version
    paramkit.__version__, version = "0.0.9" if odd else paramkit.__version__, paramkit.__version__
    case(tensors(0.0), full)
    paramkit.__version__ = version
    bad = {"bucket_bytes": 4096 if odd else 8192}, {"bucket_bytes": 7 if odd else 4096}
    for options in (
        *bad,
        {"checksum": "both" if odd else None},
        {"checksum": "x" if odd else None},
    ):
        out.append(told(lambda o=options: pkd.Sync(tensors(0.0), source=full, **o)))  # type: ignore[misc]
    # After all of that, the group is of use.
    model = tensors(0.0)
    pkd.transplant(model, full, allow_missing=["w", "b"] if odd else ["b", "w"])
    assert_holds(model, tensors(1.0))
    return out


DIFFERENCES = [
    ("different models", "b", "float32 (5,) on rank 2", "float32 (6,), as on rank 0"),
    ("different models", "b", "missing on rank 2", "there, as on rank 0"),
    ("different models", "w", "at this place of the order, as on rank 0"),
    ("different models", "b", "bfloat16 (6,) on rank 2", "float32 (6,), as on rank 0"),
    ("different sources", "b", "(7,) on rank 2"),
    ("different arguments", "rules[0]", "nothing, as on rank 0"),
    ("different arguments", "casting", "'unsafe' on rank 2", "'safe', as on rank 0"),
    ("different arguments", "allow_missing", "['b'] on rank 2"),
    ("different arguments", "staging", "8192 on rank 2", "16384, as on rank 0"),
    ("different arguments", "src", "1 on rank 2", "0, as on rank 0"),
    ("rank 2", "casting", "wrong"),
    ("rank 2", "staging", "much"),
    ("rank 2", "src must be a rank", "9"),
    ("a path is a source on all ranks", "as on rank 2"),
    ("rank 2", "list"),
    ("rank 2", "w", "int"),
    ("no rank", "model"),
    ("no rank", "source"),
    ("b", "missing"),
    ("w", "shape", "(4, 6)"),
    ("different releases of torch", "2.99.1 on rank 2"),
    ("different releases of paramkit", "0.0.9 on rank 2"),
    ("different arguments", "bucket_bytes", "4096 on rank 2"),
    ("rank 2", "bucket_bytes must be at least"),
    ("different arguments", "checksum"),
    ("rank 2", "checksum must be"),
]


def test_the_first_difference_is_named_on_every_rank() -> None:
    found = ranks.run(differ, 3)
    assert len(found[0]) == len(DIFFERENCES)
    for k, words in enumerate(DIFFERENCES):
        texts = {said[k][0] for said in found}
        assert len(texts) == 1, texts
        (text,) = texts
        assert all(word in text for word in words), (k, words, text)
        if "rank 2" in words:
            assert [said[k][1] for said in found] == [2, 2, 2], text


# ---- an exception on one rank --------------------------------------------------------------------


class Broken:
    """A plan that fails when it runs, from the n-th time on."""

    def __init__(self, plan: Any, error: BaseException, times: int = 0) -> None:
        self.plan, self.error, self.times = plan, error, times

    def run(self, *args: Any) -> Any:
        self.times -= 1
        if self.times < 0:
            raise self.error
        return self.plan.run(*args)

    def moved(self) -> Any:
        return self.plan.moved()


def state(sync: pkd.Sync) -> tuple[int, tuple[int, int] | None]:
    """Version, and how many tensors of this rank are new and are not, where it is torn."""
    torn = sync.torn
    return sync.version, None if torn is None else (len(torn.written), len(torn.unwritten))


def errors(rank: int) -> list[list[Any]]:
    """Rank 0 trains; one step after the other fails on one rank, and the one after it does not."""
    torch.manual_seed(0)
    trainer = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(8)))  # 4 KiB each
    torch.manual_seed(rank)
    replica = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(8)))
    mine = (None, trainer) if rank == 0 else (replica, None)
    sync = pkd.Sync(mine[0], source=mine[1], bucket_bytes=4096)
    (traffic,) = sync._work.passes
    assert len(traffic.rounds) == 8
    out = []

    def next_is_well() -> None:
        with torch.no_grad():
            for p in trainer.parameters():
                p.add_(1)
        version = sync.step().version
        assert (sync.version, sync.torn) == (version, None)
        if rank:
            assert_holds(replica, trainer.state_dict())
            assert paramkit.torn(replica) is None

    def case(who: int, k: int, what: str, error: BaseException) -> None:
        found = traffic.rounds[k]
        kept = getattr(found, what)
        if rank == who:
            setattr(found, what, Broken(kept, error))
        before = [p.clone() for p in replica.parameters()]
        with torch.no_grad():
            for p in trainer.parameters():
                p.add_(1)
        text, where, cause = told(sync.step)
        setattr(found, what, kept)
        same = [torch.equal(a, b) for a, b in zip(before, replica.parameters(), strict=True)]
        torn = sync.torn
        if rank and torn is not None:  # what it says of this replica is so
            names = [n for n, _ in replica.named_parameters()]
            assert {n for n, s in zip(names, same, strict=True) if not s} == set(torn.written)
            assert paramkit.torn(replica) == torn
        assert all(same) or (rank and torn is not None)
        out.append([text, where, cause, *state(sync)])
        next_is_well()

    next_is_well()
    case(0, 0, "pack", MemoryError("on purpose"))
    case(0, 3, "pack", RuntimeError("on purpose"))
    case(2, 0, "unpack", RuntimeError("on purpose"))
    case(2, 5, "unpack", KeyboardInterrupt())
    # A failure before anything is written is no torn state, not even after one that was.
    kept = sync._work.check
    if rank == 1:
        sync._work.check = lambda: exec("raise ValueError('on purpose')")  # type: ignore[method-assign]
    with nothing_sent(), nothing_written(*(p for p in replica.parameters())):
        out.append([*told(sync.step), *state(sync)])
    sync._work.check = kept  # type: ignore[method-assign]
    next_is_well()
    # Replaced parameters are found, and named.
    if rank == 2:
        replica[3].weight = nn.Parameter(torch.zeros(32, 32))
    with nothing_sent():
        out.append([*told(sync.step), *state(sync)])
    sync.rebuild()
    next_is_well()
    return out


def test_an_exception_on_one_rank_is_raised_on_all() -> None:
    found = ranks.run(errors, 3)
    for k, (who, words, versions) in enumerate(
        [
            (0, ("MemoryError: on purpose",), 1),
            (0, ("RuntimeError: on purpose",), 2),
            (2, ("RuntimeError: on purpose",), 3),
            (2, ("KeyboardInterrupt",), 4),
            (1, ("ValueError: on purpose",), 5),
            (2, ("3.weight", "replaced"), 6),
        ]
    ):
        said = [f[k] for f in found]
        assert len({s[0] for s in said}) == 1 and all(word in said[0][0] for word in words), said
        assert [s[1] for s in said] == [who] * 3
        assert [s[3] for s in said] == [versions] * 3
    # Torn: nobody; the first three of eight; the one whose own writing failed, and the other not at all.
    torn = [[f[k][4] for f in found] for k in range(6)]
    assert torn[0] == [None, None, None]
    assert torn[1] == [None, (3, 5), (3, 5)]
    assert torn[2] == [None, (8, 0), (0, 8)]
    assert torn[3] == [None, (8, 0), (5, 3)]
    assert torn[4] == torn[5] == [None, None, None]


def progress_fails(rank: int) -> None:
    model = tensors(0.0)
    transfer = pkd.plan(model, tensors(1.0) if rank == 1 else None)

    def fails(done: int, total: int) -> None:
        raise ValueError(f"on purpose, {done} of {total}")

    text, where, cause = told(lambda: transfer.apply(progress=fails))
    assert (where, cause) == (0, "ValueError" if rank == 0 else "") and "on purpose" in text
    transfer.apply(progress=lambda done, total: None)
    assert_holds(model, tensors(1.0))
    # Hooks of a model on one rank.
    module = nn.Linear(4, 6)
    if rank == 2:
        module._register_load_state_dict_pre_hook(lambda *args: None)
    text, where, _ = told(lambda: pkd.plan(module, nn.Linear(4, 6)))
    assert where == 2 and "hook" in text
    # A source that cannot be read, on the one rank that reads it; and on one of all.
    text, where, _ = told(lambda: pkd.plan(module, "nowhere.safetensors", src=1, hooks="ignore"))
    assert where == 1 and "nowhere" in text


def test_progress_hooks_and_reading_on_one_rank() -> None:
    ranks.run(progress_fails, 3)


# ---- ranks that die, hang, or do not come --------------------------------------------------------


def gone(rank: int, how: str, at: str) -> Any:
    """Of trainer 0 and replicas 1 to 3, rank 3 is gone; the others repair themselves without it."""
    folder = Path(os.environ[ranks.FOLDER])
    torch.manual_seed(0)
    trainer = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(6)))
    replica = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(6)))
    mine = (None, trainer) if rank == 0 else (replica, None)
    if at == "in pairs" and rank == 2:  # not to all: no broadcast
        mine = (None, None)
    sync = pkd.Sync(mine[0], source=mine[1], bucket_bytes=4096)
    sync.step()

    def leave() -> None:
        """At once, or not before the others have done without."""
        while how != "dies" and not all((folder / f"{r}.repaired").exists() for r in range(3)):
            time.sleep(0.01)
        ranks.die(rank)

    if rank == 3:
        if how == "stays away":
            leave()
        if at == "before":
            sync._work.check = leave  # type: ignore[method-assign]
        elif at == "after":
            kept = sync._work.talk.numbers
            calls: list[int] = []

            def numbers(said: Any) -> Any:
                calls.append(1)
                return leave() if len(calls) == 2 else kept(said)

            sync._work.talk.numbers = numbers  # type: ignore[method-assign, assignment]
        else:
            found = sync._work.passes[0].rounds[2]
            found.unpack = type(
                "Leaves", (), {"run": lambda *_: leave(), "moved": lambda _: ([], [])}
            )()
    with torch.no_grad():
        for p in trainer.parameters():
            p.add_(1)
    start = time.monotonic()
    text, _, _ = told(sync.step)
    took = time.monotonic() - start
    out = (text, took, *state(sync))
    ranks.new_group("without", rank, 3)
    sync.rebuild()
    assert state(sync) == out[2:]
    report = sync.step()
    assert (report.version, sync.torn) == (2, None)
    if mine[0] is not None:
        assert_holds(replica, trainer.state_dict())
    (folder / f"{rank}.repaired").touch()
    return out


TIMEOUT = 3.0


@pytest.mark.parametrize(
    ("how", "at"),
    [
        ("dies", "before"),
        ("dies", "during"),
        ("dies", "in pairs"),
        ("dies", "after"),
        ("hangs", "during"),
        ("stays away", "before"),
    ],
)
def test_a_rank_that_is_gone_is_noticed_and_the_others_go_on(how: str, at: str) -> None:
    found = ranks.run(gone, 4, how, at, group_timeout=TIMEOUT, timeout=40, dies={3})
    for rank, (text, took, version, torn) in enumerate(found[:3]):
        assert "could not be reached" in text
        assert took < TIMEOUT + 1.5, (
            took
        )  # of those who wait for one that is gone; some see it at once
        assert version == 1
        if rank == 0 or at == "before" or (rank == 2 and at == "in pairs"):
            assert torn is None
        elif at == "after":
            assert torn == (6, 0)
        else:
            assert torn is not None and sum(torn) == 6


def wrong_calls(rank: int) -> list[tuple[str, int | None, str]]:
    source = {"w": torch.ones(3)} if rank == 0 else None
    sync = pkd.Sync(None, source=source, stream=rank == 1)
    out = [told(sync.step)]  # rank 1 takes a stream
    assert sync.step().version == 1 if rank == 0 else len(list(sync.weights())) == 1
    out.append(told(lambda: list(sync.weights())))  # rank 0 does not
    return out


def test_the_wrong_way_to_take_a_step_is_told_to_all() -> None:
    found = ranks.run(wrong_calls, 2, timeout=20, group_timeout=10)
    for k, (who, word) in enumerate([(1, "takes a stream"), (0, "call step()")]):
        assert [f[k][1] for f in found] == [who, who]
        assert word in found[0][k][0] and found[0][k][0] == found[1][k][0]
