"""Files that change while they are used, full disks, limits that are reached: an error, never a killed process."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import resource
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import paramkit
from paramkit.cli import main
from paramkit.errors import SourceError
from paramkit.output import SafetensorsOutput
from paramkit.whole import write_whole
from tests.cases import random_bits
from tests.disks import largest_file, small_disk
from tests.faulty import run_plain
from tests.guards import assert_same_bits, nothing_written

# ---- files that change ---------------------------------------------------------------------------

# What is saved in each way: together larger than the staging, and than a page of memory many times over.
CHANGING = """
import contextlib, io, itertools, json, os, shutil, sys, traceback, warnings
import torch, paramkit
from pathlib import Path
from safetensors.torch import save_file
from paramkit.cli import main
from paramkit.errors import PlanError
from paramkit.sources import StoredFile
from paramkit.sources.dcp import Checkpoint

warnings.simplefilter("ignore")
folder = Path(sys.argv[1])
values = {f"w.{k}": torch.full((70, 100), float(k + 1)) for k in range(8)}
halves = [dict(list(values.items())[:4]), dict(list(values.items())[4:])]

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name.replace(".", "_"), torch.nn.Parameter(torch.zeros_like(value)))

RULES = [paramkit.Rule("w.{k}", "w_{k}")]

def safetensors(at):
    save_file(values, at / "m.safetensors")
    return at / "m.safetensors", at / "m.safetensors"
def pt(at):
    torch.save(values, at / "m.pt")
    return at / "m.pt", at / "m.pt"
def old_pt(at):  # the format before the zip archive: read into memory
    torch.save(values, at / "m.pt", _use_new_zipfile_serialization=False)
    return at / "m.pt", at / "m.pt"
def index(at):
    for k, half in enumerate(halves):
        save_file(half, at / f"{k}.safetensors")
    places = {name: f"{k}.safetensors" for k, half in enumerate(halves) for name in half}
    (at / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return at / "model.safetensors.index.json", at / "1.safetensors"
def bins(at):
    for k, half in enumerate(halves):
        torch.save(half, at / f"{k}.bin")
    places = {name: f"{k}.bin" for k, half in enumerate(halves) for name in half}
    (at / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return at / "pytorch_model.bin.index.json", at / "1.bin"
def dcp(at):
    import torch.distributed.checkpoint as dcp
    dcp.save(values, checkpoint_id=at / "dcp", no_dist=True)
    return at / "dcp", next((at / "dcp").glob("*.distcp"))

def emptied(path): os.truncate(path, 0)
def cut(path): os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)
def replaced(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-1])
    other.replace(path)
def rewritten(path):
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    os.utime(path, ns=(1, 1))

def transplant(source, model, begun):
    begun()
    paramkit.transplant(model, source, RULES, staging=1 << 15)
def apply(source, model, begun):
    plan = paramkit.plan(model, source, RULES, staging=1 << 15)
    begun()
    plan.apply()
def atomic(source, model, begun):
    plan = paramkit.plan(model, source, RULES, staging=1 << 15)
    begun()
    plan.apply(atomic=True)
def converting(source, model, begun):
    plan = paramkit.plan(model.half(), source, RULES, staging=1 << 15)
    begun()
    plan.apply()
def verify(source, model, begun):
    plan = paramkit.plan(model, source, RULES, staging=1 << 15)
    begun()
    plan.verify()
def swapped(source, model, begun):
    plan = paramkit.plan(model, source, RULES, staging=1 << 15)
    begun()
    with plan.swapped():
        pass
def fingerprint(source, model, begun):
    begun()
    paramkit.fingerprint(source)
def load(source, model, begun):
    tensors = paramkit.open_source(source, mmap=False)
    begun()
    for tensor in tensors.values():
        tensor if isinstance(tensor, torch.Tensor) else tensor.load()
def command(*argv):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(a) for a in argv])
    assert "Traceback" not in err.getvalue(), err.getvalue()
    if code == (2 if argv[0] == "diff" else 1):
        raise PlanError(err.getvalue())
    return code
def diff(source, model, begun):
    begun()
    assert command("diff", source, kept / source.name) == 0
def transplanting(source, model, begun):
    begun()
    out = folder / "out.safetensors"
    out.unlink(missing_ok=True)
    try:
        command("transplant", source, "-o", out, "--staging", "32K")
    except PlanError:
        assert not out.exists()
        raise

