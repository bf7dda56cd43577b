"""Sharded models and weight sync."""

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import assert_type

import paramkit.distributed as pkd
from paramkit import Report, Rule
from paramkit.torn import Torn


def trainer(model: nn.Module, group: dist.ProcessGroup | None) -> pkd.SyncReport:
    sync = pkd.Sync(None, group, source=model, checksum="bucket", casting="unsafe")
    report = sync.step()
    assert_type(report.version, int)
    sync.rebuild()
    return report


def engine(meta: dict[str, Tensor]) -> Iterator[str]:
    sync = pkd.Sync(meta, stream=True, rules=[Rule("a.{*p}", "{*p}")])
    for name, tensor in sync.weights():
        assert_type(tensor, Tensor)
        yield name
    for bucket in sync.buckets():
        assert_type(bucket.buffer, Tensor)
        assert_type([entry.offset for entry in bucket.entries], list[int])
    assert_type(sync.torn, Torn | None)


def reshard(model: nn.Module, held: nn.Module | None) -> Report:
    transfer = pkd.plan(model, held, src=0, allow_missing=["head.*"])
    assert_type(transfer, pkd.Transfer)
    transfer.apply(held, progress=print)
    return pkd.transplant(model, "checkpoint", casting="safe", staging=1 << 20)


def wrong(model: nn.Module) -> None:
    pkd.Sync(model, checksum="all")  # error: arg-type
    pkd.Sync(model, casting="any")  # error: arg-type
    pkd.transplant(model, None, overlap="last")  # error: call-arg
    pkd.plan(model, None, src="0")  # error: arg-type
