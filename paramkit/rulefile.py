"""Rule files: rules in YAML or TOML, with errors that name the line.

    about: Conv1D layers of GPT-2 to linear ones
    sizes: {heads: 12}          # axes that shapes do not tell; without a value: to be given by the caller
    rules:
      - {src: "h.{i}.attn.c_attn.weight", dst: "layers.{i}.qkv.weight", pattern: "i o -> o i"}
      - {src: "h.{i}.attn.bias"}                      # no dst: dropped on purpose
      - {dst: "layers.{i}.extra", fill: 0}            # no src: filled, or without fill kept on purpose

A rule has the keys `src`, `dst`, `pattern`, `at`, `rows`, `fill`, `sizes`, with the meaning that they have
in `paramkit.Rule`; `sizes` are its axis sizes. Values of sizes may be sums of products of the sizes on
top: `"heads*64"`. The sizes on top hold for every rule that has an axis of that name, or uses it in `at`.

YAML is read without aliases and tags, and a range without quotes stays one: `at: {s: 1:30}`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import Finding, RuleFileError
from .patterns import parse, parse_at
from .rules import Rule, rule_list
from .whole import write_whole

__all__ = ["as_rules", "load_rules", "outline", "save_rules"]

_TOP = ("about", "sizes", "rules")
_KEYS = ("src", "dst", "pattern", "at", "rows", "fill", "sizes")
_MOST_BYTES = 16 << 20
_DEEPEST = 6


def as_rules(rules: Any) -> tuple[Rule, ...]:
    """The rules of a file, or those given.

    Raises:
        RuleFileError: a file that cannot be read.
        TypeError: something that is no list of rules.
    """
    if isinstance(rules, (str, os.PathLike)):
        return tuple(load_rules(rules))
    return tuple(rule_list(rules))


def load_rules(path: str | os.PathLike[str], **sizes: int) -> list[Rule]:
    """Read a rule file.

    Args:
        path: ends in `.yaml`, `.yml` or `.toml`. YAML needs the package PyYAML, and TOML on Python 3.10 the
            package tomli: `pip install "paramkit[rules]"`.
        sizes: values for the sizes on top of the file, in place of those there.

    Returns:
        The rules, in order.

    Raises:
        RuleFileError: with every problem, each with the file and the line.
        ModuleNotFoundError: the package that reads it is not installed.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rules.toml"
        >>> save_rules([Rule("a.w", "b.w", "i o -> o i")], path)
        >>> load_rules(path)
        [Rule('a.w', 'b.w', 'i o -> o i')]
    """
    path = Path(path)
    return _Reader(path, _document(path)).rules(sizes)


def outline(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """What a rule file says of itself: about, and its sizes, None for those that the caller gives.

    Raises:
        RuleFileError: it cannot be read.
        ModuleNotFoundError: the package that reads it is not installed.
    """
    path = Path(path)
    top = _document(path).plain()
    about, sizes = (top.get("about"), top.get("sizes")) if isinstance(top, dict) else (None, None)
    named = sizes.items() if isinstance(sizes, dict) else ()
    return str(about or "").strip(), {n: None if v == "" else v for n, v in named}


def save_rules(rules: Iterable[Rule], path: str | os.PathLike[str], about: str = "") -> None:
    """Write rules to a file that `load_rules` reads.

    Args:
        rules: the rules.
        path: ends in `.yaml`, `.yml` or `.toml`.
        about: a line that says what they are for.

    Raises:
        RuleFileError: another suffix.
        TypeError: something that is no rule, or a rule with a complex fill, which no file can hold.
        ModuleNotFoundError: PyYAML is not installed.
        OSError: the file cannot be written; what was there is unchanged.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rules.toml"
        >>> save_rules([Rule("pooler.*", None)], path, about="to a model without a pooler")
        >>> print(path.read_text().strip())
        about = "to a model without a pooler"
        <BLANKLINE>
        [[rules]]
        src = "pooler.*"
    """
    path = Path(path)
    entries = [_entry(k, rule) for k, rule in enumerate(rules)]
    if path.suffix == ".toml":
        lines = [f"about = {_toml(about)}", ""] if about else []
        lines += [] if entries else ["rules = []", ""]
        for entry in entries:
            lines += ["[[rules]]", *(f"{key} = {_toml(value)}" for key, value in entry.items()), ""]
        write_whole(path, "\n".join(lines))
        return
    if path.suffix not in (".yaml", ".yml"):
        raise _one(path, 0, f'a file that ends in "{path.suffix}"', ".yaml, .yml or .toml")
    yaml = _yaml()
    lines = [yaml.safe_dump({"about": about}, width=1000).rstrip()] if about else []
    lines += ["rules:"] if entries else ["rules: []"]
    for entry in entries:
        # One line a rule: a list of rules is read as a table.
        flow = yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=10**6)
        lines.append(f"  - {flow.strip()}")
    write_whole(path, "\n".join(lines) + "\n")


def _entry(k: int, rule: Rule) -> dict[str, Any]:
    if not isinstance(rule, Rule):
        raise TypeError(f"rules[{k}] must be a paramkit.Rule, got {type(rule).__name__}")
    if rule.fill is not None and isinstance(rule.fill.value, complex):
        raise TypeError(f"rules[{k}]: a rule file cannot hold a complex number: {rule}")
    given = {
        "src": rule.src,
        "dst": rule.dst,
        "pattern": rule.pattern,
        "at": dict(rule.at) or None,
        "rows": rule.rows,
        "fill": None if rule.fill is None else rule.fill.plain(),
        "sizes": dict(rule.axis_sizes) or None,
    }
    return {key: value for key, value in given.items() if value is not None}


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, float):
        return repr(value)  # inf and nan are written the same way
    if isinstance(value, str):
        # As in JSON, but characters above U+FFFF are no pairs of escapes, and U+007F is one.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)


# ---- reading -------------------------------------------------------------------------------------


@dataclass
class _Value:
    """A value and the line that it stands on; containers hold further ones."""

    value: Any
    line: int

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {key: inner.plain() for key, inner in self.value.items()}
        if isinstance(self.value, list):
            return [inner.plain() for inner in self.value]
        return self.value


def _document(path: Path) -> _Value:
    text = _text(path)
    return _read_toml(path, text) if path.suffix == ".toml" else _read_yaml(path, text)


def _text(path: Path) -> str:
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise _one(path, 0, f'a file that ends in "{path.suffix}"', ".yaml, .yml or .toml")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise _one(path, 0, f"{path.stat().st_size} bytes", f"at most {_MOST_BYTES}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise _one(path, 0, error.strerror or str(error), "a rule file") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise _one(path, line, "bytes that are no UTF-8", "text") from error
    except ValueError as error:
        if isinstance(error, RuleFileError):
            raise
        raise _one(path, 0, str(error), "a path") from error


def _yaml() -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'rule files in YAML need PyYAML: pip install "paramkit[rules]"', name="yaml"
        ) from error
    return yaml


def _read_yaml(path: Path, text: str) -> _Value:
    yaml = _yaml()
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        return _Value({}, 1) if node is None else _Nodes(path, loader).read(node, 0)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _one(path, mark.line + 1 if mark else 0, f"{error.problem}", "YAML") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _one(
            path, line, f"the character #x{ord(text[error.position]):04x}", "text"
        ) from error
    except RecursionError as error:
        raise _one(path, 0, "values nested deeper than a rule is") from error


_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null"))


class _Nodes:
    """Nodes of a YAML document to values with their lines."""

    def __init__(self, path: Path, loader: Any) -> None:
        self.path, self.loader = path, loader
        self.seen: set[int] = set()

    def read(self, node: Any, depth: int) -> _Value:
        line = node.start_mark.line + 1
        if depth > _DEEPEST:
            raise _one(self.path, line, "values nested deeper than a rule is")
        # An alias is the same node again: a few of them may stand for more than fits in memory.
        if id(node) in self.seen:
            raise _one(self.path, line, "a value that an alias repeats", "no aliases")
        self.seen.add(id(node))
        if node.id == "mapping":
            return _Value(self._mapping(node, depth), line)
        if node.id == "sequence":
            return _Value([self.read(inner, depth + 1) for inner in node.value], line)
        return _Value(self._scalar(node, line), line)

    def _mapping(self, node: Any, depth: int) -> dict[str, _Value]:
        out: dict[str, _Value] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.id != "scalar":
                raise _one(self.path, line, "a key that is no text")
            key = key_node.value
            if key in out:
                raise _one(self.path, line, f'the key "{key}" twice')
            out[key] = self.read(value_node, depth + 1)
        return out

    def _scalar(self, node: Any, line: int) -> Any:
        if node.tag not in _TAGS:
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            hint = "text in quotes" if kind == "timestamp" else "text or a number"
            raise _one(self.path, line, f'{kind} "{node.value}"'[:100], hint)
        plain = node.style is None
        if plain and (":" in node.value or re.match("[+-]?0[0-9_]", node.value)):
            return node.value  # YAML 1.1 reads 1:30 as 90, and 010 as 8
        try:
            return self.loader.construct_object(node)
        except Exception as error:  # of a value that is not what its tag says, any kind
            kind = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise _one(self.path, line, f'{kind} "{node.value}"'[:100], "YAML") from error


def _read_toml(path: Path, text: str) -> _Value:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'rule files in TOML need tomli on Python 3.10: pip install "paramkit[rules]"',
                name="tomli",
            ) from error
    try:
        document = tomllib.loads(text)
    except RecursionError as error:
        raise _one(path, 0, "values nested deeper than a rule is") from error
    except ValueError as error:  # also of a number of too many digits
        found = re.search(r"at line (\d+)", str(error))
        line = text.count("\n") + 1 if "end of document" in str(error) else 0
        raise _one(
            path, int(found.group(1)) if found else line, str(error)[:300], "TOML"
        ) from error
    return _Lines(path, text).document(document)


class _Lines:
    """The lines of a TOML document, which its reader does not give: tables and keys are found in the text."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.lines = path, text.split("\n")

    def document(self, document: dict[str, Any]) -> _Value:
        headers = [n for n, line in enumerate(self.lines, 1) if re.match(r"\s*\[", line)]
        tables = [n for n in headers if re.match(r"\s*\[\[\s*rules\s*\]\]", self.lines[n - 1])]
        top: dict[str, _Value] = {}
        for key, value in document.items():
            line = self._find(rf"\s*\[*\s*{re.escape(key)}\b", 1, len(self.lines)) or 1
            if key == "rules" and isinstance(value, list):
                starts = [tables[k] if k < len(tables) else line for k in range(len(value))]
                made = [
                    self._table(rule, n, headers) for rule, n in zip(value, starts, strict=True)
                ]
                top[key] = _Value(made, line)
            else:
                top[key] = self._table(value, line, headers)
        return _Value(top, 1)

    def _table(self, value: Any, line: int, headers: list[int]) -> _Value:
        """A table that begins on a line; its keys are sought up to the next one."""
        if not isinstance(value, dict):
            return self._value(value, line, 1)
        end = next((n for n in headers if n > line), len(self.lines) + 1) - 1
        found = {}
        for key, inner in value.items():
            at = self._find(rf"""\s*["']?{re.escape(key)}["']?\s*[=.]""", line + 1, end)
            found[key] = self._value(inner, at or line, 1)
        return _Value(found, line)

    def _find(self, pattern: str, first: int, last: int) -> int | None:
        matching = re.compile(pattern)
        return next((n for n in range(first, last + 1) if matching.match(self.lines[n - 1])), None)

    def _value(self, value: Any, line: int, depth: int) -> _Value:
        if depth > _DEEPEST:
            raise _one(self.path, line, "values nested deeper than a rule is")
        if isinstance(value, dict):
            inner = {key: self._value(v, line, depth + 1) for key, v in value.items()}
            return _Value(inner, line)
        if isinstance(value, list):
            return _Value([self._value(v, line, depth + 1) for v in value], line)
        return _Value(value, line)