# The change comes once the use has begun, or at its n-th read.
real = {StoredFile: StoredFile.read_many, Checkpoint: Checkpoint._load}
def at_read(number, change):
    seen = itertools.count()
    def changing(name, owner):
        def call(self, *args):
            if next(seen) == number:
                change()
            return real[owner](self, *args)
        setattr(owner, name, call)
    changing("read_many", StoredFile)
    changing("_load", Checkpoint)

moments = {emptied: (None, 2), cut: (None, 0), replaced: (None,), rewritten: (None, 2)}
tried = told = whole = 0
for make in (safetensors, pt, old_pt, index, bins, dcp):
    at = folder / "made"
    shutil.rmtree(at, ignore_errors=True)
    at.mkdir()
    source, path = make(at)
    kept = folder / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(at, kept)
    for use in (transplant, apply, atomic, converting, verify, swapped, fingerprint, load, diff, transplanting):
        for change in (emptied, cut, replaced, rewritten):
            for moment in moments[change]:
                shutil.rmtree(at)
                shutil.copytree(kept, at)
                change_now = lambda: change(path)
                model, begun = Model(), change_now
                if moment is not None:
                    begun = lambda: at_read(moment, change_now)
                what = f"{make.__name__} {use.__name__} {change.__name__} {moment}"
                tried += 1
                try:
                    use(source, model, begun)
                except PlanError as error:
                    told += 1
                    # Of a file there is nothing else to say than which it is.
                    assert path.name in str(error) or source.name in str(error), f"{what}: {error}"
                    torn = paramkit.torn(model)
                    changed = [n for n, p in model.named_parameters() if p.any()]
                    assert not changed or torn is not None, f"{what}: torn, and not said: {changed}"
                    assert use not in (atomic, verify, swapped) or not changed, f"{what}: {changed}"
                except Exception as error:
                    traceback.print_exc()
                    raise AssertionError(what)
                else:
                    whole += 1
                    # In memory since it was opened, or read by hand, which compares nothing; or not read any more.
                    assert make is old_pt or use is load, what
                    if use in (transplant, apply, atomic, converting):
                        # Nothing was read after the change.
                        for name, value in values.items():
                            got = model.get_parameter(name.replace(".", "_"))
                            assert torch.equal(got, value.to(got.dtype)), f"{what}: {name}"
                finally:
                    for owner, name in ((StoredFile, "read_many"), (Checkpoint, "_load")):
                        setattr(owner, name, real[owner])
print(tried, told, whole)
"""


def test_no_change_of_a_file_ends_the_process(tmp_path: Path) -> None:
    """Every kind of source, every use, cut or emptied or replaced or rewritten, before it is read or in the middle."""
    tried, told, whole = map(int, run_plain(CHANGING, tmp_path).split())
    assert tried == 6 * 10 * 7 and told + whole == tried
    assert told > tried // 2, (tried, told, whole)


MAPPED = """
import os, resource, sys
import torch, torch.utils.serialization, paramkit
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if sys.argv[2] == "torch":  # who asks torch to map everything has not asked paramkit
    torch.utils.serialization.config.load.mmap = True
tensors = paramkit.open_source(sys.argv[1], mmap=sys.argv[2] == "mmap")
os.truncate(sys.argv[1], 0)
try:
    for tensor in tensors.values():
        print((tensor if isinstance(tensor, torch.Tensor) else tensor.load()).sum().item())
except paramkit.PlanError as error:
    print("SourceError")
