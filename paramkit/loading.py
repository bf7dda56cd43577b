"""`load_state_dict`: torch's, all or nothing, with the copies fused."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import _IncompatibleKeys
from torch.overrides import TorchFunctionMode

from . import backend
from .backend import checks
from .compiling import between_graphs
from .destinations import is_uninitialized
from .hooks import in_place_is_fine, is_torchs_load
from .interrupts import grad_mode_kept, settled, without_grad
from .localize import local_pairs
from .sharding import any_sharded, is_sharded
from .sources import module_tensors
from .torn import clear, torn

__all__ = ["load_state_dict"]


def load_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
) -> _IncompatibleKeys:
    """Load a state dict as `model.load_state_dict` does, faster, and with nothing written on an error.

    Hooks, modules with a loading of their own, ties and buffers are treated as torch treats them. One
    thing differs: a parameter on the meta device is an error, where torch warns and leaves it empty.
    And one is more: a DTensor parameter takes its shard of a tensor that the state dict has in full, without
    communication. From a DTensor of other placements it is written as torch does it, by all ranks together.

    Args:
        model: the module.
        state_dict: names and tensors, of the shapes that the model has.
        strict: missing and unexpected names are errors.
        assign: the model takes the tensors themselves in place of its own, as in torch.

    Returns:
        `(missing_keys, unexpected_keys)`, as torch.

    Raises:
        RuntimeError: with torch's own text: names (strict), shapes, or a copy that cannot be done.
        TypeError: `model` or `state_dict` of another type.

    >>> import torch, paramkit
    >>> model, trained = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    >>> paramkit.load_state_dict(model, trained.state_dict())
    <All keys matched successfully>
    >>> torch.equal(model.weight, trained.weight)
    True
    """
    if torch.compiler.is_dynamo_compiling():
        run = between_graphs(load_state_dict, "load_state_dict")
        return run(model, state_dict, strict, assign)
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_state_dict: model must be an nn.Module, got {type(model).__name__}")
    keys = grad_mode_kept(partial(_load, model, state_dict, strict, assign))
    if torn(model) is not None:
        clear(model, [name for name in state_dict if name not in keys.unexpected_keys])
    return keys


def _load(
    model: nn.Module, state_dict: Mapping[str, Any], strict: bool, assign: bool
) -> _IncompatibleKeys:
    if assign:
        return _load_assigned(model, state_dict, strict)
    own_way = (
        "load_state_dict" in vars(model)
        or type(model).load_state_dict is not nn.Module.load_state_dict
        or not is_torchs_load(nn.Module.load_state_dict)
    )
    if own_way or torch.__future__.get_swap_module_params_on_conversion():
        return _load_with_rollback(model, state_dict, strict)
    if type(state_dict) in (dict, OrderedDict) and backend.active().load_state_dict(
        model, state_dict, True
    ):
        return _IncompatibleKeys([], [])
    if all(_is_standard(module) for module in model.modules()):
        return _load_recorded(model, state_dict, strict)
    return _load_with_rollback(model, state_dict, strict)


def _is_standard(module: nn.Module) -> bool:
    """Whether nothing but torch's own copies happens when this module is loaded."""
    load = type(module)._load_from_state_dict
    return (
        load in (nn.Module._load_from_state_dict, _NormBase._load_from_state_dict)
        and "_load_from_state_dict" not in vars(module)
        and type(module).set_extra_state is nn.Module.set_extra_state
        # A pre-hook may be wrapped, to be given its module.
        and all(
            in_place_is_fine(getattr(hook, "hook", hook))
            for hook in module._load_state_dict_pre_hooks.values()
        )
        and all(in_place_is_fine(hook) for hook in module._load_state_dict_post_hooks.values())
    )


