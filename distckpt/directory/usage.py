"""Where the bytes of a checkpoint are: by key, by rank and by element type. Pure: from its index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from distckpt.format.arrow.dtypes import VALUE
from distckpt.format.arrow.index import Index
from distckpt.format.tree.tree import RankStep, decode_path


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of tensors and values: by what is saved at the top (``model``), by the rank that wrote them, by element type.

    Each sums up to the same ``nbytes``. What belongs to single ranks is under the name that they share.
    """

    keys: Counter[str] = field(default_factory=Counter)
    ranks: Counter[int] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)

    @property
    def nbytes(self) -> int:
        """All of them."""
        return self.keys.total()


def usage_of(index: Index, path: str) -> Usage:
    """Of one checkpoint; ``path`` is for errors."""
    size = np.bincount(index.key, weights=index.size, minlength=len(index.names)).astype(np.int64).tolist()
    by_rank = np.bincount(index.rank, weights=index.size).astype(np.int64).tolist()
    usage = Usage(ranks=Counter({rank: nbytes for rank, nbytes in enumerate(by_rank) if nbytes}))
    for text, dtype, nbytes in zip(index.paths, index.dtypes, size, strict=True):
        top = decode_path(text, path)[0]
        usage.keys[f"@{top.rank}" if isinstance(top, RankStep) else str(top)] += nbytes
        usage.dtypes["value" if dtype == VALUE else dtype] += nbytes
    return usage


def summed(usages: Iterable[Usage]) -> Usage:
    """Of several."""
    total = Usage()
    for one in usages:
        for mine, its in ((total.keys, one.keys), (total.dtypes, one.dtypes)):
            mine.update(its)
        total.ranks.update(one.ranks)
    return total
