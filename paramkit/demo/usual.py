"""The same transplant as it is usually written: a loop over names, `torch.cat`, `load_state_dict`.

The demo times it beside the plan, and compares every element that the plan wrote with its result.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["converted", "transplant_by_hand"]

_RENAMED = {
    "embeddings.word_embeddings": "embeddings.tokens",
    "embeddings.position_embeddings": "embeddings.positions",
    "embeddings.token_type_embeddings": "embeddings.segments",
    "embeddings.LayerNorm": "embeddings.norm",
}
_RENAMED_IN_LAYER = {
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "linear1",
    "output.dense": "linear2",
    "output.LayerNorm": "norm2",
}


def converted(source: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The source as a state dict of `SentenceEncoder`.

    Args:
        source: a BERT checkpoint.
        layers: its number of layers.

    Returns:
        A state dict; the fused parameters are new tensors.

    Raises:
        KeyError: a name that the checkpoint does not have.
    """
    out = {}
    for kind in ("weight", "bias"):
        for old, new in _RENAMED.items():
            if f"{old}.{kind}" in source:
                out[f"{new}.{kind}"] = source[f"{old}.{kind}"]
        for i in range(layers):
            old_layer, new_layer = f"encoder.layer.{i}", f"encoder.layers.{i}"
            parts = [
                source[f"{old_layer}.attention.self.{p}.{kind}"] for p in ("query", "key", "value")
            ]
            out[f"{new_layer}.self_attn.in_proj_{kind}"] = torch.cat(parts)
            for old, new in _RENAMED_IN_LAYER.items():
                out[f"{new_layer}.{new}.{kind}"] = source[f"{old_layer}.{old}.{kind}"]
    return out


def transplant_by_hand(model: nn.Module, source: Mapping[str, Tensor], layers: int) -> None:
    """Fill `model` from `source` with `torch.cat` and `load_state_dict`."""
    model.load_state_dict(converted(source, layers))
