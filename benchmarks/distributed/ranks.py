"""The processes: started together, watched, and gone in the end whatever happens."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["RANKS", "launch"]

RANKS = 4


def launch(names: Sequence[str], size: str, folder: Path, timeout: float) -> dict[str, Any]:
    """Measure cases in four new processes, one after the other.

    Args:
        names: of the cases.
        size: one of `registry.SIZES`.
        folder: for files, and for what the processes say.
        timeout: seconds; what runs longer is killed.

    Returns:
        name -> `Measured` as plain data, or {"error": text}.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-", dir=folder) as own:
        context = mp.spawn(
            _rank, (list(names), size, own, timeout), nprocs=RANKS, join=False, daemon=True
        )
        why = ""
        try:
            stop = time.monotonic() + timeout
            while not context.join(max(0.1, min(5.0, stop - time.monotonic()))):
                if time.monotonic() > stop:
                    why = f"no end after {timeout:g} s"
                    break
        except Exception as error:
            why = str(error).strip().splitlines()[-1][:300]
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        found: dict[str, Any] = {}
        said = Path(own) / "said.jsonl"
        if said.exists():
            for line in said.read_text().splitlines():
                found.update(json.loads(line))
    return {name: found.get(name, {"error": why or "no result"}) for name in names}


def _rank(rank: int, names: Sequence[str], size: str, folder: str, timeout: float) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    logging.getLogger("torch").setLevel(logging.ERROR)  # that gloo has no all-to-all, once a rank
    torch.set_num_threads(1)  # there are more processes than cores as it is
    from .cases import CASES
    from .registry import Setting
    from .rounds import measure

    here = Path(folder)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(here / "store"), RANKS),
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=min(timeout, 300.0)),
    )
    chosen = {case.name: case for case in CASES}
    for k, name in enumerate(names):
        own = here / str(k)
        own.mkdir(exist_ok=True)
        measured = measure(chosen[name], Setting(size, own))
        if rank == 0:
            with (here / "said.jsonl").open("a") as said:
                said.write(json.dumps({name: asdict(measured)}) + "\n")
        dist.barrier()
    dist.destroy_process_group()
