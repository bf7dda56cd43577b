"""Rows beyond the source's, fills, keeps and drops; what a write leaves alone; what is refused beforehand."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import paramkit
from paramkit import PlanError, Rule
from paramkit.sources.lazy import StoredFile
from tests.guards import Layout, assert_same_bits, nothing_written, place, watch

NORMAL = {"normal": 0.5, "mean": 3.0, "seed": 4}


def findings(error: pytest.ExceptionInfo[PlanError]) -> set[tuple[str, str]]:
    return {(f.name, f.kind) for f in error.value.findings}


def as_file(tensors: dict[str, Tensor], folder: Path) -> Path:
    path = folder / "m.safetensors"
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path)
    return path


# Rows that only overlap.


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("fill", [None, "zeros", 2.5, "mean", NORMAL], ids=str)
@pytest.mark.parametrize("strides", [None, (1, 17)], ids=str)
def test_more_rows_than_the_source(fill: Any, strides: tuple[int, ...] | None) -> None:
    destination = place(Layout.dense((12, 5), strides), torch.float32)
    before, source = destination.clone(), torch.randn(7, 5)
    seen = watch(destination)
    report = paramkit.transplant(
        {"w": destination}, {"w": source}, [Rule("w", "w", rows="overlap", fill=fill)]
    )
    seen.assert_only_inside()
    assert_same_bits(destination[:7], source)
    rest = destination[7:]
    if fill is None:
        assert_same_bits(rest, before[7:])
    elif fill == "mean":
        assert_same_bits(rest, source.double().mean(0).float().expand(5, 5))
    elif fill is NORMAL:
        assert not torch.equal(rest[0], rest[1])
        assert bool(((rest - 3).abs() < 4).all())
    else:
        assert bool((rest == {"zeros": 0.0}.get(fill, fill)).all())
    assert report.summary.elements == (35 if fill is None else 60)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("fill", [None, "zeros", 2.5, "mean", NORMAL], ids=str)
def test_fewer_rows_than_the_source(fill: Any) -> None:
    """Nothing is left to fill, and the rest of the source is dropped on purpose."""
    for rows in (7, 4, 0):
        destination = place(Layout.dense((rows, 5)), torch.float32)
        source = torch.randn(7, 5)
        seen = watch(destination)
        report = paramkit.transplant(
            {"w": destination}, {"w": source}, [Rule("w", "w", rows="overlap", fill=fill)]
        )
        seen.assert_only_inside()
        assert_same_bits(destination, source[:rows])
        assert report.summary.elements == rows * 5
        assert report.summary.dropped == (("w (in part)",) if rows < 7 else ())


def test_only_the_first_dimension_may_differ() -> None:
    destination = torch.ones(4, 5)
    for shape in ((4, 6), (4,), (4, 5, 1), ()):
        with nothing_written(destination), pytest.raises(PlanError) as caught:
            paramkit.transplant(
                {"w": destination}, {"w": torch.ones(shape)}, [Rule("w", "w", rows="overlap")]
            )
        assert findings(caught) == {("w", "shape")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_mean_is_taken_in_float64_and_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    source = (torch.randn(3001, 6) + 1000).to(dtype)
    want = source.double().mean(0)
    for kind, staging in itertools.product(("memory", "file"), (4096, None)):
        destination = torch.zeros(3003, 6)
        paramkit.transplant(
            {"w": destination},
            {"w": source} if kind == "memory" else as_file({"w": source}, tmp_path),
            [Rule("w", "w", rows="overlap", fill="mean")],
            staging=staging,
        )
        assert_same_bits(destination[3001:], want.float().expand(2, 6))
        assert_same_bits(destination[:3001], source.float())


def test_a_mean_is_read_once_and_taken_again_when_values_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"w": torch.randn(10, 3000)}
    destination = {"w": torch.zeros(11, 3000)}
    path, rules = as_file(source, tmp_path), [Rule("w", "w", rows="overlap", fill="mean")]
    plan = paramkit.plan(destination, path, rules, staging=4096)  # a mean in many pieces
    read, before = [0], StoredFile.read

    def counted(file: StoredFile, offset: int, out: Tensor) -> None:
        read[0] += len(out)
        before(file, offset, out)

    with monkeypatch.context() as patch:
        patch.setattr(StoredFile, "read", counted)
        plan.apply()
    assert read[0] == source["w"].nbytes
    assert_same_bits(destination["w"][10], source["w"].double().mean(0).float())
    plan = paramkit.plan(destination, source, rules, staging=4096)
    for _ in range(2):
        plan.apply()
        assert_same_bits(destination["w"][10], source["w"].double().mean(0).float())
        source["w"].add_(torch.randn(10, 3000))


class Small(nn.Module):
    """A language model's two ends: a vocabulary, tied or not."""

    def __init__(self, vocabulary: int, tied: bool = True) -> None:
        super().__init__()
        self.tok = nn.Embedding(vocabulary, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tok.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.tok(x)))


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary(tied: bool) -> None:
    old, new = Small(20, tied), Small(26, tied)
    rules = [Rule(n, n, rows="overlap", fill="mean") for n in ("tok.weight", "head.weight")]
    x = torch.tensor([3, 19])
    if tied:
        rules = rules[1:]
    paramkit.transplant(new, old, rules)
    assert torch.equal(new(x)[:, :20], old(x))
    assert (new.head.weight is new.tok.weight) == tied
    assert torch.equal(new.tok.weight[25], old.tok.weight.double().mean(0).float())
    back = Small(20, tied)
    paramkit.transplant(back, new, rules)
    assert torch.equal(back(x), old(x))


