"""Reads that come short, are interrupted or fail: values are exact, or an error says which file it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import need_extension
from tests.faulty import build, run

READS = """
import sys, warnings
from pathlib import Path
import torch, paramkit
from paramkit import Rule
from safetensors.torch import save_file
from tests.faulty import BROKEN, INTERRUPTED, SHORT, Faults

warnings.simplefilter("ignore")
folder, backend = Path(sys.argv[1]), sys.argv[2]
faults = Faults()
values = {**{f"w_{k}": torch.randn(40 + k, 60) for k in range(6)}, "rows": torch.randn(30, 4096)}
save_file(values, folder / "m.safetensors")
torch.save(values, folder / "m.pt")
QUARTER = [Rule("rows", "rows", "r (s c) -> r c", at={"s": 1}, s=4),
           *(Rule("rows", None, "r (s c) ->", at={"s": k}, s=4) for k in (0, 2, 3))]

def model(wanted):
    made = torch.nn.Module()
    for name, value in wanted.items():
        made.register_parameter(name, torch.nn.Parameter(torch.zeros_like(value)))
    return made

quarter = {**values, "rows": values["rows"][:, 1024:2048]}
turned = {name: value.t().contiguous() for name, value in values.items()}
# Read straight into the model; through staging, converted; turned; row by row, without what lies between.
WAYS = {
    "whole": (values, []),
    "cast": ({name: value.double() for name, value in values.items()}, []),
    "turned": (turned, [Rule("{*p}", "{*p}", "a b -> b a")]),
    "rows": (quarter, QUARTER),
}

def holds(ours, wanted):
    return all(torch.equal(ours.get_parameter(name), value) for name, value in wanted.items())

def empty(ours):
    return not any(p.any() for p in ours.parameters())

with paramkit.backend.force(backend):
    for suffix in ("safetensors", "pt"):
        for way, (wanted, rules) in WAYS.items():
            path = folder / f"m.{suffix}"
            hits = exact = 0
            for seed in range(6):
                ours = model(wanted)
                with faults.reads((SHORT, INTERRUPTED, SHORT | INTERRUPTED)[seed % 3], seed):
                    plan = paramkit.plan(ours, path, rules, staging=1 << 16)
                    plan.apply()
                    assert plan.verify() == []
                    hits += faults.hits()
                assert holds(ours, wanted), (suffix, way, seed)
                exact += 1
            # How many reads a pass takes; then each of them fails, once.
            ours = model(wanted)
            plan = paramkit.plan(ours, path, rules, staging=1 << 16)
            with faults.reads(BROKEN, 0, 1 << 40):
                plan.apply()
                reads = faults.seen()
            told = 0
            for at in range(0, reads, max(1, reads // 5)):
                for atomic in (False, True):
                    ours = model(wanted)
                    plan = paramkit.plan(ours, path, rules, staging=1 << 16)
                    try:
                        with faults.reads(BROKEN, 0, at):
                            plan.apply(atomic=atomic)
                    except paramkit.PlanError as error:
                        assert path.name in str(error) and "Input/output error" in str(error), error
                        assert "disk" in str(error), error
                        told += 1
                        torn = paramkit.torn(ours)
                        assert empty(ours) or (torn is not None and not atomic), (way, at, atomic)
                        paramkit.transplant(ours, path, rules)
                        assert paramkit.torn(ours) is None
                    else:
                        raise AssertionError(f"{suffix} {way}: read {at} failed, and nobody said so")
                    assert holds(ours, wanted)
            print(suffix, way, exact, hits, reads, told, sep="\\t")
"""


@pytest.mark.parametrize("backend", [pytest.param("native", marks=pytest.mark.slow), "cpu"])
def test_reads_that_come_short_are_interrupted_or_fail(tmp_path: Path, backend: str) -> None:
    need_extension()
    rows = [
        line.split("\t") for line in run(build(tmp_path), READS, tmp_path, backend).splitlines()
    ]
    assert len(rows) == 8, rows
    for suffix, way, exact, hits, reads, told in rows:
        assert int(exact) == 6 and int(hits) > 25, (suffix, way, hits)
        assert int(reads) >= 5 and int(told) >= 10, (suffix, way, reads, told)
