"""Rule files: every form survives a save and a load; whatever is wrong is said with file and line."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import paramkit
from paramkit import Rule, RuleFileError, load_rules, save_rules
from paramkit.rulefile import as_rules, outline
from tests.conftest import need_module

need_module("yaml")
if sys.version_info < (3, 11):
    need_module("tomli")

SUFFIXES = ["yaml", "yml", "toml"]

FORMS = [
    Rule("a", "b"),
    Rule("{p}.a.{i}", "{p}.b.{i}"),
    Rule("{*p}.q.weight", "{*p}.q.weight", "(h two d) e -> (h d two) e", two=2, h=32),
    Rule("h.{i}.w", "layers.{i}.w", "i o -> o i"),
    Rule("q", "qkv", "h e -> (s h) e", at={"s": 0}),
    Rule("q", "qkv", "h e -> (s h) e", at={"s": -1}),
    Rule("q", "qkv", "(g r d) e -> (g s d) e", at={"s": "0:r"}, g=8, d=128),
    Rule("q", "qkv", "r e -> s e", at={"s": slice(1, 30)}),
    Rule("q", "qkv", "r e -> s e", at={"s": ":-2"}),
    Rule("k", "k", "(h d) e -> (h r d) e", at={"r": "*"}, h=2),
    Rule("experts.{e}.w1.weight", "experts.w1", "o i -> e o i"),
    Rule("tok", "tok", rows="overlap"),
    Rule("tok", "tok", rows="overlap", fill="mean"),
    Rule("tok", "tok", rows="overlap", fill="zeros"),
    Rule("tok", "tok", rows="overlap", fill={"normal": 0.02, "mean": 1.5, "seed": 7}),
    Rule("pooler.*", None),
    Rule("fused", None, "(s h) e ->", at={"s": 2}, s=3),
    Rule(None, "kept.*"),
    Rule(None, "b", "-> (s h)", at={"s": "1:"}, s=3),
    Rule(None, "b", fill=0.5),
    Rule(None, "b", fill=-3),
    Rule(None, "b", fill=True),
    Rule(None, "b", fill=float("inf")),
    Rule(None, "b", fill=1e-300),
    Rule(None, "mask", "-> r c", at={"r": 0}, fill=float("-inf")),
    # Names that a reader could take for something else.
    Rule("null", "true"),
    Rule("1.2", "3"),
    Rule("no", "~"),
    Rule("2001-01-01", "1:30"),
    Rule("naïve.重み.😀", "a b\tc: d # e, [f] 'g' \"h\" \\i"),
    Rule("line\nbreak", "\x7f\x1b\u2028"),
    Rule("x", "y", "on off -> off on"),
    Rule("x", "y", "n y -> y n", n=2),
]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("about", ["", "From here to there: #1 \"quoted\" 'too'\nand on"])
def test_every_form_survives(tmp_path: Path, suffix: str, about: str) -> None:
    path = tmp_path / f"rules.{suffix}"
    save_rules(FORMS, path, about)
    loaded = load_rules(path)
    assert loaded == FORMS
    # Also types that compare equal: True is not 1, and an index is not text.
    assert [repr(r) for r in loaded] == [repr(r) for r in FORMS]
    assert outline(path) == (about, {})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_rules_and_nan_survive(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rules.{suffix}"
    save_rules([], path)
    assert load_rules(path) == []
    save_rules([Rule(None, "b", fill=float("nan"))], path)
    assert repr(load_rules(path)) == "[Rule(None, 'b', fill=nan)]"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_a_file_cannot_hold_is_refused_before_anything_is_written(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"rules.{suffix}"
    save_rules(FORMS, path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="complex"):
        save_rules([Rule("a", "b"), Rule(None, "b", fill=1j)], path)
    with pytest.raises(TypeError, match=r"rules\[1\]"):
        save_rules([Rule("a", "b"), "no rule"], path)  # type: ignore[list-item]
    assert path.read_bytes() == before
    with pytest.raises(RuleFileError, match=r"\.json"):
        save_rules(FORMS, tmp_path / "rules.json")
    assert not (tmp_path / "rules.json").exists()


name = st.lists(
    st.text(st.characters(exclude_characters="{}*.", exclude_categories=["Cs"]), min_size=1),
    min_size=1,
    max_size=3,
).map(".".join)
scalar = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, width=64)
)
fill = st.one_of(
    scalar,
    st.just("zeros"),
    st.fixed_dictionaries(
        {"normal": st.floats(0, 10)},
        optional={"mean": st.floats(-3, 3), "seed": st.integers(0, 2**40)},
    ),
)
axis = st.sampled_from(["e", "on", "y", "null", "x1", "_"])
rule = st.one_of(
    st.builds(Rule, name, name),
    st.builds(Rule, name, st.none()),
    st.builds(lambda dst, value: Rule(None, dst, fill=value), name, fill),
    st.builds(lambda n, value: Rule(n, n, rows="overlap", fill=value), name, fill),
    st.builds(
        lambda a, b, x, at, size: Rule(a, b, f"h -> (s {x} h)", at={"s": at, x: "*"}, **{x: size}),
        name,
        name,
        axis,
        st.one_of(st.integers(-5, 5), st.sampled_from(["1", "1:30", "h+1", ":2", "*"])),
        st.integers(0, 2**40),
    ),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(rule, max_size=5), st.sampled_from(SUFFIXES), st.text(max_size=30))
def test_any_rules_survive(tmp_path: Path, rules: list[Rule], suffix: str, about: str) -> None:
    path = tmp_path / f"rules.{suffix}"
    try:
        about.encode()
    except UnicodeEncodeError:
        about = ""
    save_rules(rules, path, about)
    assert [repr(r) for r in load_rules(path)] == [repr(r) for r in rules]


# ---- sizes and use -------------------------------------------------------------------------------

SIZED = {
    "yaml": """\
