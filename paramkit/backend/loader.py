"""Finds the compiled extension, loads it once, and picks the route for every call.

Nothing happens at import. The first use looks for a binary built against this torch and this
Python: in the package, then in torch's extension cache. A binary for another torch is never
opened, since opening it can crash the process. Without a binary the calls run on torch's own
``copy_`` and ``fill_``, and one warning says why. Nothing is ever compiled here.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from paramkit.backend import elf, sources

ROUTES = ("auto", "native", "cpu", "cuda")
CAPABILITIES = ("scalar", "avx2", "avx512")
_MODULE_NAME = "paramkit._C"
_REMEDY = "run `paramkit build` (or paramkit.backend.build())"


class BackendError(RuntimeError):
    """The route that was asked for cannot be had, or is not one that exists.

    Example:
        >>> from paramkit import backend
        >>> try:
        ...     with backend.force("avx"):
        ...         pass
        ... except backend.BackendError as error:
        ...     print(error)
        force: got 'avx', expected one of native, cpu, cpu:scalar, cpu:avx2, cpu:avx512, cuda
    """


@dataclass(frozen=True)
class Extension:
    """The outcome of looking for the extension."""

    module: ModuleType | None = None
    binary: Path | None = None
    build_log: Path | None = None
    where: str = ""  # one sentence: which binary
    reason: str = ""  # one sentence: why there is none
    error: str | None = None  # the original error text
    declined: bool = False  # installed with PARAMKIT_BUILD=off: no reason to warn


@dataclass(frozen=True)
class Decision:
    """The route that calls take."""

    module: ModuleType
    name: str  # "cpu", "cuda" or "native"
    why: str
    extension: Extension = field(default_factory=Extension)
    warning: str = ""  # to be given at the first use
    remedy: str = "paramkit build"  # what gets the extension
    cuda: bool = False  # CUDA tensors go to the kernels, if there is a library and a device

    @property
    def compiled(self) -> bool:
        """Whether the extension runs the writes: for CPU tensors "cuda" is the same as "cpu"."""
        return self.name != "native"


_lock = threading.RLock()
_active: ModuleType | None = None  # what active() returns; None until the first use
_decision: Decision | None = None
_extension: Extension | None = None
_warned = False
_cuda_enabled = True  # as the extension has it
_patched = False  # whether torch's own functions are to take the kernels


def active() -> ModuleType:
    """The module that runs writes now: ``paramkit._C`` or ``paramkit.backend.native``.

    The first call decides, following ``PARAMKIT_BACKEND`` and ``PARAMKIT_CPU_CAPABILITY``; later
    calls return the same module.

    Returns:
        The module, which has the operators, ``Plan`` and the rest under the same names either way.

    Raises:
        BackendError: if one of the two variables has an unknown or unavailable value.

    Example:
        >>> from paramkit import backend
        >>> with backend.force("native"):
        ...     backend.active().__name__
        'paramkit.backend.native'
    """
    module = _active
    if module is None:
        module = _first_use()
    return module


@contextmanager
def force(name: str) -> Iterator[ModuleType]:
    """Take one route for the duration of a block, whatever the environment says.

    It holds for the whole process, all threads included: meant for tests and comparisons.

    Args:
        name: ``native``; ``cpu``, or ``cpu:`` and an instruction set, as in ``cpu:avx2``, with
            torch's own functions for CUDA tensors; or ``cuda``, with the kernels for both.

    Yields:
        The module that runs the writes, as :func:`active` gives it.

    Raises:
        BackendError: if the name is unknown, or the route cannot be had on this machine.

    Example:
        >>> from paramkit import backend
        >>> with backend.force("native"):
        ...     backend.status().backend
        'native'
    """
    global _active, _decision
    choices = ("native", "cpu", *(f"cpu:{one}" for one in CAPABILITIES), "cuda")
    if name not in choices:
        raise BackendError(f"force: got {name!r}, expected one of {', '.join(choices)}")
    route, _, capability = name.partition(":")
    with _lock:
        before, cuda_before = (_active, _decision), _cuda_enabled
        decision = _decide(route, f"forced by paramkit.backend.force({name!r})")
        restore = decision.module.capability() if decision.compiled else None

        def put_back() -> None:
            global _active, _decision
            with _lock:
                if restore is not None:
                    decision.module.set_capability(restore)
                    _enable_cuda(decision.module, cuda_before)
                _active, _decision = before
                _sync_patch()

        try:
            if capability:
                _set_capability(decision.module, capability, f"force({name!r})")
            if decision.compiled:
                _enable_cuda(decision.module, decision.cuda)
            _active, _decision = decision.module, decision
            _sync_patch()
        except BaseException:
            put_back()
            raise
    try:
        yield decision.module
    finally:
        put_back()


def decide() -> Decision:
    """The decision, made now if there is none yet; no warning is given.

    Raises:
        BackendError: as :func:`active`.
    """
    global _decision
    with _lock:
        if _decision is None:
            route, capability = _environment()
            decision = _decide(route, f"PARAMKIT_BACKEND={route}" if route != "auto" else "")
            if capability:
                if decision.compiled:
                    source = f"PARAMKIT_CPU_CAPABILITY={capability}"
                    _set_capability(decision.module, capability, source)
                elif route == "auto":
                    # Native was not asked for: running it would ignore what was asked for.
                    raise BackendError(
                        f"PARAMKIT_CPU_CAPABILITY={capability} asks for the compiled extension, "
                        f"but {decision.extension.reason}. To get it, {_REMEDY}; or unset the "
                        f"variable{_quote(decision.extension.error)}"
                    )
            if decision.compiled:
                _enable_cuda(decision.module, decision.cuda)
            _decision = decision
            try:
                _sync_patch()
            except BaseException:
                _decision = None
                raise
        return _decision


def reset() -> None:
    """Forget the decision, so that the next use looks again. A loaded extension stays loaded."""
    global _active, _decision, _extension, _warned
    with _lock:
        _active = _decision = _extension = None
        _warned = False
        _sync_patch()


def patch(on: bool) -> None:
    """Whether torch's own functions take the kernels, wherever the route is not `native`.

    Raises:
        BackendError: as :func:`active`.
        RuntimeError: another library has kernels of its own for these functions.
    """
    global _patched
    if on:
        active()
    with _lock:
        before, _patched = _patched, on
        try:
            _sync_patch()
        except BaseException:
            _patched = before
            raise


def _sync_patch() -> None:
    """Tell the extension; until there is a decision nothing is patched."""
    module = extension()
    set_patched = getattr(module, "patch_torch", None)
    if set_patched is not None:  # what stands in for the extension in tests has none
        set_patched(_patched and _decision is not None and _decision.compiled)


def extension() -> ModuleType | None:
    """The extension if this process has loaded it. A process can load only one."""
    return sys.modules.get(_MODULE_NAME)


def settings() -> dict[str, str]:
    """The variables of the environment that bear on the choice, those that are set."""
    names = (
        "PARAMKIT_BACKEND",
        "PARAMKIT_CPU_CAPABILITY",
        "PARAMKIT_STREAM_BYTES",
        "PARAMKIT_STAGING_BYTES",
        "TORCH_EXTENSIONS_DIR",
    )
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def _first_use() -> ModuleType:
    global _active, _warned
    if _forked:
        _take_one_thread()
    with _lock:
        decision = decide()
        warn = bool(decision.warning) and not _warned
        _warned = _warned or warn
        _active = decision.module
    if warn:
        warnings.warn(decision.warning, RuntimeWarning, stacklevel=outside())
    return decision.module


def outside() -> int:
    """The stack level, seen from the caller, of the first frame that is not paramkit's."""
    level, frame = 1, sys._getframe(1)
    package = f"{Path(__file__).parent.parent}{os.sep}"
    while frame is not None and frame.f_code.co_filename.startswith(package):
        level += 1
        if frame.f_back is None:
            break
        frame = frame.f_back
    return level