"""


def test_what_would_end_it_is_a_map(tmp_path: Path) -> None:
    """The same with mmap=True is killed: so the test above can fail."""
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(100_000)}, path)
    with pytest.raises(AssertionError, match=f"ended with {-signal.SIGBUS}"):
        run_plain(MAPPED, path, "mmap")


def test_torch_set_to_map_by_default_maps_nothing_here(tmp_path: Path) -> None:
    """A checkpoint whose tensors have to be loaded into memory: compressed records cannot be read by offset."""
    import zipfile

    path, packed = tmp_path / "m.pt", tmp_path / "packed.pt"
    torch.save({"w": torch.ones(100_000)}, path)
    # In another order of records, as other tools write them: offsets are not known then, and torch loads it.
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w") as new:
        for entry in sorted(old.infolist(), key=lambda e: e.filename, reverse=True):
            new.writestr(entry.filename, old.read(entry))
    assert run_plain(MAPPED, packed, "torch") in ("100000.0\n", "SourceError\n")


# ---- disks ---------------------------------------------------------------------------------------


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """The folder holds what it held, and no file is open that was not."""

    def state() -> tuple[dict[str, bytes], int]:
        gc.collect()  # an error that was handled may be part of a cycle, and hold a file
        files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        return files, len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    before = state()
    yield
    assert state() == before


def command(*argv: object) -> tuple[int, str]:
    """Run a command in this process: its exit code, and what it said on stderr."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        return main([str(a) for a in argv]), err.getvalue()


def old_and_large(folder: Path) -> tuple[Path, Path]:
    """A small file where output goes, and a source that makes a large one."""
    out, source = folder / "out.safetensors", folder.parent / "source.safetensors"
    save_file({"w": torch.ones(3)}, out)
    save_file({"w": torch.ones(1 << 19)}, source)
    return out, source


