"""Modules that have a way of their own to load a state dict, which writing to their tensors goes past."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .errors import Finding

if TYPE_CHECKING:
    from .destinations import Destination

__all__ = ["HookCheck", "in_place_is_fine", "is_torchs_load"]

# FSDP's hooks put its own record right where parameters were replaced; writing in place replaces none.
_FSDP = "torch.distributed.fsdp._fully_shard."

# What is on the meta device here, because its values are in a mapping of the hook's, for each call.
_OFFLOADS = "a hook of accelerate that offloads it"


def is_torchs_load(load: Any) -> bool:
    """Whether a `Module.load_state_dict` is torch's own, with `patch_torch` over it or not.

    Another library's wrapper has something to say that must not be gone past. `functools.wraps` lends it torch's name
    and module, so a function is known by where its globals are.
    """
    while getattr(load, "of_paramkit", False):
        load = load.__wrapped__
    return getattr(load, "__globals__", None) is vars(nn.modules.module)


class HookCheck:
    """Finds modules whose loading does more than copy.

    torch's own layers that override `_load_from_state_dict` only bring old checkpoints up to date (batch
    norm's counter, the names of parametrized weights): copying by name is what they come to. Anybody
    else's hook may rename, reshape or compute, and is not gone past in silence.

    Args:
        hooks: "refuse": a finding for each such module that is written; "ignore": none.

    Raises:
        ValueError: another value.
    """

    def __init__(self, hooks: str) -> None:
        if hooks not in ("refuse", "ignore"):
            raise ValueError(f'hooks must be "refuse" or "ignore", got {hooks!r}')
        self._ignore = hooks == "ignore"
        self._known: dict[int, str] = {}
        self._fine: set[tuple[int, int]] = set()  # owner and path

    def finding(self, destination: Destination) -> Finding | None:
        """Why a destination should not be written directly, or None."""
        if self._ignore or destination.owner is None:
            return None
        # The parameters of one module share its path.
        place = id(destination.owner), id(destination.path)
        if place in self._fine and not destination.alias_places:
            return None
        modules = [destination.owner, *(parent for parent, _, _ in destination.path)]
        for alias in destination.alias_places:
            modules += [alias.owner, *(parent for parent, _, _ in alias.path)]
        for module in modules:
            reason = self._known.get(id(module))
            if reason is None:
                reason = self._known[id(module)] = _reason(module)
            if reason == _OFFLOADS:
                return Finding(
                    destination.name,
                    "hook",
                    f"{type(module).__name__} has {reason}, which brings other values at each call",
                    "a module that holds its own values",
                    "take the hooks off first (accelerate.hooks.remove_hook_from_submodules), or write what the "
                    "hook's weights_map holds",
                )
            if reason:
                return Finding(
                    destination.name,
                    "hook",
                    f"{type(module).__name__} has {reason}, which a direct write would go past",
                    "a module that loads by copying",
                    'use load_state_dict, or hooks="ignore" to write its tensors as they are',
                )
        self._fine.add(place)
        return None


def _reason(module: nn.Module) -> str:
    hook = vars(module).get("_hf_hook")
    if any(getattr(h, "offload", False) for h in (hook, *getattr(hook, "hooks", ()))):
        return _OFFLOADS
    load = type(module)._load_from_state_dict
    if "_load_from_state_dict" in vars(module):
        return "a _load_from_state_dict of its own"
    if load is not nn.Module._load_from_state_dict and not _of_torch(load):
        return f"its own _load_from_state_dict ({load.__qualname__})"
    for kind, hooks in (
        ("load_state_dict pre-hook", module._load_state_dict_pre_hooks),
        ("load_state_dict post-hook", module._load_state_dict_post_hooks),
    ):
        for hook in hooks.values():
            # A pre-hook may be wrapped, to be given its module.
            inner = getattr(hook, "hook", hook)
            if not _of_torch(inner):
                return f"a {kind} ({getattr(inner, '__qualname__', type(inner).__name__)})"
    return ""


def in_place_is_fine(hook: object) -> bool:
    """Whether a hook has nothing to do where parameters are written in place."""
    return _home(hook).startswith(_FSDP)


def _of_torch(function: object) -> bool:
    return _home(function).startswith(("torch.nn.modules.", "torch.nn.utils.", _FSDP))


def _home(function: object) -> str:
    home: str = getattr(function, "__module__", None) or type(function).__module__
    return home
