"""What can be written: the tensors of a model or mapping, one for each memory, and whether they can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .backend.checks import has_no_memory
from .errors import Finding, PlanError
from .sharding import is_sharded, sharded_key, spread_finding
from .sources import module_tensors
from .sources.lazy import Lazy
from .sources.spread import Spread

__all__ = [
    "Destination",
    "Place",
    "allocated",
    "destinations_of",
    "is_uninitialized",
    "layout_finding",
    "memory_key",
    "named_destinations",
]

Path = tuple[tuple[nn.Module, str, nn.Module], ...]


class Place(NamedTuple):
    """Where a module holds a tensor: `owner`'s attribute `key`, and how to get there from the root."""

    owner: nn.Module
    key: str
    path: Path


@dataclass(slots=True)
class Destination:
    """A tensor that can be written.

    Attributes:
        name: its first name in the model.
        tensor: the parameter, buffer or mapping value itself.
        owner: the module that holds it, None for a mapping.
        key: the attribute's name in the owner, or the mapping's key.
        kind: "parameter", "buffer", "transient" (a buffer that no state dict has: it is written where a rule
            or a source names it) or "tensor".
        path: (parent, child key, child) from the root to the owner.
        aliases: further names of the same memory (tied weights).
        alias_places: where each alias is held, in the order of `aliases`; empty for a mapping.
        wrapper: the DTensor whose local tensor `tensor` is, once writes are cut by what is held here.
    """

    name: str
    tensor: Any
    owner: nn.Module | None
    key: str
    kind: str
    path: Path = ()
    aliases: tuple[str, ...] = ()
    alias_places: tuple[Place, ...] = ()
    wrapper: Any = None

    @property
    def transient(self) -> bool:
        """Whether it is a buffer that no state dict has."""
        return self.kind == "transient"


def named_destinations(
    model: nn.Module | Mapping[str, Tensor], transient: bool = False
) -> list[Destination]:
    """The tensors of a model, one for each name.

    Args:
        model: a module or a mapping from names to tensors.
        transient: with the non-persistent buffers of a module, after the others.

    Raises:
        TypeError: another type.
        PlanError: a mapping with values that are no tensors; a module of TorchScript.
    """
    if isinstance(model, nn.Module):
        found = [
            Destination(name, tensor, owner, key, kind, path)
            for name, tensor, owner, key, kind, path in module_tensors(model, transient)
        ]
        scripted = [d.name for d in found if isinstance(d.owner, torch.jit.ScriptModule)]
        if scripted:
            raise PlanError(
                "model: TorchScript holds these tensors, so that a replaced one cannot be told; nothing was written.",
                [
                    Finding(
                        name,
                        "script",
                        "a ScriptModule",
                        "an nn.Module",
                        "load_state_dict takes it; or script the model afterwards",
                    )
                    for name in scripted
                ],
            )
        # Of one memory, the name that a state dict has comes first.
        return sorted(found, key=lambda d: d.transient) if transient else found
    if isinstance(model, Mapping):
        wrong = [
            Finding(str(n), "type", type(t).__name__, "a tensor")
            for n, t in model.items()
            if not (isinstance(n, str) and isinstance(t, (Tensor, Spread)))
        ]
        if wrong:
            raise PlanError(
                f"model: {len(wrong)} entries are not named tensors; nothing was written.", wrong
            )
        return [Destination(name, tensor, None, name, "tensor") for name, tensor in model.items()]
    raise TypeError(
        f"model must be an nn.Module or a mapping from names to tensors, got {type(model).__name__}"
    )


def destinations_of(
    model: nn.Module | Mapping[str, Tensor], transient: bool = False
) -> list[Destination]:
    """The tensors of a model, one for each memory, with all their names; `transient` as there.

    Raises:
        TypeError, PlanError: as `named_destinations`.

    Example:
        >>> tied = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> tied[1].weight = tied[0].weight
        >>> [(d.name, d.aliases) for d in destinations_of(tied)][0]
        ('0.weight', ('1.weight',))
    """
    by_memory: dict[object, Destination] = {}
    for destination in named_destinations(model, transient):
        first = by_memory.setdefault(memory_key(destination.tensor), destination)
        if first is not destination:
            first.aliases += (destination.name,)
            if destination.owner is not None:
                first.alias_places += (Place(destination.owner, destination.key, destination.path),)
    return list(by_memory.values())