class _Reader:
    """A document to rules; problems are collected."""

    def __init__(self, path: Path, document: _Value) -> None:
        self.path, self.document = path, document
        self.findings: list[Finding] = []
        self.unknown: set[str] = set()  # sizes without a value: what follows from that is no news

    def rules(self, given: Mapping[str, int]) -> list[Rule]:
        top = self.document.value
        if not isinstance(top, dict):
            raise _one(self.path, self.document.line, "a document without keys", "rules: [...]")
        for key, value in top.items():
            if key not in _TOP:
                self._add(value.line, f'the key "{key}"', " or ".join(_TOP))
        about = top.get("about")
        if about is not None and not isinstance(about.value, str):
            self._add(about.line, f"about = {about.plain()!r}"[:100], "text")
        entries = top.get("rules")
        if entries is None or not isinstance(entries.value, list):
            line = 1 if entries is None else entries.line
            self._add(line, "no list of rules", "rules: [...]")
            entries = _Value([], line)
        sizes = self._sizes(top.get("sizes"), given)
        made = [self._rule(entry, sizes) for entry in entries.value]
        if self.findings:
            n = len(self.findings)
            raise RuleFileError(
                f"the rule file {self.path} has {n} {'problem' if n == 1 else 'problems'}.",
                self.findings,
            )
        return [rule for rule in made if rule is not None]

    def _sizes(self, declared: _Value | None, given: Mapping[str, int]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        entries = {} if declared is None else declared.value
        if not isinstance(entries, dict):
            assert declared is not None
            self._add(declared.line, "sizes that are no mapping", "sizes: {name: 12}")
            entries = {}
        for name in given:
            if name not in entries:
                known = ", ".join(entries) or "none"
                self._add(0, f"a value for the size {name}", f"sizes that the file has: {known}")
        for name, entry in entries.items():
            value = given.get(name, entry.plain())
            if value is None or value == "":
                self._add(
                    entry.line, f"no value for the size {name}", f"{name}=... from the caller"
                )
                self.unknown.add(name)
            else:
                number = self._number(value, sizes, entry.line, f"the size {name}")
                if number is None:
                    self.unknown.add(name)
                else:
                    sizes[name] = number
        return sizes

    def _number(self, value: Any, sizes: Mapping[str, int], line: int, what: str) -> int | None:
        """An int, or a sum of products of sizes."""
        number = self._evaluated(value, sizes, line, what)
        if number is not None and not 0 <= number < 1 << 63:
            self._add(line, f"{what} = {value!r}"[:100], "a number of at least 0, below 2**63")
            return None
        return number

    def _evaluated(self, value: Any, sizes: Mapping[str, int], line: int, what: str) -> int | None:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str):
            try:
                parsed = parse_at(value)
            except ValueError as error:
                self._add(line, str(error))
                return None
            if parsed.start is not None and not parsed.is_range:
                number = parsed.start.value(sizes)
                if number is not None:
                    return number
                unknown = [n for n in parsed.names if n not in sizes]
                if not self.unknown.intersection(unknown):
                    self._add(line, f'{what} = "{value}"', f"a value for {', '.join(unknown)}")
                return None
        self._add(line, f"{what} = {value!r}"[:100], "an int, or a sum of products of sizes")
        return None

    def _rule(self, entry: _Value, sizes: Mapping[str, int]) -> Rule | None:
        if not isinstance(entry.value, dict):
            self._add(entry.line, "no mapping", "a rule such as {src: a.w, dst: b.w}")
            return None
        fields = entry.value
        unknown = [key for key in fields if key not in _KEYS]
        for key in unknown:
            self._add(fields[key].line, f'the key "{key}"', " or ".join(_KEYS))
        if unknown:
            return None
        own: dict[str, int] = {}
        at = fields["at"].plain() if "at" in fields else None
        if "sizes" in fields:
            listed = fields["sizes"]
            if not isinstance(listed.value, dict):
                self._add(listed.line, "sizes that are no mapping", "sizes: {g: 8}")
                return None
            for name, value in listed.value.items():
                number = self._number(value.plain(), sizes, value.line, f"the size {name}")
                if number is None:
                    return None
                own[name] = number
        plain = {
            k: fields[k].plain() for k in ("src", "dst", "pattern", "rows", "fill") if k in fields
        }
        names: set[str] = set()
        try:
            names = self._names_in(plain.get("pattern"), at)
            for name in names:
                if name in sizes:
                    own.setdefault(name, sizes[name])
            return _made(plain, at, own)
        except (ValueError, TypeError) as error:
            if not self.unknown & names:
                self._add(entry.line, str(error))
            return None

    @staticmethod
    def _names_in(pattern: Any, at: Any) -> set[str]:
        names: set[str] = set()
        if isinstance(pattern, str):
            parsed = parse(pattern)
            names |= {*parsed.src_axes, *parsed.dst_axes}
        if isinstance(at, Mapping):
            for value in at.values():
                if isinstance(value, str):
                    names |= set(parse_at(value).names)
        return names

    def _add(self, line: int, got: str, expected: str = "") -> None:
        self.findings.append(_finding(self.path, line, got, expected))


def _made(plain: Mapping[str, Any], at: Any, sizes: Mapping[str, int]) -> Rule:
    reserved = [name for name in sizes if name in (*_KEYS, "self")]
    if reserved:
        raise ValueError(f'an axis cannot be named "{reserved[0]}", which has a meaning of its own')
    return Rule(
        plain.get("src"),
        plain.get("dst"),
        plain.get("pattern"),
        at=at,
        rows=plain.get("rows"),
        fill=plain.get("fill"),
        **sizes,
    )


def _finding(path: Path, line: int, got: str, expected: str = "") -> Finding:
    return Finding(f"{path}:{line}" if line else str(path), "rule", got, expected)


def _one(path: Path, line: int, got: str, expected: str = "") -> RuleFileError:
    return RuleFileError(
        f"the rule file {path} cannot be read.", [_finding(path, line, got, expected)]
    )
