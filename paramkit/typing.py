"""Types of arguments, for the annotations of code that calls paramkit.

    from paramkit.typing import Casting, Source

    def load(path: Source, casting: Casting = "same_kind") -> None: ...

They are for type checkers; at run time they are plain objects, and nothing is checked against them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union

import numpy as np
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.checkpoint.storage import StorageReader

    from .fills import Fill
    from .rules import Rule
    from .sources.lazy import Lazy

__all__ = [
    "Casting",
    "Checksum",
    "Filling",
    "Hooks",
    "Index",
    "Model",
    "NewSource",
    "Number",
    "Overflow",
    "Overlap",
    "Progress",
    "Rules",
    "Source",
    "StoredPath",
    "Stream",
    "Values",
]

Casting: TypeAlias = Literal["no", "safe", "same_kind", "unsafe"]
"""Which conversions are allowed, with numpy's meaning."""

Overflow: TypeAlias = Literal["ignore", "error"]
"""What happens to finite values that the destination's dtype cannot hold."""

Hooks: TypeAlias = Literal["refuse", "ignore"]
"""What happens to modules that load a state dict in a way of their own."""

Overlap: TypeAlias = Literal["error", "last"]
"""What two recorded writes of one element are."""

Checksum: TypeAlias = Literal["bucket", "parameter", "both"]
"""What a `paramkit.distributed.Sync` checks."""

Number: TypeAlias = Union[bool, int, float, complex, "np.number[Any]", np.bool_]
"""What torch takes as a number."""

StoredPath: TypeAlias = Union[str, "os.PathLike[str]"]
"""The path of a file or folder."""

Values: TypeAlias = Number | Sequence[Tensor | Number]
"""What a list of tensors is written from: one value each, or one number for all."""

NewSource: TypeAlias = Union[
    nn.Module,
    Mapping[str, Union[Tensor, "Lazy"]],
    StoredPath,
    "StorageReader",
    Number,
    Sequence[StoredPath | Tensor | Number],
]
"""What `Plan.apply` takes: a `Source` or `Values`, as the plan was made from."""

Index: TypeAlias = int | slice | EllipsisType | tuple[int | slice | EllipsisType | None, ...] | None
"""A basic index: what a recorded tensor may be assigned by."""

Progress: TypeAlias = Callable[[int, int], object]
"""Called with (bytes done, bytes in all)."""

Model: TypeAlias = nn.Module | Mapping[str, Tensor]
"""What is written by name."""

Source: TypeAlias = Union[
    nn.Module,
    Mapping[str, Union[Tensor, "Lazy"]],
    StoredPath,
    Sequence[StoredPath],
    "StorageReader",
]
"""What values are read from by name: see `paramkit.open_source`."""

Stream: TypeAlias = Iterable[tuple[str, Tensor]]
"""What `paramkit.transplant` takes beside a `Source`: each tensor is written before the next is asked for."""

Rules: TypeAlias = Iterable["Rule"] | StoredPath
"""Rules, or the path of a rule file."""

Filling: TypeAlias = Union[
    bool, int, float, complex, Literal["zeros", "mean"], Mapping[str, float], "Fill"
]
"""What a rule fills with: a number, "zeros", "mean", or {"normal": std} with "mean" and "seed" if wanted."""