def memory_key(tensor: Any) -> object:
    """A key that is equal for tensors which are the very same memory, seen the same way.

    Two tensor objects may be one memory: a state dict detaches, so tied weights are two objects in it.
    Two lazy tensors may be one place in a file.
    """
    if isinstance(tensor, Lazy):
        return tensor.location()
    if is_sharded(tensor):
        return sharded_key(tensor)
    if tensor.layout is not torch.strided or tensor.is_meta or is_uninitialized(tensor):
        return id(tensor)
    if isinstance(tensor, FakeTensor):  # warns when it is asked for its address
        return id(tensor)
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a subclass without storage of its own
        return id(tensor)
    if address == 0 or tensor.numel() == 0:
        return id(tensor)
    return (
        address,
        tensor.dtype,
        tensor.device,
        tuple(tensor.shape),
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def is_uninitialized(tensor: Tensor) -> bool:
    return isinstance(
        tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
    )


def layout_finding(
    name: str, tensor: Any, destination: bool, device: torch.device | None = None
) -> Finding | None:
    """Why a tensor cannot take part in a write, or None; `device`: where meta destinations will be."""
    kind = type(tensor)
    if (
        (kind is Tensor or kind is nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and tensor.device.type == "cpu"
        and not tensor.is_nested
        and not has_no_memory(tensor)
    ):
        return None  # nearly every tensor is like this, and there may be tens of thousands
    if isinstance(tensor, Lazy):
        return spread_finding(name, tensor, destination) if isinstance(tensor, Spread) else None
    if is_sharded(tensor):
        return Finding(
            name,
            "layout",
            "a DTensor in a list",
            "a tensor of this process",
            "pass its to_local(), or mappings of names to tensors",
        )
    if is_uninitialized(tensor):
        return Finding(
            name,
            "meta",
            "an uninitialized lazy parameter",
            "a tensor with memory",
            "run the module once first",
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return Finding(
            name,
            "layout",
            "a tensor that a torch.func transform (vmap, grad, functionalize) works on",
            "a tensor with memory",
            "use copy_, fill_ and the foreach_ operators inside transforms",
        )
    if isinstance(tensor, FakeTensor):
        what = "destination" if destination else "source"
        return Finding(
            name,
            "meta",
            f"a fake {what}, which has no memory",
            "a tensor with memory",
            "make the model outside of FakeTensorMode",
        )
    if tensor.is_meta and not (destination and device is not None):
        what = "destination" if destination else "source"
        hint = (
            'device="cpu" in transplant gives it memory, or module.to_empty(device=...)'
            if destination
            else "load the values first"
        )
        return Finding(
            name, "meta", f"a meta {what}, which has no memory", "a tensor with memory", hint
        )
    if tensor.layout is not torch.strided or tensor.is_nested:
        form = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        return Finding(
            name,
            "layout",
            f"a {form} tensor",
            "a dense, strided tensor",
            "convert it with to_dense()",
        )
    if tensor.device.type == "cpu" and has_no_memory(tensor):
        return Finding(
            name,
            "layout",
            "a tensor with a shape but no memory",
            "a tensor with memory",
            "its storage was freed, as FSDP does: gather it first",
        )
    if destination and any(
        n > 1 and st == 0 for n, st in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        return Finding(
            name,
            "expanded",
            f"shape {tuple(tensor.shape)} with strides {tensor.stride()}: several elements share memory",
            "a destination with one place for each element",
            "make it contiguous() first",
        )
    return None


def allocated(tensor: Tensor, device: torch.device) -> Tensor:
    """Memory, not initialised, for a tensor on the meta device; it keeps its strides, class and attributes."""
    # The strides to the element, gaps included: the writes were worked out for them.
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        made = torch.Tensor._make_subclass(type(tensor), made, tensor.requires_grad)
    made.__dict__.update(tensor.__dict__)
    return made