def _environment() -> tuple[str, str]:
    route = os.environ.get("PARAMKIT_BACKEND") or "auto"
    if route not in ROUTES:
        raise BackendError(f"PARAMKIT_BACKEND: got {route!r}, expected one of {', '.join(ROUTES)}")
    capability = os.environ.get("PARAMKIT_CPU_CAPABILITY") or ""
    if capability and capability not in CAPABILITIES:
        raise BackendError(
            f"PARAMKIT_CPU_CAPABILITY: got {capability!r}, "
            f"expected one of {', '.join(CAPABILITIES)}"
        )
    for name in ("PARAMKIT_STREAM_BYTES", "PARAMKIT_STAGING_BYTES"):
        value = os.environ.get(name) or "0"
        if not value.isdecimal():
            raise BackendError(f"{name}: got {value!r}, expected a number of bytes")
    return route, capability


def _decide(route: str, asked: str) -> Decision:
    """The decision for a route that is known to be one of ROUTES."""
    if route == "native":
        return Decision(_native(), "native", asked)
    if route == "auto" and _gil_is_off():
        return _without_gil()
    extension = _find()
    if extension.module is not None:
        # Python has turned the GIL on to load it, unless PYTHON_GIL=0 forbids that.
        if _gil_is_off():
            raise BackendError(f"{asked}, but {_NO_GIL}. Unset PYTHON_GIL, or take -X gil=1")
        why = f"{extension.where} ({asked})" if asked else extension.where
        if route == "cuda":
            _need_cuda(asked, extension)
            return Decision(extension.module, "cuda", why, extension, cuda=True)
        return Decision(extension.module, "cpu", why, extension, cuda=route == "auto")
    if route in ("cpu", "cuda"):
        raise BackendError(
            f"{asked}, but {extension.reason}. To get the extension, {_REMEDY}"
            f"{_quote(extension.error)}"
        )
    warning = (
        ""
        if extension.declined
        else (
            f"paramkit runs on torch's own copy_ and fill_ (same results, slower): {extension.reason}. "
            f"To get the compiled extension, {_REMEDY}. PARAMKIT_BACKEND=native asks for this route "
            "and silences the warning; paramkit.status() tells more."
        )
    )
    return Decision(_native(), "native", extension.reason, extension, warning)


