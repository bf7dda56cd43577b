"""What runs the writes and why, as data and as text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from paramkit.backend import cuda, loader


@dataclass(frozen=True)
class Status:
    """What runs the writes now. ``str()`` of it is a readable page, ``as_dict()`` plain data.

    Attributes:
        backend: ``cpu`` (compiled; CUDA tensors too, where ``cuda`` says so), ``cuda`` (the same,
            with CUDA asked for), ``native`` (torch's own `copy_` and `fill_`), or ``none`` when the
            settings in the environment cannot be met: then every call raises ``error``.
        why: one sentence.
        capability: the instruction set in use; None unless compiled.
        capabilities: those that this machine can run.
        cuda: what happens to CUDA tensors.
        torch: version of torch.
        binary: path of the loaded extension.
        build_log: path of the log of the build, or of the build that failed.
        remedy: what gets the compiled extension; None where it is in use.
        error: the original error text where the extension could not be built or loaded.
        env: the settings of the environment in force.

    Example:
        >>> import paramkit
        >>> paramkit.status().backend in ("cpu", "cuda", "native")
        True
    """

    backend: str
    why: str
    torch: str
    cuda: str
    capability: str | None = None
    capabilities: tuple[str, ...] = ()
    binary: str | None = None
    build_log: str | None = None
    remedy: str | None = None
    error: str | None = None
    env: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON; never raises.

        Returns:
            The attributes by name.

        >>> import json, paramkit
        >>> sorted(json.loads(json.dumps(paramkit.status().as_dict())))[:4]
        ['backend', 'binary', 'build_log', 'capabilities']
        """
        return {**dataclasses.asdict(self), "capabilities": list(self.capabilities)}

    def __str__(self) -> str:
        rows = [("backend", f"{self.backend}: {self.why}")]
        if self.capability:
            others = ", ".join(self.capabilities)
            rows.append(("instructions", f"{self.capability} (this machine has {others})"))
        rows += [("cuda", self.cuda), ("torch", self.torch)]
        if self.binary:
            rows.append(("library", self.binary))
        if self.build_log:
            rows.append(("build log", self.build_log))
        rows += [("setting", f"{name}={value}") for name, value in self.env.items()]
        if self.remedy:
            rows.append(("remedy", self.remedy))
        text = "\n".join(f"{name:<13}{value}" for name, value in rows)
        if self.error:
            lines = self.error.splitlines()
            shown = lines if len(lines) <= 24 else [*lines[:2], "...", *lines[-20:]]
            text += "\nerror\n" + "\n".join(f"  {line}" for line in shown)
        return text


def status() -> Status:
    """What runs the writes and why. Loads the extension if no call has yet; never raises.

    Returns:
        A `Status`; printed, a page that people can read.

    Example:
        >>> import paramkit
        >>> paramkit.status().backend in ("cpu", "native")
        True
    """
    import torch

    version, env, on_cuda = str(torch.__version__), loader.settings(), cuda.describe()
    try:
        decision = loader.decide()
    except loader.BackendError as trouble:
        text = str(trouble)
        return Status("none", text.splitlines()[0], version, on_cuda, error=text, env=env)
    extension = decision.extension
    compiled = decision.module if decision.compiled else None
    return Status(
        backend=decision.name,
        why=decision.why,
        torch=version,
        cuda=on_cuda,
        capability=compiled.capability() if compiled else None,
        capabilities=tuple(compiled.capabilities()) if compiled else (),
        binary=str(extension.binary) if extension.binary else None,
        build_log=str(extension.build_log) if extension.build_log else None,
        remedy=None if compiled or extension.binary else decision.remedy,
        error=extension.error,
        env=env,
    )
