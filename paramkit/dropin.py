"""`patch_torch`: code that knows nothing of paramkit takes its kernels."""

from __future__ import annotations

import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from . import backend
from .backend import loader
from .hooks import is_torchs_load

__all__ = ["TorchPatch", "patch_torch"]

_lock = threading.RLock()  # a finalizer may remove one while another is made
_count = 0  # of patches that have not been removed
_original: Any = None  # nn.Module.load_state_dict as it was found
_installed: Any = None  # what stands in its place


def _renew_lock() -> None:
    """A child has no thread that would give the lock back."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


def patch_torch() -> TorchPatch:
    """Let torch's own functions take paramkit's kernels, for existing code that is not to be edited.

    From the call on, in the whole process and all its threads, these have the same results and are faster:

    - `Tensor.copy_`, also as `tensor[index] = other`, `Tensor.fill_`, also as `tensor[index] = number`, and
      `torch._foreach_copy_`, for CPU tensors that the kernels take (dense or strided, all dtypes); and
      what torch itself does with `copy_`: `.to(dtype)`, `.contiguous()`, `.clone()` of a strided tensor. Writes of
      less than 512 bytes stay with torch.
    - `nn.Module.load_state_dict`, where the names and shapes of model and state dict are the same and no
      hook or module has a say; everything else, errors included, is torch's.

    Autograd, version counters, functorch, modes and subclasses see the same as without, since torch comes to
    the kernels behind all of those. Where paramkit's route is `native`, nothing is changed. CUDA tensors are
    not affected: torch has kernels of its own for them.

    Returns:
        a handle. Leaving its `with` block, or calling `remove()`, ends it; the last one to end puts everything
        back. They may be nested and end in any order.

    Raises:
        BackendError: `PARAMKIT_BACKEND` or `PARAMKIT_CPU_CAPABILITY` asks for what is not there.
        RuntimeError: another library has replaced torch's CPU kernel of `copy_` or `_foreach_copy_`.

    >>> import torch, paramkit
    >>> weight, rows = torch.zeros(64, 64), torch.ones(64, 8)
    >>> with paramkit.patch_torch():
    ...     weight[:, ::8] = rows
    >>> int(weight.sum())
    512
    """
    global _count
    with _lock:
        if _count == 0:
            loader.patch(True)
            _wrap_load_state_dict()
        _count += 1
    return TorchPatch()


class TorchPatch:
    """What `patch_torch` returns: the patch lasts until it is removed.

    >>> import paramkit
    >>> patch = paramkit.patch_torch()
    >>> patch.active
    True
    >>> patch.remove()
    >>> patch.active
    False
    """

    def __init__(self) -> None:
        self._active = True

    @property
    def active(self) -> bool:
        """Whether it has not been removed yet."""
        return self._active

    def remove(self) -> None:
        """End this patch; other patches go on. A second time does nothing, and it never raises."""
        global _count
        with _lock:
            if not self._active:
                return
            self._active = False
            _count -= 1
            if _count == 0:
                loader.patch(False)
                _restore_load_state_dict()

    def __enter__(self) -> TorchPatch:
        if not self._active:
            raise RuntimeError("patch_torch: this patch was removed; call patch_torch() again")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __reduce__(self) -> Any:
        raise TypeError("a patch cannot be copied or pickled: each call of patch_torch() makes one")

    def __repr__(self) -> str:
        return f"<paramkit.patch_torch, {'active' if self._active else 'removed'}>"


# --- nn.Module.load_state_dict ------------------------------------------------------------------


def _wrap_load_state_dict() -> None:
    """A Python function has no dispatcher below it; so it is replaced, as other libraries do."""
    global _original, _installed
    _original = original = nn.Module.load_state_dict
    replaced = not is_torchs_load(original)  # then every call is the other library's

    @functools.wraps(original)
    def load_state_dict(
        self: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        fused = (
            _count > 0  # another library may have wrapped this one, and keeps it
            and not replaced
            and not assign
            and type(state_dict) in (dict, OrderedDict)
            and not torch.__future__.get_swap_module_params_on_conversion()
            and not torch.compiler.is_compiling()
            # It waits for no other thread, who may hold a lock of the caller's: torch does not either.
            and backend.active().load_state_dict(self, state_dict, False)
        )
        if fused:
            return _IncompatibleKeys([], [])
        return original(self, state_dict, strict=strict, assign=assign)

    load_state_dict.of_paramkit = True  # type: ignore[attr-defined]
    _installed = load_state_dict
    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]


def _restore_load_state_dict() -> None:
    """Put torch's own back, unless somebody has replaced ours: then ours stays below, and passes on."""
    global _original, _installed
    if nn.Module.load_state_dict is _installed:
        nn.Module.load_state_dict = _original  # type: ignore[method-assign]
    _original = _installed = None