# NOTE: [Free-threaded Python] The extension says of itself that it needs the GIL (module.cpp): its
# tables and plans are guarded by it. Loading it would turn the GIL on for the whole process, so that
# is done only when it is asked for by name.
_NO_GIL = "this is a free-threaded Python with its GIL off, and the extension needs the GIL"


def _gil_is_off() -> bool:
    enabled = getattr(sys, "_is_gil_enabled", None)
    return enabled is not None and not enabled()


def _without_gil() -> Decision:
    warning = (
        f"paramkit runs on torch's own copy_ and fill_ (same results, slower): {_NO_GIL}. "
        "PARAMKIT_BACKEND=cpu loads it, and Python then turns the GIL on for the whole process. "
        "PARAMKIT_BACKEND=native asks for this route and silences the warning."
    )
    remedy = "PARAMKIT_BACKEND=cpu, which turns the GIL on"
    return Decision(_native(), "native", _NO_GIL, Extension(reason=_NO_GIL), warning, remedy)


def _native() -> ModuleType:
    from paramkit.backend import native

    return native


def _need_cuda(asked: str, extension: Extension) -> None:
    """Raise unless the kernels can take CUDA tensors in this process."""
    from paramkit.backend import cuda

    problem = cuda.device_problem() or cuda.open_now(extension.module, extension.binary)
    if problem:
        raise BackendError(
            f"{asked}, but {problem.reason}. {problem.remedy}. Choices here: auto, native, cpu"
        )


def _enable_cuda(module: ModuleType, wanted: bool) -> None:
    """Tell the extension whether CUDA tensors are its kernels' at all."""
    global _cuda_enabled
    enable = getattr(module, "enable_cuda", None)
    if enable is not None:  # what stands in for the extension in tests has none
        enable(wanted)
        _cuda_enabled = wanted


