"""The package as text: its modules, parsed, and what each of them imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "distckpt"


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package, parsed."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """The full name of everything that is imported anywhere below."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_when_imported(tree: ast.AST) -> Iterator[str]:
    """As ``imports``, without those inside functions and those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)
        yield from imports_when_imported(node)


def part(name: str) -> str:
    """Of ``distckpt.transfer.reader`` it is transfer."""
    return name.split(".")[1] if "." in name else ""


def users(package: str) -> set[str]:
    """The modules that import anything of a third party's package."""
    return {
        name
        for name, tree in modules().items()
        if any(used == package or used.startswith(f"{package}.") for used in imports(tree))
    }


def file_of(name: str) -> Path:
    """Where a module is."""
    path = ROOT / Path(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def modules_of_tests() -> dict[str, ast.Module]:
    """Every module below ``tests``, parsed."""
    folder = ROOT / "tests"
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text(), str(path))
        for path in sorted(folder.rglob("*.py"))
    }
