"""Modules as sources: their parameters and buffers, without running anything of theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

__all__ = ["module_tensors"]


def module_tensors(
    module: nn.Module, transient: bool = False
) -> Iterator[
    tuple[str, Tensor, nn.Module, str, str, tuple[tuple[nn.Module, str, nn.Module], ...]]
]:
    """Parameters and persistent buffers of a module, in the order and under the names of its state dict.

    Walks the modules itself, so that no hook runs and nothing is detached. A module or a parameter
    that is reachable under several names is given under each of them.

    Args:
        module: the module.
        transient: with the non-persistent buffers, which no state dict has.

    Yields:
        (name, tensor, owner, key, kind, path), where kind is "parameter", "buffer" or "transient", and path holds
        (parent, child key, child) from the root to the owner.

    Example:
        >>> import torch
        >>> [name for name, *_ in module_tensors(torch.nn.Sequential(torch.nn.Linear(3, 2)))]
        ['0.weight', '0.bias']
    """
    Step = tuple[str, "nn.Module", tuple[tuple["nn.Module", str, "nn.Module"], ...]]
    stack: list[Step] = [("", module, ())]
    while stack:
        prefix, owner, path = stack.pop()
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                yield prefix + key, parameter, owner, key, "parameter", path
        for key, buffer in owner._buffers.items():
            kind = "transient" if key in owner._non_persistent_buffers_set else "buffer"
            if buffer is not None and (transient or kind == "buffer"):
                yield prefix + key, buffer, owner, key, kind, path
        for key, child in reversed(owner._modules.items()):
            # A module that contains itself would be walked forever; each turn has the same parameters.
            if child is None or child is module or any(child is step[2] for step in path):
                continue
            stack.append((f"{prefix}{key}.", child, (*path, (owner, key, child))))
