"""What a plan, `writes` and `load_state_dict` promise, kept for DTensor parameters."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import paramkit
import paramkit.distributed as pkd
from paramkit import PlanError, Rule
from tests import ranks
from tests.guards import assert_same_bits, watch
from tests.sharded_models import (
    Net,
    assert_same_shards,
    checkpoint,
    local_of,
    rules,
    sharded,
    shards_of,
)

LAYOUTS = ("fsdp", "tp fsdp", "any 0")


def values(scale: float = 1.0) -> Net:
    """What one process makes of the checkpoint, its values scaled."""
    model = Net()
    paramkit.transplant(model, scaled(scale), rules())
    return model


def scaled(scale: float) -> dict[str, Tensor]:
    return {name: tensor * scale for name, tensor in checkpoint().items()}


def agreed(said: object) -> None:
    """Every rank says the same."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, said)
    assert everyone == [said] * len(everyone)


def refused(call: Any, model: Any, match: str, same: bool = True) -> str:
    """A PlanError, the same on all ranks, and no byte written."""
    watched = watch(*(t for t in shards_of(model).values() if not t.is_meta))
    with pytest.raises(PlanError, match=match) as caught:
        call()
    watched.assert_unwritten()
    text = str(caught.value)
    if same:
        agreed(text)
    return text


# ---- again and again -----------------------------------------------------------------------------


def again(rank: int) -> None:
    for how in LAYOUTS:
        model = sharded(Net(), how)
        plan = paramkit.plan(model, checkpoint(), rules())
        plan.apply()
        plan.apply(scaled(2.0))
        assert_same_shards(model, sharded(values(2.0), how))
        assert plan.verify() == []
        assert "qkv.weight" in plan.explain()
        # A bit changed on one rank is seen on that rank, by name.
        target = model.layers[0].experts
        local = local_of(target.detach())
        if local.numel():
            local.view(-1)[:1].add_(1) if local.is_contiguous() else local.add_(1)
            assert plan.verify() == ["layers.0.experts"]
            plan.apply()
            assert plan.verify() == []
        # Another source for the length of a block, and every bit back.
        held = watch(*shards_of(model).values())
        with plan.swapped(scaled(3.0)):
            assert_same_shards(model, sharded(values(3.0), how))
        held.assert_unwritten()


def test_again_with_other_sources_and_swapped_in() -> None:
    ranks.run(again, 4)


def one_to_one(rank: int) -> None:
    """Weights and their average, sharded alike: exchanged where they are."""
    for how in LAYOUTS:
        model, average = sharded(values(), how), sharded(values(2.0), how)
        mine, theirs = watch(*shards_of(model).values()), watch(*shards_of(average).values())
        plan = paramkit.plan(model, average)
        with plan.swapped():
            assert_same_shards(model, sharded(values(2.0), how))
        mine.assert_unwritten()
        theirs.assert_unwritten()


def test_shards_are_exchanged() -> None:
    ranks.run(one_to_one, 2)


def replaced(rank: int) -> None:
    for how in LAYOUTS:
        model = sharded(Net(), how)
        plan = paramkit.plan(model, checkpoint(), rules())
        plan.apply()
        # Another parameter under the name.
        new = nn.Parameter(model.norm.weight.detach().clone())
        model.norm.weight = new
        refused(plan.apply, model, "no longer fits")
        plan.refresh()
        plan.apply()
        # Other memory of a local tensor.
        model.to_empty(device="cpu")
        for tensor in shards_of(model).values():
            tensor.fill_(7)
        refused(plan.apply, model, "no longer fits")
        plan.refresh()
        plan.apply()
        assert_same_shards(model, sharded(values(), how))
        plan.release()
        with pytest.raises(PlanError, match="released"):
            plan.apply()
        plan.refresh(scaled(2.0))
        plan.apply()
        assert_same_shards(model, sharded(values(2.0), how))


def test_refreshed_where_parameters_are_others() -> None:
    ranks.run(replaced, 4)


# ---- autograd ------------------------------------------------------------------------------------


