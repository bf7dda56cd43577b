"""The command `paramkit`: status, build, demo, inspect, plan, transplant, diff.

Exit codes: 0 for success, 1 for a failure that the message explains, 2 for a wrong command line, 130 for
an interrupt. Those of `diff` are diff's: 0 equal, 1 different, 2 trouble.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..errors import PlanError
from . import basics, diff, inspect, plan, transplant
from .text import fail

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        argv: the arguments after the program's name; by default the process's own.

    Example:
        >>> from paramkit.cli import main
        >>> main(["status"])  # doctest: +SKIP
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The demo reads its own arguments, `--help` among them, so they must not be parsed here.
    if arguments[:1] == ["demo"]:
        return basics.demo(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        code = int(options.run(options))
        sys.stdout.flush()
    except OSError as error:  # `| head`, a full disk
        # What is left in the buffer would raise again when the interpreter exits.
        sys.stdout = None
        if not isinstance(error, BrokenPipeError):
            fail(f"error: {error}")
        return int(options.trouble)
    except PlanError as error:
        fail(f"error: {error}")
        return int(options.trouble)
    except ModuleNotFoundError as error:  # of an extra
        if (error.name or "").split(".")[0] == "paramkit":
            raise
        fail(f"error: {error}")
        return int(options.trouble)
    except (MemoryError, RuntimeError) as error:
        text = str(error).partition("\n")[0]
        if (
            isinstance(error, RuntimeError) and "allocate memory" not in text
        ):  # torch has no type for it
            raise
        fail(f"error: out of memory{': ' if text else ''}{text}")
        return int(options.trouble)
    except KeyboardInterrupt:
        fail(f"interrupted; {options.interrupted}")
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="paramkit", description="Writes PyTorch parameters.")
    parser.add_argument("--version", action="version", version=f"paramkit {_version()}")
    parser.set_defaults(trouble=1, interrupted="nothing was written")
    commands = parser.add_subparsers(metavar="command", required=True)
    basics.add_status(commands)
    basics.add_build(commands)
    basics.add_demo(commands)
    inspect.add(commands)
    plan.add(commands)
    transplant.add(commands)
    diff.add(commands)
    return parser


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("paramkit")
    except metadata.PackageNotFoundError:
        return "(not installed)"
