"""What the documents say of the code exists: files, folders, names, commands, links and snippets."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import distckpt
from tests.house.source import PACKAGE, ROOT, modules

DOCUMENTS = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "changes").glob("*.md"))
    if path.is_file()
)
OF_OTHERS = {
    "README.md",
    "CHANGELOG.md",
    "coming-from-accelerate.md",
    "coming-from-dcp.md",
    "coming-from-files.md",
    "coming-from-lightning.md",
    "coming-from-orbax.md",
    "coming-from-pytorch.md",
    "coming-from-ray-train.md",
    "coming-from-tensorflow.md",
    "coming-from-transformers.md",
    "comparison.md",
    "integrations.md",
    "quantization.md",
    "what-is-saved.md",
}
OF_THE_CODE = [path for path in DOCUMENTS if path.name not in OF_OTHERS or path.parent.name == "decisions"]
"""Those in which all names in code letters are ours, so that each is looked up."""

MOST_README_LINES = 150
DECISION = ("## Context", "## Decision", "## Consequences", "## Rejected")

FOREIGN = {
    "torch",
    "dcp",
    "os",
    "http",
    "ray",
    "DTensor",
    "FullyShardedDataParallel",
    "ModelCheckpoint",
    "Trainer",
    "TrainingArguments",
    "CheckpointState",
    "None",
}
"""What such a name may begin with that is not ours."""

HOMES = ("collections", "datetime", "pathlib", "random", "numpy.random")
"""Where the types of others live that documents name by themselves: `PurePosixPath`, `Philox`."""

FILES = (".py", ".md", ".toml", ".yaml", ".json", ".arrow", ".txt", ".pt2", ".safetensors", ".svg", ".png")


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def prose(path: Path) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def code(path: Path) -> list[str]:
    """What stands in code letters."""
    return re.findall(r"`([^`\n]+)`", prose(path))


def fenced(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)


@cache
def names() -> frozenset[str]:
    """Every module, class, function, method and constant, by its full name and by all that it ends with."""
    full = set()
    for module, tree in modules().items():
        full |= {module, *(f"{module}.{name}" for name in (*_defined(tree), *_handed_on(module, tree)))}
    full |= {f"distckpt.{name}" for name in dir(distckpt)}
    parts = [name.split(".") for name in full]
    return frozenset(".".join(part[at:]) for part in parts for at in range(len(part)))


def _handed_on(module: str, tree: ast.Module) -> Iterator[str]:
    """What a package has of its modules, under its own name."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{module}."):
            yield from (alias.name for alias in node.names)


def _defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name
            yield from (f"{node.name}.{inner}" for inner in _defined(node))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def is_foreign(name: str) -> bool:
    """Whether it is a name of Python's, NumPy's or of another package that documents speak of."""
    first, _, rest = name.partition(".")
    if first in FOREIGN or (not rest and any(hasattr(import_module(home), first) for home in HOMES)):
        return True
    return first in HOMES and hasattr(import_module(first), rest)


def anchors(path: Path) -> set[str]:
    """The headings, as links name them."""
    titles = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=shown)
def test_every_link_leads_somewhere(path: Path) -> None:
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(path))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            lost.append(target)
    assert lost == []


@pytest.mark.parametrize("path", OF_THE_CODE, ids=shown)
def test_every_file_and_folder_that_is_named_exists(path: Path) -> None:
    ours = {each.name for where in (ROOT, PACKAGE) for each in where.iterdir() if each.is_dir()}
    lost = []
    for text in code(path):
        inside = "/" in text and text.split("/")[0] in ours
        if not re.fullmatch(r"[\w./-]+", text) or not (text.endswith(".py") or inside):
            continue
        if not any((where / text).exists() for where in (ROOT, PACKAGE)):
            lost.append(text)
    assert lost == []


@pytest.mark.parametrize("path", OF_THE_CODE, ids=shown)
def test_every_name_of_the_code_exists(path: Path) -> None:
    lost = []
    for text in code(path):
        name = text.removesuffix("()")
        dotted = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name) and not name.endswith(FILES)
        a_class = re.fullmatch(r"[A-Z][a-z]+\w*", name)
        if (dotted or a_class) and not is_foreign(name) and name not in names():
            lost.append(text)
    assert lost == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=shown)
def test_every_public_name_in_a_document_is_public(path: Path) -> None:
    public = {*dir(distckpt), *(name.split(".")[1] for name in modules() if "." in name)}
    used = re.findall(r"\bdistckpt\.([A-Za-z_]\w*)", path.read_text())
    assert sorted({name for name in used if name not in public}) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=shown)
def test_snippets_are_python(path: Path) -> None:
    for snippet in fenced(path, "python"):
        ast.parse(snippet)


@pytest.mark.parametrize("path", DOCUMENTS, ids=shown)
def test_every_target_of_make_exists(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL))
    used = {text.split()[1] for text in code(path) if re.match(r"make [a-z]", text)}
    used |= set(re.findall(r"^make ([a-z-]+)", blocks, flags=re.MULTILINE))
    assert sorted(used - targets) == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_README_LINES


def test_the_architecture_describes_every_folder_and_no_other() -> None:
    rows = re.findall(r"^\| `([\w/]+/)` \|", (ROOT / "docs" / "ARCHITECTURE.md").read_text(), flags=re.MULTILINE)
    folders = {f"{path.parent.relative_to(PACKAGE)}/" for path in PACKAGE.rglob("__init__.py")} - {"./"}
    assert sorted(rows) == sorted(folders)


def test_the_architecture_has_the_floors_that_are_tested() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    written = re.findall(r"^\d+\. ((?:`\w+`(?:, )?)+)$", text, flags=re.MULTILINE)
    tree = ast.parse((ROOT / "tests" / "house" / "test_layers.py").read_text())
    floors = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS"
    )
    assert [tuple(re.findall(r"\w+", line)) for line in written] == list(floors)


def test_every_decision_says_what_it_must_and_is_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    pages = sorted(path for path in folder.glob("*.md") if path.name != "README.md")
    for page in pages:
        headings = re.findall(r"^## .+$", page.read_text(), flags=re.MULTILINE)
        assert headings == list(DECISION), page.name
    listed = re.findall(r"\]\((\d\d-[\w-]+\.md)\)", (folder / "README.md").read_text())
    assert listed == [page.name for page in pages]


def test_fragments_of_the_changelog_have_a_kind() -> None:
    kinds = re.findall(r'^    \{ directory = "(\w+)", name', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    described = re.findall(r"^\| `(\w+)` \|", (ROOT / "changes" / "README.md").read_text(), flags=re.MULTILINE)
    found = {path.name for path in (ROOT / "changes").iterdir()} - {"README.md"}
    assert kinds == described
    assert sorted(name for name in found if not re.fullmatch(rf"\+[a-z0-9-]+\.({'|'.join(kinds)})\.md", name)) == []
