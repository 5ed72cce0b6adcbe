"""What a rank writes under one plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from distckpt.coordinator.messages import Planned
from distckpt.format.arrow.shard import Chunk
from distckpt.state.collector import Holding


@dataclass(frozen=True, slots=True)
class Layout:
    """Which rows of the description with this ``digest`` the rank writes, as the plan says: tensors and plain values."""

    digest: str
    plan: str
    rows: tuple[int, ...]
    tensor_rows: tuple[int, ...]
    value_rows: tuple[int, ...]

    def chunks(self, holding: Holding) -> list[Chunk]:
        """All of them as chunks, in the order in which they are written."""
        held = [holding.rows[row] for row in self.rows]
        return [Chunk(row.key, row.dtype, row.shape, row.offset, row.length, row.nbytes) for row in held]

    def tensors(self, holding: Holding) -> list[torch.Tensor]:
        """What is copied into the chunks of tensors."""
        return [source for row in self.tensor_rows if (source := holding.sources[row]) is not None]

    def values(self, holding: Holding) -> list[bytes]:
        """What is copied into the chunks of values."""
        return [holding.values[row] or b"" for row in self.value_rows]

    def encoded_rows(self) -> bytes:
        """The rows as a coordinator takes them."""
        return np.asarray(self.rows, dtype="<i4").tobytes()


def layout_of(digest: str, planned: Planned, holding: Holding) -> Layout:
    """What this rank writes of ``holding``, whose description has this digest."""
    rows = tuple(np.frombuffer(planned.rows, dtype="<i4").tolist())
    tensors = tuple(row for row in rows if holding.sources[row] is not None)
    values = tuple(row for row in rows if holding.values[row] is not None)
    return Layout(digest, planned.plan, rows, tensors, values)