class _Recorder(TorchFunctionMode):
    """Keeps the copies into the model's own tensors instead of doing them; everything else happens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.own = {id(tensor) for _, tensor, *_ in module_tensors(model)}
        self.dsts: list[Tensor] = []
        self.srcs: list[Tensor] = []
        self.over = False  # an interrupt at the end of a mode leaves it on

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            not self.over
            and func is Tensor.copy_
            and len(args) == 2
            and not kwargs
            and self._is_own(args[0])
        ):
            # torch collects what this raises and puts it into its own message.
            if not is_sharded(args[0]):
                without_grad(partial(checks.check_copy, "copy_", None, args[0], args[1]))
            self.dsts.append(args[0])
            self.srcs.append(args[1])
            return args[0]
        return func(*args, **(kwargs or {}))

    def _is_own(self, tensor: Tensor) -> bool:
        # FSDP's hooks put shards in the place of gathered parameters while the model is loaded.
        return id(tensor) in self.own or is_sharded(tensor)


def _load_recorded(
    model: nn.Module, state_dict: Mapping[str, Any], strict: bool
) -> _IncompatibleKeys:
    """torch's own loading, with the copies done at the end, once it has found nothing wrong."""
    recorder = _Recorder(model)
    depth = torch._C._len_torch_function_stack()
    try:
        with _meta_is_an_error(), recorder:
            keys: _IncompatibleKeys = model.load_state_dict(state_dict, strict=strict)
    finally:
        recorder.over = True
        if torch._C._len_torch_function_stack() > depth:
            torch._C._pop_torch_function_stack()
    if recorder.dsts:
        dsts, srcs = recorder.dsts, recorder.srcs
        shards = any_sharded(dsts)
        if shards:
            torch.autograd.graph.increment_version([t for t in dsts if is_sharded(t)])
            dsts, srcs = local_pairs(dsts, srcs)
        active = backend.active()
        with active.Claim(dsts, srcs):
            without_grad(partial(active.foreach_copy_, dsts, srcs, False))
    return keys


def _load_with_rollback(
    model: nn.Module, state_dict: Mapping[str, Any], strict: bool
) -> _IncompatibleKeys:
    """torch's own loading as it is, undone on an error.

    For models with hooks or modules that load in a way of their own: they look at what was loaded,
    change it, and decide what is an error. Costs a copy of the model while it runs.
    """
    tensors = {id(t): t for m in model.modules() for t in _tensors(m) if not t.is_meta}
    values = state_dict.values() if isinstance(state_dict, Mapping) else ()
    read = [t for t in values if isinstance(t, Tensor)]

    def load() -> _IncompatibleKeys:
        with _meta_is_an_error():
            keys: _IncompatibleKeys = model.load_state_dict(state_dict, strict=strict)
            return keys

    def copy_back() -> None:
        for tensor, before in saved:
            tensor.copy_(before)

    def put_back(error: BaseException) -> None:
        without_grad(copy_back)
        put_tensors_back(error)

    with backend.active().Claim(list(tensors.values()), read):
        saved = [(t, t.detach().clone()) for t in tensors.values()]
        put_tensors_back = _tensors_back(model)
        return settled(load, put_back)


def _tensors(module: nn.Module) -> list[Tensor]:
    held = (*module._parameters.values(), *module._buffers.values())
    return [t for t in held if t is not None and not is_uninitialized(t)]


def _load_assigned(
    model: nn.Module, state_dict: Mapping[str, Any], strict: bool
) -> _IncompatibleKeys:
    """torch's own assignment, undone on an error."""
    load = partial(model.load_state_dict, state_dict, strict=strict, assign=True)
    keys: _IncompatibleKeys = settled(load, _tensors_back(model))
    return keys


def _tensors_back(model: nn.Module) -> Callable[[BaseException], None]:
    """What gives every module of the model the tensor objects back that it holds now."""
    tables: list[dict[str, Any]] = [t for m in model.modules() for t in (m._parameters, m._buffers)]
    saved = [dict(table) for table in tables]

    def put_back(error: BaseException) -> None:
        for table, before in zip(tables, saved, strict=True):
            table.clear()
            table.update(before)

    return put_back


@contextmanager
def _meta_is_an_error() -> Iterator[None]:
    """torch only warns of a parameter on the meta device, and leaves it without values."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*meta parameter.*no-op.*")
        try:
            yield
        except UserWarning as warning:
            if "meta parameter" not in str(warning):
                raise
            raise RuntimeError(
                f"load_state_dict: {warning} Nothing was written; pass assign=True, or give the model "
                "memory first with model.to_empty(device=...)."
            ) from None
