"""Programs that stand in for others, to be found in PATH."""

from __future__ import annotations

from pathlib import Path

__all__ = ["program"]


def program(folder: Path, name: str, script: str) -> Path:
    """A bash script of that name in a folder, to be put into PATH; its path."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return path
