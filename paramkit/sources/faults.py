"""Errors about sources, in one voice: what cannot be used, what was got, what was expected, what to do."""

from __future__ import annotations

from pathlib import Path

from ..errors import Finding, SourceError

__all__ = ["AGAIN", "PICKLES", "look_alike", "one_fault", "type_text", "unreadable"]

# Suffixes of what torch.save writes.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
AGAIN = "download or copy it again"


def one_fault(
    summary: str, name: str, kind: str, got: str = "", expected: str = "", hint: str = ""
) -> SourceError:
    """A `SourceError` with one finding.

    Example:
        >>> print(one_fault("the source is empty.", "a.pt", "file", hint="fetch it"))
        the source is empty. Nothing was written.
          a.pt | file | fetch it
    """
    return SourceError(
        f"{summary} Nothing was written.", [Finding(name, kind, got, expected, hint)]
    )


def unreadable(path: Path | str, got: str, expected: str = "", hint: str = AGAIN) -> SourceError:
    """A `SourceError` about the content of a file."""
    return one_fault("the source file cannot be read.", str(path), "file", got, expected, hint)


def look_alike(lead: bytes) -> tuple[str, str] | None:
    """What a file really is that was fetched by mistake, by its first bytes, and what to do.

    Example:
        >>> look_alike(b"<!DOCTYPE html>")[0]
        'a web page, not the weights themselves'
    """
    if lead.startswith((b"version ", b"<")):
        what = "a Git LFS pointer" if lead.startswith(b"version ") else "a web page"
        hint = "fetch the real file (git lfs pull, or download)"
        return f"{what}, not the weights themselves", hint
    return None


def type_text(value: object) -> str:
    """The type of a value as people write it, with the value where it is a number.

    Example:
        >>> type_text(3), type_text(None), type_text([])
        ('int 3', 'None', 'list')
    """
    kind = type(value)
    if value is None:
        return "None"
    if isinstance(value, (bool, int, float, complex)):
        return f"{kind.__name__} {value!r}"
    return (
        kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    )