about: query, key, value
sizes: {heads: 4, kv: , d: 2, q: heads*d, all: q+2*kv*d}
rules:
  - {src: q, dst: qkv, pattern: q e -> out e, at: {out: "0:q"}, sizes: {out: all}}
  - {src: k, dst: k, pattern: (kv d) e -> kv d e}
""",
    "toml": """\
about = "query, key, value"
[sizes]
heads = 4
kv = ""
d = 2
q = "heads*d"
all = "q+2*kv*d"
[[rules]]
src = "q"
dst = "qkv"
pattern = "q e -> out e"
at = {out = "0:q"}
sizes = {out = "all"}
[[rules]]
src = "k"
dst = "k"
pattern = "(kv d) e -> kv d e"
""",
}


@pytest.mark.parametrize("suffix", SIZED)
def test_sizes_on_top(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rules.{suffix}"
    path.write_text(SIZED[suffix])
    first, second = load_rules(path, kv=3)
    assert dict(first.axis_sizes) == {"out": 20, "q": 8}
    assert dict(second.axis_sizes) == {"kv": 3, "d": 2}
    assert dict(load_rules(path, kv=3, heads=6, d=3)[0].axis_sizes)["q"] == 18
    assert outline(path) == (
        "query, key, value",
        {"heads": 4, "kv": None, "d": 2, "q": "heads*d", "all": "q+2*kv*d"},
    )
    with pytest.raises(RuleFileError, match="no value for the size kv"):
        load_rules(path)
    with pytest.raises(RuleFileError, match="a value for the size nope"):
        load_rules(path, kv=3, nope=1)
    for wrong in (1.5, True, "x", [1]):
        with pytest.raises(RuleFileError, match="the size kv"):
            load_rules(path, kv=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_a_file_in_place_of_rules(tmp_path: Path, backend: str, suffix: str) -> None:
    path = tmp_path / f"rules.{suffix}"
    save_rules([Rule("w", "weight", "i o -> o i"), Rule(None, "bias", fill=2)], path)
    model, source = torch.nn.Linear(3, 2), torch.randn(3, 2)
    paramkit.transplant(model, {"w": source}, str(path))
    assert torch.equal(model.weight, source.T)
    assert torch.equal(model.bias, torch.full((2,), 2.0))
    assert as_rules(path) == tuple(load_rules(path))


def test_without_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yaml_path, toml_path = tmp_path / "rules.yaml", tmp_path / "rules.toml"
    save_rules(FORMS, yaml_path)
    monkeypatch.setitem(sys.modules, "yaml", None)
    for call in (
        lambda: load_rules(yaml_path),
        lambda: save_rules(FORMS, tmp_path / "new.yaml"),
        lambda: paramkit.recipes.load("gpt2_to_linear"),
    ):
        with pytest.raises(ModuleNotFoundError, match=r"paramkit\[rules\]"):
            call()
    assert not (tmp_path / "new.yaml").exists()
    save_rules(FORMS, toml_path)
    assert load_rules(toml_path) == FORMS


# ---- errors --------------------------------------------------------------------------------------

YAML_ERRORS: dict[str, tuple[str, int, str]] = {
    "no document": ("", 1, "no list of rules"),
    "no keys": ("- {src: a, dst: b}\n", 1, "a document without keys"),
    "unknown key on top": ("rules: []\nruels: []\n", 2, 'the key "ruels"'),
    "unknown key": ("rules:\n  - {src: a, dst: b}\n  - {src: a, dts: b}\n", 3, 'the key "dts"'),
    "unknown key, block": ("rules:\n  - src: a\n    dst: b\n    ats: {}\n", 4, 'the key "ats"'),
    "duplicate key": ("rules:\n  - src: a\n    dst: b\n    src: c\n", 4, 'the key "src" twice'),
    "duplicate key on top": ("rules: []\nrules: []\n", 2, 'the key "rules" twice'),
    "rules are a mapping": ("rules:\n  src: a\n", 2, "no list of rules"),
    "rules are text": ("about: x\nrules: a\n", 2, "no list of rules"),
    "rule is text": ("rules:\n  - {src: a, dst: b}\n  - a -> b\n", 3, "no mapping"),
    "src is a number": ("rules:\n  - {src: 3, dst: b}\n", 2, "src must be a name"),
    "src is a list": ("rules:\n  - {src: [a], dst: b}\n", 2, "src must be a name"),
    "nothing named": ("rules:\n  - {}\n", 2, "both None"),
    "unknown axis": (
        "rules:\n  - {src: a, dst: b, pattern: i o -> o i, at: {z: 0}}\n",
        2,
        "at names axis z",
    ),
    "size of no axis": (
        "rules:\n  - {src: a, dst: b, pattern: i o -> o i, sizes: {z: 2}}\n",
        2,
        "size given for axis z",
    ),
    "pattern": ("rules:\n  - {src: a, dst: b, pattern: i o}\n", 2, 'no "->"'),
    "template": ("rules:\n\n  - {src: 'a.{', dst: b}\n", 3, "a brace without its partner"),
    "lone placeholder": ("rules:\n  - {src: 'a.{i}', dst: b}\n", 2, "{i} on one side only"),
    "at is text": ("rules:\n  - {src: a, dst: b, pattern: h -> s h, at: s}\n", 2, "at must be"),
    "at is a list": (
        "rules:\n  - {src: a, dst: b, pattern: h -> s h, at: {s: [0]}}\n",
        2,
        "at s must be an index",
    ),
    "rows": ("rules:\n  - {src: a, dst: b, rows: all}\n", 2, 'rows must be "overlap"'),
    "fill": ("rules:\n  - {dst: b, fill: ones}\n", 2, "fill must be a number"),
    "fill of a copy": ("rules:\n  - {src: a, dst: b, fill: 0}\n", 2, "fill is for"),
    "sizes are a list": ("sizes: [a]\nrules: []\n", 1, "sizes that are no mapping"),
    "rule sizes": ("rules:\n  - {src: a, dst: b, pattern: h -> h, sizes: 3}\n", 2, "no mapping"),
    "size is a float": ("sizes:\n  a: 1\n  b: 1.5\nrules: []\n", 3, "the size b"),
    "size is too large": ("sizes:\n  a: 99999999999999999999\nrules: []\n", 2, "the size a"),
    "size is negative": ("sizes:\n  a: -3\nrules: []\n", 2, "the size a"),
    "size of an unknown one": ("sizes:\n  a: b*2\nrules: []\n", 2, 'the size a = "b*2"'),
    "size that cannot be read": ("sizes:\n  a: 2/3\nrules: []\n", 2, "cannot read"),
    "size without value": ("sizes:\n  a:\n  b: 2\nrules: []\n", 2, "no value for the size a"),
    "axis named as a key": (
        "rules:\n  - {src: a, dst: b, pattern: at -> at, sizes: {at: 2}}\n",
        2,
        'an axis cannot be named "at"',
    ),
    "axis named self": (
        "rules:\n  - {src: a, dst: b, pattern: self -> self, sizes: {self: 2}}\n",
        2,
        'an axis cannot be named "self"',
    ),
    "about": ("about: [a]\nrules: []\n", 1, "about"),
    "syntax": ("rules:\n  - {src: a, dst: b\n  - {src: c, dst: d}\n", 3, ""),
    "tab": ("rules:\n\t- {src: a}\n", 2, ""),
    "two documents": ("rules: []\n---\nrules: []\n", 2, ""),
    "undefined alias": ("rules:\n  - *x\n", 2, "x"),
    "alias": ("rules:\n  - &x {src: a, dst: b}\n  - *x\n", 2, "alias"),
    "alias of itself": ("rules: &x\n  - *x\n", 1, "alias"),
    "alias of a name": ("rules:\n  - {src: &x a, dst: b}\n  - {src: *x, dst: c}\n", 2, "alias"),
    "key that is a list": ("? [a]\n: b\nrules: []\n", 1, "a key that is no text"),
    "nested": ("rules:\n  - {src: a, at: {b: [[[[[[[[1]]]]]]]]}}\n", 2, "nested deeper"),
    "python tag": ("rules:\n  - {src: !!python/name:os.system x, dst: b}\n", 2, "python/name"),
    "date": ("rules:\n  - src: a\n    dst: 2001-01-01\n", 3, "quotes"),
    "wrong date": ("rules:\n  - src: a\n    dst: 2001-99-99\n", 3, "quotes"),
    "empty int": ('rules:\n  - {src: !!int "", dst: b}\n', 2, "!!int"),
    "wrong bool": ('rules:\n  - {src: !!bool "maybe", dst: b}\n', 2, "!!bool"),
    "very long int": (f"sizes:\n  a: {'9' * 5000}\nrules: []\n", 2, ""),
    "control character": ("rules:\n  - {src: a\x00, dst: b}\n", 2, "character #x0000"),
}

TOML_ERRORS: dict[str, tuple[str, int, str]] = {
    "no document": ("", 1, "no list of rules"),
    "unknown key on top": ("rules = []\nruels = 3\n", 2, 'the key "ruels"'),
    "unknown key": (
        '[[rules]]\nsrc = "a"\n[[rules]]\nsrc = "a"\ndts = "b"\n',
        5,
        'the key "dts"',
    ),
    "duplicate key": ('[[rules]]\nsrc = "a"\nsrc = "c"\n', 3, ""),
    "rules are a table": ('[rules]\nsrc = "a"\n', 1, "no list of rules"),
    "rule is text": ('about = "x"\nrules = ["a -> b"]\n', 2, "no mapping"),
    "src is a number": ("\n[[rules]]\nsrc = 3\n", 2, "src must be a name"),
    "date": ("[[rules]]\nsrc = 2001-01-01\n", 1, "src must be a name"),
    "unknown axis": (
        '[[rules]]\nsrc = "a"\ndst = "b"\npattern = "i o -> o i"\nat = {z = 0}\n',
        1,
        "at names axis z",
    ),
    "size without value": ('rules = []\n[sizes]\nb = 2\na = ""\n', 4, "no value for the size a"),
    "size of a rule": (
        '[[rules]]\nsrc = "a"\ndst = "b"\npattern = "i -> i"\nsizes = {i = 1.5}\n',
        5,
        "the size i",
    ),
    "syntax": ('[[rules]]\nsrc = "a\n', 2, ""),
    "unfinished": ('[[rules]]\nsrc = """a\n', 3, ""),
    "nested": (f"[[rules]]\nsrc = {'[' * 3000}{']' * 3000}\n", 0, ""),
    "nested tables": (f"[[rules]]\n{'a.' * 3000}a = 3\n", 2, "nested deeper"),
    "nested sizes": (f"rules = []\n[sizes]\n{'a.' * 3000}a = 3\n", 3, "nested deeper"),
    "control character": ('[[rules]]\nsrc = "a\x00"\n', 2, ""),
}


