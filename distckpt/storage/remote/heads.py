"""The head of a request, as it goes out, or what is wrong with what should be in it."""

from __future__ import annotations

import re
from collections.abc import Mapping

_NEVER = re.compile(r"[\r\n\0]|[^\x00-\xff]")
_SECRETS = {"authorization", "x-amz-security-token"}


def head_of(method: str, target: str, base: str, fields: Mapping[str, str]) -> bytes:
    """The lines for ``method`` at ``base`` with ``target`` behind it, and an empty one.

    ValueError for what would be another request than it seems, which names the header: its value may be a secret.
    """
    if _NEVER.search(f"{method}{base}{target}") or " " in target:
        raise ValueError(f"not a request that can be sent: {method} {target!r}")
    for name, value in fields.items():
        if _NEVER.search(f"{name}{value}"):
            advice = ": look at the key or token, of which a file's last line end may be a part"
            raise ValueError(
                f"{method} {target!r} is not a request that can be sent: its header {name!r} has a line break or a "
                f"character in it that no header holds{advice if name.lower() in _SECRETS else ''}"
            )
    lines = (f"{method} {base}{target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()))
    return "\r\n".join((*lines, "", "")).encode("latin-1")
