"""From any sharding into any other, renamed, permuted and converted on the way, on four processes.

What is written is compared, bit by bit, with what one process writes that has everything.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import paramkit
import paramkit.distributed as pkd
from paramkit.distributed import work
from tests import ranks
from tests.conftest import need_extension
from tests.guards import bits, nothing_written, storage_bytes, watch
from tests.layouts import LAYOUTS, arrange, assert_holds, local_of, sharded
from tests.renamed import RULES, checkpoint, destination, expected

# Bytes of staging: for several rounds, for one.
SMALL, LARGE = 4096, 64 << 20


def test_what_is_expected_is_what_torch_would_write() -> None:
    got, src = expected(), checkpoint()
    assert torch.equal(got["head.weight"], src["out"].t())
    assert torch.equal(got["layers.1.qkv"], torch.cat([src["1.q"], src["1.k"], src["1.v"]]))
    assert torch.equal(torch.cat([got["gate"], got["up"]]), src["gate_up"])
    stacked = torch.stack([src[f"experts.{e}.w"].t() for e in range(3)])
    assert torch.equal(got["experts"], stacked.half())
    mixed = src["grouped"].view(3, 2, 3, 3).transpose(0, 1).reshape(18, 3)
    assert torch.equal(got["interleaved"], mixed)
    padded = torch.cat([src["emb"].bfloat16(), torch.full((3, 6), 0.5).bfloat16()])
    assert torch.equal(got["table"], padded)
    assert all(torch.equal(bits(got[n]), bits(src[n])) for n in ("tiny", "spin", "eighth", "mask"))


# ---- all pairs -----------------------------------------------------------------------------------


def staged(transfer: pkd.Transfer) -> list[int]:
    """Bytes of staging, and of each message's buffer, on this rank."""
    (traffic,) = transfer._work.passes  # type: ignore[union-attr]
    sizes = [len(b) for r in traffic.rounds for _, b, _ in (*r.sends, *r.receives)]
    assert traffic.staging >= max(sizes, default=0)
    return [traffic.staging, *sizes]


def all_pairs(rank: int, pairs: list[tuple[str, str]]) -> tuple[int, int, int]:
    sources = {a: arrange(a, checkpoint(), rank) for a, _ in pairs}
    models = {b: arrange(b, expected(), rank, fresh=True) or {} for _, b in pairs}
    wanted = {b: arrange(b, expected(), rank) or {} for b in models}
    before = {kind: {n: bits(local_of(t)) for n, t in m.items()} for kind, m in models.items()}
    work.LEAST = 128  # bytes of a message: these tensors are small
    sent = several = 0
    for a, b in pairs:
        source, model, what = sources[a], models[b], f"{a} to {b}, rank {rank}"
        locals_ = {name: local_of(t) for name, t in model.items()}
        for name, t in locals_.items():
            storage_bytes(t)[inside(t)] = before[b][name].flatten()
        guard, counters = watch(*locals_.values()), [t._version for t in locals_.values()]
        # Both ways in each row and each column of all pairs.
        limit = (SMALL, LARGE)[(list(LAYOUTS).index(a) + list(LAYOUTS).index(b)) % 2]
        with nothing_written(*map(local_of, (source or {}).values())):
            transfer = pkd.plan(model or None, source, RULES, staging=limit)
            guard.assert_unwritten()
            report = transfer.apply()
        guard.assert_only_inside()
        for (name, t), was in zip(locals_.items(), counters, strict=True):
            assert torch.equal(bits(t), bits(local_of(wanted[b][name]))), f"{what}: {name}"
            assert t._version > was or not t.numel(), f"{what}: {name}"
        sizes = staged(transfer)
        assert sizes[0] <= limit, (what, sizes)
        sent += len(sizes) > 1
        several += len(transfer._work.passes[0].rounds) > 1  # type: ignore[union-attr]
        assert (report.summary.names == ()) == (not model), what
    return sent, several, sum(map(len, models.values()))


def inside(t: Tensor) -> Tensor:
    """Where in its storage the bytes of a dense tensor are."""
    first = t.storage_offset() * t.element_size()
    return torch.arange(first, first + t.numel() * t.element_size())


def test_all_pairs_of_layouts() -> None:
    pairs = list(itertools.product(LAYOUTS, LAYOUTS))
    found = ranks.run(all_pairs, 4, pairs, timeout=120)
    # Each rank took part in messages in most of them, and wrote under every layout but those of some ranks.
    assert all(sent > len(pairs) // 2 for sent, _, _ in found), found
    assert all(several > len(pairs) // 8 for _, several, _ in found), found
    assert all(models >= 8 * len(destination()) for _, _, models in found), found


@pytest.mark.parametrize("backend", ["native", "cpu"])
def test_each_backend(backend: str) -> None:
    if backend == "cpu":
        need_extension()
    pairs = [("fsdp", "columns"), ("columns", "2-d"), ("first rank", "hsdp"), ("2-d both", "plain")]
    for found, name in ranks.run(one_backend, 4, pairs, env={"PARAMKIT_BACKEND": backend}):
        assert found[0] and name == backend


def one_backend(rank: int, pairs: list[tuple[str, str]]) -> tuple[tuple[int, int, int], str]:
    return all_pairs(rank, pairs), paramkit.backend.active().NAME


# ---- modules as torch shards them ----------------------------------------------------------------


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Layers of odd sizes; with four shards some are uneven, and some are empty."""
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6, bias=k > 0)) for k in range(2)]
    made = nn.Sequential(*layers, nn.BatchNorm1d(3))
    made[2].running_mean.normal_()
    return made.to(dtype)


def modules(rank: int, kinds: list[str]) -> None:
    everyone = (0, 1, 2, 3)
    for a, b in itertools.product(kinds, kinds):
        full = mlp(1)
        source = sharded(mlp(1), a, everyone) if a != "plain" else mlp(1)
        model = sharded(mlp(2), b, everyone) if b != "plain" else mlp(2)
        model = model.bfloat16() if (a, b) == ("fsdp", "2-d") else model
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        before = dict(model.named_parameters())
        pkd.transplant(model, source, staging=4096)
        want = {n: t.to(model.state_dict()[n].dtype) for n, t in full.state_dict().items()}
        assert_holds(model, want, f"{a} to {b}")
        assert all(p is before[n] and p.requires_grad for n, p in model.named_parameters())
        for p in model.parameters():
            p.grad = p.detach().clone()
        optimizer.step()  # the parameters that the optimizer knows are those that were written
        halved = {n: (t / 2 if "weight" in n or "bias" in n else t) for n, t in want.items()}
        assert_holds(model, halved, f"{a} to {b}, after a step")


def test_modules_under_fsdp_and_tensor_parallel() -> None:
    ranks.run(modules, 4, ["fsdp", "tp", "hsdp", "2-d", "plain"], timeout=120)
