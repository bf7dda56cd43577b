"""What runs the writes: asking, forcing, counting."""

from pathlib import Path

from typing_extensions import assert_type

import paramkit
from paramkit import backend

status = paramkit.status()
assert_type(status, backend.Status)
assert_type(status.backend, str)
assert_type(status.remedy, str | None)
assert_type(status.capabilities, tuple[str, ...])
with backend.force("cpu:avx2"):
    pass
with backend.trace() as trace:
    assert_type(trace, backend.Trace)
assert_type(trace.routes, dict[str, int])
with backend.staging(96 << 20):
    pass
try:
    assert_type(backend.build(verbose=False, force=True), Path)
except backend.BuildError as error:
    print(error)

status.backend = "cpu"  # error: misc
backend.force(1)  # error: arg-type
backend.staging("1 MiB")  # error: arg-type
