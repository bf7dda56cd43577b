"""`transplant`: plan and apply in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .compiling import between_graphs
from .interrupts import shielded
from .iterate import is_stream, transplant_stream
from .model_plan import ModelPlan
from .options import Options
from .report import Report
from .typing import Casting, Hooks, Model, Overflow, Progress, Rules, Source, Stream

__all__ = ["transplant"]


def transplant(
    model: Model,
    source: Source | Stream,
    rules: Rules = (),
    *,
    identity: bool = True,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    casting: Casting = "same_kind",
    overflow: Overflow = "ignore",
    hooks: Hooks = "refuse",
    atomic: bool = False,
    device: torch.device | str | None = None,
    mmap: bool = False,
    staging: int | None = None,
    requires_grad: bool | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write a source's tensors into a model, in place.

    Everything that can be known beforehand is checked before the first byte is written, and all that is
    wrong is said in one error. Parameters keep their storage, dtype, hooks and ties; values are converted
    to the destination's dtype, and the report lists every conversion.

    Args:
        model: a module, or a mapping from names to tensors.
        source: a module, a mapping from names to tensors, a checkpoint file or folder (see
            `paramkit.open_source`), or an iterable of (name, tensor) in any order. Of an iterable each
            tensor is checked and written before the next one is asked for, so that it may reuse its
            memory; what is missing shows only at the end.
        rules: how source names and axes map to destinations, see `paramkit.Rule`, or the path of a rule
            file.
        identity: names that no rule touches map to themselves.
        allow_missing: destination names that may stay unwritten: exact, with `{i}`, or with `*`.
        allow_unexpected: source names that may stay unread: the same.
        casting: which conversions are allowed: "no", "safe", "same_kind", "unsafe", as in `paramkit.plan`.
        overflow: "error" looks for finite values that the destination's dtype cannot hold, before anything
            is written.
        hooks: "refuse" modules that load a state dict in a way of their own, or "ignore" their hooks.
        atomic: where something fails that shows only while writing, put back what was there. Takes as
            much memory as was written.
        device: parameters on the meta device are allocated there, once, and written; all of each must be.
            Those that are not on the meta device stay where they are.
        mmap: map files into memory instead of reading them, see `paramkit.plan`.
        staging: bytes of the buffer that files are read through, see `paramkit.plan`.
        requires_grad: set on every floating-point parameter that was written (False freezes them);
            None leaves it as it is.
        progress: called now and then with (bytes written, bytes in all); for an iterable the second is 0.

    Returns:
        What was written, cast, left alone and dropped, and how fast.

    Raises:
        PlanError: with everything that is wrong, at once; nothing was written.
        SourceError: the source cannot be read.
        TornError: writing failed half way, without `atomic`; see `paramkit.torn`.

    >>> import torch, paramkit
    >>> model, pretrained = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    >>> report = paramkit.transplant(model, pretrained, requires_grad=False)
    >>> torch.equal(model.weight, pretrained.weight), model.weight.requires_grad
    (True, False)
    >>> with torch.device("meta"):
    ...     model = torch.nn.Linear(2, 2)
    >>> _ = paramkit.transplant(model, pretrained, device="cpu")
    >>> torch.equal(model.weight, pretrained.weight)
    True
    """
    options = Options.make(
        rules,
        allow_missing,
        allow_unexpected,
        staging,
        device,
        identity=identity,
        casting=casting,
        overflow=overflow,
        hooks=hooks,
        mmap=mmap,
    )
    run = _transplant
    if torch.compiler.is_dynamo_compiling():
        run = between_graphs(_transplant, "transplant")
    return run(model, source, options, atomic, requires_grad, progress)


def _transplant(
    model: nn.Module | Mapping[str, Tensor],
    source: Any,
    options: Options,
    atomic: bool,
    requires_grad: bool | None,
    progress: Progress | None,
) -> Report:
    if is_stream(source):
        return transplant_stream(
            model, source, options, atomic=atomic, requires_grad=requires_grad, progress=progress
        )
    made = ModelPlan(model, source, options)
    if requires_grad is not None:
        made._trainable(requires_grad)  # raises before anything is written
    report = made.apply(atomic=atomic, progress=progress)
    shielded(made._install)
    if requires_grad is not None:
        made.set_requires_grad(requires_grad)
    return report
