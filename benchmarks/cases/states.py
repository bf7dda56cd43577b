"""A nested model of 2004 small parameters, loaded from a state dict."""

from __future__ import annotations

import torch

from tests import cases as inputs

from .registry import Work, case, group, moved, targets

STATES = group("states", "State dicts")


@case(
    "load_state_dict 2004",
    STATES,
    "a TransformerEncoder of 167 layers, 2004 parameters",
    targets(12),
)
def load_state_dict(tiny: bool) -> Work:
    import paramkit

    model = inputs.encoder(layers=2 if tiny else 167)
    state = {name: torch.rand_like(value) for name, value in model.state_dict().items()}
    dsts = list(model.state_dict().values())
    return Work(
        ours=lambda: paramkit.load_state_dict(model, state),
        peer=lambda: model.load_state_dict(state),
        dsts=dsts,
        bytes=moved(dsts, list(state.values())),
        keep=[model],
    )