def noticed(rank: int) -> None:
    """Autograd sees a write to what it saved; requires_grad is that of the DTensor."""
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    model = {"w": weight}
    source = {"w": torch.full((4, 3), 2.0)}
    plan = paramkit.plan(model, source)

    def by_writes() -> None:
        with paramkit.writes(model) as w:
            w["w"][...] = 1.0

    def by_swap() -> None:
        with plan.swapped():
            pass

    def loads() -> None:
        holder = nn.Module()
        holder.w = weight
        paramkit.load_state_dict(holder, source)

    for write in (
        plan.apply,
        by_writes,
        by_swap,
        loads,
        lambda: paramkit.transplant(model, source),
        lambda: paramkit.transplant(model, iter(source.items())),
    ):
        loss = (weight * weight).sum()
        versions = weight._version, weight._local_tensor._version
        write()
        assert weight._version > versions[0] and weight._local_tensor._version > versions[1]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        assert weight.is_leaf and weight.requires_grad and weight.grad_fn is None
    report = paramkit.transplant(model, source, requires_grad=False)
    assert report.summary.writes == 1 and not weight.requires_grad
    paramkit.plan(model, source).set_requires_grad(True)
    assert weight.requires_grad
    loss = (weight * weight).sum()
    loss.backward()
    assert torch.equal(weight.grad.full_tensor(), torch.full((4, 3), 4.0))


def test_autograd_notices_writes() -> None:
    ranks.run(noticed, 2)


def trains(rank: int) -> None:
    """FSDP's hooks stay: after a write a forward and a step give what they give with torch's loading."""
    results = []
    for load in (paramkit.load_state_dict, nn.Module.load_state_dict, paramkit.transplant):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
        for layer in (*model, model):
            fully_shard(layer)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(2)
        state = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3)).state_dict()
        for _ in range(2):
            model(torch.full((2, 3), rank + 1.0)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            model.reshard()
            if load is nn.Module.load_state_dict:
                mesh = model[0].weight.device_mesh
                cut = {n: distribute_tensor(t, mesh, [Shard(0)]) for n, t in state.items()}
                model.load_state_dict(cut)
            else:
                load(model, state)
        results.append(model(torch.ones(1, 3)).detach())
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[2], results[1])


def test_fsdp_trains_on() -> None:
    ranks.run(trains, 2)


def gathered(rank: int) -> None:
    """torch puts the shards back before it loads; so it is here, and their values count."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    for layer in (*model, model):
        fully_shard(layer, reshard_after_forward=False)
    state = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3)).state_dict()
    for tensor in state.values():
        dist.broadcast(tensor, 0)
    model(torch.ones(1, 3))
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    paramkit.load_state_dict(model, state)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert_same_bits(parameter.full_tensor().detach(), state[name], what=name)
    plain = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    plain.load_state_dict(state)
    assert torch.equal(model(torch.ones(1, 3)), plain(torch.ones(1, 3)))


def test_gathered_parameters_are_loaded() -> None:
    ranks.run(gathered, 2)


def frozen(rank: int) -> None:
    """A rank that holds nothing of a parameter treats it as the others do."""
    for how in LAYOUTS:
        for source in (checkpoint(), iter(checkpoint().items())):
            model = sharded(Net(), how)
            held = [local_of(p).numel() for p in model.parameters()]
            assert rank < 3 or 0 in held
            before = {name: p._version for name, p in model.named_parameters()}
            report = paramkit.transplant(model, source, rules(), requires_grad=False)
            assert all(p._version > before[name] for name, p in model.named_parameters())
            assert not any(p.requires_grad for p in model.parameters())
            agreed(sorted(report.summary.names))


def test_parameters_with_empty_shards_are_written_too() -> None:
    ranks.run(frozen, 4)


class Tied(nn.Module):
    """Of one row: on all ranks but one its shard is empty."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.full((1, 5), value))
        self.head = self.embed
        self.other = nn.Parameter(torch.full((6, 5), value))


