"""torch.compile: what is no part of a graph runs between two of them, as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["between_graphs"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


def between_graphs(function: Callable[_P, _T], name: str) -> Callable[_P, _T]:
    """The function, for code that is being traced: it ends the graph, and nothing in it is traced.

    Without this the compiler would look into the function, frame by frame, and compile what it can of
    the checks there. Only to be called where `torch.compiler.is_dynamo_compiling()`: in the function
    that comes back it is false.

    Args:
        function: what does the work.
        name: what people call it, for the error of `fullgraph=True`.
    """
    torch._dynamo.graph_break(
        msg=f"paramkit.{name} writes tensors that a graph does not know, so it is not compiled: call it outside "
        "of the compiled function, or use copy_, fill_ and the foreach_ operators, which are"
    )
    return torch.compiler.disable(function)  # type: ignore[no-any-return, no-untyped-call]
