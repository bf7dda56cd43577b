"""Sharded models and weight sync on four gloo processes, beside torch's own ways.

``python -m benchmarks.distributed [--quick] [--only CASE] [--out FILE] [--folder FOLDER]``.
"""
