"""Ready-made rules for well-known pairs of architectures."""

from __future__ import annotations

from .bert import bert_to_transformer_encoder

__all__ = ["bert_to_transformer_encoder"]
