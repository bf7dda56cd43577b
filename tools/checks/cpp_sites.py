"""Where C++ refuses something: TORCH_CHECK and its kin, exceptions for Python, checks of torch's that throw.

TORCH_CHECK(fits, text)  ->  TORCH_CHECK((fits) || !keep_check("batch.cpp:3"), text)
throw py::value_error()  ->  if (keep_check("plan.cpp:1")) throw py::value_error()
raise_plan_error(text)   ->  if (keep_check("claims.cpp:1")) raise_plan_error(text)
check_inplace(dst, ...)  ->  try { check_inplace(dst, ...) } catch (...) { if (keep_check(...)) throw; }
"""

from __future__ import annotations

import re

from .python_sites import Site

__all__ = ["HEADER", "rewrite"]

HEADER = """#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

// Whether a check that is about to refuse something is still there; noted, for whoever counts.
inline bool keep_check(const char* site) {
  if (const char* path = std::getenv("PARAMKIT_CHECK_HITS")) {
    if (std::FILE* file = std::fopen(path, "a")) {
      std::fprintf(file, "%s\\n", site);
      std::fclose(file);
    }
  }
  const char* removed = std::getenv("PARAMKIT_CHECK_REMOVED");
  return removed == nullptr || std::strcmp(removed, site) != 0;
}
"""

_CHECK = re.compile(r"\bTORCH_CHECK(?:_TYPE|_NOT_IMPLEMENTED)?\(")
_THROW = re.compile(
    r"\bthrow (?:py::value_error|py::type_error|std::\w+)\b|(?<!void )\braise_plan_error\b(?=\()"
)
_CALL = re.compile(
    r"^( *)((?:torch::autograd::check_inplace|check_conversion)\(.*\);)$", re.MULTILINE
)
_LAMBDA_CALL = re.compile(r"\[&\] \{ (check_conversion\(.*?\);) \}")
_FUNCTION = re.compile(
    r"^(?!\s|#|//|namespace|class|struct|template|using|\})(?:[^\s(][^(\n]*?[\s*&])?([\w:~]+)\(",
    re.MULTILINE,
)


def _end_of_condition(text: str, start: int) -> int:
    """Where an argument of a call ends: a comma, or the last bracket, outside all brackets and strings."""
    depth, i = 0, start
    while True:
        sign = text[i]
        if sign == '"':
            i = text.index('"', i + 1)
        elif sign in "([{":
            depth += 1
        elif sign in ",)" and depth == 0:
            return i
        elif sign in ")]}":
            depth -= 1
        i += 1


def _end_of_statement(text: str, start: int) -> int:
    """Where a call that is a statement ends: behind its semicolon."""
    i = text.index("(", start)
    while text[i] != ")":
        i = _end_of_condition(text, i + 1)
    return text.index(";", i) + 1


def rewrite(file: str, text: str) -> tuple[str, list[Site]]:
    """The source with every check behind a question, and the checks."""
    sites: list[Site] = []
    edits: list[tuple[int, int, str]] = []

    def add(start: int, end: int, shown: str, new: str) -> None:
        before = list(_FUNCTION.finditer(text, 0, start))
        function = before[-1][1] if before else ""
        key = f"{file}:{len(sites)}"
        sites.append(Site(key, file, function, " ".join(shown.split())[:100]))
        edits.append((start, end, new.replace("SITE", f'keep_check("{key}")')))

    for found in _CHECK.finditer(text):
        end = _end_of_condition(text, found.end())
        condition = text[found.end() : end]
        new = "!SITE" if condition == "false" else f"({condition}) || !SITE"
        shown = text[found.start() : min(end + 80, len(text))]
        add(found.end(), end, shown, new)
    for found in _THROW.finditer(text):
        add(
            found.start(),
            found.end(),
            text[found.start() : found.end() + 60],
            f"if (SITE) {found[0]}",
        )
        end = _end_of_statement(text, found.start())
        head = list(_FUNCTION.finditer(text, 0, found.start()))[-1]
        # What would come to the end without a value is not compiled as it reads.
        if text.startswith("\n}", end) and not head[0].startswith("void "):
            edits.append((end, end, " return {};"))
    for pattern, group in ((_CALL, 2), (_LAMBDA_CALL, 1)):
        for found in pattern.finditer(text):
            call = found[group]
            new = f"try {{ {call} }} catch (...) {{ if (SITE) throw; }}"
            add(*found.span(group), call, new)
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return f'#include "core/kept.h"\n{text}', sites
