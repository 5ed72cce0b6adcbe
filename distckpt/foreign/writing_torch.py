"""Writing files that ``torch.load`` reads, with weights_only and with mmap, a part of a tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distckpt.export.weights import files_of, index_of
from distckpt.foreign.pickle_making import make_pickle
from distckpt.foreign.streaming import Streamed
from distckpt.foreign.writing import Order, Sums, Written, put, with_sums
from distckpt.foreign.zip_making import Archive, Record
from distckpt.format.tree.tree import DictStep, unflatten
from distckpt.storage import Store

WEIGHTS = "pytorch_model.bin"
TREE = "checkpoint.pt"
"""The one file of what is no flat state dict."""


def write_torch(order: Order, store: Store) -> list[Written]:
    """See Write. A state dict becomes one file or several and their index, as Hugging Face's libraries have them; a tree
    of more than one level becomes one file, whatever its size, since it cannot be taken apart.
    """
    sums = Sums()
    if not all(path == (DictStep(name),) for name, path in order.paths.items()):
        return [_write(store, TREE, _tree(order), order.tensors, order, sums)]
    by_name = {tensor.name: tensor for tensor in order.tensors}
    sizes = {name: by_name[name].nbytes if name in by_name else 0 for name in order.paths}
    files = {_renamed(file): inside for file, inside in files_of(sizes, order.max_bytes).items()}
    trees = {
        file: {name: by_name.get(name, order.values.get(name)) for name in inside} for file, inside in files.items()
    }
    written = [
        _write(store, file, tree, [by_name[name] for name in tree if name in by_name], order, sums)
        for file, tree in trees.items()
    ]
    text = with_sums(index_of(files, sizes), written, sums.of(order.tensors), order.about)
    return [*written, put(store, f"{WEIGHTS}.index.json", len(text), [text], order, sums.seen)]


def _renamed(file: str) -> str:
    """``pytorch_model-00001-of-00002.bin`` for the like of safetensors."""
    return file.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")


def _tree(order: Order) -> Any:
    leaves: Mapping[str, Any] = {**{tensor.name: tensor for tensor in order.tensors}, **order.values}
    return unflatten((path, leaves[name]) for name, path in order.paths.items())


def _write(store: Store, file: str, tree: Any, tensors: Sequence[Streamed], order: Order, sums: Sums) -> Written:
    root = file.rpartition(".")[0]
    keys = {id(tensor): str(number) for number, tensor in enumerate(tensors)}
    archive = Archive(
        [
            Record(f"{root}/data.pkl", make_pickle(tree, keys)),
            Record(f"{root}/byteorder", b"little"),
            *(Record(f"{root}/data/{keys[id(tensor)]}", tensor) for tensor in tensors),
            Record(f"{root}/version", b"3\n"),
        ]
    )

    def seen(tensor: Streamed, view: memoryview) -> None:
        sums.seen(tensor, view)
        archive.seen(tensor, view)

    return put(store, file, archive.size, archive.parts(), order, seen)
