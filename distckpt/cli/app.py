"""The commands together, and how they end.

Exit status 0: all is well; 1: damage was found; 2: wrong usage, or nothing could be done; 130: interrupted; 141: whoever
read what it printed has gone.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import IO, Any

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


class _Ended(click.ClickException):
    """Has its exit status also where nobody hears the sentence."""

    def show(self, file: IO[Any] | None = None) -> None:
        try:
            click.echo(self.format_message(), file=file, err=True)
        except OSError:
            _let_go_of_output()

    def format_message(self) -> str:
        return f"Error: {self.message}"


class _DamageFound(_Ended):
    exit_code = 1


class _NothingDone(_Ended):
    exit_code = 2


class _Interrupted(_Ended):
    """By Ctrl-C, or by who was asked and would not."""

    exit_code = 130

    def format_message(self) -> str:
        return f"\n{self.message}"  # below the ^C of the terminal


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
            with _warned_once():
                return super().invoke(ctx)
        except DamagedError as error:
            raise _DamageFound(str(error)) from error
        except (DistckptError, ValueError) as error:
            raise _NothingDone(str(error)) from error
        except (KeyboardInterrupt, click.Abort) as error:
            raise _Interrupted("Aborted!") from error
        except OSError as error:
            unprinted = _let_go_of_output() or error.errno == errno.ENOSPC
            if error.errno == errno.EPIPE:
                ctx.exit(141)
            what = error.filename or ("what it prints cannot be written" if unprinted else type(error).__name__)
            raise _NothingDone(f"{what}: {error.strerror or error}") from error


def _let_go_of_output() -> bool:
    """Whether something cannot be printed any more. It goes nowhere.

    Else Python would try once more as it ends, and end with an error and an exit status of its own.
    """
    lost = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            lost = True
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
    return lost


@contextlib.contextmanager
def _warned_once() -> Iterator[None]:
    """Of a log entry that cannot be read people are told once, however often a command reads the log."""
    told: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        before = said in told
        told.add(said)
        return not before

    logger = logging.getLogger("distckpt.directory.chain")  # by name: `distckpt --help` does without what it imports
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="distckpt")
def main() -> None:
    """Look at checkpoints, check, copy, keep and remove them.

    DIR is the directory that a run saves to, such as /shared/run-7 or gs://bucket/run-7. PATH is one checkpoint in it, such
    as /shared/run-7/ckpt-42, or the directory, which means its newest. ls, show, du, diff, stats, plot,
    report, serve and verify only read.
    """
