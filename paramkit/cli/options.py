"""Arguments that several commands take, and what is made of them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..casting import CASTINGS
from ..recipes import describe
from ..recipes import names as recipe_names
from ..rulefile import load_rules
from ..rules import Rule, invert
from ..shapes import infer_destinations
from ..sources import open_source
from ..sources.safetensors_file import DTYPES
from ..templates import NameFilter
from .files import files_of
from .text import fail

__all__ = [
    "Job",
    "add_json",
    "add_quiet",
    "add_rules",
    "add_transplant",
    "byte_size",
    "parser",
    "rules_of",
    "unusable",
    "wrong",
]

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
_FLOATS = {
    str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values() if dtype.is_floating_point
}


def parser(commands: Any, name: str, text: str, about: str, example: str) -> Any:
    """The parser of one command, with an example at the end of its help."""
    return commands.add_parser(
        name,
        help=text,
        description=about,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def byte_size(text: str) -> int:
    """A number of bytes, with the units K, M, G, T of 1024.

    Raises:
        argparse.ArgumentTypeError: no such number, or less than 4096.

    Example:
        >>> byte_size("64M"), byte_size("1.5 GiB")
        (67108864, 1610612736)
    """
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([KMGT]?)(?:i?B)?\s*", text, re.I)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 16M or 1G")
    size = int(float(match[1]) * (1 << _UNITS[match[2].upper()]))
    if size < 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is too small: at least 4K")
    return size


def float_dtype(text: str) -> torch.dtype:
    """A floating-point dtype by its name.

    Example:
        >>> float_dtype("bf16")
        torch.bfloat16
    """
    name = text.removeprefix("torch.")
    dtype = _FLOATS.get(_SHORT.get(name, name))
    if dtype is None:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(_FLOATS)}")
    return dtype


def setting(text: str) -> tuple[str, int]:
    """`name=12`."""
    match = re.fullmatch(r"([A-Za-z_]\w*)=([0-9]{1,15})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=12")
    return match[1], int(match[2])


def _rule_file(text: str) -> Path:
    """The path of a rule file or of a recipe."""
    path = Path(text)
    return describe(text).path if not path.exists() and text in recipe_names() else path


def add_json(command: Any) -> None:
    command.add_argument("--json", action="store_true", help="as JSON, for programs")


def add_quiet(command: Any) -> None:
    command.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def add_rules(command: Any) -> None:
    """`--rules`, `--set` and `--no-identity`."""
    command.add_argument(
        "-r",
        "--rules",
        metavar="FILE",
        type=_rule_file,
        help="rules for names and axes: a .yaml or .toml file, or the name of a recipe of paramkit.recipes",
    )
    command.add_argument(
        "--inverse",
        action="store_true",
        help="the way back: what the rules make becomes the source",
    )
    command.add_argument(
        "--set",
        metavar="NAME=12",
        type=setting,
        nargs="+",
        action="extend",
        default=[],
        dest="sizes",
        help="sizes that the rule file leaves open",
    )
    command.add_argument(
        "--no-identity",
        dest="identity",
        action="store_false",
        help="names that no rule touches do not map to themselves",
    )


def add_transplant(command: Any) -> None:
    """What `plan` and `transplant` have in common."""
    command.add_argument(
        "source",
        metavar="SRC",
        type=Path,
        help="a .safetensors file, a checkpoint of torch.save, an index, or a folder of these",
    )
    add_rules(command)
    command.add_argument(
        "--like",
        metavar="TARGET",
        type=Path,
        help="a file, index or folder whose names, shapes and dtypes the result must have; "
        "without it, they follow from the source and the rules",
    )
    command.add_argument(
        "--dtype",
        type=float_dtype,
        help="of every floating-point tensor of the result, such as bfloat16",
    )
    command.add_argument(
        "--casting",
        choices=CASTINGS,
        default="same_kind",
        help="which conversions are allowed (default: %(default)s)",
    )
    command.add_argument(
        "--allow-missing",
        metavar="NAME",
        nargs="+",
        action="extend",
        default=[],
        help="names of TARGET that need no source; {i} and * stand for anything",
    )
    command.add_argument(
        "--allow-unexpected",
        metavar="NAME",
        nargs="+",
        action="extend",
        default=[],
        help="names of SRC that need not be read",
    )
    add_json(command)


def rules_of(options: argparse.Namespace) -> list[Rule]:
    """The rules that were asked for.

    Raises:
        RuleFileError: the file cannot be read.
    """
    rules = load_rules(options.rules, **dict(options.sizes)) if options.rules else []
    return invert(rules) if options.inverse else rules


@dataclass
class Job:
    """A transplant from file to file, before anything is written.

    Attributes:
        source: name -> tensor, lazy where that can be.
        rules: the rules.
        targets: name -> tensor on the meta device.
        settings: further arguments of `paramkit.plan` and `resolve`.
        inputs: every file that is read.
    """

    source: dict[str, Any]
    rules: list[Rule]
    targets: dict[str, Tensor]
    settings: dict[str, Any]
    inputs: list[Path]

    @classmethod
    def of(cls, options: argparse.Namespace) -> Job:
        """What the command line asks for.

        Raises:
            PlanError, SourceError: rules, source or target cannot be read or do not fit together.
        """
        rules = rules_of(options)
        source = open_source(options.source, mmap=False)
        inputs = files_of(options.source, source)
        if options.rules:
            inputs.append(options.rules)
        if options.like:
            like = open_source(options.like, mmap=False)
            inputs += files_of(options.like, like)
            targets = _with_dtype(like, options.dtype)
        else:
            made = _with_dtype(source, options.dtype)
            targets = infer_destinations(made, rules, identity=options.identity)
        settings = {
            "identity": options.identity,
            "casting": options.casting,
            "allow_missing": options.allow_missing,
            "allow_unexpected": options.allow_unexpected,
        }
        return cls(source, rules, targets, settings, inputs)


def _with_dtype(tensors: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Meta tensors like these, contiguous; the floating-point ones of another dtype, if one is given."""
    return {
        name: torch.empty(
            tuple(tensor.shape),
            dtype=dtype if dtype and tensor.dtype.is_floating_point else tensor.dtype,
            device="meta",
        )
        for name, tensor in tensors.items()
    }


def unusable(options: argparse.Namespace) -> str | None:
    """What is wrong with options that are fine one by one, or with a name in them."""
    if (options.sizes or options.inverse) and not options.rules:
        option = "--set" if options.sizes else "--inverse"
        return f"{option} is about the rules, and there are no --rules"
    twice = _repeated(options.sizes)
    if twice:
        return f"--set {twice} is given twice"
    for argument in ("allow_missing", "allow_unexpected"):
        try:
            NameFilter(getattr(options, argument, ()), argument)
        except ValueError as error:
            return f"--{argument.replace('_', '-')}: {error}"
    return None


def wrong(command: str, text: str) -> int:
    """Say that the command line is wrong, as argparse does, and return its exit code."""
    fail(f"error: {text}; see paramkit {command} --help")
    return 2


def _repeated(sizes: Iterable[tuple[str, int]]) -> str | None:
    """A size that is set twice to different values."""
    seen: dict[str, int] = {}
    for name, value in sizes:
        if seen.setdefault(name, value) != value:
            return name
    return None
