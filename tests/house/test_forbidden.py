"""What the code must never use."""

from __future__ import annotations

import ast
import re

from tests.house.source import file_of, imports, modules

FORBIDDEN_PACKAGES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.save",
    "np.load",
    "np.save",
    "numpy.load",
}


PICKLED = {
    "distckpt.export.packing imports ray.cloudpickle",
    "distckpt.dcp.reader calls torch.save",
    "distckpt.foreign.writing_dcp calls torch.save",
}
"""What goes from the training to the process that makes its exports, over a pipe; what planners of DCP are handed in
memory, who take values in no other way; and each tensor in files that are exported for DCP, as it writes them."""


def test_nothing_is_ever_unpickled_or_evaluated() -> None:
    found = []
    for name, tree in modules().items():
        found += [f"{name} imports {used}" for used in imports(tree) if FORBIDDEN_PACKAGES & set(used.split("."))]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
                found.append(f"{name} calls {ast.unparse(node.func)}")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                found.append(f"{name}:{node.lineno} speaks of allow_pickle")
    assert set(found) == PICKLED


def test_no_exception_is_swallowed_without_a_reason() -> None:
    """``except Exception`` either raises again or says in a comment why not."""
    found = []
    for name, tree in modules().items():
        lines = file_of(name).read_text().splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = ast.unparse(node.type) if node.type else ""
            if caught not in ("", "Exception", "BaseException"):
                continue
            again = any(isinstance(inside, ast.Raise) for inside in ast.walk(node))
            said = "#" in lines[node.lineno - 1] or lines[node.lineno].lstrip().startswith("#")
            if not again and not said:
                found.append(f"{name}:{node.lineno}")
    assert found == []


def test_nothing_is_left_to_do() -> None:
    found = []
    for name, tree in modules().items():
        for number, line in enumerate(file_of(name).read_text().splitlines(), 1):
            found += [f"{name}:{number}: {line.strip()}"] * bool(
                re.search(r"TODO|FIXME|raise NotImplementedError", line)
            )
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        found += [f"{name}:{call.lineno} prints" for call in calls if ast.unparse(call.func) == "print"]
    assert found == []
