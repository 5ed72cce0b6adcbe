"""For the site: links that lead out of docs/, as people follow them in the repository, lead to copies in the site.

A document that is linked becomes a page, with its own links followed likewise, and any other file a page that shows it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS, COPIES = "docs", "repository"
LINK = re.compile(r"(\]\()([^)\s:#]+)(#[^)\s]*)?(\))")
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages for what is linked from docs/ and lies outside of it, and for what these link."""
    waiting = [f"{DOCS}/{file.src_uri}" for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if not path.endswith(".md"):
            continue
        for target in linked(path):
            if target not in seen and not target.startswith(f"{DOCS}/"):
                seen.add(target)
                waiting.append(target)
                files.append(File.generated(config, copy_of(target), content=content(target)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """With the links of the repository as links of the site."""
    here = page.file.src_uri
    path = here.removeprefix(f"{COPIES}/") if here.startswith(f"{COPIES}/") else f"{DOCS}/{here}"
    if not path.endswith(".md") or path.endswith(shown_suffixes()):
        return markdown

    def followed(match: re.Match[str]) -> str:
        target = resolved(path, match[2])
        return f"{match[1]}{posixpath.relpath(copy_of(target), posixpath.dirname(here))}{match[3] or ''}{match[4]}"

    return outside_code(markdown, followed)


def shown_suffixes() -> tuple[str, ...]:
    """How the names of pages end that show a file."""
    return tuple(f"{suffix}.md" for suffix in LANGUAGES)


def copy_of(path: str) -> str:
    """Where in the site a file of the repository is."""
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    return f"{COPIES}/{path}" if path.endswith(".md") else f"{COPIES}/{path}.md"


def content(path: str) -> str:
    """A document as it is, a folder as a list of what it has, another file as a page that shows it."""
    if (ROOT / path).is_dir():
        names = sorted(each.name for each in (ROOT / path).iterdir() if not each.name.startswith(("_", ".")))
        return "\n".join([f"# {path}", "", *(f"- `{name}`" for name in names), ""])
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        return text
    return f"# {path}\n\n```{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}```\n"


def linked(path: str) -> set[str]:
    """Files of the repository that a document of it links."""
    found: set[str] = set()

    def note(match: re.Match[str]) -> str:
        found.add(resolved(path, match[2]))
        return match[0]

    outside_code((ROOT / path).read_text(), note)
    return found


def resolved(path: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def outside_code(markdown: str, change: object) -> str:
    """``markdown`` with each link changed that does not stand in code letters."""
    parts, at = [], 0
    for code in CODE.finditer(markdown):
        parts += [LINK.sub(change, markdown[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*parts, LINK.sub(change, markdown[at:])])
