"""What begins with an underscore is touched by the module that defines it, and by nobody else."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.house.source import modules

OF_OTHERS = {
    "_StorageInfo": "torch.distributed.checkpoint",
    "_StridedShard": "DTensor",
    "_bit_generator": "NumPy",
    "_buffers": "nn.Module",
    "_checkpoint_connector": "Lightning",
    "_current_frames": "sys",
    "_data_fetcher": "Lightning",
    "_exit": "os",
    "_foreach_copy_": "torch",
    "_get_default_store": "torch.distributed",
    "_load_best_model": "transformers",
    "_load_state_dict_post_hooks": "nn.Module",
    "_load_state_dict_pre_hooks": "nn.Module",
    "_local_tensor": "DTensor",
    "_modules": "nn.Module",
    "_non_persistent_buffers_set": "nn.Module",
    "_optimizer_load_state_dict_pre_hooks": "torch.optim",
    "_optimizer_state_dict_post_hooks": "torch.optim",
    "_optimizer_state_dict_pre_hooks": "torch.optim",
    "_orig_mod": "torch.compile",
    "_parameters": "nn.Module",
    "_pipe_file": "fsspec",
    "_register_atexit": "threading",
    "_restarting": "Lightning",
    "_set_sampler_epoch": "Lightning",
    "_spec": "DTensor",
    "_state_dict_hooks": "nn.Module",
    "_state_dict_pre_hooks": "nn.Module",
    "_version": "torch",
}
"""Of packages that are not ours, where they offer no other way."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_private(name: str) -> bool:
    """Whether a name is not meant for others. ``__init__`` and the like belong to the language."""
    return name.startswith("_") and not name.endswith("__")


def kinds_of(annotation: ast.expr | None) -> set[str]:
    """The classes that ``A`` and ``A | None`` name."""
    if isinstance(annotation, ast.BinOp):
        return kinds_of(annotation.left) | kinds_of(annotation.right)
    return {annotation.id} if isinstance(annotation, ast.Name) else set()


def own_names(function: Function, classes: set[str]) -> set[str]:
    """The parameters and local names that hold an instance of ``classes``, as far as it is written there."""
    arguments = function.args
    everyone = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    found = {argument.arg for argument in everyone if kinds_of(argument.annotation) & classes}
    for node in ast.walk(function):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and kinds_of(node.annotation) & classes
        ):
            found.add(node.target.id)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and kinds_of(node.value.func) & classes:
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def own_attributes(tree: ast.Module, classes: set[str]) -> set[str]:
    """``self.store`` and the like, where a parameter that holds an instance of ``classes`` was put there."""
    found = set()
    for function in functions(tree):
        names = own_names(function, classes)
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id in names:
                found |= {ast.unparse(target) for target in node.targets if isinstance(target, ast.Attribute)}
    return found


def functions(tree: ast.AST) -> Iterator[Function]:
    """All of them, however deep."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def foreign(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Every private of somebody else that a module touches: the line, the text, and the name."""
    classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    own = {"self", "cls", "super()"} | classes | own_attributes(tree, classes)
    inside: dict[int, set[str]] = {}
    for function in functions(tree):  # an outer one comes before those inside it
        inside |= dict.fromkeys(map(id, ast.walk(function)), own_names(function, classes))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            base = ast.unparse(node.value)
            if base not in own and base not in inside.get(id(node), set()):
                yield node.lineno, ast.unparse(node), node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"import {each.name}", each.name) for each in node.names if is_private(each.name))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value):
                yield node.lineno, ast.unparse(node), name.value


def test_no_module_touches_what_is_private_to_another() -> None:
    found = [(f"{name}:{line}: {text}", what) for name, tree in modules().items() for line, text, what in foreign(tree)]
    assert [where for where, what in found if what not in OF_OTHERS] == []
    assert {what for _, what in found} == set(OF_OTHERS), "an exception that nobody needs any more"


def test_a_foreign_private_is_found_and_an_own_one_is_none() -> None:
    """The check itself: what it must see, and what it must leave alone."""
    seen = {
        "def f(pending):\n    pending._future.done()": ["pending._future"],
        "def f(a: Other):\n    return a._b": ["a._b"],
        "class A:\n    def f(self):\n        return self._b._c": ["self._b._c"],
        "from package import _name": ["import _name"],
        "x = getattr(object, '_secret', None)": ["getattr(object, '_secret', None)"],
        "class A: pass\ndef f(a: A):\n    return a._b\ndef g(a):\n    return a._b": ["a._b"],
    }
    for text, expected in seen.items():
        assert [found for _, found, _ in foreign(ast.parse(text))] == expected
    allowed = [
        "class A:\n    def f(self, other: A | None):\n        return self._b + other._b",
        "class A: pass\ndef f(a: A):\n    return a._b",
        "class A: pass\ndef f():\n    a = A()\n    return a._b",
        "class A: pass\nclass B:\n    def __init__(self, a: A):\n        self._a = a\n    def f(self):\n        self._a._b()",
        "class A:\n    def __repr__(self):\n        return type(self).__name__ + super()._text()",
    ]
    for text in allowed:
        assert list(foreign(ast.parse(text))) == []


def test_nobody_calls_by_hand_what_a_with_statement_calls() -> None:
    by_hand = {"__enter__", "__exit__", "__aenter__", "__aexit__"}
    found = [
        f"{name}:{node.lineno}: {ast.unparse(node)}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in by_hand
    ]
    assert found == []