# Seeded normal values.


def normal(name: str, seed: int, shape: tuple[int, ...], **options: Any) -> Tensor:
    dtype = options.pop("dtype", torch.float32)
    out = options.pop("out", None)
    out = torch.zeros(shape, dtype=dtype) if out is None else out
    rule = Rule(None, name, fill={"normal": 0.02, "seed": seed})
    paramkit.transplant({name: out}, {}, [rule], **options)
    return out


def test_normal_values_are_the_same_whatever_the_staging_and_layout() -> None:
    shape = (300, 251)  # more than one block of values
    first = normal("w", 0, shape)
    assert abs(float(first.std()) - 0.02) < 0.001
    assert abs(float(first.mean())) < 0.001
    assert_same_bits(normal("w", 0, shape), first)
    for staging in (4096, 65536, 1 << 20):
        assert_same_bits(normal("w", 0, shape, staging=staging), first)
    for strides in ((1, 307), (600, 2)):
        out = place(Layout.dense(shape, strides), torch.float32)
        seen = watch(out)
        assert_same_bits(normal("w", 0, shape, out=out, staging=9000), first)
        seen.assert_only_inside()
    exact = normal("w", 0, shape, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_same_bits(normal("w", 0, shape, dtype=dtype, staging=30_000), exact.to(dtype))


def test_normal_values_differ_by_name_and_seed() -> None:
    first = normal("w", 0, (50,))
    for other in (normal("v", 0, (50,)), normal("w", 1, (50,)), normal("w", -1, (50,))):
        assert not bool((first == other).any())
    layers = {f"{i}.w": torch.zeros(50) for i in range(3)}
    paramkit.transplant(layers, {}, [Rule(None, "{i}.w", fill={"normal": 1.0})])
    for a, b in itertools.combinations(layers.values(), 2):
        assert not bool((a == b).any())


@pytest.mark.usefixtures("backend")
def test_values_of_a_tied_parameter_do_not_depend_on_the_name_used() -> None:
    made = []
    for name in ("tok.weight", "head.weight", "{n}.weight"):
        model = Small(9)
        rules = [Rule(None, name, fill={"normal": 1.0}), Rule(None, "body.*")]
        if name.startswith("{"):
            del model.body
            rules = rules[:1]
        paramkit.transplant(model, {}, rules)
        made.append(model.tok.weight.detach())
    assert_same_bits(made[0], made[1])
    assert_same_bits(made[0], made[2])


# Constants, keeps and drops.


@pytest.mark.usefixtures("backend")
def test_constants() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
    table = {str(k): place(Layout.dense((3, 4), (1, 5)), d) for k, d in enumerate(dtypes)}
    seen = watch(*table.values())
    plan = paramkit.plan(table, {}, [Rule(None, "{k}", fill=1)])
    plan.apply()
    assert all(bool((t == 1).all()) for t in table.values())
    for tensor in table.values():
        tensor.zero_()
    plan.apply({})
    assert all(bool((t == 1).all()) for t in table.values())
    assert plan.verify() == []
    seen.assert_only_inside()
    half = place(Layout.dense((6, 4)), torch.float32)
    rules = [Rule(None, "w", "-> (s o) i", at={"s": k}, s=3, fill=k - 0.5) for k in range(3)]
    paramkit.transplant({"w": half}, {}, rules)
    assert half[:, 0].tolist() == [-0.5, -0.5, 0.5, 0.5, 1.5, 1.5]


MISFITS = {
    "0.5 in int64": (0.5, torch.int64),
    "inf in int8": (float("inf"), torch.int8),
    "nan in uint8": (float("nan"), torch.uint8),
    "300 in uint8": (300, torch.uint8),
    "-1 in uint8": (-1, torch.uint8),
    "70000 in float16": (70000, torch.float16),
    "1e39 in float32": (1e39, torch.float32),
    "449 in float8_e4m3fn": (449, torch.float8_e4m3fn),
    "complex in float32": (1 + 2j, torch.float32),
    "normal in int64": ({"normal": 1.0}, torch.int64),
    "normal in bool": ({"normal": 1.0}, torch.bool),
}


def test_numbers_that_a_dtype_cannot_hold_are_refused_together() -> None:
    made = {name: torch.zeros(3, dtype=dtype) for name, (_, dtype) in MISFITS.items()}
    made |= {"mean": torch.zeros(4, dtype=torch.int64), "fine": torch.zeros(2, dtype=torch.int64)}
    rules = [Rule(None, name, fill=fill) for name, (fill, _) in MISFITS.items()]
    rules += [Rule("mean", "mean", rows="overlap", fill="mean"), Rule(None, "fine", fill=2.0)]
    with nothing_written(*made.values()), pytest.raises(PlanError) as caught:
        paramkit.transplant(made, {"mean": torch.ones(3, dtype=torch.int64)}, rules)
    assert findings(caught) == {(name, "dtype") for name in (*MISFITS, "mean")}
    for fill, want in ((0.5, 0), (-7.9, -7), (True, 1), (5.0, 5)):
        tensor = torch.ones(2, dtype=torch.int64)
        paramkit.transplant({"w": tensor}, {}, [Rule(None, "w", fill=fill)], casting="unsafe")
        assert tensor.tolist() == [want] * 2
    half = torch.zeros(2, dtype=torch.float16)
    for fill in (float("inf"), -65504.0, 1e-9):
        paramkit.transplant({"w": half}, {}, [Rule(None, "w", fill=fill)], overflow="error")
        assert_same_bits(half, torch.full((2,), fill, dtype=torch.float16))


@pytest.mark.usefixtures("backend")
def test_what_is_kept() -> None:
    def table() -> dict[str, Tensor]:
        return {n: place(Layout.dense((4, 3)), torch.float32) for n in ("a", "x.0", "x.1.y", "p")}

    source = {"a": torch.ones(4, 3), "half": torch.ones(2, 3)}
    rules = [
        Rule(None, "x.*"),
        Rule("half", "p", "o i -> (s o) i", at={"s": 1}),
        Rule(None, "p", "-> (s o) i", at={"s": 0}, s=2),
    ]
    made = table()
    kept = [made["x.0"], made["x.1.y"], made["p"][:2].clone()]
    before = [t.clone() for t in kept]
    report = paramkit.transplant(made, source, rules)
    assert report.summary.kept[:2] == ("x.0", "x.1.y")
    for now, was in zip([*kept[:2], made["p"][:2]], before, strict=True):
        assert_same_bits(now, was)
    assert bool((made["p"][2:] == 1).all())
    # A wildcard keeps what nothing else writes.
    made = table()
    paramkit.transplant(made, {"a": torch.ones(4, 3)}, [Rule(None, "*")])
    assert bool((made["a"] == 1).all())
    with nothing_written(*made.values()), pytest.raises(PlanError) as caught:
        paramkit.transplant(made, source, [*rules[1:2], Rule(None, "x.{i}")])
    assert findings(caught) == {("p", "kept"), ("x.1.y", "missing")}


def test_what_is_dropped() -> None:
    made = {"k": torch.zeros(2, 3)}
    source = {
        "qkv": torch.arange(18.0).view(6, 3),
        "old.a": torch.ones(1),
        "old.b.c": torch.ones(1),
    }
    read = Rule("qkv", "k", "(s o) i -> o i", at={"s": 1}, s=3)
    drops = [Rule("qkv", None, "(s o) i ->", at={"s": k}, s=3) for k in (0, 2)]
    report = paramkit.transplant(made, source, [read, *drops, Rule("old.*", None)])
    assert_same_bits(made["k"], source["qkv"][2:4])
    assert report.summary.dropped == ("qkv (in part)", "old.a", "old.b.c")
    with nothing_written(made["k"]), pytest.raises(PlanError) as caught:
        paramkit.transplant(made, source, [read, drops[0], Rule("old.{n}", None)])
    assert findings(caught) == {("qkv", "unread"), ("old.b.c", "unexpected")}


W = "w"
CONTRADICTIONS: dict[str, tuple[list[Rule], str]] = {
    "kept and written": ([Rule(W, W), Rule(None, W)], "rule"),
    "dropped and read": ([Rule(W, W), Rule(W, None)], "rule"),
    "filled and written": ([Rule(W, W), Rule(None, W, fill=0)], "conflict"),
    "filled twice": ([Rule(W, None), Rule(None, W, fill=0), Rule(None, W, fill=1)], "conflict"),
    "kept and filled": ([Rule(W, None), Rule(None, W), Rule(None, W, fill=1)], "rule"),
    "a part kept and written": (
        [Rule(W, W), Rule(None, W, "-> (s o) i", at={"s": 0}, s=2)],
        "conflict",
    ),
    "parts that meet": (
        [
            Rule(W, None),
            Rule(None, W, "-> (s o) i", at={"s": "0:2"}, s=4, fill=0),
            Rule(None, W, "-> (s o) i", at={"s": "1:4"}, s=4, fill=1),
        ],
        "conflict",
    ),
    "a part that does not fit": (
        [Rule(W, W), Rule(None, W, "-> (s o) i", at={"s": 0}, s=3)],
        "shape",
    ),
    "nothing of that name": ([Rule(W, W), Rule(None, "v", fill=0)], "rule"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions(case: str) -> None:
    rules, kind = CONTRADICTIONS[case]
    made = {W: torch.zeros(4, 2)}
    with nothing_written(made[W]), pytest.raises(PlanError) as caught:
        paramkit.transplant(made, {W: torch.ones(4, 2)}, rules)
    assert kind in {f.kind for f in caught.value.findings}


@pytest.mark.usefixtures("backend")
def test_buffers_that_no_state_dict_has() -> None:
    def model() -> nn.Module:
        made = nn.Linear(2, 2)
        made.register_buffer("angles", torch.arange(3.0), persistent=False)
        return made

    for source, rules, want in (
        ({}, [], [0, 1, 2]),
        ({"angles": torch.ones(3)}, [], [1, 1, 1]),
        ({"x": torch.ones(3)}, [Rule("x", "angles")], [1, 1, 1]),
        ({}, [Rule(None, "angles", fill=5)], [5, 5, 5]),
        ({}, [Rule(None, "angl*s", fill=5)], [5, 5, 5]),
    ):
        made = model()
        paramkit.transplant(made, {**nn.Linear(2, 2).state_dict(), **source}, rules)
        assert made.angles.tolist() == want
    made = model()
    paramkit.transplant(made, {}, [Rule(None, "*", fill=0)])  # does not name them
    assert made.angles.tolist() == [0, 1, 2]
    assert not made.weight.any()


# Modules with a loading of their own.


class Renaming(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        state[f"{prefix}w"] = state.pop(f"{prefix}w") * 2
        super()._load_from_state_dict(state, prefix, *rest)


def plain() -> nn.Module:
    made = nn.Module()
    made.w = nn.Parameter(torch.zeros(3))
    return made


def with_pre_hook() -> nn.Module:
    made = plain()
    made.register_load_state_dict_pre_hook(lambda *_: None)
    return made


def with_old_pre_hook() -> nn.Module:
    made = plain()
    made._register_load_state_dict_pre_hook(lambda *_: None)
    return made


def with_post_hook() -> nn.Module:
    made = plain()
    made.register_load_state_dict_post_hook(lambda *_: None)
    return made


def patched() -> nn.Module:
    made = plain()
    made._load_from_state_dict = lambda *_: None
    return made


@pytest.mark.parametrize(
    "make", [Renaming, with_pre_hook, with_old_pre_hook, with_post_hook, patched]
)
@pytest.mark.parametrize("inner", [True, False])
def test_hooks_are_refused_with_the_reason_or_ignored(make: Any, inner: bool) -> None:
    model = nn.Sequential(make()) if inner else make()
    name = "0.w" if inner else "w"
    (tensor,) = model.parameters()
    with nothing_written(tensor), pytest.raises(PlanError) as caught:
        paramkit.transplant(model, {name: torch.ones(3)})
    (finding,) = caught.value.findings
    assert (finding.name, finding.kind) == (name, "hook")
    assert "load" in finding.got
    assert 'hooks="ignore"' in finding.hint
    paramkit.transplant(model, {name: torch.ones(3)}, hooks="ignore")
    assert tensor.tolist() == [1, 1, 1]
    # Nothing of it is written: nothing to refuse.
    paramkit.transplant(model, {}, allow_missing=["*"])
    with pytest.raises(ValueError, match="hooks"):
        paramkit.transplant(model, {}, hooks="whatever")


def test_a_hook_of_an_outer_module_counts() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_load_state_dict_pre_hook(lambda *_: None)
    with pytest.raises(PlanError) as caught:
        paramkit.transplant(model, nn.Sequential(nn.Linear(2, 2)))
    assert findings(caught) == {("0.weight", "hook"), ("0.bias", "hook")}


TORCHS_OWN = {
    "batch norm": lambda: nn.BatchNorm2d(4),
    "sync batch norm": lambda: nn.SyncBatchNorm(4),
    "instance norm": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(3, 4)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(3, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "attention": lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
    "recurrent": lambda: nn.LSTM(3, 4, 2),
    "encoder": lambda: nn.TransformerEncoderLayer(4, 2, 8),
}


@pytest.mark.parametrize("kind", TORCHS_OWN)
def test_torchs_own_layers_are_not_refused(kind: str) -> None:
    model, source = TORCHS_OWN[kind](), TORCHS_OWN[kind]()
    for tensor in source.state_dict().values():
        tensor.add_(1)
    paramkit.transplant(model, source)
    want = TORCHS_OWN[kind]()
    want.load_state_dict(source.state_dict())
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, want.state_dict()[name], what=name)


# Casts.

F32, F64, BF16, I64, I32, BOOL = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.bool,
)
POLICIES = {  # (source, destination): the strictest policy that allows it
    (F32, F32): "no",
    (F32, F64): "safe",
    (BF16, F32): "safe",
    (I32, I64): "safe",
    (I32, F64): "safe",
    (BOOL, I32): "safe",
    (F64, F32): "same_kind",
    (F32, BF16): "same_kind",
    (I64, I32): "same_kind",
    (I64, F32): "same_kind",
    (F32, I64): "unsafe",
    (I32, BOOL): "unsafe",
    (torch.complex64, F32): "unsafe",
}
ORDER = ("no", "safe", "same_kind", "unsafe")


@pytest.mark.parametrize("casting", ORDER)
def test_a_policy_refuses_all_that_it_must_in_one_error(casting: str) -> None:
    pairs = list(POLICIES)
    made = {f"{k}.w": torch.zeros(3, dtype=d) for k, (_, d) in enumerate(pairs)}
    source = {f"{k}.w": torch.ones(3, dtype=s) for k, (s, _) in enumerate(pairs)}
    bad = {
        f"{k}.w"
        for k, pair in enumerate(pairs)
        if ORDER.index(POLICIES[pair]) > ORDER.index(casting)
    }
    if bad:
        with nothing_written(*made.values()), pytest.raises(PlanError) as caught:
            paramkit.transplant(made, source, casting=casting)
        assert findings(caught) == {(name, "dtype") for name in bad}
        for name in bad:
            del made[name], source[name]
    report = paramkit.transplant(made, source, casting=casting)
    assert all(bool((t == 1).all()) for t in made.values())
    assert {c.name for c in report.summary.casts} == {n for n in made if n != "0.w"}


def test_the_default_is_same_kind() -> None:
    made = {"w": torch.zeros(3, dtype=I64)}
    with nothing_written(made["w"]), pytest.raises(PlanError, match="same_kind") as caught:
        paramkit.transplant(made, {"w": torch.ones(3)})
    assert findings(caught) == {("w", "dtype")}
    back = {"w": torch.zeros(3)}
    paramkit.transplant(back, {"w": torch.ones(3, dtype=I64)})
    assert back["w"].tolist() == [1, 1, 1]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", ["memory", "file"])
def test_overflow_is_found_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    values = {f"{k}.w": torch.ones(40, 50) for k in range(3)}
    values["1.w"][39, 49] = 70000.0
    values["2.w"][0, 0] = float("inf")  # is no finite value that is lost
    made = {n: place(Layout.dense((50, 40)), torch.float16) for n in values}
    rules = [Rule("{k}.w", "{k}.w", "i o -> o i")]
    source: Any = values if kind == "memory" else as_file(values, tmp_path)
    with nothing_written(*made.values()), pytest.raises(PlanError) as caught:
        paramkit.transplant(made, source, rules, overflow="error", staging=4096)
    assert {f.name for f in caught.value.findings} == {"1.w"}
    paramkit.transplant(made, source, rules, staging=4096)
    assert made["1.w"][49, 39].isinf()


# Ties, and what a write leaves alone.


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", ["memory", "file", "pt"])
def test_two_sources_for_one_memory(kind: str, tmp_path: Path) -> None:
    table = torch.randn(9, 6)
    source: dict[str, Tensor] = {"tok.weight": table, "head.weight": table.clone()}
    source |= nn.Linear(6, 6).state_dict(prefix="body.")

    def given() -> Any:
        if kind == "pt":
            torch.save(source, tmp_path / "m.pt")
            return tmp_path / "m.pt"
        return source if kind == "memory" else as_file(source, tmp_path)

    model = Small(9)
    report = paramkit.transplant(model, given(), staging=4096)
    assert report.summary.writes == 3
    assert_same_bits(model.head.weight.detach(), table)
    for element in ((0, 0), (8, 5)):
        source["head.weight"] = table.clone()
        source["head.weight"][element] += 1
        model = Small(9)
        plan = paramkit.plan(model, given(), staging=4096)
        with nothing_written(*model.parameters()), pytest.raises(PlanError) as caught:
            plan.apply()
        assert findings(caught) == {("tok.weight", "conflict")}
        assert "head.weight" in str(caught.value)
    only = {n: t for n, t in source.items() if n != "tok.weight"}  # under either name
    paramkit.transplant(model, only)
    assert_same_bits(model.tok.weight.detach(), only["head.weight"])


@pytest.mark.usefixtures("backend")
def test_what_a_write_leaves_alone() -> None:
    model = Small(9)
    model.body.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.tensor([1])).sum().backward()
    optimizer.step()
    seen: list[str] = []
    model.tok.weight.register_hook(lambda g: seen.append("tensor"))
    model.body.weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    model.register_forward_hook(lambda *_: seen.append("forward"))
    model.tok.weight.note = "mine"
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    facts = [(id(p), p.data_ptr(), p.stride(), p.requires_grad) for p in model.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    paramkit.transplant(model, Small(9))

    assert facts == [(id(p), p.data_ptr(), p.stride(), p.requires_grad) for p in model.parameters()]
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None)
        if grad is not None:
            assert_same_bits(p.grad, grad)
    for p, entries in state.items():
        for key, value in entries.items():
            assert_same_bits(optimizer.state[p][key], value)
    assert model.tok.weight.note == "mine"
    model(torch.tensor([1])).sum().backward()
    assert sorted(set(seen)) == ["accumulated", "forward", "tensor"]
    optimizer.step()
