"""Ready-made rules for well-known pairs of architectures.

Each is a rule file in this folder. `names()` lists them, `describe(name)` says what one is for and which
sizes it needs, `load(name, config=model.config)` makes its rules, and `paramkit.invert` those of the way
back. docs/recipes.md has a table.
"""

from __future__ import annotations

from .bert import bert_to_transformer_encoder
from .catalog import Recipe, describe, load, names

__all__ = ["Recipe", "bert_to_transformer_encoder", "describe", "load", "names"]
