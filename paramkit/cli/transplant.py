"""`paramkit transplant`: from checkpoint to `.safetensors` file, streaming, whole or not at all."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import Finding, PlanError, fold_names
from ..explain import bytes_text
from ..output import SafetensorsOutput
from ..planning import plan
from ..report import Report
from ..sources import open_source
from ..torn import TornError
from .files import metadata_of
from .options import Job, add_quiet, add_transplant, byte_size, parser, unusable, wrong
from .plan import proven
from .progress import progress
from .text import counted, say, say_json

__all__ = ["add"]


def add(commands: Any) -> None:
    command = parser(
        commands,
        "transplant",
        "write a checkpoint as another architecture, format or dtype",
        "Read SRC, rearrange it by rules, and write the result to a .safetensors file. Without rules the\n"
        "format is converted, with --dtype the dtype. The file appears when it is complete, or not at all.\n"
        "Memory is bounded by --staging, whatever the size of the files.",
        "paramkit transplant pytorch_model.bin -o model.safetensors --rules gpt2.yaml --dtype bfloat16",
    )
    add_transplant(command)
    command.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        type=Path,
        required=True,
        help="the .safetensors file to make",
    )
    command.add_argument(
        "--force", action="store_true", help="replace OUT if it is there, once the new one is whole"
    )
    command.add_argument(
        "--staging",
        type=byte_size,
        default=byte_size("16M"),
        metavar="SIZE",
        help="bytes of the buffer that files are read through (default: 16M)",
    )
    command.add_argument(
        "--mmap",
        action="store_true",
        help="map SRC into memory instead of reading it: faster, for local files that nobody changes",
    )
    command.add_argument(
        "--overflow",
        choices=("ignore", "error"),
        default="ignore",
        help="error: refuse finite values that the new dtype cannot hold (default: %(default)s)",
    )
    add_quiet(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    trouble = unusable(options)
    if options.output.suffix != ".safetensors":
        trouble = f"-o {options.output}: its name must end in .safetensors"
    if trouble:
        return wrong("transplant", trouble)
    job = Job.of(options)
    resolved = proven(job)
    left_out = set(resolved.kept)
    entries = [(n, t.dtype, tuple(t.shape)) for n, t in job.targets.items() if n not in left_out]
    metadata = {**metadata_of(job.source), "format": "pt"}
    output = SafetensorsOutput(options.output, entries, metadata, inputs=job.inputs)
    if os.path.lexists(options.output) and not options.force:
        raise PlanError(
            "the output is there already; nothing was written.",
            [Finding(str(options.output), "file", "a file", "none", "--force replaces it")],
        )
    with _terminated_cleanly(), output:
        report = _write(job, output, options)
    summary = report.summary
    if options.json:
        say_json(
            {
                "output": str(options.output),
                "tensors": len(entries),
                "file_bytes": output.size,
                "writes": summary.writes,
                "elements": summary.elements,
                "bytes": summary.bytes,
                "seconds": report.seconds,
                "casts": [dataclasses.asdict(cast) for cast in summary.casts],
                "left_out": list(resolved.kept),
                "dropped": list(summary.dropped),
            }
        )
        return 0
    say(f"{options.output}: {counted(len(entries), 'tensor')}, {bytes_text(output.size)}")
    say(str(Report(dataclasses.replace(summary, kept=()), report.seconds)))
    if left_out:
        names = ", ".join(folded for folded, _ in fold_names(resolved.kept))
        say(f"{len(left_out)} left out, because nothing writes them: {names}")
    return 0


def _write(job: Job, output: SafetensorsOutput, options: argparse.Namespace) -> Report:
    source = open_source(options.source, mmap=True) if options.mmap else job.source
    # What nothing writes is no part of the file; the plan must know it, and does not touch it.
    targets = {
        name: output.tensors[name] if name in output.tensors else torch.empty_like(t, device="cpu")
        for name, t in job.targets.items()
    }
    with progress(options, str(options.output)) as advance:

        def step(done: int, total: int) -> None:
            output.trim()  # what is written counts as this process's memory until then
            advance(done, total)

        try:
            planned = plan(
                targets,
                source,
                job.rules,
                overflow=options.overflow,
                staging=options.staging,
                **job.settings,
            )
            report = planned.apply(progress=step)
        except TornError as error:  # there is no model here that could be torn
            reason = error.state.reason if error.state else error.summary
            raise PlanError(f"{options.output} was not made: {reason}", error.findings) from error
        output.commit()
    return report


@contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the process the ordinary way, which removes a half-written file."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {
        number: signal.signal(number, end)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_DFL
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
