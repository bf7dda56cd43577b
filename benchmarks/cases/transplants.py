"""Whole models: from a state dict in memory, and from a file, against `load_state_dict`."""

from __future__ import annotations

from functools import partial

import torch

from .models import Folder, Shapes, dense, filled, nested
from .registry import Work, case, group, moved, targets

__all__ = ["DENSE", "TRANSPLANTS"]

TRANSPLANTS = group("transplants", "Transplants")

DENSE = {
    "2 GiB": dense(4096, 14336, 1024, 4, 49152),
    "1 GiB": dense(4096, 14336, 1024, 2, 24576),
    "256 MiB": dense(2048, 7168, 512, 2, 12288),
    "tiny": dense(32, 48, 16, 2, 64),
}
"""Shapes of models of that many bytes in bfloat16 (and the norms' few KiB)."""


def _memory(shapes: Shapes, tiny: bool) -> Work:
    import paramkit

    shapes = DENSE["tiny"] if tiny else shapes
    state = filled(shapes)
    model = nested({name: torch.zeros_like(tensor) for name, tensor in state.items()})
    dsts = list(model.parameters())
    return Work(
        ours=lambda: paramkit.transplant(model, state),
        peer=lambda: model.load_state_dict(state),
        dsts=dsts,
        bytes=moved(dsts, dsts),
    )


def _file(shapes: Shapes, mmap: bool, tiny: bool) -> Work:
    from safetensors.torch import load_file, save_file

    import paramkit

    shapes = DENSE["tiny"] if tiny else shapes
    folder = Folder()
    path = folder.path / "model.safetensors"
    save_file(filled(shapes), path)  # written just now: it is in the page cache
    model = nested({name: torch.zeros(s, dtype=torch.bfloat16) for name, s in shapes.items()})
    dsts = list(model.parameters())
    return Work(
        ours=lambda: paramkit.transplant(model, path, mmap=mmap),
        peer=lambda: model.load_state_dict(load_file(path)),
        dsts=dsts,
        bytes=moved(dsts, dsts),
        keep=[folder],
    )


# Quick runs have the small one alone.
for size, quick in (("2 GiB", False), ("256 MiB", True)):
    case(
        f"transplant {size} memory",
        TRANSPLANTS,
        "a bfloat16 model of large tensors from a state dict",
        targets(1.4),
        seconds=8.0,
        quick=quick,
    )(partial(_memory, DENSE[size]))
    for how, mmap, ratio in (("pread", False, 1.0), ("mmap", True, 1.2)):
        case(
            f"transplant {size} file {how}",
            TRANSPLANTS,
            "the same from a .safetensors file in the page cache; torch's side is load_file",
            targets(ratio),
            seconds=8.0,
            quick=quick,
        )(partial(_file, DENSE[size], mmap))
