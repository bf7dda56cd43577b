"""The command as a process of its own: interrupts, memory, pipes, terminals."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

MIB = 1 << 20


def command(*argv: object, code: str = "", **options: Any) -> subprocess.Popen[str]:
    """Start the command; `code` runs before it."""
    # Where the tests run in the background, an interrupt is ignored, and their children inherit that.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    script = (
        f"import sys\n{heard}\n{code}\nfrom paramkit.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, argv)],
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=options.pop("stderr", subprocess.PIPE),
        text=True,
        **options,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


# Slow enough to be caught in the middle, whatever the machine: each read says so, then waits a little.
SLOW = """
import time
from paramkit.sources import StoredFile
real = StoredFile.read_many
def slow(self, ranges):
    real(self, ranges)
    print("read", file=sys.stderr, flush=True)
    time.sleep(0.05)
StoredFile.read_many = slow
"""


NO_TMPFILE = """
import errno, os
def refusing(path, flags, *args, real=os.open, **options):
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(errno.EOPNOTSUPP, "not supported")
    return real(path, flags, *args, **options)
os.open = refusing
"""


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(tmp_path: Path, number: int, named: bool) -> None:
    save_file({f"w.{k}": torch.ones(1 << 18) for k in range(100)}, tmp_path / "a.safetensors")
    (tmp_path / "o.safetensors").write_bytes(b"before")
    code = SLOW
    if named:  # a file system without files that have no name
        code += NO_TMPFILE
    argv = ("transplant", tmp_path / "a.safetensors", "-o", tmp_path / "o.safetensors", "--force")
    process = command(*argv, "--staging", "64K", code=code)
    assert process.stderr is not None
    for _ in range(3):
        assert process.stderr.readline() == "read\n"
    assert len(list(tmp_path.iterdir())) == (3 if named else 2)
    process.send_signal(number)
    status, out, err = finished(process)
    said = [line for line in err.splitlines() if line != "read"]
    if number == signal.SIGINT:
        assert (status, said) == (130, ["paramkit: interrupted; nothing was written"])
    else:
        assert (status, said) == (143, [])
    assert not out
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors", "o.safetensors"}
    assert (tmp_path / "o.safetensors").read_bytes() == b"before"


def test_an_interrupted_diff(tmp_path: Path) -> None:
    save_file({f"w.{k}": torch.ones(1 << 18) for k in range(100)}, tmp_path / "a.safetensors")
    save_file({f"w.{k}": torch.ones(1 << 18) for k in range(100)}, tmp_path / "b.safetensors")
    process = command("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", code=SLOW)
    assert process.stderr is not None and process.stderr.readline() == "read\n"
    process.send_signal(signal.SIGINT)
    status, out, err = finished(process)
    said = [line for line in err.splitlines() if line != "read"]
    assert (status, out, said) == (130, "", ["paramkit: interrupted; nothing was written"])


# Asked of the process itself. Not by getrusage: its peak may be one that the parent had before exec.
PEAK = """
import atexit, json, torch
import paramkit.cli
def memory(which):
    for line in open("/proc/self/status"):
        if line.startswith(which + ":"):
            return int(line.split()[1]) << 10
