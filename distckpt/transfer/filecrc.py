"""The CRC32C of a whole shard from the CRC32C of each of its rows, without a second look at the bytes.

A CRC is a remainder of polynomials over one bit, so what ``n`` bytes behind a part do to its CRC is a multiplication
by x to the power 8n. For a layout these factors never change.
"""

from __future__ import annotations

import functools

import crc32c
import numpy as np

from distckpt.format.arrays import Crcs, Ints
from distckpt.format.arrow.shard import ShardImage

_POLYNOMIAL = 0x82F63B78  # Castagnoli, bit 31 is x to the power 0
_ONE, _X8 = 1 << 31, 1 << 23


class FileCrc:
    """The CRC32C of the shard files of one layout."""

    def __init__(self, image: ShardImage) -> None:
        fixed_crcs = np.array([crc32c.crc32c(text) for _, text in image.fixed], dtype=np.uint32)
        fixed_ends = np.array([position + len(text) for position, text in image.fixed], dtype=np.int64)
        self._fixed = _fold(_table(_factors(image.size - fixed_ends)), fixed_crcs)
        # A row's CRC counts twice: for the payload it is of, and as the four bytes that it is itself written as.
        behind_payload = _factors(image.size - image.positions - image.sizes)
        self._rows = _table(behind_payload ^ _factors(image.size - image.crc_positions))

    def of(self, row_crcs: Crcs) -> int:
        """The file's CRC32C when its rows, in order, have these."""
        return self._fixed ^ _fold(self._rows, row_crcs)


def _factors(nbytes: Ints) -> Crcs:
    """x to the power 8n for every n."""
    factors = np.full(len(nbytes), _ONE, dtype=np.uint32)
    for bit in range(int(nbytes.max(initial=0)).bit_length()):
        chosen = (nbytes >> bit) & 1 == 1
        factors[chosen] = _products(_powers()[bit], factors[chosen])
    return factors


@functools.cache
def _powers() -> Crcs:
    """The tables of x to the power 8, 16, 32, 64 and so on."""
    tables = [_table(np.array([_X8], dtype=np.uint32))]
    while len(tables) < 63:
        tables.append(_table(_products(tables[-1], tables[-1][:, 31])))
    return np.concatenate(tables)


def _table(factors: Crcs) -> Crcs:
    """For each factor its products with the 32 CRCs that have one bit set."""
    table = np.empty((len(factors), 32), dtype=np.uint32)
    table[:, 31] = factors
    for bit in range(31, 0, -1):
        before = table[:, bit]
        table[:, bit - 1] = (before >> np.uint32(1)) ^ (before & np.uint32(1)) * np.uint32(_POLYNOMIAL)
    return table


def _fold(table: Crcs, crcs: Crcs) -> int:
    """The sum (XOR) of each CRC times its factor."""
    return int(np.bitwise_xor.reduce(_products(table, crcs)))


def _products(table: Crcs, crcs: Crcs) -> Crcs:
    """Each CRC times its factor, or all times the same one if the table has one row."""
    bits = (crcs[:, np.newaxis] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    products: Crcs = np.bitwise_xor.reduce(table * bits, axis=1)
    return products
