"""Sharded models and weight sync on torch.distributed: process groups, device meshes, DTensors."""

from .buckets import Bucket, Entry
from .errors import SyncError
from .sync import Sync, SyncReport
from .transfer import Transfer, plan, transplant

__all__ = ["Bucket", "Entry", "Sync", "SyncError", "SyncReport", "Transfer", "plan", "transplant"]
