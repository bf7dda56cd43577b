"""The suite on builds with sanitizers: ``make sanitize``, or ``python -m tests.sanitize``.

What sanitizers see is memory between allocations, undefined arithmetic and unordered threads. A write that
strays within one storage, into the parameter next to it, they do not see: for that the guard bytes of
``tests/guards.py`` are the oracle, here as everywhere.
"""
