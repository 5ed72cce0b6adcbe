"""What stands under a tag: the few shapes that it may have. ValueError for any other."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Sequence
from typing import Any

Write = Callable[[Any, Any], Any]
"""Given a part of a value and the step that leads to it, the JSON that stands for the part."""

WriteAll = Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]
"""The same for many parts of a value, and the steps that lead to them."""

HERE = object()
"""The step from a value to itself as another type."""

Read = Callable[[Any], Any]
"""Given JSON, the value that it stands for."""


def list_in(content: Any, length: int | None = None) -> list[Any]:
    """A list, of that length if one is given."""
    if type(content) is not list or (length is not None and len(content) != length):
        raise ValueError(f"a list of {'any number of' if length is None else length} items is expected")
    return content


def text_in(content: Any, pattern: re.Pattern[str] | None = None) -> str:
    """A str, all of which the pattern matches."""
    if type(content) is not str or (pattern is not None and not pattern.fullmatch(content)):
        raise ValueError("a str of another form is expected")
    return content


def int_in(content: Any, least: int, most: int) -> int:
    """An int between the two."""
    if type(content) is not int or not least <= content <= most:
        raise ValueError(f"an int from {least} to {most} is expected")
    return content


def bytes_in(content: Any) -> bytes:
    """The bytes that a str says in base64."""
    return base64.b64decode(text_in(content), validate=True)


def as_text(data: bytes) -> str:
    """The bytes in base64."""
    return base64.b64encode(data).decode()
