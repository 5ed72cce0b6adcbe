"""What is needed twice has one home."""

from __future__ import annotations

import ast

from tests.house.source import imports, modules, modules_of_tests


def is_test_module(name: str) -> bool:
    """Whether pytest looks for tests in it."""
    return name.rpartition(".")[2].startswith("test_")


def test_no_test_module_imports_another() -> None:
    """What they share is in tests/support."""
    found = [
        f"{name} imports {used}"
        for name, tree in modules_of_tests().items()
        for used in imports(tree)
        if used.startswith("tests.") and any(map(is_test_module, (used, used.rpartition(".")[0])))
    ]
    assert found == []


def test_no_alias_of_a_type_is_made_twice() -> None:
    homes: dict[tuple[str, str], list[str]] = {}
    for name, tree in modules().items():
        for node in tree.body:
            if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp | ast.Name)):
                continue
            for target in node.targets:
                alias = ast.unparse(target).lstrip("_")
                if alias[0].isupper() and not alias.isupper():
                    homes.setdefault((alias, ast.unparse(node.value)), []).append(name)
    assert homes[("Ints", "npt.NDArray[np.int64]")] == ["distckpt.format.arrays"]
    assert {alias: where for alias, where in homes.items() if len(where) > 1} == {}
