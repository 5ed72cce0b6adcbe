"""A run that measures itself and is killed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from distckpt.rank import chronicle
from tests.support.small_runs import Trainer


def train_until_killed(say: Callable[[Any], None], directory: str) -> None:
    """Restore, save 1, and train on without another save; says how long it had saved when it goes on."""
    chronicle.FIRST_SECONDS = chronicle.EVERY_SECONDS = 0.02
    trainer = Trainer(directory)
    trainer.manager.restore_or_initialize()
    say("begins")
    trainer.saved(1)
    say("saved")
    while True:
        time.sleep(0.01)
