"""How many ranks share this node: what a rank may take of its memory, processors and network is divided by that."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from typing import Any

TOLD = (
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "JSM_NAMESPACE_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "PMI_LOCAL_SIZE",
    "PALS_LOCAL_SIZE",
)
"""By torchrun, Open MPI, MVAPICH, jsrun, Hydra (MPICH, Intel MPI), Cray's PMI and PALS."""

_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_met = 0


def ranks_here() -> int:
    """How many ranks are on this node, this one included, as far as it is told; else 1.

    The launcher says so, or Ray Train; or the ranks have found out when they made a manager together.
    """
    launched = next(filter(None, map(_number, TOLD)), 0)
    return launched or _told_by_slurm() or _told_by_ray_train() or max(1, _met)


def met(hosts: Iterable[str], host: str) -> None:
    """Every rank has said on which host it is, and this one is on ``host``."""
    global _met
    _met = sum(one == host for one in hosts)


def _told_by_slurm() -> int:
    """Of this step: ``2(x3),1`` are two on each of three nodes, and one on the fourth."""
    node = _number("SLURM_NODEID")
    for count, times in _TASKS.findall(os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        node -= int(times or 1)
        if node < 0:
            return int(count)
    return 0


def _told_by_ray_train() -> int:
    # A Ray Train worker has imported ray.train; anybody else need not pay for the import.
    train: Any = sys.modules.get("ray.train")
    if train is None:
        return 0
    try:
        return int(train.get_context().get_local_world_size() or 0)
    except (RuntimeError, AttributeError):
        return 0  # not inside a training function


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0
