"""The ``distckpt`` command: look at checkpoints, and check them, from a shell."""

from distckpt.cli.app import main

__all__ = ["main"]
