"""The documentation site has every document and every public name; `make docs` checks its links."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import distckpt

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def referenced() -> list[str]:
    pages = sorted((DOCS / "reference").glob("*.md"))
    return [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]


def test_what_the_reference_names_is_there() -> None:
    """A module, or a name that its module says, none of which is imported: some need a library that forks badly."""
    for name in referenced():
        home, _, last = name.rpartition(".")
        module = find_spec(home)
        assert module is not None, name
        assert module.origin is not None, name
        said = re.search(rf"\b{last}\b", Path(module.origin).read_text())
        assert said or find_spec(name), name


def test_every_public_name_is_in_the_reference() -> None:
    known = set(referenced())
    public = {name: getattr(distckpt, name) for name in distckpt._HOMES}
    lost = [
        name
        for name, value in public.items()
        if value.__module__ not in known and f"{value.__module__}.{value.__name__}" not in known
    ]
    assert lost == []


def test_every_document_is_on_the_site() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    documents = [*DOCS.glob("*.md"), *(DOCS / "reference").glob("*.md")]
    assert [path.name for path in documents if f" {path.relative_to(DOCS)}\n" not in menu] == []
