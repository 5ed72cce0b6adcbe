"""What options of stores may be: each is what it says, or refused by its name, and no secret is shown on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, quote_plus, unquote

WHERE = "storage_options"


def flag(given: Mapping[str, Any], name: str, *, default: bool = False, where: str = WHERE) -> bool:
    """Whether the option is on; None is as if it were not given. ValueError for what only looks like an answer."""
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{where}: {name} is True or False, not {value!r}")
    return default if value is None else value


def positive(given: Mapping[str, Any], name: str, default: float) -> float:
    """A number above 0; None is as if it were not given."""
    value = given.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{WHERE}: {name} is a number above 0, not {value!r}")
    return float(value)


def whole(given: Mapping[str, Any], name: str, default: int) -> int:
    """A whole number above 0."""
    value = positive(given, name, default)
    if value % 1:
        raise ValueError(f"{WHERE}: {name} is a whole number above 0, not {value!r}")
    return int(value)


def mapping(given: Mapping[str, Any], name: str, *, where: str = WHERE) -> dict[str, Any]:
    """What the option has in it; nothing if it is None or not given. ValueError if it is no mapping."""
    value = given.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        written = f'; at the command line that is JSON: -o \'{name}={{"option": "value"}}\'' if where == WHERE else ""
        raise ValueError(f"{where}: {name} is a dict, not {type(value).__name__}{written}")  # noqa: TRY004  as all others
    return dict(value)


def in_header(value: Any, name: str, *, where: str = WHERE) -> Any:
    """``value``, which goes out in the head of requests. ValueError if it is a text that cannot: it is not shown."""
    if isinstance(value, str) and not (value.isascii() and value.isprintable() and value == value.strip()):
        raise ValueError(
            f"{where}: {name} has a line break, a space at an end or another character in it that no header holds; "
            "what was read from a file wants .strip(), and tags are written as urllib.parse.quote does it"
        )
    return value


def endpoint_url(url: str | None) -> str | None:
    """``url``. ValueError if it has a user or a password in it: nobody would be told of them."""
    if isinstance(url, str) and "@" in _authority_of(url):
        raise ValueError(
            f"{WHERE}: endpoint_url is {without_password(url)!r}, and who is named before the @ would be ignored: pass "
            "credentials by the options for them"
        )
    return url


def password_of(url: str) -> str:
    """The password that stands in ``url``, between a user and an ``@``, or ''."""
    return _authority_of(url).rpartition("@")[0].partition(":")[2]


def without_password(url: str) -> str:
    """``url`` as it may be shown."""
    password = password_of(url)
    return url.replace(f":{password}@", ":***@", 1) if password else url


def without(text: str, secret: str) -> str:
    """``text`` with stars for ``secret``, however a URL has it."""
    forms = {secret, quote(secret), quote(secret, safe=""), quote_plus(secret), unquote(secret)}
    for form in sorted(filter(None, forms), key=len, reverse=True):
        text = text.replace(form, "***")
    return text


def _authority_of(url: str) -> str:
    return url.partition("://")[2].partition("/")[0]
