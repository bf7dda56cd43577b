"""Benchmarks on a GPU: lists, permutes, fills and transfers beside torch, in one process.

``python -m benchmarks.gpu`` measures, ``python -m benchmarks.gpu.table RESULT.json`` prints the table.
``benchmarks/gpu.sh`` does all that a result needs, from the build on.

Everything but `device.Gpu` works without a GPU, on tiny tensors of the CPU: so it is tested.
"""
