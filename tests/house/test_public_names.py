"""What every public name must have, and that nobody changes one by accident."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import distckpt
from tests.house.source import file_of, modules
from tests.support.warm import ROOT

PROMISED = {
    "Checkpoint", "PerRank", "CheckpointManager", "PendingSave", "LoadStatus", "load", "open", "CheckpointReader",
    "latest_checkpoint", "get_checkpoint_state", "update_checkpoint_state", "generate_checkpoint_state_proto",
    "checkpoints_iterator", "wait_for_new_checkpoint", "Coordinator", "LooperThread", "errors",
}  # fmt: skip


def public() -> list[str]:
    """What users may write after ``distckpt.``"""
    return [name for name in dir(distckpt) if not name.startswith("_")]


def test_public_names_are_complete() -> None:
    assert set(dir(distckpt)) >= PROMISED
    assert sorted(distckpt.__all__) == distckpt.__all__
    for_type_checkers = {
        alias.asname
        for node in ast.walk(modules()["distckpt"])
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert for_type_checkers - {None} == {*public()} - {"errors"}
    with pytest.raises(AttributeError, match="nonsense"):
        _ = distckpt.nonsense


def test_a_star_import_hides_nothing_and_the_version_is_that_of_the_package() -> None:
    """Whoever writes ``from distckpt import *`` still opens files with ``open``."""
    names: dict[str, Any] = {}
    exec("from distckpt import *", names)  # noqa: S102
    assert {*names, "open"} >= PROMISED
    assert [name for name in names if name in vars(builtins) and not name.startswith("__")] == []
    written = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert written
    assert names["__version__"] == distckpt.__version__ == written[1]


def documented(name: str, thing: Any) -> Iterator[str]:
    """What of ``thing`` has no docstring."""
    if not inspect.getdoc(thing):
        yield name
    if not inspect.isclass(thing):
        return
    for attribute, value in vars(thing).items():
        if attribute.startswith(("_", "test_")) or not (callable(value) or isinstance(value, property)):
            continue
        if not inspect.getdoc(getattr(thing, attribute)):
            yield f"{name}.{attribute}"


def test_every_public_name_has_a_docstring() -> None:
    without = []
    for name in public():
        without += documented(name, getattr(distckpt, name))
    assert without == []


def test_every_public_thing_inside_has_a_docstring() -> None:
    without = []
    for name in modules():
        if name.endswith("__main__"):
            continue
        if ast.get_docstring(modules()[name]) is None and file_of(name).read_text().strip():
            without.append(name)
        module = importlib.import_module(name)
        for attribute, value in vars(module).items():
            ours = getattr(value, "__module__", None) == name
            if ours and not attribute.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
                without += documented(f"{name}.{attribute}", value)
    assert without == []


SIGNATURES = Path(__file__).with_name("signatures.json")
"""Written by ``python -m tests.house.test_public_names``: look at what changes before it is committed."""


def signature(thing: Any) -> str:
    """How it is called. Where a class of ours lives is not part of that."""
    return re.sub(r"\bdistckpt\.[\w.]+\.(\w+)", r"\1", str(inspect.signature(thing)))


def signatures() -> dict[str, str]:
    """Of every public name, and of the public members of its class."""
    found = {}
    for name in public():
        thing = getattr(distckpt, name)
        if not inspect.isclass(thing):
            found[name] = signature(thing) if callable(thing) else "module"
            continue
        found[name] = f"class{signature(thing)}"
        for member in dir(thing):
            if member.startswith("_") and member not in ("__enter__", "__exit__", "__str__", "__fspath__"):
                continue
            home = next(kind for kind in thing.__mro__ if member in vars(kind))
            if home.__module__.startswith("distckpt"):
                found[f"{name}.{member}"] = _kind_of(thing, member)
    return found


def _kind_of(thing: type, member: str) -> str:
    if isinstance(inspect.getattr_static(thing, member), property):
        return "property"
    value = getattr(thing, member)
    return signature(value) if callable(value) else "attribute"


def test_public_names_are_called_as_they_were() -> None:
    assert signatures() == json.loads(SIGNATURES.read_text())


if __name__ == "__main__":
    SIGNATURES.write_text(json.dumps(signatures(), indent=1, sort_keys=True) + "\n")
