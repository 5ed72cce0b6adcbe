"""A script whose store hangs in its second save, and that closes no manager."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import distckpt.manager
from distckpt.coordinator.shell import shell
from tests.support.hanging import hanging
from tests.support.small_runs import Trainer, mounting


def main(folder: Path, operation: str, path: str) -> None:
    """Save twice, and come to the end."""
    logging.basicConfig()
    distckpt.manager.CLOSE_SECONDS = shell.CLOSE_SECONDS = 0.3
    hang, url = hanging(folder, operation, path)
    trainer = Trainer(url, save_timeout=0.3)
    trainer.saved(1)
    hang.armed = True
    trainer.save(2)
    assert hang.hanging.wait(20)


if __name__ == "__main__":
    with mounting():
        main(Path(sys.argv[1]), *sys.argv[2:])
