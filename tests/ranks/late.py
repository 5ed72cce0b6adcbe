"""Rank functions in which one rank keeps the others waiting."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.distributed as dist

import distckpt
from tests.support.small_runs import until


class _Kept(logging.Handler):
    """Keeps what is logged, and leaves a file behind when it is a warning."""

    def __init__(self, sign: Path) -> None:
        super().__init__(logging.INFO)
        self.texts: list[str] = []
        self._sign = sign

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(f"{record.levelname} {record.getMessage()}")
        if record.levelno >= logging.WARNING:
            self._sign.touch()


def save_late(directory: str, late: int) -> list[str]:
    """Rank ``late`` saves once another has complained; what each has logged."""
    sign = Path(directory) / "complained"
    logger, kept = logging.getLogger("distckpt"), _Kept(sign)
    level = logger.level
    logger.setLevel(logging.INFO)
    checkpoint = distckpt.Checkpoint(a=torch.ones(1000))
    with distckpt.CheckpointManager(checkpoint, f"{directory}/run", save_timeout=20.0) as manager:
        manager.prepare()
        logger.addHandler(kept)
        if dist.get_rank() == late:
            assert until(sign.exists, 19.0)
        pending = manager.save(1)
        assert pending is not None
        pending.result(60)
        logger.removeHandler(kept)
    logger.setLevel(level)
    return kept.texts
