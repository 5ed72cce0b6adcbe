"""NumPy arrays by what they hold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Crcs = npt.NDArray[np.uint32]
"""CRC32Cs, and the polynomials that turn one into another."""
