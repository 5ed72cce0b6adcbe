"""Errors as text, and back: how rank 0 tells the others what it met, where there is no coordinator to tell them.

Not pickled: what ranks share before a coordinator is there goes through torch's store, which anybody can reach who
reaches its port.
"""

from __future__ import annotations

import json
from typing import Any

from distckpt import errors
from distckpt.errors import CoordinatorError, DistckptError


def to_text(error: DistckptError) -> str:
    """Everything that the error says."""
    return json.dumps([type(error).__name__, _plain(error.args), _plain(vars(error))])


def from_text(text: str) -> DistckptError:
    """The same error again; a CoordinatorError if its class is none of ours."""
    name, args, fields = json.loads(text)
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, DistckptError)):
        return CoordinatorError(*_typed(args))
    error = kind.__new__(kind)
    error.args = _typed(args)
    vars(error).update(_typed(fields))
    return error


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, list):
        return {"list": [_plain(item) for item in value]}
    if isinstance(value, dict):
        return {"items": [[_plain(key), _plain(item)] for key, item in value.items()]}
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _typed(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_typed(item) for item in value)
    if isinstance(value, dict) and "list" in value:
        return [_typed(item) for item in value["list"]]
    if isinstance(value, dict):
        return {_typed(key): _typed(item) for key, item in value["items"]}
    return value