paramkit.fill_(torch.empty(1 << 20), 1.0)
base = memory("VmRSS")
atexit.register(lambda: print(json.dumps([base, memory("VmHWM")]), file=sys.stderr))
"""


def above_base(*argv: object) -> int:
    """Bytes of peak memory above what the process has before its work."""
    status, _, err = finished(command(*argv, code=PEAK))
    assert status in (0, 1), err
    base, peak = json.loads(err.splitlines()[-1])
    assert peak >= base
    return int(peak - base)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """290 MiB, most of it in two tensors, and rules that transpose one of them."""
    folder = tmp_path_factory.mktemp("large")
    tensors = {"a": torch.rand(4000, 8192), "b": torch.rand(4096, 8000)}
    tensors |= {f"s.{k}": torch.rand(256, 1024) for k in range(40)}
    save_file(tensors, folder / "a.safetensors")
    (folder / "r.yaml").write_text('rules: [{src: b, dst: b, pattern: "i o -> o i"}]')
    return folder


def test_memory_is_bounded_by_the_staging(large: Path) -> None:
    argv = ("transplant", large / "a.safetensors")
    rules = ("--rules", large / "r.yaml")
    try:
        used = above_base(*argv, "-o", large / "p.safetensors", "--dtype", "bf16")
        assert used < (16 + 32) * MIB
        # A transposed tensor is written in short runs, and each has a page of the file mapped meanwhile.
        used = above_base(*argv, *rules, "-o", large / "o.safetensors", "--staging", "16M")
        assert used < (16 + 96) * MIB
        used = above_base("diff", large / "a.safetensors", large / "o.safetensors", *rules)
        assert used < 96 * MIB
    finally:
        for name in ("o.safetensors", "p.safetensors"):
            (large / name).unlink(missing_ok=True)


def test_output_that_nobody_reads_to_its_end(tmp_path: Path) -> None:
    names = {f"{chr(97 + k % 26)}{k}x.w": torch.ones(1) for k in range(9000)}
    save_file(names, tmp_path / "a.safetensors")
    for argv in (
        ("inspect", tmp_path / "a.safetensors"),
        ("plan", tmp_path / "a.safetensors", "--json"),
        ("diff", tmp_path / "a.safetensors", tmp_path / "a.safetensors", "--all"),
    ):
        process = command(*argv)
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == (2 if argv[0] == "diff" else 1)
        process.stderr.close()


def on_a_terminal(*argv: object) -> str:
    """What the command writes to a terminal on stderr."""
    master, slave = pty.openpty()
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    process = command(*argv, code=SLOW, stderr=slave, env=environ)
    os.close(slave)
    seen = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(master)
    assert process.wait(timeout=60) == 0
    assert process.stdout is not None
    process.stdout.close()
    return seen.replace(b"read\r\n", b"").decode()


def test_progress_on_a_terminal_only(tmp_path: Path) -> None:
    save_file({f"w.{k}": torch.ones(1 << 12) for k in range(20)}, tmp_path / "a.safetensors")
    argv = ("transplant", tmp_path / "a.safetensors", "--force", "-o", tmp_path / "o.safetensors")
    argv = (*argv, "--staging", "64K")
    shown = on_a_terminal(*argv)
    assert "o.safetensors" in shown and "KiB" in shown
    assert on_a_terminal(*argv, "--quiet") == "" == on_a_terminal(*argv, "--json")
    assert "comparing" in on_a_terminal("diff", *[tmp_path / f"{n}.safetensors" for n in "ao"])
    status, _, err = finished(command(*argv))
    assert (status, err) == (0, "")


def test_without_rich(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1 << 12)}, tmp_path / "a.safetensors")
    master, slave = pty.openpty()
    code = "sys.modules['rich'] = None"
    argv = ("transplant", tmp_path / "a.safetensors", "-o", tmp_path / "o.safetensors")
    status, out, _ = finished(command(*argv, code=code, stderr=slave))
    os.close(slave)
    os.close(master)
    assert status == 0 and "1 tensor" in out


def test_rules_without_yaml(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "r.yaml").write_text("rules: []")
    code = "sys.modules['yaml'] = None"
    argv = ("plan", tmp_path / "a.safetensors", "--rules", tmp_path / "r.yaml")
    status, out, err = finished(command(*argv, code=code))
    assert status == 1 and not out
    assert err.startswith("paramkit: error: ") and "paramkit[rules]" in err


def test_names_that_the_encoding_does_not_have(tmp_path: Path) -> None:
    save_file({"größe": torch.ones(2)}, tmp_path / "a.safetensors")
    environ = {**os.environ, "PYTHONIOENCODING": "ascii"}
    status, out, err = finished(command("inspect", tmp_path / "a.safetensors", env=environ))
    assert (status, err) == (0, "") and "gr\\xf6\\xdfe" in out
