"""`paramkit.distributed.plan` as a whole: its sources, memory, repetition, groups and what it says."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import paramkit.distributed as pkd
from paramkit import Rule
from tests import ranks
from tests.layouts import arrange, assert_holds, local_of
from tests.renamed import RULES, checkpoint, destination, expected

# ---- memory --------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The bytes of the largest storage that an operation gave, of those that were not there before."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {local_of(t).untyped_storage().data_ptr() for t in known}
        self.bytes, self.total = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if type(t) is Tensor and t.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def bounded(rank: int) -> list[int]:
    shape, staging = (512, 768), 256 << 10
    full = torch.randn(shape, generator=torch.Generator().manual_seed(1))  # 1.5 MiB
    mesh = DeviceMesh("cpu", [0, 1, 2, 3])
    source = {"a": distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None)}
    whole = distribute_tensor(torch.zeros(768, 512), mesh, [Shard(0)], src_data_rank=None)
    model = {"b": whole}
    found = []
    for wanted, src, rules in (
        (full.t().contiguous(), source, [Rule("a", "b", "i o -> o i")]),
        (full.t().contiguous(), {"a": full} if rank == 0 else None, [Rule("a", "b", "i o -> o i")]),
    ):
        with Largest([full, source["a"], whole]) as largest:
            transfer = pkd.plan(model, src, rules, staging=staging)
            transfer.apply()
        assert_holds(model, {"b": wanted})
        traffic = transfer._work.passes[0]  # type: ignore[union-attr]
        assert traffic.staging <= staging and len(traffic.rounds) > 2
        assert 0 < largest.bytes <= staging, largest.bytes
        found.append(largest.bytes)
        whole.to_local().zero_()
    return found


def test_no_rank_holds_more_than_its_shard_and_the_staging() -> None:
    for sizes in ranks.run(bounded, 4):
        assert max(sizes) <= 256 << 10


# ---- again and again -----------------------------------------------------------------------------


def repeats(rank: int) -> None:
    source, model = arrange("fsdp", checkpoint(), rank), arrange("columns", destination(), rank)
    transfer = pkd.plan(model, source, RULES)
    calls: list[tuple[int, int]] = []
    report = transfer.apply(progress=lambda done, total: calls.append((done, total)))
    assert_holds(model, expected())
    if rank == 0:  # on the first rank alone
        assert calls and calls[-1][0] == calls[-1][1] and calls == sorted(calls)
    else:
        assert calls == []
    assert report.summary.routes["received"] > 0
    held = {n for n, t in (model or {}).items() if local_of(t).numel()}
    assert set(report.summary.names) == held
    text = transfer.explain()
    assert text.startswith(f"rank {rank} of 4") and "staging" in text and " -> " in text
    # Other values in the same tensors; another source of another layout; it is used from then on.
    for name, t in (arrange("fsdp", checkpoint(1), rank) or {}).items():
        local_of((source or {})[name]).copy_(local_of(t))
    transfer.apply()
    assert_holds(model, expected(1))
    transfer.apply(arrange("2-d", checkpoint(2), rank))
    assert_holds(model, expected(2))
    # Where a rank gives one, a rank that gives None has none any more.
    moving = {"w": torch.zeros(3)}
    moves = pkd.plan(moving, {"w": torch.ones(3)} if rank == 0 else None)
    moves.apply()
    moves.apply({"w": torch.full((3,), 5.0)} if rank == 1 else None)
    assert moving["w"].tolist() == [5.0] * 3
    # One that does not fit leaves the transfer as it was.
    wrong = arrange("fsdp", {**checkpoint(3), "emb": torch.zeros(13, 5)}, rank)
    with pytest.raises(pkd.SyncError, match=r"emb|table"):
        transfer.apply(wrong)
    for t in (model or {}).values():
        local_of(t).zero_()
    transfer.apply()
    assert_holds(model, expected(2))


def test_a_transfer_runs_again_with_other_values_and_other_sources() -> None:
    ranks.run(repeats, 4)


# ---- files ---------------------------------------------------------------------------------------


def from_files(rank: int, folder: str) -> None:
    path = Path(folder, "model.safetensors")
    model = arrange("2-d", destination(), rank)
    nothing = model if rank != 3 else None

    def again() -> None:
        for t in (model or {}).values():
            local_of(t).zero_()

    transfer = pkd.plan(model, path, RULES)  # read on all ranks
    transfer.apply()
    assert_holds(model, expected())
    assert transfer.explain()
    again()
    with pytest.raises(pkd.SyncError, match="nowhere"):
        transfer.apply(Path(folder, "nowhere.safetensors"))
    transfer.apply()  # as it was
    assert_holds(model, expected())
    again()
    transfer.apply(
        arrange("columns", checkpoint(1), rank)
    )  # from files to what ranks hold, and back
    assert_holds(model, expected(1))
    transfer.apply(str(path))
    assert_holds(model, expected())
    again()
    pkd.transplant(model, path if rank == 2 else object(), RULES, src=2)  # on one alone
    assert_holds(model, expected())
    again()
    calls: list[int] = []
    pkd.transplant(model, Path(folder, "dcp"), RULES, progress=lambda done, _: calls.append(done))
    assert_holds(model, expected())
    assert bool(calls) == (rank == 0)
    report = pkd.transplant(nothing and destination(), path, RULES)  # whole, and on some ranks
    assert (report.summary.names == ()) == (rank == 3)


def test_files_and_folders(tmp_path: Path) -> None:
    save_file(checkpoint(), tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(checkpoint(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    ranks.run(from_files, 4, str(tmp_path))


# ---- groups and memory of models -----------------------------------------------------------------


def in_groups(rank: int) -> None:
    """In a group whose ranks are not the global ones, and in two groups at once."""
    group = dist.new_group([1, 2, 3])
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    full = torch.arange(42.0).view(7, 6)
    mesh = DeviceMesh("cpu", [3, 1])
    if rank:
        source = {"a": full} if rank == 2 else None
        model: dict[str, Any] | None = None
        if rank != 2:
            local = distribute_tensor(torch.zeros(7, 6), mesh, [Shard(0)], src_data_rank=None)
            assert isinstance(local, DTensor)
            model = {"a": local}
        pkd.transplant(model, source, group=group)
        if model is not None:
            assert_holds(model, {"a": full})
        text = f"rank {rank - 1} of 3"
        assert text in pkd.plan(model, source, group=group, src=1).explain()
        with pytest.raises(pkd.SyncError, match="ranks outside of the group"):
            outside = DeviceMesh("cpu", [0, 1], _init_backend=False)
            bad = DTensor.from_local(torch.zeros(7, 6), outside, [Shard(0)], run_check=False)
            pkd.plan({"a": bad} if rank == 1 else model, source, group=group)
    else:
        with pytest.raises(ValueError, match="not one of its ranks"):
            pkd.plan({"a": torch.zeros(7, 6)}, {"a": full}, group=group)
    own = {"a": torch.full((2,), -1.0)}
    given = {"a": torch.full((2,), float(rank))} if rank < 2 else None
    pkd.transplant(own if rank >= 2 else None, given, group=pairs[rank % 2])
    assert own["a"].tolist() == ([rank - 2.0] * 2 if rank >= 2 else [-1, -1])
    # Views of one memory, side by side; and one above another.
    memory = torch.zeros(6, 8)
    both = {"a": memory[:, :4], "b": memory[:, 4:]}
    whole = {"a": torch.ones(6, 4), "b": torch.full((6, 4), 2.0)}
    pkd.transplant(both, whole if rank == 1 else None)
    assert memory.sum() == 6 * 4 * 3
    for meeting in (
        {"a": memory[:, :5], "b": memory[:, 4:]},
        {"a": memory[:2, :4], "b": memory[1:, :4]},
    ):
        full_ = {n: torch.ones(t.shape) for n, t in meeting.items()}
        with pytest.raises(pkd.SyncError, match="conflict"):
            pkd.plan(meeting, full_ if rank == 1 else None)
    with pytest.raises(pkd.SyncError, match="of the source is read"):
        pkd.plan({"a": memory[:, :4]}, {"a": memory[:, 1:5]})
    memory[0] = torch.arange(8.0)
    read = {"a": memory[0, :4].expand(6, 4)}  # one row for all, beside what is written
    pkd.transplant({"a": memory[:, 4:]}, read if rank == 1 else {"a": read["a"].clone()})
    assert torch.equal(memory[:, 4:], read["a"])


def test_groups_and_views_of_one_memory() -> None:
    ranks.run(in_groups, 4)
