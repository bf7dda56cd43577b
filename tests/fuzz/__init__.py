"""Seeded random lists of writes, on every backend against torch; and the C++ core against plain loops."""
