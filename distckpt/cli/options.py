"""What several commands take."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import click

from distckpt.errors import CheckpointNotFoundError
from distckpt.storage import canonical

_Command = TypeVar("_Command", bound=Callable[..., Any])

_WHERE_SHARDS_ARE = "Where the shards are, if the manager was given data=URL."

_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def as_json(command: _Command) -> _Command:
    """``--json``: for programs instead of people."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, with sizes in bytes and epoch seconds.")(
        command
    )


def seconds(ctx: click.Context, parameter: click.Parameter, value: str) -> float:
    """Callback for an age: ``90``, ``30m``, ``12h`` or ``7d``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is no age, such as 30m, 12h or 7d", ctx, parameter)
    return float(found[1]) * _SECONDS[found[2]]


def optional_seconds(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """As ``seconds``, or None if it is not given."""
    return None if value is None else seconds(ctx, parameter, value)


def storage_options(command: _Command) -> _Command:
    """``-o key=value``, any number of them, for the store; and ``--data URL``, which is one of them."""
    return _with_data(source_options(command), "--data", "storage_options", _WHERE_SHARDS_ARE)


def source_options(command: _Command) -> _Command:
    """``-o key=value`` alone, for a store that never has shards in another place."""
    return _options_of(_explaining(command), "-o", "storage_options", "the store")


def storage_options_in_full(command: _Command) -> _Command:
    """The same as ``--option key=value``, for a command whose ``-o`` is the output."""
    with_options = _options_of(_explaining(command), "--option", "storage_options", "the store")
    return _with_data(with_options, "--data", "storage_options", _WHERE_SHARDS_ARE)


def _explaining(command: _Command) -> _Command:
    """Says what is at a path at which nothing was found: a checkpoint for a directory, a typo, a file of others."""

    @functools.wraps(command)
    def explained(*args: Any, **arguments: Any) -> Any:
        try:
            return command(*args, **arguments)
        except CheckpointNotFoundError as error:
            if "`distckpt adopt " in error.message:  # then that is said already
                raise
            from distckpt.directory.recognize import what_is  # only who is lost waits for its imports

            what = what_is(error.path, arguments.get("storage_options")) if error.path in _paths(arguments) else ""
            if not what:
                raise
            raise CheckpointNotFoundError(error.path, f"{error.message}; {what}") from error

    return cast(_Command, explained)


def _paths(arguments: Mapping[str, Any]) -> set[str]:
    """What of the arguments may be a path, as it was given and as it is said: errors speak of other things too."""
    given = {
        each
        for value in arguments.values()
        for each in (value if isinstance(value, tuple) else (value,))
        if isinstance(each, str) and each
    }
    spelt = set()
    for path in given:
        with contextlib.suppress(ValueError):
            spelt.add(canonical(path))
    return given | spelt


@contextlib.contextmanager
def told_in_words() -> Iterator[None]:
    """Inside, an unknown key is told as other errors are that are meant for people."""
    try:
        yield
    except KeyError as error:
        raise ValueError(error.args[0]) from error


def destination_options(command: _Command) -> _Command:
    """``--to-option key=value`` and ``--to-data URL``, where ``-o`` and ``--data`` are for the source."""
    where = "Where to put the shards, if not in DST."
    return _with_data(target_options(command), "--to-data", "destination_options", where)


def target_options(command: _Command) -> _Command:
    """``--to-option key=value`` alone, for a destination that has no shards."""
    return _options_of(command, "--to-option", "destination_options", "the store of the destination")


def _options_of(command: _Command, flag: str, name: str, whose: str) -> _Command:
    return click.option(
        flag,
        name,
        metavar="KEY=VALUE",
        multiple=True,
        callback=_parsed,
        help=f"An option for {whose}, such as token=anon; may be repeated.",
    )(command)


def _with_data(command: _Command, flag: str, name: str, what: str) -> _Command:
    def noted(ctx: click.Context, _: click.Parameter, url: str | None) -> None:
        """Among the options of that store, whichever of the two comes first."""
        if url is not None:
            ctx.params[name] = {**ctx.params.get(name, {}), "data": url}

    return click.option(flag, metavar="URL", callback=noted, expose_value=False, help=what)(command)


def _parsed(ctx: click.Context, parameter: click.Parameter, pairs: tuple[str, ...]) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{pair!r} is not KEY=VALUE", ctx, parameter)
        options[key] = _value(text)
    return {**options, **ctx.params.get(parameter.name or "", {})}


def _value(text: str) -> Any:
    """JSON, or True and False as Python has them, or else the text."""
    if text in ("True", "False"):
        return text == "True"
    try:
        return json.loads(text)
    except ValueError:
        return text
