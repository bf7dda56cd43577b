"""Benchmarks: named cases -> interleaved measurements -> JSON -> table.

``python -m benchmarks`` measures, ``python -m benchmarks.table RESULT.json`` prints Markdown.
"""
