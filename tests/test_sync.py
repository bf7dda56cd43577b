"""A trainer's weights into replicas of other names, layouts and dtypes, step after step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import paramkit
import paramkit.distributed as pkd
from paramkit import Rule
from paramkit.distributed.checksum import checksum
from paramkit.distributed.run import Run, broadcasts
from tests import ranks
from tests.calls import python_calls
from tests.guards import bits, watch
from tests.layouts import arrange, assert_holds, local_of, sharded
from tests.renamed import RULES, checkpoint, destination, expected


def fill(held: dict[str, Any] | None, full: dict[str, Tensor], rank: int, kind: str) -> None:
    """Other values, in place, as an optimizer has it."""
    for name, t in (arrange(kind, full, rank) or {}).items():
        local_of(held[name]).copy_(local_of(t))  # type: ignore[index]


# ---- trainers and replicas -----------------------------------------------------------------------

QKV = [
    Rule("blocks.{i}.q.weight", "layers.{i}.qkv.weight", "h e -> (s h) e", at={"s": 0}, s=3),
    Rule("blocks.{i}.k.weight", "layers.{i}.qkv.weight", "h e -> (s h) e", at={"s": 1}, s=3),
    Rule("blocks.{i}.v.weight", "layers.{i}.qkv.weight", "h e -> (s h) e", at={"s": 2}, s=3),
    Rule("blocks.{i}.o.weight", "layers.{i}.out.weight"),
]


def blocks(names: dict[str, tuple[int, int]], top: str, dtype: torch.dtype) -> nn.Module:
    made = nn.Module()
    layers = [
        nn.ModuleDict({n: nn.Linear(a, b, bias=False) for n, (a, b) in names.items()})
        for _ in range(2)
    ]
    setattr(made, top, nn.ModuleList(layers))
    return made.to(dtype)


def trained(rank: int, bucket: int, sums: str | None) -> list[tuple[int, int, int]]:
    """FSDP2 on ranks 0 and 1 into tensor parallel bf16 replicas on 2 and 3, fused, ten times."""
    torch.manual_seed(5)
    full = blocks({**dict.fromkeys("qkv", (8, 7)), "o": (7, 8)}, "blocks", torch.float32)
    trainer = blocks({**dict.fromkeys("qkv", (8, 7)), "o": (7, 8)}, "blocks", torch.float32)
    trainer.load_state_dict(full.state_dict())
    replica = blocks({"qkv": (8, 21), "out": (7, 8)}, "layers", torch.bfloat16)
    # Every rank makes both meshes, as torch wants it.
    sharded(trainer, "fsdp", (0, 1))
    sharded(replica, "tp", (2, 3))
    model, source = (None, trainer) if rank < 2 else (replica, None)
    sync = pkd.Sync(model, source=source, rules=QKV, bucket_bytes=bucket, checksum=sums)
    figures = []
    for step in range(10):
        for p in full.parameters():
            p.data.mul_(0.9).add_(0.1 * step)
        for p in trainer.parameters() if rank < 2 else ():
            p.data.mul_(0.9).add_(0.1 * step)
        report = sync.step()
        assert report.version == sync.version == step + 1 and sync.torn is None
        figures.append((report.bytes_sent, report.bytes_received, report.messages))
        if rank >= 2:
            values = full.state_dict()
            want = {}
            for i in range(2):
                parts = [values[f"blocks.{i}.{n}.weight"] for n in "qkv"]
                want[f"layers.{i}.qkv.weight"] = torch.cat(parts).bfloat16()
                want[f"layers.{i}.out.weight"] = values[f"blocks.{i}.o.weight"].bfloat16()
            assert_holds(replica, want, f"step {step}")
    assert len(set(figures)) == 1
    return figures[:1]


@pytest.mark.parametrize(("bucket", "sums"), [(4096, None), (1 << 20, "both")])
def test_fsdp_trainer_to_tensor_parallel_replicas(bucket: int, sums: str | None) -> None:
    found = [f[0] for f in ranks.run(trained, 4, bucket, sums)]
    sent, received = sum(f[0] for f in found), sum(f[1] for f in found)
    # In bf16, once to each replica's shard, and each piece at a place of 16 bytes.
    values = 2 * (3 * 56 + 56) * 2
    assert sent == received and values <= sent < 4 * values
    assert [f[1] for f in found[:2]] == [0, 0] and [f[0] for f in found[2:]] == [0, 0]
    assert all(f[2] for f in found)


def replicated(rank: int, bucket: int) -> list[bool]:
    """One trainer into three full replicas, with rules and dtypes of every kind."""
    source = checkpoint() if rank == 0 else None
    model = arrange("plain", destination(), rank) if rank else None
    sync = pkd.Sync(model, source=source, rules=RULES, bucket_bytes=bucket)
    guard = watch(*(model or {}).values())
    calls: list[str] = []
    for name in ("broadcast", "batch_isend_irecv"):
        kept = getattr(dist, name)
        setattr(dist, name, lambda *a, _n=name, _k=kept, **kw: (calls.append(_n), _k(*a, **kw))[1])
    for step in range(3):
        if source is not None:
            fill(source, checkpoint(step), rank, "plain")
        sync.step()
        assert_holds(model, expected(step), f"step {step}")
    guard.assert_only_inside()
    (traffic,) = sync._work.passes
    assert broadcasts(traffic, 4) == {0} and set(calls) == {"broadcast"}
    assert len(calls) == 3 * len(traffic.rounds)
    assert traffic.staging <= 2 * (bucket + 64)
    return [len(traffic.rounds) > 1]


def test_one_trainer_to_three_replicas_goes_by_broadcast() -> None:
    ranks.run(replicated, 4, 1 << 20)


def others(rank: int) -> None:
    """Layouts of every kind, with the rules and dtypes of every kind."""
    kinds = [("fsdp", "columns"), ("2-d", "plain"), ("subset", "hsdp"), ("columns", "three")]
    for sums, (a, b) in zip(("both", "parameter", "bucket", None), kinds, strict=True):
        source, model = arrange(a, checkpoint(), rank), arrange(b, destination(), rank)
        # Trainer and replica on one rank, where both layouts have it.
        sync = pkd.Sync(model, source=source, rules=RULES, bucket_bytes=4096, checksum=sums)
        for step in range(2):
            fill(source, checkpoint(step), rank, a)
            report = sync.step()
            assert_holds(model, expected(step), f"{a} to {b}, step {step}")
        assert report.version == 2 and report.seconds > 0 and f"rank {rank} of 4" in sync.explain()
        assert "version 2, whole" in repr(sync)


def test_colocated_and_sharded_replicas() -> None:
    ranks.run(others, 4)


# ---- sums ----------------------------------------------------------------------------------------


def error_of(work: Callable[[], object]) -> tuple[str, int | None]:
    with pytest.raises(pkd.SyncError) as caught:
        work()
    return str(caught.value), caught.value.rank


class Strays:
    """A plan that writes, and then something else."""

    def __init__(self, plan: Any, then: Callable[[], object]) -> None:
        self.plan, self.then, self.moved = plan, then, plan.moved

    def run(self, *args: Any) -> Any:
        return (self.plan.run(*args), self.then())[0]


def damaged(rank: int) -> list[Any]:
    """Of trainer 0 and replicas 1 and 2, something goes wrong on rank 2."""
    out: list[Any] = []
    looks = Run._look_at
    for sums in ("bucket", "parameter", "both"):
        source = {f"w{k}": torch.randn(1500) + 1 for k in range(6)} if rank == 0 else None
        model = {f"w{k}": torch.zeros(1500, dtype=torch.bfloat16) for k in range(6)}
        replica = model if rank else None
        sync = pkd.Sync(replica, source=source, bucket_bytes=4096, checksum=sums)
        sync.step()
        before = [t.clone() for t in model.values()]
        (traffic,) = sync._work.passes
        assert len(traffic.rounds) == 6
        found = traffic.rounds[3]
        if sums != "parameter":
            # One bit of a message, on its way.
            def look(self: Run, sender: int, number: int, buffer: Tensor, message: Any) -> None:
                if number == 3:
                    buffer[-7] ^= 4
                looks(self, sender, number, buffer, message)

            Run._look_at = look if rank == 2 else looks  # type: ignore[method-assign]
            out.append(error_of(sync.step))
            Run._look_at = looks  # type: ignore[method-assign]
            if rank == 2:
                assert sync.torn is not None and sync.torn.written == ("w0", "w1", "w2")
                assert torch.equal(model["w3"], before[3])  # it was not even unpacked
        if sums != "bucket":
            kept, target = found.unpack, model["w3"].view(torch.int16)
            if rank == 2:
                found.unpack = Strays(kept, lambda t=target: t[70].add_(1))  # type: ignore[misc]
            out.append(error_of(sync.step))
            found.unpack = kept
            if rank == 2:
                assert sync.torn is not None and "w3" in sync.torn.unwritten
        assert sync.version == 1
        assert sync.step().version == 2 and sync.torn is None
        mine = torch.tensor([checksum(t) for t in model.values()])
        if rank == 0 and source is not None:
            mine = torch.tensor([checksum(t, torch.bfloat16) for t in source.values()])
        all_: list[Any] = [None] * 3
        dist.all_gather_object(all_, mine.tolist())
        assert all_[0] == all_[1] == all_[2]
    return out


def test_damaged_messages_and_wrong_writes_are_found() -> None:
    found = ranks.run(damaged, 3)
    assert found[0] == found[1] == found[2] and len(found[0]) == 4
    for (text, who), words in zip(
        found[0],
        ("from rank 0 was damaged", "w3", "from rank 0 was damaged", "w3"),
        strict=True,
    ):
        assert words in text, text
        assert who == (0 if "damaged" in words else 2)


# ---- streams -------------------------------------------------------------------------------------


def streams(rank: int, bucket: int) -> int:
    """A trainer, a replica written in place, and two engines that take tensors; all as one model."""
    source = checkpoint() if rank == 0 else None
    meta = {name: t.to("meta") for name, t in destination().items()}
    model = destination() if rank == 1 else meta if rank > 1 else None
    sync = pkd.Sync(model, source=source, rules=RULES, bucket_bytes=bucket, stream=rank > 1)
    buckets = 0
    for step in range(3):
        if source is not None:
            fill(source, checkpoint(step), rank, "plain")
        if rank < 2:
            assert sync.step().version == step + 1
        elif rank == 2:
            taken = {}
            for name, tensor in sync.weights():
                taken[name] = tensor.clone()
            assert sorted(taken) == sorted(meta)
            assert_holds(taken, expected(step), f"step {step}")
        else:
            for part in sync.buckets():
                buckets += 1
                assert part.buffer.dtype == torch.uint8 and part.buffer.dim() == 1
                for name, dtype, shape, offset in part.entries:
                    want = expected(step)[name]
                    assert (dtype, shape) == (want.dtype, tuple(want.shape))
                    raw = part.buffer[offset : offset + want.nbytes]
                    assert torch.equal(raw, bits(want).flatten()), name
        if rank == 1:
            assert_holds(model, expected(step), f"step {step}")
        assert (sync.version, sync.torn) == (step + 1, None)
    return buckets


def test_streams_and_a_replica_in_place() -> None:
    # In buckets of all sizes: of one tensor at least.
    assert ranks.run(streams, 4, 1 << 20)[3] == 3


def alike(rank: int) -> None:
    """A stream of what the trainer has, sharded there, without a mapping; taken in part, and again."""
    full = {f"w{k}": torch.randn(8, 128) for k in range(5)}
    dist.broadcast(full["w0"], 0)
    for t in full.values():
        dist.broadcast(t, 0)
    source = arrange("subset", full, rank)
    taker = source is None
    sync = pkd.Sync(source=source, bucket_bytes=4096, stream=taker, checksum="both")

    def step() -> None:
        if not taker:
            sync.step()
            return
        taken = {name: t.clone() for name, t in sync.weights()}
        assert_holds(taken, full)
        assert [*taken] == [*full]

    step()
    assert sync.version == 1

    def stops_early() -> None:
        if rank != 3:
            step()
        with contextlib.closing(sync.weights()) as weights:  # type: ignore[type-var]
            next(weights)

    text, who = error_of(stops_early)
    assert "not taken to the end" in text and who == 3 and sync.version == 1
    step()
    assert (sync.version, sync.torn) == (2, None)

    class Engine(Exception):
        pass

    def raises() -> None:
        if rank != 0:
            step()
        for name, _ in sync.weights():
            if name == "w3":
                raise Engine

    if rank == 0:  # it lets go of the generator with the error; the others hear of it
        with pytest.raises(Engine):
            raises()
    else:
        assert error_of(raises)[1] == 0
    step()
    assert sync.version == 3
    with pytest.raises(paramkit.PlanError, match="step()" if not taker else "weights()"):
        next(iter(sync.buckets())) if not taker else sync.step()


def test_streams_that_stop_early_fail_on_every_rank() -> None:
    ranks.run(alike, 4)


# ---- versions and arguments ----------------------------------------------------------------------


def given_up(rank: int) -> None:
    """An engine raises, and whoever handles that keeps the error, and with it the generator."""
    source = {"v": torch.ones(4), "w": torch.ones(4)} if rank == 0 else None
    sync = pkd.Sync(source=source, stream=rank == 1)

    def engine(weights: Any) -> None:
        for _ in weights:
            raise ValueError("on purpose")

    kept = []
    for then in ("step", "rebuild"):
        if rank:
            with pytest.raises(ValueError) as caught:
                engine(sync.weights())
            kept.append(caught)
        # The next call of this rank ends the step of the other one.
        if then == "step":
            text, who = error_of(lambda: list(sync.weights()) if rank else sync.step())
            assert "not taken to the end" in text and who == 1, text
            assert sync.version == 0
            assert [n for n, _ in sync.weights()] == ["v", "w"] if rank else sync.step()
    if rank == 0:
        text, _ = error_of(sync.step)
        assert "could not be reached" in text, text
    # What the old group has to say is of no matter to a new one.
    ranks.new_group("next", rank, 2)
    sync.rebuild()
    assert [n for n, _ in sync.weights()] == ["v", "w"] if rank else sync.step()
    assert sync.version == 2


def test_a_step_that_was_given_up_is_ended_by_the_next() -> None:
    ranks.run(given_up, 2, group_timeout=5.0)


def versions(rank: int) -> None:
    source = {"w": torch.ones(4)} if rank == 0 else None
    model = {"w": torch.zeros(4)}
    first = pkd.Sync(None if source else model, source=source)
    assert (first.version, first.torn) == (0, None)
    for _ in range(3):
        first.step()
    first.rebuild()
    assert first.version == 3 and first.step().version == 4
    assert first.group is dist.group.WORLD
    # One of a rank that is new has the version of the others after its first step.
    late = pkd.Sync(None if source else model, source=source)
    late.version = 0 if rank else 6
    assert late.step().version == 7 and late.version == 7
    for wrong in (
        {"bucket_bytes": 1.5},
        {"bucket_bytes": True},
        {"checksum": "all"},
        {"casting": "x"},
        {"stream": True, "model": nn.Linear(1, 1)},
    ):
        given: dict[str, Any] = {"model": None if source else model, **(wrong if rank == 1 else {})}
        text, who = error_of(lambda given=given: pkd.Sync(**given, source=source))  # type: ignore[misc]
        assert who == 1, text
    # A stream with a tensor that nothing is known of, or that is kept in part.
    meta = {"w": torch.empty(6, device="meta"), "v": torch.empty(2, device="meta")}
    rules = [Rule("w", "w", rows="overlap"), Rule(None, "v")]
    text, _ = error_of(
        lambda: pkd.Sync(None if rank == 0 else meta, source=source, rules=rules, stream=rank > 0)
    )
    assert "w | " in text and "kept" in text, text

    # One of nothing at all.
    empty = pkd.Sync({} if rank else None, source=None if rank else {}, stream=rank > 0)
    assert not (list(empty.weights()) if rank else empty.step().messages) and empty.version == 1
    # A model that no rank has, of files or of tensors.
    for given in ("missing.safetensors", {"w": torch.ones(4)}, None):
        text, _ = error_of(lambda given=given: pkd.plan(None, given))  # type: ignore[misc]
        assert "no rank of 2 has a model" in text, text


def test_versions_and_arguments() -> None:
    ranks.run(versions, 2)


def crossed(rank: int) -> None:
    """Two of the same names and shapes, whose steps ranks take in another order."""
    syncs, models = [], []
    for value in (1.0, 2.0):
        models.append({"w": torch.zeros(4)})
        source = None if rank else {"w": torch.full((4,), value)}
        syncs.append(pkd.Sync(models[-1] if rank else None, source=source))
    text, who = error_of(syncs[rank].step)
    assert "different transfers" in text and "number 2 on rank 1" in text and who == 1, text
    assert all(sync.version == 0 and sync.torn is None for sync in syncs)
    for k in (1, 0):
        syncs[k].step()
        assert not rank or torch.equal(models[k]["w"], torch.full((4,), k + 1.0))


def test_steps_of_two_syncs_in_another_order_are_refused() -> None:
    ranks.run(crossed, 2)


def in_parts(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    full = torch.arange(8.0).view(4, 2)
    names = {"w": distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)])}
    text, _ = error_of(lambda: pkd.Sync(names, source={"w": full}, stream=True))
    assert "w | layout | got a DTensor" in text and "whole" in text, text


def test_a_stream_of_parts_is_refused() -> None:
    ranks.run(in_parts, 2)


def joins(rank: int) -> tuple[int, bool] | None:
    source = {"w": torch.arange(6.0)} if rank == 0 else None
    replica = {"w": torch.zeros(6)} if rank else None
    two = dist.new_group([0, 1])
    everyone = dist.new_group([0, 1, 2])
    if rank < 2:
        sync = pkd.Sync(replica, two, source=source)
        sync.step()
        sync.rebuild(everyone)
    else:
        sync = pkd.Sync(replica, everyone, source=source)
    sync.step()
    return sync.version, replica is None or torch.equal(replica["w"], torch.arange(6.0))


def test_a_rank_joins_while_the_others_rebuild() -> None:
    assert ranks.run(joins, 3) == [(2, True)] * 3


def counts(rank: int) -> list[int]:
    """Calls of one step with few parameters, and with many."""
    out = []
    for n in (10, 500):
        held = {f"w.{k}": torch.ones(3) for k in range(n)}
        model = nn.ParameterList([nn.Parameter(torch.zeros(3)) for _ in range(n)])
        rules = [Rule("w.{i}", "{i}")]
        sync = pkd.Sync(model if rank else None, source=None if rank else held, rules=rules)
        sync.step()
        out.append(python_calls(sync.step))
        assert not rank or all(bool((p == 1).all()) for p in model)
    return out


def test_a_step_runs_no_python_for_a_parameter() -> None:
    for few, many in ranks.run(counts, 3):
        assert few == many < 400


def moved(rank: int) -> str:
    source = {"a": torch.ones(3), "b": torch.ones(3)} if rank == 0 else None
    model = nn.ParameterDict({n: torch.zeros(3) for n in "ab"}) if rank else None
    sync = pkd.Sync(model, source=source)
    sync.step()
    if model is not None:
        model["b"].data = torch.zeros(3)
    with pytest.raises(pkd.SyncError) as caught:
        sync.step()
    sync.rebuild()
    assert sync.step().version == 2
    return str(caught.value)


def test_what_moved_is_named() -> None:
    first, second = ranks.run(moved, 2)
    assert first == second and "b | moved" in first and "a | moved" not in first
