"""The commands together, and how they end: 0 all is well, 1 damage was found, 2 wrong usage, or nothing could be done."""

from __future__ import annotations

import importlib
from typing import Any

import click

from distckpt.errors import DamagedError, DistckptError

_HOMES = {
    "ls": ("listing", "list_checkpoints"),
    "show": ("showing", "show_checkpoint"),
    "du": ("measuring", "measure"),
    "diff": ("differing", "compare_checkpoints"),
    "stats": ("costing", "show_stats"),
    "plot": ("plotting", "plot"),
    "verify": ("verifying", "verify_checkpoints"),
    "adopt": ("adopting", "adopt_checkpoints"),
    "import": ("importing", "import_files"),
    "export": ("exporting", "export_files"),
    "cp": ("copying", "copy_checkpoints"),
    "doctor": ("examining", "examine_place"),
    "pin": ("pinning", "pin_checkpoint"),
    "unpin": ("pinning", "unpin_checkpoint"),
    "tag": ("pinning", "tag_checkpoint"),
    "untag": ("pinning", "untag_checkpoint"),
    "rm": ("removing", "remove_checkpoints"),
    "gc": ("collecting", "collect"),
    "watch": ("watching", "watch_directory"),
    "groups": ("grouping", "groups"),
    "report": ("reporting", "write_report"),
    "serve": ("reporting", "serve_page"),
}


class _DamageFound(click.ClickException):
    exit_code = 1


class _NothingDone(click.ClickException):
    exit_code = 2


class _Commands(click.Group):
    """Imports a command when it is asked for, so that ``ls`` need not wait for what ``show`` needs.

    Errors that are meant for people become one sentence on stderr and an exit status.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_HOMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _HOMES:
            return None
        module, name = _HOMES[cmd_name]
        command: click.Command = getattr(importlib.import_module(f"distckpt.cli.{module}"), name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DamagedError as error:
            raise _DamageFound(str(error)) from error
        except (DistckptError, ValueError) as error:
            raise _NothingDone(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="distckpt")
def main() -> None:
    """Look at checkpoints, check, copy, keep and remove them.

    DIR is the directory that a run saves to, such as /shared/run-7 or gs://bucket/run-7. PATH is one checkpoint in it, such
    as /shared/run-7/ckpt-42, or the directory, which means its newest. ls, show, du, diff, stats, plot,
    report, serve and verify only read.
    """