def _set_capability(module: Any, capability: str, source: str) -> None:
    try:
        module.set_capability(capability)
    except ValueError as error:
        raise BackendError(
            f"{source}: this machine or build offers {', '.join(module.capabilities())} ({error})"
        ) from None


def _quote(error: str | None) -> str:
    return f".\nThe original error:\n{error}" if error else ""


# --- forks --------------------------------------------------------------------------------------

_pool = False  # whether there are threads that are not Python's, as of the last fork
_forked = False  # whether this process is a child of one that had some, and torch has not been told


def _before_fork() -> None:
    global _pool
    try:
        _pool = Path("/proc/self/task").stat().st_nlink - 2 > threading.active_count()
    except OSError:
        _pool = True


def _in_child() -> None:
    """The threads of torch's pool are not there, but OpenMP waits for them: torch and the kernels would hang."""
    global _lock, _forked
    _lock = threading.RLock()
    _forked = _pool
    if _forked and _active is not None:
        _take_one_thread()


def _take_one_thread() -> None:
    """As in a worker of a DataLoader."""
    global _forked
    import torch

    torch.set_num_threads(1)
    _forked = False


os.register_at_fork(before=_before_fork, after_in_child=_in_child)


# --- finding the binary -------------------------------------------------------------------------


def _find() -> Extension:
    """Look for the extension and load it; the outcome is kept."""
    global _extension
    if _extension is None:
        _extension = _search()
    return _extension


def _search() -> Extension:
    import torch

    version = str(torch.__version__)
    csrc = sources.csrc_dir()
    digest = sources.source_hash(csrc, version) if csrc else None
    module = extension()
    if module is not None:
        path = Path(module.__file__ or "")
        return Extension(module, path, _log_of(path), where=f"the extension loaded from {path}")

    package = sources.PACKAGE_DIR
    record = sources.read_record(package / sources.RECORD_NAME)
    problems: list[tuple[str, str | None]] = []  # (sentence, original error)
    candidates: list[tuple[Path, str]] = []  # (binary, where)

    declined = record is not None and record.get("result") == "off"
    stale = False
    if declined:
        when = "when paramkit was installed, or its wheel was built"
        problems.append((f"PARAMKIT_BUILD=off was set {when}", None))
    else:
        problem = _mismatch(record, package / sources.BINARY_NAME, version)
        if problem:
            problems.append(_install_problem(problem))
        else:
            assert record is not None
            stale = digest is not None and record.get("source_hash") != digest
            where = "the extension built when paramkit was installed"
            if stale:
                where += ", older than the C++ sources now beside it"
            candidates.append((package / sources.BINARY_NAME, where))

    if digest:
        try:
            folder = sources.cache_dir(torch.version) / digest
        except RuntimeError:  # no home folder, as in some containers: no cache either
            folder = package / "no-cache"
        binary = folder / sources.BINARY_NAME
        kept, problem = _in_cache(folder, version)
        # What was built before an install that asked for none is not used.
        wanted = not declined or (kept or {}).get("time", "") > (record or {}).get("time", "")
        if binary.exists() and wanted:
            if problem:
                problems.append((problem, None))
            else:
                found = (binary, "the extension built by `paramkit build`")
                # Built from exactly these sources: better than one from older sources.
                better = stale or _has_newer_cuda(kept or {}, record or {})
                candidates.insert(0 if better else len(candidates), found)

    for binary, where in candidates:
        try:
            module = _load(binary)
        except _OpenError as error:
            problems.insert(0, (f"{binary} cannot be opened", str(error)))
        except Exception as error:
            # The library is mapped and its operators may be registered; a second one would clash.
            problems.insert(0, (f"{binary} cannot be loaded", f"{type(error).__name__}: {error}"))
            break
        else:
            return Extension(module, binary, _log_of(binary), where=where)

    if declined and len(problems) == 1:
        return Extension(reason=problems[0][0], declined=True)
    return Extension(
        reason="; ".join(dict.fromkeys(sentence for sentence, _ in problems)),
        error=next((text for _, text in problems if text), None),
        build_log=_failed_log(),
    )


