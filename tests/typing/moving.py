"""From a source into a model: `transplant`, `plan`, rules, recipes, sources."""

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import paramkit
from paramkit import Rule, recipes
from paramkit.typing import Casting, Model, Rules, Source


def sources(
    model: nn.Module, other: nn.Module, path: Path, text: str, entry: "os.DirEntry[str]"
) -> None:
    assert_type(paramkit.transplant(model, other), paramkit.Report)
    for source in (path, text, entry):
        paramkit.transplant(model, source)
    files: list[str | Path] = [path, text]
    paramkit.transplant(model, files)
    paramkit.transplant(model, (path, path))
    paramkit.transplant(model, other.state_dict())
    paramkit.transplant(model, dict(other.named_parameters()))
    paramkit.transplant(model, OrderedDict(other.named_parameters()))
    paramkit.transplant(model, paramkit.open_source(path, mmap=False))


def stream() -> Iterator[tuple[str, Tensor]]:
    yield "weight", torch.zeros(2, 2)


def options(model: Model, source: Source, rules: Rules, casting: Casting) -> str:
    report = paramkit.transplant(
        model,
        source,
        rules,
        identity=False,
        allow_missing=["lm_head.*"],
        allow_unexpected=(name for name in ("pooler.weight",)),
        casting=casting,
        overflow="error",
        hooks="ignore",
        atomic=True,
        device="cpu",
        mmap=True,
        staging=1 << 20,
        requires_grad=False,
        progress=lambda done, total: print(done / total),
    )
    assert_type(report.seconds, float)
    assert_type(report.summary.names, tuple[str, ...])
    assert_type(report.summary.routes, dict[str, int])
    assert_type([cast.src_dtype for cast in report.summary.casts], list[str])
    return f"{report.gbps:.1f} GB/s"


rules = [
    Rule("h.{i}.q.weight", "layers.{i}.qkv", "h e -> (s h) e", at={"s": 0}),
    Rule("h.{i}.w", "layers.{i}.w", "(h d) e -> (d h) e", at={"e": slice(0, 8)}, h=4),
    Rule("pooler.*", None),
    Rule(None, "layers.{i}.extra", fill={"normal": 0.02, "seed": 3}),
    Rule("tok", "tok", rows="overlap", fill="mean"),
]
assert_type(paramkit.invert(rules), list[Rule])
assert_type(paramkit.load_rules("rules.yaml", heads=12), list[Rule])
paramkit.save_rules(rules, Path("rules.toml"), about="an example")
assert_type(recipes.load("llama_to_fused", config={"hidden_size": 8}, heads=2), list[Rule])
assert_type(recipes.describe("llama_to_fused").needs, tuple[str, ...])

model, trained = nn.Linear(2, 2), nn.Linear(2, 2)
paramkit.transplant(model, stream())
plan = paramkit.plan(model, trained, rules, casting="safe")
assert_type(plan, paramkit.Plan)
assert_type(plan.apply(atomic=True), paramkit.Report)
plan.apply(trained, progress=print)
assert_type(plan.verify(), list[str])
assert_type(plan.explain(), str)
with plan.swapped(trained) as report:
    assert_type(report, paramkit.Report)
plan.refresh(trained)
plan.set_requires_grad(False)
plan.release()

weights = [model.weight, trained.weight]
assert_type(paramkit.plan(weights, [torch.zeros(2, 2), 0.5]), paramkit.Plan)
paramkit.plan(tuple(model.parameters()), 0).apply()
paramkit.plan([weight[:1] for weight in weights], 1.0).apply([2.0, torch.ones(1, 2)])

assert_type(paramkit.open_source("model.safetensors"), dict[str, Tensor])
assert_type(paramkit.fingerprint(model, algorithm="sha1"), dict[str, str])
torn = paramkit.torn(model)
if torn is not None:
    assert_type(torn.unwritten, tuple[str, ...])
keys = paramkit.load_state_dict(model, trained.state_dict(), strict=False)
print(keys.missing_keys)
try:
    paramkit.transplant(model, "model.safetensors")
except paramkit.TornError as error:
    assert_type(error.state, paramkit.Torn | None)
except paramkit.PlanError as error:
    assert_type(error.findings, tuple[paramkit.Finding, ...])
    assert_type([finding.hint for finding in error.findings], list[str])

paramkit.transplant(model, 5)  # error: arg-type
paramkit.transplant(model, [torch.zeros(2)])  # error: arg-type
paramkit.transplant(model, trained, casting="same-kind")  # error: arg-type
paramkit.transplant(model, trained, overflow=True)  # error: arg-type
paramkit.transplant(model, trained, hooks="skip")  # error: arg-type
paramkit.transplant(model, trained, [("a", "b")])  # error: list-item
paramkit.transplant(model, trained, rule=rules)  # error: call-arg
paramkit.transplant(model, trained, progress=len)  # error: arg-type
paramkit.plan(weights, trained)  # error: call-overload
paramkit.plan(weights, [0.5, 0.5], casting="no")  # error: call-overload
paramkit.plan(model.parameters(), 0.5)  # error: call-overload
paramkit.plan(model)  # error: call-overload
plan.apply(trained, True)  # error: call-arg
plan.apply(atomic=1)  # error: arg-type
plan.run()  # error: attr-defined
report.seconds = 1.0  # error: misc
Rule("a")  # error: call-arg
Rule("a", "b", rows="all")  # error: arg-type
Rule("a", "b", fill="ones")  # error: arg-type
Rule("a", "b", h="4")  # error: arg-type
paramkit.load_state_dict(model, trained)  # error: arg-type
paramkit.fingerprint(7)  # error: arg-type
