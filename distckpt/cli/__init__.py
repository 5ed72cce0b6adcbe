"""The ``distckpt`` command: look at checkpoints, check, copy, keep and remove them, from a shell."""

from distckpt.cli.app import main

__all__ = ["main"]
