"""Which code runs the writes, and how it came to be: loading, building, status.

>>> from paramkit import backend
>>> backend.status().backend in ("cpu", "native")
True
"""

from __future__ import annotations

# NOTE: [Names] `build`, `staging` and `status` are functions here and also the names of the files that hold
# them. Importing a file binds its name in the package once, when it is first imported; the lines
# below do that now and bind the functions afterwards, so the functions stay.
from paramkit.backend.build import BuildError, build
from paramkit.backend.loader import BackendError, active, force
from paramkit.backend.routes import Trace, trace
from paramkit.backend.staging import staging
from paramkit.backend.status import Status, status

__all__ = [
    "BackendError",
    "BuildError",
    "Status",
    "Trace",
    "active",
    "build",
    "force",
    "staging",
    "status",
    "trace",
]
