"""`paramkit plan`: every write of a transplant from file to file, proven and shown; nothing is written."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..conflicts import find_conflicts
from ..errors import Finding, PlanError, dtype_text
from ..explain import explain
from ..judge import conflict_finding, conversion_findings, summary_of
from ..resolve import Resolved, plan_error, resolve
from .options import Job, add_transplant, parser, unusable, wrong
from .text import say, say_json

__all__ = ["add", "proven"]


def add(commands: Any) -> None:
    command = parser(
        commands,
        "plan",
        "show what a transplant would write, and prove that nothing is missing",
        "Work out every write of a transplant from file to file, prove that each element is written once and\n"
        "each source read, and show the writes. Only headers are read; nothing is written.",
        "paramkit plan gpt2.safetensors --rules gpt2.yaml --set heads=12 --dtype bfloat16",
    )
    add_transplant(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    trouble = unusable(options)
    if trouble:
        return wrong("plan", trouble)
    resolved = proven(Job.of(options))
    if options.json:
        say_json(as_data(resolved))
    else:
        say(explain(resolved))
    return 0


def proven(job: Job) -> Resolved:
    """The writes of a job, proven complete and apart.

    Raises:
        PlanError: with everything that is wrong.
    """
    device = torch.device("cpu")
    try:
        resolved = resolve(job.targets, job.source, job.rules, **job.settings, device=device)
    except PlanError as error:
        raise PlanError(error.summary, [_of_a_file(f) for f in error.findings]) from None
    findings = conversion_findings(resolved)
    findings += [
        conflict_finding(resolved, c.kind, c.first, c.second) for c in find_conflicts(resolved)
    ]
    if findings:
        raise plan_error(findings)
    return resolved


def _of_a_file(finding: Finding) -> Finding:
    """What is said about a model without memory, as it is true of a file that is to be made."""
    if finding.kind != "meta":
        return finding
    expected = "every element written: a new file has nothing to keep"
    return Finding(finding.name, "missing", "written in part", expected, "give the rule a fill")


def as_data(resolved: Resolved) -> dict[str, Any]:
    """A plan as plain data."""
    names = [d.name for d in resolved.destinations]
    summary = summary_of(resolved, names, [], "")
    return {
        "writes": [
            {
                "destination": names[w.dst],
                "source": None if _is_made(resolved, w.src) else resolved.source_names[w.src],
                "pattern": w.text,
                "sizes": list(w.sizes),
                "source_dtype": dtype_text(resolved.source_tensors[w.src].dtype),
                "destination_dtype": dtype_text(resolved.destinations[w.dst].tensor.dtype),
            }
            for w in resolved.writes
        ],
        "destinations": {
            d.name: {"shape": list(d.tensor.shape), "dtype": dtype_text(d.tensor.dtype)}
            for d in resolved.destinations
        },
        "elements": summary.elements,
        "bytes": summary.bytes,
        "kept": resolved.kept,
        "partial": resolved.partial,
        "dropped": resolved.dropped,
    }


def _is_made(resolved: Resolved, source: int) -> bool:
    """Whether a rule's fill made this source."""
    return source >= len(resolved.source_names) - resolved.made
