"""The operators as torch has them: the reference of tests that hand their calls around."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["TorchOps"]


class TorchOps:
    """The reference."""

    copy_ = staticmethod(Tensor.copy_)
    fill_ = staticmethod(Tensor.fill_)

    @staticmethod
    def foreach_copy_(dsts: list[Tensor], srcs: list[Tensor]) -> None:
        for dst, src in zip(dsts, srcs, strict=True):
            dst.copy_(src)

    @staticmethod
    def foreach_fill_(dsts: list[Tensor], values: list[Any]) -> None:
        for dst, value in zip(dsts, values, strict=True):
            dst.fill_(value)
