"""`transplant`: plan and apply in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .plan import Progress, plan
from .report import Report
from .rules import Rule

__all__ = ["transplant"]


def transplant(
    model: nn.Module | Mapping[str, Tensor],
    source: Any,
    rules: Iterable[Rule] = (),
    *,
    identity: bool = True,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    requires_grad: bool | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write a source's tensors into a model, in place, all or nothing.

    Parameters keep their storage, dtype, hooks and ties; values are converted to the destination's
    dtype, and the report lists every conversion.

    Args:
        model: a module, or a mapping from names to tensors.
        source: a module, a mapping from names to tensors, or the path of a `.safetensors` file.
        rules: how source names and axes map to destinations; see `paramkit.Rule`.
        identity: names that no rule touches map to themselves.
        allow_missing: destination names that may stay unwritten: exact, with `{i}`, or with `*`.
        allow_unexpected: source names that may stay unread: the same.
        requires_grad: set on every floating-point parameter that was written (False freezes them);
            None leaves it as it is.
        progress: called now and then with (bytes written, bytes in all).

    Returns:
        What was written, cast, left alone and dropped, and how fast.

    Raises:
        PlanError: with everything that is wrong, at once; nothing was written.
        SourceError: the source cannot be read.

    >>> import torch, paramkit
    >>> model, pretrained = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    >>> report = paramkit.transplant(model, pretrained, requires_grad=False)
    >>> torch.equal(model.weight, pretrained.weight), model.weight.requires_grad
    (True, False)
    """
    made = plan(
        model,
        source,
        rules,
        identity=identity,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
    )
    if requires_grad is not None:
        made._trainable(requires_grad)  # raises before anything is written
    report = made.apply(progress=progress)
    if requires_grad is not None:
        made.set_requires_grad(requires_grad)
    return report
