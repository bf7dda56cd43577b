"""`paramkit demo`: transplant a real pre-trained sentence encoder, check it, use it, time it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: arguments; None takes none.

    Returns:
        0 where everything fits to the bit; 1 where something is missing or differs.
    """
    options = _parser().parse_args(list(argv or []))
    if options.repeats is not None and options.repeats < 1:
        print(f"--repeats: expected at least 1, got {options.repeats}", file=sys.stderr)
        return 2
    from .assets import MissingError, find

    try:
        assets = find(options.model)
    except MissingError as error:
        print(error, file=sys.stderr)
        return 1
    from ..errors import PlanError
    from .show import Show

    repeats = options.repeats or (3 if options.quick else 15)
    try:
        return Show(assets, repeats=repeats, color=not options.no_color).run()
    except PlanError as error:  # a folder given with --model may hold another architecture
        print(f"The checkpoint in {assets.folder} does not fit: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="paramkit demo",
        description="Transplant the all-MiniLM-L6-v2 sentence encoder from its BERT layout into stock "
        "torch.nn.TransformerEncoder layers, check every element, embed sentences, and time it.",
    )
    parser.add_argument("--quick", action="store_true", help="time 3 rounds instead of 15")
    parser.add_argument("--repeats", type=int, metavar="N", help="time N rounds")
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="a folder with model.safetensors, tokenizer.json, config.json",
    )
    parser.add_argument("--no-color", action="store_true", help="plain text")
    return parser
