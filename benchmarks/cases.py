"""The cases: what is timed, against which torch call, and the ratio we promise.

A case is a small function that builds a :class:`Work`: our call, torch's call on the same tensors,
the destinations (compared bit for bit before timing) and the bytes moved, read plus written.
Register one with ``@case(...)``; several sizes or dtypes of one case are a loop around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests import cases as inputs

__all__ = ["CASES", "Case", "Work", "case"]

GUARD = 0.95
"""The ratio below which a case counts as slower than torch."""

KIB = 1024
MIB = 1024 * KIB


@dataclass
class Work:
    """One case made ready: two calls that do the same work on the same tensors."""

    ours: Callable[[], object]
    peer: Callable[[], object]
    dsts: list[Tensor]
    bytes: int
    inner: int = 1
    keep: list[object] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """A name, a sentence, the mode (interleaved or hot), the target ratio and the builder."""

    name: str
    what: str
    target: float
    mode: str
    make: Callable[[], Work]


CASES: list[Case] = []


def case(
    name: str, what: str, target: float = GUARD, mode: str = "interleaved"
) -> Callable[[Callable[[], Work]], Callable[[], Work]]:
    """Register the decorated builder as a case; names are unique."""
    if any(known.name == name for known in CASES):
        raise ValueError(f"two benchmark cases are named {name!r}")

    def register(make: Callable[[], Work]) -> Callable[[], Work]:
        CASES.append(Case(name=name, what=what, target=target, mode=mode, make=make))
        return make

    return register


def moved(dsts: list[Tensor], srcs: list[Tensor] | None = None) -> int:
    """Bytes written to ``dsts`` plus bytes read from ``srcs``, counting elements of the views."""
    written = sum(dst.numel() * dst.element_size() for dst in dsts)
    return written + sum(src.numel() * src.element_size() for src in srcs or ())


# 1. Many small tensors: 1000 x 64 float32.


def _thousand() -> tuple[list[Tensor], list[Tensor]]:
    return inputs.small_tensors(1000, 64)


@case("foreach_copy 1000x64", "foreach_copy_, 1000 x 64 float32, eager", target=5)
def foreach_copy_small() -> Work:
    import paramkit

    dsts, srcs = _thousand()
    return Work(
        ours=lambda: paramkit.foreach_copy_(dsts, srcs),
        peer=lambda: torch._foreach_copy_(dsts, srcs),
        dsts=dsts,
        bytes=moved(dsts, srcs),
    )


def _replay_small() -> Work:
    import paramkit

    dsts, srcs = _thousand()
    return Work(
        ours=paramkit.plan(dsts, srcs).apply,
        peer=lambda: torch._foreach_copy_(dsts, srcs),
        dsts=dsts,
        bytes=moved(dsts, srcs),
    )


case("replay 1000x64", "plan(dsts, srcs).apply() against torch._foreach_copy_", target=20)(
    _replay_small
)
case("replay 1000x64 hot", "the same, each side alone in a loop", target=40, mode="hot")(
    _replay_small
)


# 2. Slice fills: the centre tap of 1000 convolution weights. A tap of (4, 4, 3, 3) is 16 elements in
# 9 cache lines; of (8, 8, 3, 3) it is 64 in 36, and 1000 of those no longer fit a 1 MiB cache.


def _slices() -> None:
    for shape in ((4, 4, 3, 3), (8, 8, 3, 3)):
        of = "x".join(map(str, shape))

        def weights_and_views(
            shape: tuple[int, ...] = shape,
        ) -> tuple[list[Tensor], list[Tensor]]:
            weights = inputs.conv_weights(1000, shape)
            return weights, inputs.centre_views(weights)

        @case(f"fill slices {of}", f"foreach_fill_ on 1000 ready views of {shape}", target=6)
        def foreach_fill_slices(make: Callable[[], Any] = weights_and_views) -> Work:
            import paramkit

            weights, views = make()

            def peer() -> None:
                for view in views:
                    view.fill_(0.5)

            return Work(
                ours=lambda: paramkit.foreach_fill_(views, 0.5),
                peer=peer,
                dsts=weights,
                bytes=moved(views),
            )

        def replay_slices(make: Callable[[], Any] = weights_and_views) -> Work:
            import paramkit

            weights, views = make()

            def peer() -> None:
                for weight in weights:
                    weight[:, :, 1:2, 1:2] = 0.5

            return Work(
                ours=paramkit.plan(views, 0.5).apply,
                peer=peer,
                dsts=weights,
                bytes=moved(views),
                keep=[views],
            )

        replay = "plan(views, 0.5).apply() against p[:, :, 1:2, 1:2] = 0.5"
        case(f"replay slices {of}", replay, target=30)(replay_slices)
        hot = "the same, each side alone in a loop"
        case(f"replay slices {of} hot", hot, target=100, mode="hot")(replay_slices)


_slices()


# 3. A nested model of 2004 small parameters.


@case("load_state_dict 2004", "a TransformerEncoder of 167 layers, 2004 parameters", target=12)
def load_state_dict() -> Work:
    import paramkit

    model = inputs.encoder(layers=167)
    state = {name: torch.rand_like(value) for name, value in model.state_dict().items()}
    dsts = list(model.state_dict().values())
    return Work(
        ours=lambda: paramkit.load_state_dict(model, state),
        peer=lambda: model.load_state_dict(state),
        dsts=dsts,
        bytes=moved(dsts, list(state.values())),
        keep=[model],
    )


# 4. Guards: nothing slower than torch.


def _copy(dst: Tensor, src: Tensor, inner: int = 1) -> Work:
    import paramkit

    return Work(
        ours=lambda: paramkit.copy_(dst, src),
        peer=lambda: dst.copy_(src),
        dsts=[dst],
        bytes=moved([dst], [src]),
        inner=inner,
    )


def _fill(dst: Tensor, value: float, inner: int = 1) -> Work:
    import paramkit

    return Work(
        ours=lambda: paramkit.fill_(dst, value),
        peer=lambda: dst.fill_(value),
        dsts=[dst],
        bytes=moved([dst]),
        inner=inner,
    )


def _sized() -> None:
    # `inner` keeps one sample near 100 us or more without making the big ones slow.
    sizes = (
        ("64 elements", 256, 200),
        ("4 KiB", 4 * KIB, 100),
        ("64 KiB", 64 * KIB, 20),
        ("1 MiB", MIB, 4),
        ("16 MiB", 16 * MIB, 1),
        ("256 MiB", 256 * MIB, 1),
    )
    for label, size, inner in sizes:

        @case(f"copy {label}", f"copy_ of one contiguous float32 tensor, {label}")
        def copy_sized(size: int = size, inner: int = inner) -> Work:
            return _copy(torch.zeros(size // 4), torch.rand(size // 4), inner)

    for label, size, inner in sizes:

        @case(f"fill {label}", f"fill_ of one contiguous float32 tensor, {label}")
        def fill_sized(size: int = size, inner: int = inner) -> Work:
            return _fill(torch.zeros(size // 4), 0.5, inner)


_sized()


def _layouts() -> None:
    f32, bf16, u8 = torch.float32, torch.bfloat16, torch.uint8
    for dtype in (f32, bf16, u8):
        short = str(dtype).removeprefix("torch.")

        @case(f"transpose {short}", f"copy_ of a 2048 x 2048 {short} transpose")
        def transpose(dtype: torch.dtype = dtype) -> Work:
            return _copy(*inputs.transposed(2048, 2048, dtype))

    for dtype in (f32, bf16, u8):
        short = str(dtype).removeprefix("torch.")

        @case(f"permute {short}", f"copy_ of (32, 128, 1024).permute(2, 0, 1), {short}")
        def permute(dtype: torch.dtype = dtype) -> Work:
            return _copy(*inputs.permuted((32, 128, 1024), (2, 0, 1), dtype))

    @case("row slice", "copy_ into rows 1024:3072 of a 4096 x 4096 float32 weight")
    def row_slice() -> Work:
        return _copy(*inputs.row_slice(2048, 4096, f32))

    @case("column slice", "copy_ into columns 1024:2048 of a 2048 x 4096 float32 weight")
    def column_slice() -> Work:
        return _copy(*inputs.column_slice(2048, 1024, f32))

    @case("every other row", "copy_ into rows ::2 of a 4096 x 4096 float32 weight")
    def every_other_row() -> Work:
        return _copy(*inputs.every_other_row(2048, 4096, f32))


_layouts()


def _lists(dsts: list[Tensor], srcs: list[Tensor]) -> Work:
    import paramkit

    return Work(
        ours=lambda: paramkit.foreach_copy_(dsts, srcs),
        peer=lambda: torch._foreach_copy_(dsts, srcs),
        dsts=dsts,
        bytes=moved(dsts, srcs),
    )


@case("foreach_copy mixed", "foreach_copy_, 500 x 256: float32 -> bfloat16 and same-dtype pairs")
def foreach_copy_mixed() -> Work:
    cast = inputs.small_tensors(250, 256, torch.bfloat16, torch.float32)
    same = inputs.small_tensors(250, 256, torch.float32)
    dsts = [dst for pair in zip(cast[0], same[0], strict=True) for dst in pair]
    srcs = [src for pair in zip(cast[1], same[1], strict=True) for src in pair]
    return _lists(dsts, srcs)


@case("foreach_copy casts", "foreach_copy_, 200 x 4096, every pair float32 -> bfloat16")
def foreach_copy_casts() -> Work:
    return _lists(*inputs.small_tensors(200, 4096, torch.bfloat16, torch.float32))


@case("foreach_copy 200x64KiB", "foreach_copy_, 200 contiguous float32 tensors of 64 KiB")
def foreach_copy_medium() -> Work:
    return _lists(*inputs.small_tensors(200, 16 * KIB))
