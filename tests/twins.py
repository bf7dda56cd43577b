"""Twins of tensors: the same bytes in the same places, one for torch and one for us.

Tensors that share a storage share one in their copies too. Each copied storage lies between pattern
bytes, so that a write that strays shows when two sets of twins are compared whole.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .guards import storage_bytes

__all__ = ["Twins", "is_strided"]

Tree = TypeVar("Tree")

# A multiple of every element's size, so that offsets stay whole numbers of elements.
_MARGIN = 16 * 5
_PATTERN = torch.arange(1, _MARGIN + 1, dtype=torch.uint8)


def is_strided(tensor: Tensor) -> bool:
    """Whether a tensor is shape and strides over bytes of its own: neither sparse, nested nor quantized."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_nested
    )


class Twins:
    """One copy of everything in a structure of tensors."""

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self._storages: dict[int, Tensor] = {}

    def of(self, tree: Tree) -> Tree:
        """The structure with every tensor replaced by its twin; the same tensor twice is one twin."""
        return pytree.tree_map(lambda leaf: self._of(leaf), tree)

    def _of(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self._tensors:
            # The original is kept, so that no other tensor gets its id.
            self._tensors[id(leaf)] = (leaf, self._copy(leaf))
        return self._tensors[id(leaf)][1]

    def _copy(self, tensor: Tensor) -> Tensor:
        if not is_strided(tensor):
            twin = tensor.detach().clone()
            return twin.requires_grad_(tensor.requires_grad)
        storage = tensor.untyped_storage()
        raw = self._storages.get(storage._cdata)
        if raw is None:
            raw = torch.cat([_PATTERN, storage_bytes(tensor), _PATTERN])
            self._storages[storage._cdata] = raw
        offset = _MARGIN // tensor.element_size() + tensor.storage_offset()
        twin = torch.empty(0, dtype=tensor.dtype).set_(
            raw.untyped_storage(), offset, tensor.shape, tensor.stride()
        )
        # The bits say conjugated or negated of the same bytes.
        twin = twin.conj() if tensor.is_conj() else twin
        twin = torch._neg_view(twin) if tensor.is_neg() else twin
        return twin.requires_grad_(tensor.requires_grad)

    @property
    def tensors(self) -> list[Tensor]:
        """Every twin so far, in the order in which they were asked for."""
        return [twin for _, twin in self._tensors.values()]

    @property
    def originals(self) -> list[Tensor]:
        """What they are twins of, in the same order."""
        return [original for original, _ in self._tensors.values()]

    def margins(self) -> list[Tensor]:
        """The bytes before and behind every storage that was not resized; views of the live memory."""
        whole = [raw for raw in self.memory() if raw.numel() == raw.untyped_storage().nbytes()]
        return [part for raw in whole for part in (raw[:_MARGIN], raw[-_MARGIN:])]

    def memory(self) -> list[Tensor]:
        """The bytes of every storage, pattern included; views of the live memory."""
        return list(self._storages.values())
