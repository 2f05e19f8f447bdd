"""ResQ checkpoints on disk: tensor names and shapes, the sharded writer, the validating reader."""

from offline.pack.reader import ResQCheckpoint
from offline.pack.tensors import linear_from_tensors, linear_tensors
from offline.pack.writer import CheckpointWriter

__all__ = ["CheckpointWriter", "ResQCheckpoint", "linear_from_tensors", "linear_tensors"]
