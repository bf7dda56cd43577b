"""Sources: whatever holds values, opened as named tensors.

A module, a mapping, a `.safetensors` file, a checkpoint of torch.save, or many files by their index or
folder: all become a dict of tensors. Opening a file reads its header. Its tensors are `Stored`, read by
offset when they are written elsewhere, or views of the memory-mapped file.
"""

from .lazy import Lazy, Stored, StoredFile
from .module import module_tensors
from .opening import open_source

__all__ = ["Lazy", "Stored", "StoredFile", "module_tensors", "open_source"]
