"""Folders of torch.distributed.checkpoint: ``.metadata``, a pickle that is read as data, and files of parts of tensors.

Each part is a file of ``torch.save`` by itself, which lies in a larger one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from distckpt.errors import DamagedError
from distckpt.foreign.contents import Contents, Held, Spread, check_shape
from distckpt.foreign.files import File, Found, Section
from distckpt.foreign.pickles import Opaque, read_pickle
from distckpt.foreign.torch_file import is_torch_file, read_torch_file
from distckpt.format.limits import MAX_BYTES, shown
from distckpt.format.tree.tree import DictStep, ListStep, Path, flatten, key_of
from distckpt.storage import join

METADATA = ".metadata"
MAX_METADATA_BYTES = 1 << 30

_HOME = "torch.distributed.checkpoint."


def read_dcp(found: Found) -> Contents | None:
    """What DCP has saved in a folder; None for any other place. DamagedError for what is not sound."""
    data = found.folder.hidden(METADATA, MAX_METADATA_BYTES) if found.file is None else None
    if data is None:
        return None
    where = join(found.folder.url, METADATA)
    return _Reading(found, where, _Metadata(read_pickle(data, where), where)).contents()


class _Metadata:
    """What ``.metadata`` says: of every flat key what it is, where it was in the nested state, and where its parts lie."""

    def __init__(self, tree: Any, where: str) -> None:
        self._where = where
        said = self.record(tree, "Metadata")
        self.keys = self._mapping(said, "state_dict_metadata")
        self.places = self._mapping(said, "planner_data")
        self.infos: dict[tuple[str, tuple[int, ...] | None], Any] = {}
        for index, info in self._mapping(said, "storage_data").items():
            named = self.record(index, "MetadataIndex")
            offset = named.get("offset")
            self.infos[str(named.get("fqn")), None if offset is None else tuple(offset)] = info

    def record(self, node: Any, kind: str) -> dict[str, Any]:
        """The fields of an object of DCP's class of that name."""
        right = isinstance(node, Opaque) and node.name.startswith(_HOME) and node.name.endswith(f".{kind}")
        if not right or not isinstance(node.state, dict):
            raise DamagedError(self._where, f"something is there that is no {kind} of DCP's")
        return node.state

    def kind(self, node: Any) -> str:
        """Which of its classes it is."""
        return node.name.rpartition(".")[2] if isinstance(node, Opaque) and node.name.startswith(_HOME) else ""

    def _mapping(self, said: Mapping[str, Any], name: str) -> dict[Any, Any]:
        found = said.get(name) or {}
        if not isinstance(found, dict):
            raise DamagedError(self._where, f"its {name} is no dict")
        return found


