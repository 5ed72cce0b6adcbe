"""Keys as text: which of them one text stands for. The language of ``select``, ``rename`` and ``exclude``."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator


def is_below(key: str, text: str) -> bool:
    """Whether ``key`` is ``text``, or begins with it up to a ``.`` or ``@``."""
    return key == text or key.startswith((f"{text}.", f"{text}@"))


def beginnings(key: str) -> Iterator[str]:
    """All that ``is_below`` has the key below, the longest first: itself, and what it begins with up to ``.`` or ``@``."""
    yield key
    yield from (key[:at] for at in range(len(key) - 1, -1, -1) if key[at] in ".@")


def is_among(key: str, texts: Collection[str]) -> bool:
    """Whether the key is below one of the ``texts``, of which there may be very many."""
    return bool(texts) and any(text in texts for text in beginnings(key))


def without_rank(key: str) -> str:
    """The key of what belongs to one rank, as it is on all of them: ``loader.cursor`` for ``loader@3.cursor``."""
    name, at, rest = key.partition("@")
    rank, dot, inside = rest.partition(".")
    return f"{name}{dot}{inside}" if at and "." not in name and rank.isdecimal() else key


def hint(key: str, known: Collection[str]) -> str:
    """``; did you mean ...?`` with up to three of the ``known`` keys that look like it; empty if none does."""
    close = difflib.get_close_matches(key, _with_prefixes(known), n=3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _with_prefixes(keys: Iterable[str]) -> list[str]:
    found = dict.fromkeys(keys)
    for key in list(found)[:10_000]:
        top = key.replace("@", ".").partition(".")[0]
        found.setdefault(top)
    return list(found)[:20_000]
