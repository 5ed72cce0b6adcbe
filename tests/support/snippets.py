"""The programs in the documents, as their readers would run them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.warm import ROOT


def snippets(document: str) -> list[str]:
    """The Python in a document, ``docs/hooks.md``, in order."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def play(
    document: str, number: int, names: Mapping[str, Any], here: Path | None = None, told: Mapping[str, str] = {}
) -> dict[str, Any]:
    """Run a snippet, which finds these names; all names afterwards.

    Its places, ``/shared/`` and ``gs://bucket/``, are folders ``here``, and ``told`` says what stands in the place of text
    that leaves something open, or that would not end.
    """
    source = snippets(document)[number]
    for place in ("/shared/", "gs://bucket/", "/models/"):
        source = source.replace(place, f"{here}/")
    for text, instead in told.items():
        assert text in source, f"{document} has no {text!r} in snippet {number}"
        source = source.replace(text, instead)
    found = {"__name__": "snippet", **names}
    exec(compile(source, f"{document}, snippet {number}", "exec"), found)  # noqa: S102 - what a reader would run
    return found