def test_a_full_disk_leaves_the_old_output(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        out, source = old_and_large(disk)
        with unchanged(disk):
            code, said = command("transplant", source, "-o", out, "--force")
            assert code == 1 and "the disk is full" in said
        # A disk that is nearly full, for rules.
        (disk / "rules.toml").write_text("rules = []\n")
        (disk / "filler").write_bytes(bytes((1 << 20) - 5 * 4096))
        with unchanged(disk), pytest.raises(OSError, match="No space left") as caught:
            paramkit.save_rules([paramkit.Rule("a" * 30_000, None)], disk / "rules.toml")
        assert caught.value.errno == errno.ENOSPC
        (disk / "filler").unlink()
        paramkit.save_rules([paramkit.Rule("a" * 30_000, None)], disk / "rules.toml")
        assert len(paramkit.load_rules(disk / "rules.toml")) == 1


def test_a_limit_of_file_size_leaves_the_old_output(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    out, source = old_and_large(folder)
    rules = folder / "rules.yaml"
    rules.write_text("rules: []\n")
    with unchanged(folder), largest_file(1 << 16):
        code, said = command("transplant", source, "-o", out, "--force")
        assert code == 1 and "ulimit -f" in said
        with pytest.raises(OSError, match="File too large"):
            paramkit.save_rules([paramkit.Rule("a" * 100_000, None)], rules)
        with pytest.raises(OSError, match="ulimit -f"):
            SafetensorsOutput(out, [("w", torch.float32, (1 << 19,))]).__enter__()
    assert command("transplant", source, "-o", out, "--force")[0] == 0
    assert load_file(out)["w"].sum() == 1 << 19


def test_a_disk_that_says_so_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a network, and where space is given out late, it is found out only when the file is synchronised."""
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"the old one")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with unchanged(tmp_path), pytest.raises(OSError, match="the disk is full") as caught:  # noqa: SIM117
        with SafetensorsOutput(out, [("w", torch.float32, (3,))]) as output:
            monkeypatch.setattr(os, "fsync", full)
            output.commit()
    assert caught.value.errno == errno.ENOSPC and str(out) in str(caught.value)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write anywhere."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_may_not_be_written_to() -> None:
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to nobody
    out = folder / "out"
    out.mkdir()
    try:
        file, source = old_and_large(out)
        (out / "rules.toml").write_text("rules = []\n")
        for path in (out, folder):
            path.chmod(0o555)
        for path in (file, source, out / "rules.toml"):
            path.chmod(0o444)
        with unchanged(out), as_nobody():
            code, said = command("transplant", source, "-o", file, "--force")
            assert code == 1 and "Permission denied" in said
            with pytest.raises(PermissionError):
                paramkit.save_rules([paramkit.Rule("a", None)], out / "rules.toml")
            with pytest.raises(PermissionError):
                paramkit.save_rules([paramkit.Rule("a", None)], out / "new.toml")
            # Reading needs no more than reading.
            model = {"w": torch.zeros(1 << 19)}
            paramkit.transplant(model, source)
            assert model["w"].sum() == 1 << 19
    finally:
        folder.chmod(0o755)
        out.chmod(0o755)
        shutil.rmtree(folder)


def test_text_files_are_whole_or_what_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("old")
    link.symlink_to(real)
    real.chmod(0o600)
    write_whole(link, "new")
    assert link.is_symlink() and real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o600
    for failing in ("fsync", "replace"):

        def fail(*_: Any, **__: Any) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with (
            monkeypatch.context() as patch,
            unchanged(tmp_path),
            pytest.raises(OSError, match="Input"),
        ):
            patch.setattr(os if failing == "fsync" else Path, failing, fail)
            write_whole(real, "newer")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_whole(pipe, "through")
    reader.join(10)
    assert read == ["through"] and pipe.is_fifo()


# ---- limits and signals --------------------------------------------------------------------------


def shards(folder: Path, count: int, suffix: str) -> dict[str, Tensor]:
    values = {f"w.{k}": torch.full((5, 7), float(k)) for k in range(count)}
    for name, value in values.items():
        if suffix == "safetensors":
            save_file({name: value}, folder / f"{name}.safetensors")
        else:
            torch.save({name: value}, folder / f"{name}.pt")
    return values


@contextmanager
def open_files(most: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_more_shards_than_files_may_be_open(tmp_path: Path, suffix: str) -> None:
    values = shards(tmp_path, 120, suffix)
    model = {name: torch.full_like(value, -1.0) for name, value in values.items()}
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with open_files(before + 50), nothing_written(*model.values()):
        with pytest.raises(SourceError) as caught:
            paramkit.transplant(model, tmp_path)
        caught.value.__traceback__ = None  # which holds the frames, and they the files
    assert "ulimit -n" in str(caught.value) and "Too many open files" in str(caught.value)
    del caught
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    paramkit.transplant(model, tmp_path)
    for name, value in values.items():
        assert_same_bits(model[name], value)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@contextmanager
def signals_every(seconds: float) -> Iterator[list[int]]:
    """A handler of Python's is called again and again, and system calls are interrupted."""
    calls = [0]

    def handler(number: int, frame: object) -> None:
        calls[0] += 1

    before = signal.signal(signal.SIGALRM, handler)
    signal.siginterrupt(signal.SIGALRM, True)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield calls
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("backend", ["native", "cpu:scalar"], indirect=True)
def test_signals_while_files_are_read_and_written(tmp_path: Path, backend: str) -> None:
    values = {f"w.{k}": random_bits((200, 1000), torch.float32, seed=k) for k in range(12)}
    path, out = tmp_path / "m.safetensors", tmp_path / "out.safetensors"
    save_file(values, path)
    model = {name: torch.zeros(1000, 200) for name in values}
    plan = paramkit.plan(
        model, path, [paramkit.Rule("{*p}", "{*p}", "a b -> b a")], staging=1 << 20
    )
    with signals_every(0.0005) as calls:
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            plan.apply()
            assert plan.verify() == []
        assert command("transplant", path, "-o", out, "--force")[0] == 0
    assert calls[0] > 100
    written = load_file(out)
    for name, value in values.items():
        assert_same_bits(model[name], value.t().contiguous())
        assert_same_bits(written[name], value)


def test_a_handler_that_raises_is_an_interrupt_like_another(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(number: int, frame: object) -> None:
        raise Stop

    values = {f"w_{k}": random_bits((300, 1000), torch.float32, seed=k) for k in range(12)}
    path = tmp_path / "m.safetensors"
    save_file(values, path)
    model = nn.Module()
    for name, value in values.items():
        model.register_parameter(name, nn.Parameter(torch.zeros_like(value)))
    plan = paramkit.plan(model, path, staging=1 << 16)
    outcomes = set()
    before = signal.signal(signal.SIGALRM, stop)
    try:
        for k in range(30):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0002 + 0.0003 * k)
                    plan.apply(atomic=True)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                outcomes.add("done")
                assert plan.verify() == []
            except Stop:
                outcomes.add("stopped")
                new = [
                    name
                    for name, value in values.items()
                    if torch.equal(model.get_parameter(name), value)
                ]
                old = [name for name in values if not model.get_parameter(name).any()]
                assert len(new) == len(values) or len(old) == len(values), (len(new), len(old))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "stopped" in outcomes, outcomes
    plan.apply()
    assert plan.verify() == []
