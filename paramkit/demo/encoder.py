"""A sentence encoder made of stock PyTorch modules: the demo's destination."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["EncoderConfig", "SentenceEncoder"]


@dataclass(frozen=True)
class EncoderConfig:
    """The sizes of an encoder, under the names of its `config.json`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float

    @classmethod
    def read(cls, path: Path) -> EncoderConfig:
        """Read a `config.json`.

        Raises:
            KeyError: a size is not in it.
            ValueError: it is no JSON, or asks for an activation other than the exact GELU.
        """
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f'{path}: expected hidden_act "gelu", got "{data["hidden_act"]}"')
        return cls(**{name: data[name] for name in cls.__dataclass_fields__})


class Embeddings(nn.Module):
    """Token, position and segment embeddings, summed and normalised."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.tokens = nn.Embedding(config.vocab_size, size)
        self.positions = nn.Embedding(config.max_position_embeddings, size)
        self.segments = nn.Embedding(config.type_vocab_size, size)
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (batch, length) to vectors (batch, length, size); every token is of segment 0."""
        places = torch.arange(ids.shape[1], device=ids.device)
        summed: Tensor = self.tokens(ids) + self.positions(places) + self.segments.weight[0]
        normed: Tensor = self.norm(summed)
        return normed


class SentenceEncoder(nn.Module):
    """Embeddings, a stock `nn.TransformerEncoder`, the mean over tokens, unit length.

    Args:
        config: its sizes.

    Example:
        >>> config = EncoderConfig(100, 8, 2, 2, 16, 32, 2, 1e-12)
        >>> model = SentenceEncoder(config).eval()
        >>> ids = torch.tensor([[5, 6, 7], [5, 6, 0]])
        >>> model(ids, torch.tensor([[1, 1, 1], [1, 1, 0]])).shape
        torch.Size([2, 8])
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        layer = nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
            norm_first=False,
        )
        # Nested tensors would skip the padding, but warn that they are a prototype.
        self.encoder = nn.TransformerEncoder(
            layer, config.num_hidden_layers, enable_nested_tensor=False
        )

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The last layer: ids and mask (batch, length) to (batch, length, size)."""
        states: Tensor = self.encoder(self.embeddings(ids), src_key_padding_mask=mask == 0)
        return states

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Sentence vectors of unit length.

        Args:
            ids: token ids, int64, (batch, length).
            mask: 1 for a token, 0 for padding, (batch, length).

        Returns:
            (batch, size).
        """
        weight = mask.unsqueeze(-1).to(self.embeddings.norm.weight.dtype)
        summed = (self.hidden(ids, mask) * weight).sum(1)
        return nn.functional.normalize(summed / weight.sum(1).clamp(min=1), dim=1)
