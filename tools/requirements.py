"""Print the requirements of the package, or of some of its extras, one a line.

The Makefile installs them before the package itself, so that pyproject.toml stays the only list.

    python tools/requirements.py             the package's own, torch left out
    python tools/requirements.py test lint   those of two extras, extras they name included
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pip carries the same reader
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def expand(names: list[str], extras: dict[str, list[str]]) -> list[str]:
    """The requirements of the extras named, with `paramkit[a,b]` replaced by what it stands for."""
    found: list[str] = []
    for name in names:
        for requirement in extras[name]:
            own = re.fullmatch(r"paramkit\[(.*)\]", requirement.replace(" ", ""))
            found += expand(own.group(1).split(","), extras) if own else [requirement]
    return list(dict.fromkeys(found))


def main(names: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if names:
        requirements = expand(names, project["optional-dependencies"])
    else:
        requirements = [one for one in project["dependencies"] if not one.startswith("torch")]
    print("\n".join(requirements))


if __name__ == "__main__":
    main(sys.argv[1:])
