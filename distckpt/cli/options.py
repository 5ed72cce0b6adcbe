"""What several commands take."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])


def as_json(command: _Command) -> _Command:
    """``--json``: for programs instead of people."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, with sizes in bytes and epoch seconds.")(
        command
    )


def storage_options(command: _Command) -> _Command:
    """``-o key=value``, any number of them, for the store; and ``--data URL``, which is one of them."""
    with_data = click.option(
        "--data",
        metavar="URL",
        callback=_noted,
        expose_value=False,
        help="Where the shards are, if the manager was given data=URL.",
    )(command)
    return click.option(
        "-o",
        "storage_options",
        metavar="KEY=VALUE",
        multiple=True,
        callback=_parsed,
        help="An option for the store, such as token=anon; may be repeated.",
    )(with_data)


def _parsed(ctx: click.Context, parameter: click.Parameter, pairs: tuple[str, ...]) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{pair!r} is not KEY=VALUE", ctx, parameter)
        options[key] = _value(text)
    return {**options, **ctx.params.get(parameter.name or "", {})}


def _noted(ctx: click.Context, _: click.Parameter, url: str | None) -> None:
    """Among the storage options, whichever of the two comes first."""
    if url is not None:
        ctx.params["storage_options"] = {**ctx.params.get("storage_options", {}), "data": url}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
