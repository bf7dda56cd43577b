"""Rules into sharded models: every shard, bit by bit, is that of the same values sharded by torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

import paramkit
from paramkit import Rule
from tests import ranks
from tests.conftest import need_extension
from tests.guards import assert_same_bits, watch
from tests.sharded_models import (
    HOWS,
    Net,
    assert_same_shards,
    checkpoint,
    grid,
    local_of,
    rules,
    sharded,
    shards_of,
)

NORMAL = {"normal": 0.02, "seed": 3}


def whole(fill: Any = "zeros", dtype: torch.dtype = torch.float32) -> Net:
    """What one process makes."""
    model = Net().to(dtype)
    paramkit.transplant(model, checkpoint(), rules(fill))
    return model


# ---- every way to shard --------------------------------------------------------------------------


def into_all(rank: int, source: Any, backend: str) -> int:
    """The same rules into every sharding, twice: with rows filled by a number, and by normal values."""
    assert paramkit.backend.active().NAME.startswith(backend)
    source = checkpoint() if source is None else source
    count = 0
    for how in HOWS:
        model = sharded(Net(), how)
        assert any(isinstance(p, DTensor) for p in model.parameters())
        own = [local_of(p.detach()) for p in model.parameters()]
        for fill in ("zeros", NORMAL):
            watched = watch(*own)
            plan = paramkit.plan(model, source, rules(fill))
            report = plan.apply()
            watched.assert_only_inside()
            expected = whole(fill)
            assert_same_shards(model, sharded(whole(fill), how))
            written = sum(t.nbytes for n, t in shards_of(model).items() if n != "head.weight")
            assert report.summary.bytes == written, how
            assert plan.verify() == []
            if "any" not in how:  # torch's own idea of the whole
                for name, tensor in model.state_dict().items():
                    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                    assert_same_bits(full, expected.state_dict()[name], what=f"{how}: {name}")
            count += 1
        assert (
            own[0].untyped_storage().data_ptr() == watched._tensors[0].untyped_storage().data_ptr()
        )
        assert model.head.weight is model.embed.weight
    return count


@pytest.mark.parametrize(("world", "backend"), [(2, "native"), (4, "cpu")])
def test_into_every_sharding(world: int, backend: str) -> None:
    if backend == "cpu":
        need_extension()
    environment = {"PARAMKIT_BACKEND": backend}
    found = ranks.run(into_all, world, None, backend, env=environment, timeout=90)
    assert found == [2 * len(HOWS)] * world


def other_dtypes(rank: int) -> None:
    """Into bf16 and f64 models, refused where a cast is not allowed, on every rank alike."""
    for dtype in (torch.bfloat16, torch.float64):
        for how in ("tp fsdp", "any 3"):
            model = sharded(Net().to(dtype), how)
            watched = watch(*shards_of(model).values())
            with pytest.raises(paramkit.PlanError, match="casting"):
                paramkit.transplant(model, checkpoint(), rules(), casting="no")
            watched.assert_unwritten()
            paramkit.transplant(model, checkpoint(), rules(NORMAL))
            assert_same_shards(model, sharded(whole(NORMAL, dtype), how))


def test_into_other_dtypes() -> None:
    ranks.run(other_dtypes, 4)


# ---- other sources -------------------------------------------------------------------------------


def from_each(rank: int, folder: str) -> None:
    """A file, a mapped file, an iterable, a module: all ranks can read them, nobody sends anything."""
    path = Path(folder) / "whole.safetensors"
    for how in ("tp fsdp", "any 0", "hsdp"):
        expected = sharded(whole(NORMAL), how)
        for source, more in (
            (path, {}),
            (path, {"mmap": True}),
            (path, {"staging": 4096}),
            (path.with_suffix(".pt"), {}),
            (iter(checkpoint().items()), {}),
        ):
            model = sharded(Net(), how)
            paramkit.transplant(model, source, rules(NORMAL), **more)
            assert_same_shards(model, expected)
        model = sharded(Net(), how)
        paramkit.transplant(model, whole(NORMAL))
        assert_same_shards(model, expected)


def test_from_files_iterables_and_modules(tmp_path: Path) -> None:
    save_file(checkpoint(), tmp_path / "whole.safetensors")
    torch.save(checkpoint(), tmp_path / "whole.pt")
    ranks.run(from_each, 4, str(tmp_path))


# ---- fills ---------------------------------------------------------------------------------------


def filled(rank: int) -> None:
    """Every kind of fill, of rows that lie on other ranks, and of parts of an axis that is merged."""
    source = {"w": torch.randn(5, 3), "s": torch.tensor(2.0)}
    made = [
        Rule("w", "mean", rows="overlap", fill="mean"),
        Rule("w", "normal", rows="overlap", fill={"normal": 1.0}),
        Rule("w", "kept", rows="overlap"),
        Rule(None, "halves", "-> (s h) e", at={"s": 1}, s=2, fill=-1.5),
        Rule("w", "halves", "h e -> (s h) e", at={"s": 0}),
        Rule(None, "all", fill={"normal": 0.5, "mean": 1.0}),
        Rule("w", "twice", "h e -> (h s) e", at={"s": "*"}, s=2),
        Rule("s", "s"),
    ]
    sizes = {"mean": 9, "normal": 9, "kept": 9, "halves": 10, "all": 7, "twice": 10}
    expected = {name: torch.zeros(n, 3) for name, n in sizes.items()}
    expected["s"] = torch.tensor(0.0)
    paramkit.transplant(expected, source, made)
    assert expected["mean"][8].any() and expected["all"].std() > 0.1
    for k in range(8):
        model, wanted = Holder(sizes), Holder(sizes)
        wanted.load_state_dict(expected)
        sharded(model, f"any {k}")
        paramkit.transplant(model, source, made)
        assert_same_shards(model, sharded(wanted, f"any {k}"))


class Holder(nn.Module):
    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        for name, n in sizes.items():
            setattr(self, name, nn.Parameter(torch.zeros(n, 3)))
        self.s = nn.Parameter(torch.tensor(0.0))


def test_fills_are_the_same_whatever_the_sharding() -> None:
    ranks.run(filled, 4)


# ---- sources in shards ---------------------------------------------------------------------------


def from_shards(rank: int) -> None:
    """Of the same sharding nothing has to move; of another something has, and every rank says so."""
    for how in HOWS:
        trained, model = sharded(whole(), how), sharded(Net(), how)
        paramkit.transplant(model, trained)
        assert_same_shards(model, trained)
        mapping = {name: t.detach() for name, t in model.state_dict().items()}
        again = sharded(Net(), how)
        paramkit.transplant(again, mapping)
        assert_same_shards(again, trained)
    model = sharded(Net(), "fsdp")
    watched = watch(*shards_of(model).values())
    for how in ("tp", "tp fsdp"):
        with pytest.raises(paramkit.PlanError, match="another rank holds") as caught:
            paramkit.transplant(model, sharded(whole(), how))
        assert "paramkit.distributed" in str(caught.value)
    watched.assert_unwritten()


def test_from_shards() -> None:
    ranks.run(from_shards, 4)


def renamed(rank: int) -> None:
    """From shards of one layout into others, where each rank has what it needs."""
    mesh = grid()["tp"]
    whole_ = torch.arange(48.0).view(8, 6)
    from torch.distributed.tensor import Replicate, Shard

    source: dict[str, Tensor] = {
        "w": distribute_tensor(whole_, mesh, [Shard(0)]),
        "r": distribute_tensor(whole_, mesh, [Replicate()]),
    }
    model = {
        "turned": distribute_tensor(torch.zeros(6, 8), mesh, [Shard(1)]),
        "copied": distribute_tensor(torch.zeros(8, 6), mesh, [Shard(1)]),
        "cast": distribute_tensor(torch.zeros(8, 6, dtype=torch.bfloat16), mesh, [Shard(0)]),
        "plain": torch.zeros(8, 6),
    }
    made = [
        Rule("w", "turned", "a b -> b a"),
        Rule("w", "cast"),
        Rule("r", "copied"),
        Rule("r", "plain"),
    ]
    paramkit.transplant(model, source, made)
    for name, expected in {
        "turned": whole_.t(),
        "copied": whole_,
        "cast": whole_.bfloat16(),
    }.items():
        assert torch.equal(model[name].full_tensor(), expected), name
    assert torch.equal(model["plain"], whole_)
    with pytest.raises(paramkit.PlanError, match="another rank holds"):
        paramkit.transplant({"plain": torch.zeros(8, 6)}, {"plain": source["w"]})


def test_from_shards_by_rules() -> None:
    ranks.run(renamed, 2)
    ranks.run(renamed, 4)
