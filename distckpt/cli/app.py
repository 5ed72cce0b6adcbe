"""The commands together, and how they end: 0 all is well, 1 damage was found, 2 wrong usage or nothing there."""

from __future__ import annotations

from typing import Any

import click

from distckpt.cli.listing import list_checkpoints
from distckpt.cli.showing import show_checkpoint
from distckpt.cli.verifying import verify_checkpoints
from distckpt.errors import DamagedError, DistckptError

DAMAGE = 1
USAGE = 2


class _Failure(click.ClickException):
    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class _Commands(click.Group):
    """Turns errors that are meant for people into one sentence on stderr and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DamagedError as error:
            raise _Failure(str(error), DAMAGE) from error
        except (DistckptError, ValueError) as error:
            raise _Failure(str(error), USAGE) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="distckpt")
def main() -> None:
    """Look at checkpoints, and check them.

    DIR is the directory that a run saves to, a local path or a URL such as gs://bucket/run-7; PATH is one checkpoint
    in it, such as gs://bucket/run-7/ckpt-42, or the directory, which means its newest. Nothing is ever changed.
    """


main.add_command(list_checkpoints)
main.add_command(show_checkpoint)
main.add_command(verify_checkpoints)
