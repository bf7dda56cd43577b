"""The CUDA library while a program runs: whether there is one, opening it once, and what became of that.

Nothing is opened before the first CUDA tensor, or before ``PARAMKIT_BACKEND=cuda`` asks for it: the
library holds a CUDA runtime, which a process without CUDA tensors need not have.
"""

from __future__ import annotations

import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramkit.backend import elf, loader, sources

_NATIVELY = "CUDA tensors go through torch's own copy_ and fill_"
_BUILD = "run `paramkit build` (or paramkit.backend.build())"


@dataclass(frozen=True)
class Problem:
    """Why CUDA tensors cannot be the kernels'. ``quiet``: asked for, or nothing that can be helped."""

    reason: str
    remedy: str
    quiet: bool = False


@dataclass(frozen=True)
class _Library:
    path: Path
    entry: dict[str, Any]  # what the record says of it

    def __str__(self) -> str:
        version = ".".join(str(self.entry.get("toolkit")).split(".")[:2])
        names = self.entry.get("architectures") or []
        count = len([name for name in names if not name.endswith("+PTX")]) or len(names)
        return f"built with CUDA {version} for {count} architecture{'s' if count != 1 else ''}"


@dataclass(frozen=True)
class _Outcome:
    problem: Problem | None  # None: the library is open


_lock = threading.RLock()
_outcome: _Outcome | None = None  # of opening the library; None until somebody asks
_warned = False


def open_library() -> bool:
    """Open the library, unless that has been tried. The extension asks at the first CUDA tensor.

    Where there is none, or it does not open, one warning gives the reason and the remedy. Never
    raises: CUDA tensors then go through torch's own ``copy_`` and ``fill_``.

    Returns:
        Whether it is open.
    """
    global _warned
    module = loader.extension()
    binary = Path(module.__file__) if module is not None and module.__file__ else None
    problem = open_now(module, binary)
    with _lock:
        warn = problem is not None and not problem.quiet and not _warned
        _warned = _warned or warn
    if warn and problem is not None:
        _warn(
            f"paramkit leaves CUDA tensors to torch's own copy_ and fill_ (same results, slower): "
            f"{problem.reason}. {problem.remedy}. PARAMKIT_BACKEND=cpu asks for this route and "
            "silences the warning; paramkit.status() tells more."
        )
    return problem is None


def open_now(module: Any, binary: Path | None) -> Problem | None:
    """Open the library beside an extension, unless that has been tried; no warning is given.

    Args:
        module: the extension.
        binary: the file it was loaded from.

    Returns:
        Why it is not open; None if it is.
    """
    global _outcome
    with _lock:
        if _outcome is None:
            try:
                _outcome = _Outcome(_open(module, binary))
            except Exception as error:
                text = f"the CUDA library cannot be opened: {type(error).__name__}: {error}"
                _outcome = _Outcome(Problem(text, f"To have it anew, {_BUILD}"))
        return _outcome.problem


def device_problem() -> Problem | None:
    """Why torch has no CUDA device here; None if it has one. As torch.cuda.is_available(), which asks the driver."""
    import torch

    if torch.version.cuda is None:
        if getattr(torch.version, "hip", None):
            return Problem(
                "this torch is built for ROCm", "The kernels are for CUDA alone", quiet=True
            )
        return Problem("this torch is built without CUDA", "Install a torch that is built for CUDA")
    if not torch.cuda.is_available():
        return Problem(
            "torch has no CUDA device", "See what nvidia-smi and CUDA_VISIBLE_DEVICES say"
        )
    return None


def describe() -> str:
    """What happens to CUDA tensors, in one sentence. Opens nothing and does not initialize CUDA."""
    try:
        decision = loader.decide()
    except loader.BackendError:
        return "not used: the settings cannot be met"
    if not (decision.compiled and decision.cuda):
        return f"not used on this route: {_NATIVELY}"
    library = _find(decision.extension.binary)
    if isinstance(library, Problem):
        return f"no library: {library.reason}: {_NATIVELY}"
    outcome = _outcome
    if outcome is not None:
        if outcome.problem is None:
            return f"open: {library}: {library.path}"
        return f"{library}; not open: {outcome.problem.reason}: {_NATIVELY}"
    problem = device_problem()
    if problem is not None:
        return f"{library}; not opened: {problem.reason}"
    return f"{library}; to be opened at the first CUDA tensor"


def _open(module: Any, binary: Path | None) -> Problem | None:
    library = _find(binary)
    problem = library if isinstance(library, Problem) else None
    problem = device_problem() or problem
    if problem is not None:
        return problem
    assert isinstance(library, _Library)
    problem = _uncovered(library)
    if problem is not None:
        return problem
    try:
        lacking = elf.cut_short(library.path)
        if lacking:
            raise OSError(lacking)
        module.open_cuda(str(library.path))
    except Exception as error:
        return Problem(f"{library.path} cannot be opened: {error}", f"To have it anew, {_BUILD}")
    return None


def _find(binary: Path | None) -> _Library | Problem:
    """The library beside an extension, as far as its record tells."""
    if binary is None:
        return Problem("there is no extension", f"To have both, {_BUILD}")
    record = sources.read_record(binary.parent / sources.RECORD_NAME) or {}
    entry = record.get("cuda") or {}
    result, reason = entry.get("result"), entry.get("reason")
    path = binary.parent / sources.CUDA_NAME
    if result == "built":
        if path.is_file():
            return _Library(path, entry)
        return Problem(f"{path} is missing", f"To have it anew, {_BUILD}")
    if result == "off":
        remedy = f"To have one, unset PARAMKIT_CUDA and {_BUILD}"
        return Problem(f"not built ({reason})", remedy, quiet=True)
    if result == "failed":
        remedy = f"Once that is put right, {_BUILD}; the build log has the output"
        return Problem(f"building it failed ({reason})", remedy)
    why = f"not built ({reason})" if reason else "the extension was built without one"
    return Problem(why, f"To have one, install the CUDA toolkit and {_BUILD}")


def _uncovered(library: _Library) -> Problem | None:
    """A GPU of this machine that the library has no code for. One is enough to leave it closed."""
    import torch

    from paramkit.backend import toolkit

    built_for = library.entry["architectures"]
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    missing = [f"{a}.{b}" for a, b in sorted(found) if not toolkit.covers(built_for, (a, b))]
    if not missing:
        return None
    return Problem(
        f"{library.path} has no code for GPUs of compute capability {', '.join(missing)}, only for "
        f"{', '.join(built_for)}",
        f"Set TORCH_CUDA_ARCH_LIST, as in {';'.join(missing)!r}, and {_BUILD}",
    )


def _warn(text: str) -> None:
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=loader.outside())
    except RuntimeWarning:  # warnings are errors here, but this is no place for one
        print(f"RuntimeWarning: {text}", file=sys.stderr)
