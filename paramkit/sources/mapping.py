"""Mappings as sources: every entry must be a named tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import Finding, SourceError
from .faults import type_text
from .lazy import Lazy

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NESTS", "open_mapping"]

# What checkpoints nest their weights under.
NESTS = ("state_dict", "model_state_dict", "model", "module", "params", "weights")


def open_mapping(source: Mapping[Any, Any]) -> dict[str, Tensor | Lazy]:
    """The entries of a mapping, if all of them are tensors (or `Lazy`) under names.

    Args:
        source: name -> tensor of any shape and dtype.

    Returns:
        A dict of the same objects, in the mapping's order.

    Raises:
        SourceError: lists every entry that is not a named tensor.

    Example:
        >>> list(open_mapping({"a": torch.zeros(2)}))
        ['a']
    """
    tensors, findings = sift(source)
    if findings:
        raise SourceError(
            f"the source mapping has {len(findings)} of {len(source)} entries that are not named tensors; "
            "nothing was written.",
            findings,
        )
    return tensors


def sift(source: Mapping[Any, Any]) -> tuple[dict[str, Tensor | Lazy], list[Finding]]:
    """The named tensors of a mapping, and a finding for each other entry."""
    findings = []
    tensors: dict[str, Tensor | Lazy] = {}
    for name, value in source.items():
        if not isinstance(name, str):
            findings.append(Finding(f"source[{name!r}]", "type", type_text(name), "a name (str)"))
        elif isinstance(value, (torch.Tensor, Lazy)):
            tensors[name] = value
        else:
            findings.append(
                Finding(name, "type", type_text(value), "a tensor", _value_hint(name, value))
            )
    return tensors, findings


def _value_hint(name: str, value: object) -> str:
    if isinstance(value, Mapping):
        inner = next((v for v in value.values()), None)
        nested = name in NESTS or isinstance(inner, torch.Tensor)
        return (
            f'a nested checkpoint? pass source["{name}"]'
            if nested
            else "leave it out of the source"
        )
    if isinstance(value, torch.nn.Module):
        return f'pass source["{name}"] itself, or its state_dict()'
    if type(value).__module__.split(".")[0] == "numpy":
        return "convert it with torch.from_numpy"
    if name.endswith("_extra_state"):
        return "extra state is not a weight; leave it out of the source"
    if isinstance(value, (bool, int, float, complex)):
        return "convert it with torch.tensor, or leave it out of the source"
    return "leave it out of the source"
