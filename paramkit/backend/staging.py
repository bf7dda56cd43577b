"""How much pinned memory copies between host and device go through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from paramkit.backend import loader

__all__ = ["staging"]


@contextmanager
def staging(total: int) -> Iterator[None]:
    """Other bytes than usual for the pinned memory of transfers, for the duration of a block.

    The memory is three slots, each the largest power of two of which three fit, pinned at the first transfer
    that needs them and kept: pinning takes longer than copying. torch keeps slots of another size for later
    uses of pinned memory. It holds for the whole process, all threads included. Without the extension
    it means nothing.

    Args:
        total: bytes of all slots together, at least 12,288; 96 MiB if nothing is said here or in
            PARAMKIT_STAGING_BYTES.

    Yields:
        Nothing.

    Raises:
        TypeError: ``total`` is no int.
        ValueError: ``total`` is too small.

    Example:
        >>> from paramkit import backend
        >>> with backend.staging(384 << 20):
        ...     pass  # copies from pageable memory to the GPU
    """
    if not isinstance(total, int) or isinstance(total, bool):
        raise TypeError(f"staging: expected a number of bytes, got {type(total).__name__}")
    if total < 3 * 4096:
        raise ValueError(f"staging: got {total} bytes, expected at least {3 * 4096}")
    module = loader.active()
    change = getattr(module, "set_staging_bytes", None)
    if change is None:
        yield
        return
    before = change(total)
    try:
        yield
    finally:
        change(before)