def ties(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    source = fully_shard(Tied(3.0), mesh=mesh)
    for way in (paramkit.transplant, pkd.transplant):
        for of, to in ((source.state_dict(), Tied(0.0)), (source, Tied(0.0))):
            model = fully_shard(to, mesh=mesh)
            way(model if isinstance(of, dict) else model.state_dict(), of)
            assert all(torch.equal(t, torch.full_like(t, 3.0)) for t in shards_of(model).values())
    # Apart, they are not tied anywhere.
    apart = {name: t.clone() for name, t in source.state_dict().items()}
    pkd.transplant(apart, source.state_dict())
    # A rank that has all of a tensor says what the others say, which have none of it.
    dst = {"embed": torch.zeros(1, 5)}
    src = {"embed": source.state_dict()["embed"]}
    refused(lambda: paramkit.transplant(dst, src), dst, "another rank holds")


def test_ranks_without_a_row_say_what_the_others_say() -> None:
    ranks.run(ties, 2)


# ---- errors --------------------------------------------------------------------------------------


def wrong(rank: int) -> None:
    for how in ("fsdp", "tp fsdp", "any 1"):
        model = sharded(Net(), how)
        full = checkpoint()
        # Not all of a tensor is written, though the rest may lie on another rank.
        less = [r for r in rules() if r.src != "h.{i}.v.w"]
        drop = Rule("h.{i}.v.w", None)
        text = refused(lambda: paramkit.plan(model, full, [*less, drop]), model, "qkv.weight")  # noqa: B023
        assert "got 108 of 144 elements written" in text
        # A shape, a name too many, an overlap: found by whole shapes.
        other = {**full, "h.0.one": torch.zeros(2, 5), "more": torch.zeros(1)}
        text = refused(lambda: paramkit.plan(model, other, rules()), model, "h.0.one")  # noqa: B023
        assert "more" in text
        twice = [*rules(), Rule("x", "layers.0.gate_up.weight", "o i -> (s o) i", at={"s": 1})]
        more = {**full, "x": torch.zeros(7, 6)}
        refused(paramkit.plan(model, more, twice).apply, model, "gate_up")


def test_errors_are_those_of_every_rank() -> None:
    ranks.run(wrong, 4)


def impossible(rank: int) -> None:
    """What cannot be written or read: refused with what helps."""
    mesh = init_device_mesh("cpu", (2,))
    source = {"w": torch.zeros(4, 3)}
    unsummed = DTensor.from_local(torch.zeros(4, 3), mesh, [Partial()], run_check=False)
    model = {"w": unsummed}
    assert "redistribute" in refused(lambda: paramkit.plan(model, source), model, "Partial|P\\(")
    plain = {"w": torch.ones(4, 3)}
    assert "redistribute" in refused(lambda: paramkit.plan(plain, model), plain, "Partial|P\\(")
    with torch.device("meta"):
        empty = nn.Linear(3, 4)
    fully_shard(empty)
    state = {"weight": torch.ones(4, 3), "bias": torch.ones(4)}
    assert "to_empty" in refused(lambda: paramkit.plan(empty, state), empty, "meta")
    assert "to_empty" in refused(lambda: paramkit.plan(state, empty), state, "meta")
    empty.to_empty(device="cpu")
    paramkit.transplant(empty, state)
    assert torch.equal(empty.weight.full_tensor(), state["weight"])

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    gathered, state = Two(), Two().state_dict()
    fully_shard(gathered.a, reshard_after_forward=False)
    fully_shard(gathered)
    gathered(torch.ones(1, 3))
    for call in (
        lambda: paramkit.plan(gathered, state),
        lambda: paramkit.transplant(gathered, state),
        lambda: paramkit.transplant(gathered, iter(state.items())),
    ):
        with pytest.raises(PlanError, match=r"reshard\(\)"):
            call()
    for module in (gathered, gathered.a):
        module.reshard()
    paramkit.transplant(gathered, state)
    assert torch.equal(gathered.a.weight.full_tensor(), state["a.weight"])


def test_what_cannot_be_is_refused_with_a_hint() -> None:
    ranks.run(impossible, 2)


def outside(rank: int) -> None:
    """A rank that is not part of a parameter's mesh has nothing to write, and no trouble."""
    mesh = DeviceMesh("cpu", [1])
    whole = torch.arange(8.0).view(4, 2)
    model = {"w": distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)], src_data_rank=None)}
    plan = paramkit.plan(model, {"w": whole})
    for _ in range(2):
        plan.apply()
        assert plan.verify() == []
    paramkit.transplant(model, iter({"w": whole}.items()))
    with paramkit.writes(model) as w:
        w["w"][1] = -1.0
    whole[1] = -1.0
    local = model["w"]._local_tensor
    assert torch.equal(local, whole) if rank == 1 else not local.numel()
    listed = [model["w"]]
    assert "to_local()" in refused(lambda: paramkit.plan(listed, [whole]), model, "DTensor")


def test_a_rank_outside_of_the_mesh() -> None:
    ranks.run(outside, 2)


# ---- writes --------------------------------------------------------------------------------------


INDICES: tuple[Any, ...] = (
    (slice(None), slice(0, 2)),
    (slice(1, 9, 3), slice(None)),
    (slice(2, 7),),
    (-1,),
    (4, 3),
    (Ellipsis, slice(None, None, 2)),
    (None, slice(3, 5)),
    (slice(5, 5),),
)