@pytest.mark.parametrize(
    ("suffix", "case"),
    [*(("yaml", case) for case in YAML_ERRORS), *(("toml", case) for case in TOML_ERRORS)],
)
def test_errors_name_the_line(tmp_path: Path, suffix: str, case: str) -> None:
    text, line, said = (YAML_ERRORS if suffix == "yaml" else TOML_ERRORS)[case]
    path = tmp_path / f"rules.{suffix}"
    path.write_bytes(text.encode())
    with pytest.raises(RuleFileError) as caught:
        load_rules(path)
    finding = caught.value.findings[0]
    assert finding.name == (f"{path}:{line}" if line else str(path)), str(caught.value)
    assert said in f"{finding.got} {finding.expected} {finding.hint}"
    assert len(str(caught.value)) < 2000


def test_all_problems_come_in_one_error(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(
        "sizes: {n: }\nextra: 1\nrules:\n  - {src: a, dst: b}\n  - {src: 3}\n  - {dts: b}\n"
    )
    with pytest.raises(RuleFileError, match="has 4 problems") as caught:
        load_rules(path)
    lines = sorted(int(f.name.rsplit(":", 1)[1]) for f in caught.value.findings)
    assert lines == [1, 2, 5, 6]


def test_a_range_is_never_a_number_of_minutes(tmp_path: Path) -> None:
    # YAML 1.1 reads 1:30 as 90, and 010 as 8.
    path = tmp_path / "rules.yaml"
    path.write_text(
        "rules:\n"
        "  - {src: a, dst: b, pattern: r -> s, at: {s: 1:30}}\n"
        "  - {src: a, dst: b, pattern: r -> s r, at: {s: 010}}\n"
        "  - {src: a, dst: b, pattern: r -> s r, at: {s: 12}}\n"
    )
    assert [dict(r.at)["s"] for r in load_rules(path)] == ["1:30", "010", 12]


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for path in ("missing.yaml", "missing.toml", "folder.yaml", "missing/rules.yaml", "a\0b.yaml"):
        with pytest.raises(RuleFileError) as caught:
            load_rules(tmp_path / path)
        assert path.replace("\0", "") in str(caught.value).replace("\0", "").replace("\\x00", "")
    for path in ("rules", "rules.json", "rules.YAML", "rules.yaml.gz"):
        (tmp_path / path).write_text("rules: []\n")
        with pytest.raises(RuleFileError, match=r"\.yaml, \.yml or \.toml"):
            load_rules(tmp_path / path)


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_huge_and_binary_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rules.{suffix}"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room
    with pytest.raises(RuleFileError, match=f"{1 << 40} bytes"):
        load_rules(path)
    rng = random.Random(7)
    for _ in range(50):
        path.write_bytes(rng.randbytes(rng.randint(1, 300)))
        with pytest.raises(RuleFileError):
            load_rules(path)
    path.write_bytes(b"\xff\xfe" + "rules: []".encode("utf-16-le"))
    with pytest.raises(RuleFileError, match="UTF-8"):
        load_rules(path)


def bomb(width: int, depth: int) -> str:
    lines = ["sizes: {}", "about: &b0 x"]
    for level in range(1, depth + 1):
        lines.append(f"b{level}: &b{level} [{', '.join([f'*b{level - 1}'] * width)}]")
    return "\n".join([*lines, f"rules: *b{depth}"]) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        bomb(10, 9),
        bomb(2000, 4),  # no deeper than a rule is
        "rules: " + "[" * 100_000,
        "rules: " + "{a: " * 5000,
        "- " * 50_000,
        "rules:\n  - {src: a, dst: b, pattern: h -> s h, at: {s: '" + "9*" * 100_000 + "9'}}\n",
        "sizes: {a: '" + "9*" * 100_000 + "9'}\nrules: []\n",
        "sizes: {a: 999999999, b: '" + "*".join(["a"] * 40) + "'}\nrules: []\n",
        "rules:\n  - {src: '" + "{i}" * 5000 + "', dst: b}\n",
        "rules:\n  - {src: a, dst: b, pattern: '" + "(" * 5000 + "'}\n",
    ],
    ids=[
        "bomb",
        "flat bomb",
        "lists",
        "mappings",
        "sequences",
        "at",
        "size",
        "power",
        "name",
        "pattern",
    ],
)
def test_bombs(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(RuleFileError) as caught:
        load_rules(path)
    assert len(str(caught.value)) < 20_000


# ---- fuzz ----------------------------------------------------------------------------------------


def only_our_error(path: Path) -> Any:
    try:
        return load_rules(path)
    except RuleFileError as error:
        assert error.findings
        assert str(path) in str(error)
        return None


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.one_of(st.text(), st.text("[]{}:,-&*!|>'\"%@#? \n\tarules0=.")), st.sampled_from(SUFFIXES)
)
def test_any_text(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"rules.{suffix}"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    only_our_error(path)


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_mutations_of_a_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rules.{suffix}"
    save_rules(FORMS, path, "about")
    whole = path.read_bytes() if suffix == "toml" else SIZED["yaml"].encode() + path.read_bytes()
    pieces = [
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b"*",
        b"&a ",
        b"!!int ",
        b"- ",
        b"\n",
        b"'",
        b'"',
        b"\x00",
    ]
    pieces += [
        b"\xff",
        b"->",
        b"(",
        b")",
        b"=",
        b"null",
        b"1e999",
        b"\t",
        b"...",
        b"src: ",
        b"<<: ",
    ]
    rng = random.Random(f"mutations {suffix}")
    loaded = 0
    for _ in range(250):
        data = bytearray(whole if rng.random() < 0.3 else whole[: rng.randrange(len(whole))][-400:])
        if rng.random() < 0.5:
            data = bytearray((SIZED[suffix]).encode())
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data) + 1)
            what = rng.randrange(4)
            if what == 0:
                data[at : at + rng.randint(1, 8)] = b""
            elif what == 1:
                data[at:at] = rng.choice(pieces)
            elif what == 2 and data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            else:
                start = rng.randrange(len(data) + 1)
                data[at:at] = data[start : start + rng.randint(1, 40)]
        path.write_bytes(data)
        loaded += only_our_error(path) is not None
    assert loaded < 250
