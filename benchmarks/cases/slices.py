"""Slice fills: the centre tap of 1000 convolution weights, `p[:, :, 1:2, 1:2] = 0.5`.

A tap of (4, 4, 3, 3) is 16 elements in 9 cache lines; of (8, 8, 3, 3) it is 64 in 36, and 1000 of
those no longer fit a 1 MiB cache. The other side is always the loop of slice assignments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks import plain
from tests import cases as inputs

from .registry import Work, case, group, moved, targets

FILLS = group("slice fills", "Slice fills of 1000 convolution weights")
WRITES = group("recorded writes", "The same slice assignments recorded through writes()")

COUNT, TINY = 1000, 10


def assign(weights: Sequence[Tensor]) -> None:
    """What people write."""
    for weight in weights:
        weight[:, :, 1:2, 1:2] = 0.5


def _taps(views: Sequence[Tensor]) -> plain.Pairs:
    """The least that they cost: one number into every ninth place, in a plain C loop."""
    number = torch.full((1,), 0.5)
    tap = 9 * number.element_size()
    runs = views[0].numel()
    return plain.Pairs(list(views), [number] * len(views), runs, number.element_size(), tap)


def _fills() -> None:
    for shape in ((4, 4, 3, 3), (8, 8, 3, 3)):
        of = "x".join(map(str, shape))

        def weights_and_views(
            tiny: bool, shape: tuple[int, ...] = shape
        ) -> tuple[list[Tensor], list[Tensor]]:
            weights = inputs.conv_weights(TINY if tiny else COUNT, shape)
            return weights, inputs.centre_views(weights)

        @case(
            f"fill slices {of}",
            FILLS,
            f"foreach_fill_ on 1000 ready views of {shape} against p[:, :, 1:2, 1:2] = 0.5",
            targets(10),
        )
        def fill_slices(tiny: bool, ready=weights_and_views) -> Work:
            import paramkit

            weights, views = ready(tiny)
            return Work(
                ours=lambda: paramkit.foreach_fill_(views, 0.5),
                peer=lambda: assign(weights),
                dsts=weights,
                bytes=moved(views),
                pairs=_taps(views),
            )

        @case(
            f"replay slices {of} hot",
            FILLS,
            "the same, each side alone in a loop",
            targets(100),
            mode="hot",
        )
        @case(f"replay slices {of}", FILLS, "plan(views, 0.5).apply() against it", targets(100))
        def replay_slices(tiny: bool, ready=weights_and_views) -> Work:
            import paramkit

            weights, views = ready(tiny)
            return Work(
                ours=paramkit.plan(views, 0.5).apply,
                peer=lambda: assign(weights),
                dsts=weights,
                bytes=moved(views),
                keep=[views],
                pairs=_taps(views),
            )


_fills()


# Recorded: from before the block is entered until it is left, nothing kept between two rounds.


def _recorded(model: nn.Module | dict[str, Tensor], named: dict[str, Tensor]) -> Work:
    import paramkit

    weights = list(named.values())

    def ours() -> None:
        with paramkit.writes(model) as w:
            for name in named:
                w[name][:, :, 1:2, 1:2] = 0.5

    return Work(
        ours=ours,
        peer=lambda: assign(weights),
        dsts=weights,
        bytes=moved(inputs.centre_views(weights)),
        keep=[model],
    )


@case(
    "writes mapping 1000",
    WRITES,
    "a mapping of 1000 weights (4, 4, 3, 3), block entered to block left, against the plain loop",
    targets(4),
)
def writes_mapping(tiny: bool) -> Work:
    weights = inputs.conv_weights(TINY if tiny else COUNT, (4, 4, 3, 3))
    named = {f"weights.{number}": weight for number, weight in enumerate(weights)}
    return _recorded(named, named)


@case(
    "writes module 1000",
    WRITES,
    "a module of 1000 nested convolutions 4 -> 4, keyed by name, against the plain loop",
    targets(4),
)
def writes_module(tiny: bool) -> Work:
    model = inputs.convolutions(stages=2 if tiny else 10, blocks=5 if tiny else 100)
    return _recorded(model, dict(model.named_parameters()))