def _in_cache(folder: Path, version: str) -> tuple[dict[str, Any] | None, str]:
    """The record of a folder in the extension cache, and why its binary must not be opened."""
    path, binary = folder / sources.RECORD_NAME, folder / sources.BINARY_NAME
    for _ in range(5):
        kept = sources.read_record(path)
        problem = _mismatch(kept, binary, version)
        # Opening a damaged library can crash the process, so the content is compared first. Not
        # done for the package's own binary: packagers strip.
        if not problem and not sources.is_whole(binary, (kept or {}).get("sha256")):
            problem = f"the binary in the extension cache is damaged: {binary}"
        if not problem or not binary.exists():
            break
        # Another process may just have put a new build in place.
        time.sleep(0.02)
    return kept, problem


def _has_newer_cuda(kept: dict[str, Any], installed: dict[str, Any]) -> bool:
    """Whether the cache's build was asked for after the install, and has another CUDA library."""
    entry = kept.get("cuda") or {}
    if entry.get("result") != "built" or kept.get("time", "") <= installed.get("time", ""):
        return False
    return not sources.is_whole(sources.PACKAGE_DIR / sources.CUDA_NAME, entry.get("sha256"))


def _mismatch(record: dict[str, Any] | None, binary: Path, version: str) -> str:
    """Why a binary must not be opened, or an empty string."""
    if record is None or "python" not in record or "torch" not in record:
        record = None
    if not binary.exists() and (record is None or record["python"] == sources.PYTHON_TAG):
        return "the extension has not been built"
    if record is None:
        why = f"no {sources.RECORD_NAME} that can be read"
        return f"nothing tells which torch {binary} was built for ({why})"
    if record.get("python") != sources.PYTHON_TAG:
        return f"the extension was built for {record.get('python')}, not {sources.PYTHON_TAG}"
    if record.get("torch") != version:
        return f"the extension was built for torch {record.get('torch')}, and this is {version}"
    return ""


def _install_problem(problem: str) -> tuple[str, str | None]:
    """The problem with the package's own binary; if installing could not build it, why."""
    try:
        text = (sources.PACKAGE_DIR / sources.ERROR_NAME).read_text(encoding="utf-8").strip()
    except OSError:
        return problem, None
    first = text.splitlines()[0][:200] if text else "no message"
    return f"building it failed when paramkit was installed ({first})", text


class _OpenError(ImportError):
    """The dynamic loader refused the library; nothing of it is in the process."""


def _load(binary: Path) -> ModuleType:
    import torch  # noqa: F401  the libraries that the extension needs must be there first

    try:
        lacking = elf.cut_short(binary)
        if lacking:
            raise OSError(f"{binary}: {lacking}")
        # Opened once by itself, to tell a library that could not be opened (another one may be
        # tried) from one that failed half-way (its operators are registered: none may be tried).
        ctypes.CDLL(str(binary))
    except OSError as error:
        raise _OpenError(str(error)) from None
    loader = importlib.machinery.ExtensionFileLoader(_MODULE_NAME, str(binary))
    spec = importlib.util.spec_from_file_location(_MODULE_NAME, str(binary), loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[_MODULE_NAME] = module
    # What `import paramkit._C` would have done.
    package = sys.modules.get("paramkit")
    if package is not None:
        package.__dict__["_C"] = module
    return module


def _log_of(binary: Path) -> Path | None:
    record = sources.read_record(binary.parent / sources.RECORD_NAME) or {}
    log = Path(record.get("log") or binary.parent / "build.log")
    return log if log.is_file() else None


def _failed_log() -> Path | None:
    log = sources.PACKAGE_DIR / sources.ERROR_NAME
    return log if log.is_file() else None