def assigned(rank: int) -> None:
    """Indices are those of the whole tensor; numbers, whole tensors and broadcasts are values."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, world // 2))
    whole = torch.arange(50.0).view(10, 5)
    for placements in (
        [Shard(0), Shard(0)],
        [Shard(1), Shard(0)],
        [Replicate(), Shard(1)],
        [Shard(0), Replicate()],
    ):
        for k, index in enumerate(INDICES):
            for value in (-1.5, whole[index] * 3, whole[index][..., :1] if index != (4, 3) else 2):
                model = {"w": distribute_tensor(whole.clone(), mesh, placements)}
                expected = whole.clone()
                expected[index] = value
                with paramkit.writes(model) as w:
                    w["w"][index] = value
                said = f"{placements} {k} {value}"
                assert_same_bits(model["w"].full_tensor(), expected, what=said)
        # Values in shards: of the same rows and columns, or whole on every rank.
        model = {"w": distribute_tensor(torch.zeros(10, 5), mesh, placements)}
        with paramkit.writes(model) as w:
            w["w"][:, :] = distribute_tensor(whole, mesh, placements)
        assert_same_bits(model["w"].full_tensor(), whole)
        with paramkit.writes(model) as w:
            w["w"][2:4] = distribute_tensor(-whole[:2], mesh, [Replicate(), Replicate()])
        expected = whole.clone()
        expected[2:4] = -whole[:2]
        assert_same_bits(model["w"].full_tensor(), expected)
        # Many at once, of which the later wins; plans of them run again.
        model = {"w": distribute_tensor(whole.clone(), mesh, placements)}
        expected = whole.clone()
        with paramkit.writes(model, overlap="last") as w:
            for k, index in enumerate(INDICES):
                w[model["w"]][index] = -1.0 - k
                expected[index] = -1.0 - k
        assert_same_bits(model["w"].full_tensor(), expected)
        model["w"]._local_tensor.zero_()
        assert w.plan is not None
        w.plan.apply()
        zeroed = torch.where(expected == whole, torch.zeros(()), expected)
        assert_same_bits(model["w"].full_tensor(), zeroed)
        # Refused on every rank, wherever the elements are.

        def crossed() -> None:
            with paramkit.writes(model) as w:  # noqa: B023
                w["w"][0] = 1.0
                w["w"][:, 4] = 2.0

        refused(crossed, model, "overlap|twice|both")

        def outside() -> None:
            with paramkit.writes(model) as w:  # noqa: B023
                w["w"][10] = 1.0

        refused(outside, model, "index")


def test_writes_by_indices_of_the_whole() -> None:
    ranks.run(assigned, 4)


# ---- load_state_dict -----------------------------------------------------------------------------


def loaded(rank: int) -> None:
    expected = values()
    state = expected.state_dict()
    for how in ("fsdp", "hsdp", "tp", "tp fsdp", "any 2"):
        model = sharded(Net(), how)
        assert str(paramkit.load_state_dict(model, state)) == "<All keys matched successfully>"
        assert_same_shards(model, sharded(values(), how))
        # A DTensor of the same placements, and, for all ranks together, of others.
        again = sharded(Net(), how)
        paramkit.load_state_dict(again, model.state_dict())
        assert_same_shards(again, model)
        keys = paramkit.load_state_dict(
            model, {"scale": state["scale"] * 2, "x": torch.ones(1)}, strict=False
        )
        assert keys.unexpected_keys == ["x"] and len(keys.missing_keys) == len(state) - 1
        assert torch.equal(model.scale, state["scale"] * 2)
        # torch's error, and nothing written.
        watched = watch(*shards_of(model).values())
        with pytest.raises(RuntimeError, match=re.escape("size mismatch for norm.weight")):
            paramkit.load_state_dict(model, {**state, "norm.weight": torch.zeros(7)})
        with pytest.raises(RuntimeError, match="Missing key"):
            paramkit.load_state_dict(model, {"scale": state["scale"]})
        watched.assert_unwritten()
    mesh = init_device_mesh("cpu", (4,))
    for own, given in ((Shard(0), Shard(1)), (Shard(1), Replicate()), (Replicate(), Shard(0))):
        module, whole = nn.Linear(6, 7, bias=False), torch.randn(7, 6)
        dist.broadcast(whole, 0)
        module.weight = nn.Parameter(distribute_tensor(torch.zeros(7, 6), mesh, [own]))
        paramkit.load_state_dict(module, {"weight": distribute_tensor(whole, mesh, [given])})
        assert torch.equal(module.weight.full_tensor(), whole)


def test_load_state_dict() -> None:
    ranks.run(loaded, 4)


def overflows(rank: int) -> None:
    model = sharded(Net(), "fsdp").to(torch.float16)
    source = {n: torch.full(t.shape, 1.0) for n, t in model.state_dict().items()}
    name = next(iter(source))
    source[name].reshape(-1)[0] = 1e9  # in the shard of the first rank
    plan = paramkit.plan(model, source, casting="same_kind", overflow="error")
    refused(plan.apply, model, "1e|overflow")
    source[name].reshape(-1)[0] = 1.0
    plan.apply()


def test_what_overflows_in_one_shard_is_refused_on_every_rank() -> None:
    ranks.run(overflows, 2)
