"""torch.distributed.checkpoint with our store, shards and commit: a StorageWriter and a StorageReader."""

from distckpt.dcp.reader import Reader
from distckpt.dcp.writer import Writer

__all__ = ["Reader", "Writer"]
