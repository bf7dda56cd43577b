"""JSON as strictly as other languages read it: text in UTF-8, each name once, no NaN."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["parse"]


def parse(raw: bytes) -> Any:
    """What a JSON text says.

    Args:
        raw: UTF-8. A negative integer is given as -1, whichever it is: nothing that is read by this can be
            negative, and Python would take "-0" for 0.

    Raises:
        ValueError: it is no such JSON, with the reason. Also for brackets nested too deep.

    Example:
        >>> parse(b'{"a": [1]}')
        {'a': [1]}
        >>> parse(b'{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ValueError: 'a' is there twice
    """
    try:
        content = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_int=lambda text: -1 if text.startswith("-") else int(text),
        )
        if b"\\ud" in raw or b"\\uD" in raw:  # half of a character, which nothing could print
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except UnicodeEncodeError:
        raise ValueError("a name that is half a character") from None
    except RecursionError:
        raise ValueError("brackets in brackets without end") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name!r} is there twice")
            seen.add(name)
    return out


def _constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")
