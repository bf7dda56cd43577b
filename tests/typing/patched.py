"""Code that is not to be edited: `patch_torch`."""

import torch
from typing_extensions import assert_type

import paramkit

with paramkit.patch_torch():
    torch.zeros(2).copy_(torch.ones(2))
handle = paramkit.patch_torch()
assert_type(handle.remove(), None)

paramkit.patch_torch(torch.nn.Module)  # error: call-arg
with paramkit.patch_torch() as patched:
    patched.apply()  # error: attr-defined