class _Reading:
    """One folder on its way into contents."""

    def __init__(self, found: Found, where: str, metadata: _Metadata) -> None:
        self._found = found
        self._where = where
        self._metadata = metadata
        self._files: dict[str, File] = {}
        self._paths: dict[str, Path] = {}
        self._tensors: dict[str, Held | Spread] = {}
        self._values: dict[str, Any] = {}
        self._refused: dict[str, str] = {}

    def contents(self) -> Contents:
        """All of it."""
        keys = self._metadata.keys
        paths = {flat: self._path(flat) for flat in keys}
        is_tensor = {flat for flat, said in keys.items() if self._metadata.kind(said) == "TensorStorageMetadata"}
        if all(len(path) == 1 for path in paths.values()):  # one state dict, which has no name there
            paths = {flat: (DictStep(self._found.under), *path) for flat, path in paths.items()}
        for flat, said in keys.items():
            if flat in is_tensor:
                self._add_tensor(flat, paths[flat], self._metadata.record(said, "TensorStorageMetadata"))
            else:
                self._add_object(flat, paths[flat])
        kind = "checkpoint of torch.distributed.checkpoint"
        return Contents(kind, self._found.path, self._paths, self._tensors, self._values, self._refused)

    def _path(self, flat: Any) -> Path:
        steps = self._metadata.places.get(flat, (flat,))
        if not isinstance(steps, tuple) or not steps or not all(type(step) in (str, int) for step in steps):
            raise DamagedError(self._where, "no place in a state dict", str(flat))
        return tuple(DictStep(step) if isinstance(step, str) else ListStep(step) for step in steps)

    def _add_tensor(self, flat: str, path: Path, said: Mapping[str, Any]) -> None:
        key = key_of(path)
        shape = check_shape(self._where, key, said.get("size") or ())
        parts: list[tuple[tuple[int, ...], Held]] = []
        dtypes: set[str] = set()
        for offset, length in self._boxes(key, said.get("chunks"), len(shape)):
            held = self._part(flat, key, offset)
            if isinstance(held, Opaque):
                self._refused[key] = held.what
                return
            if held.shape != length:
                raise DamagedError(
                    self._where, f"a part of shape {list(length)} has {list(held.shape)} in its file", key
                )
            if held.strides is not None and length == shape:
                self._put(key, path, held)
                return
            if held.strides is not None:
                self._refused[key] = "a part of it lies transposed in its file: save it by torch.contiguous_format"
                return
            dtypes.add(held.dtype)
            parts.append((offset, held))
        if len(dtypes) != 1:
            raise DamagedError(self._where, "it has no parts, or parts of several types", key)
        self._put(key, path, Spread(dtypes.pop(), shape, tuple(parts)))

    def _put(self, key: str, path: Path, held: Held | Spread) -> None:
        self._paths[key] = path
        self._tensors[key] = held

    def _boxes(self, key: str, chunks: Any, ndim: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Offset and length of each part; those without elements only where there is none with any."""
        boxes = []
        for chunk in chunks if isinstance(chunks, list) else ():
            said = self._metadata.record(chunk, "ChunkStorageMetadata")
            box = [check_shape(self._where, key, said.get(name) or ()) for name in ("offsets", "sizes")]
            if any(len(side) != ndim for side in box):
                raise DamagedError(self._where, "a part of other dimensions than the tensor", key)
            boxes.append((box[0], box[1]))
        yield from [box for box in boxes if 0 not in box[1]] or boxes[:1]

    def _part(self, flat: str, key: str, offset: tuple[int, ...]) -> Held | Opaque:
        tree, refused = self._saved(flat, key, offset)
        if isinstance(tree, Held):
            return tree
        return Opaque(next(iter(refused.values()), "no tensor in its file"))

    def _add_object(self, flat: str, path: Path) -> None:
        key = key_of(path)
        tree, refused = self._saved(flat, key, None)
        self._refused.update(refused)
        if isinstance(tree, Opaque):
            self._refused.setdefault(key, tree.what)
            return
        for leaf in flatten(tree, lambda value: type(value) is Held, path):
            if leaf.key in self._refused:
                continue
            self._paths[leaf.key] = leaf.path
            if type(leaf.value) is Held:
                self._tensors[leaf.key] = leaf.value
            else:
                self._values[leaf.key] = leaf.value

    def _saved(self, flat: str, key: str, offset: tuple[int, ...] | None) -> tuple[Any, dict[str, str]]:
        """What lies where the metadata say, as torch.save has put it there."""
        info = self._metadata.infos.get((flat, offset))
        if info is None:
            raise DamagedError(self._where, f"it does not say where the part at {offset} lies", key)
        said = self._metadata.record(info, "_StorageInfo")
        if said.get("transform_descriptors"):
            return Opaque(""), {
                key: f"its bytes were changed on the way, by {shown(str(said['transform_descriptors']))}"
            }
        name, begin, size = said.get("relative_path"), said.get("offset"), said.get("length")
        if not (type(name) is str and type(begin) is int and type(size) is int):
            raise DamagedError(self._where, "it does not say where a part lies", key)
        file = self._file(name)
        if not 0 <= begin <= begin + size <= min(file.size, MAX_BYTES):
            raise DamagedError(file.url, f"bytes {begin} to {begin + size} are outside of the file", key)
        section = Section(file.store, file.path, file.name, size, begin)
        if not is_torch_file(section):
            return Opaque(""), {key: "it was written in another format than that of torch.save"}
        tree, refused = read_torch_file(section, key)
        return _outside(tree, file, begin), refused

    def _file(self, name: str) -> File:
        if name not in self._files:
            try:
                found = self._found.folder.find(name)
            except ValueError as error:
                raise DamagedError(self._where, f"it names a file outside of its folder, or none: {error}") from error
            if found is None:
                raise DamagedError(self._where, f"it names {shown(name)}, which is missing")
            self._files[name] = found
        return self._files[name]


def _outside(node: Any, file: File, begin: int) -> Any:
    """The same tree, of tensors in the file itself."""
    if isinstance(node, Held):
        return replace(node, file=file, position=node.position + begin)
    if type(node) is dict:
        return {name: _outside(item, file, begin) for name, item in node.items()}
    if type(node) in (list, tuple):
        return type(node)(_outside(item, file, begin) for item in node)
    return node
