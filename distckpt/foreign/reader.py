"""Reading files of other programs as checkpoints are read: whole, in part, or straight into live objects."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from distckpt.checkpoint import fill_from
from distckpt.errors import EncodeError, UnsupportedFormatError
from distckpt.foreign.choosing import without
from distckpt.foreign.contents import Contents, Held, Spread, why_not_encoded
from distckpt.foreign.formats import read_contents
from distckpt.foreign.shelves import Shelved, shelved
from distckpt.format.arrow.dtypes import VALUE
from distckpt.format.arrow.index import KeyInfo
from distckpt.format.json.left_out import LeftOut
from distckpt.format.tree.select import unknown_key
from distckpt.format.tree.tree import encode_path
from distckpt.sharding.chunks import dtype_from_name, pieces
from distckpt.sharding.match import Wanted
from distckpt.state.objects import NamedObjects
from distckpt.state.selection import Rename
from distckpt.state.status import LoadStatus
from distckpt.state.stored import Targets, load_leaves, load_tree
from distckpt.state.tensors import read_rectangles, read_tensors
from distckpt.storage import PathLike
from distckpt.transfer.progress import Meter, Progress
from distckpt.transfer.reader import ReadStats

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)


def read_foreign(
    path: PathLike,
    storage_options: Mapping[str, Any] | None = None,
    *,
    under: str = "model",
    leave_out: str | Sequence[str] = (),
) -> ForeignReader:
    """What another program has saved at ``path``, to be read like a checkpoint. Nothing is unpickled.

    It may be a safetensors file, one of ``torch.save`` or of Lightning, a folder of Hugging Face's with one or several of
    them, or one of Accelerate, the Transformers Trainer or torch.distributed.checkpoint. ``under`` names what has no name
    there, the one state dict of such a file: its keys are ``model.layers.0.weight`` and so on. What holds objects that only
    unpickling could make is refused by its key, unless it is below one of ``leave_out``.

    Raises CheckpointNotFoundError if nothing at the path is known here, ForeignError for what must be left out,
    DamagedError for files that are not sound, UnsupportedFormatError for names that a checkpoint cannot have, and
    ValueError if ``under`` is empty.
    """
    chosen = (leave_out,) if isinstance(leave_out, str) else tuple(leave_out)
    try:
        contents = without(read_contents(path, storage_options, under), chosen)
    except EncodeError as error:
        raise UnsupportedFormatError(str(path), why_not_encoded(error), error.key) from error
    if contents.notes:
        logger.warning("%s: %s", contents.path, "; ".join(contents.notes))
    return ForeignReader(contents)


class ForeignReader:
    """Files of another program, of which all but the tensors has been read.

    Tensors are read when they are asked for, and of them only what is asked for. Such files have no checksums: what is
    read is what is there. Safe to use from several threads.
    """

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._texts = {key: encode_path(path) for key, path in contents.paths.items()}
        self._shelves = shelved(contents.tensors, contents.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ForeignReader {self.kind} {self.path}>"

    def close(self) -> None:
        """Does nothing: files are open only while they are read."""

    @property
    def path(self) -> str:
        """Where it is."""
        return self._contents.path

    @property
    def kind(self) -> str:
        """What it is, in words."""
        return self._contents.kind

    @property
    def contents(self) -> Contents:
        """What there is, and where."""
        return self._contents

    @property
    def refused(self) -> dict[str, str]:
        """Keys that were left out, and why they could not be read."""
        return dict(self._contents.refused)

    @property
    def world_size(self) -> int:
        """One: whatever wrote it, no part of it is any rank's own."""
        return 1

    @property
    def left_out(self) -> LeftOut | None:
        """None: files of others do not say what they lack."""
        return None

    @property
    def texts(self) -> Mapping[str, str]:
        """Of every key its path as text."""
        return self._texts

    def keys(self) -> list[str]:
        """The keys of all tensors and plain values, in order."""
        return list(self._texts)

    def layout(self, key: str) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of a tensor; "json" and () for a plain value. KeyError, naming similar keys, if there is none."""
        held = self._contents.tensors.get(key)
        if held is None and key not in self._texts:
            raise unknown_key(key, self._texts, self.path)
        return (VALUE, ()) if held is None else (held.dtype, held.shape)

    def info(self, key: str) -> KeyInfo:
        """Type, shape and size in bytes. KeyError, naming similar keys, if there is none."""
        dtype, shape = self.layout(key)
        nbytes = 0 if dtype == VALUE else self._contents.tensors[key].nbytes
        return KeyInfo(key, self._texts[key], dtype, shape, nbytes, (0,))

    def tensor(self, key: str) -> torch.Tensor:
        """The whole tensor, on the CPU. KeyError for an unknown key, ValueError for a value's."""
        if self.layout(key)[0] == VALUE:
            raise ValueError(f"{key!r} of {self.path} is a plain value: read it with value()")
        tensor: torch.Tensor = load_leaves(self, [key])[key]
        return tensor

    def value(self, key: str) -> Any:
        """The plain value. KeyError for an unknown key, ValueError for a tensor's."""
        if self.layout(key)[0] != VALUE:
            raise ValueError(f"{key!r} of {self.path} is a tensor: read it with tensor()")
        return self.values([key])[key]

    def load(self, select: str | Sequence[str] | None = None) -> Any:
        """All of it, or what is below a place, as ``CheckpointReader.load`` has it."""
        return load_tree(self, select)

    def restore(
        self,
        checkpoint: NamedObjects,
        partial: bool = False,
        *,
        select: str | Sequence[str] | None = None,
        rename: Rename | None = None,
        progress: bool = False,
    ) -> LoadStatus:
        """Fill the objects of a ``distckpt.Checkpoint`` in place, as its ``restore`` does from a checkpoint.

        Every rank calls it for itself and reads only what it holds, of a DTensor its own part. Arguments, status and
        errors are those of ``Checkpoint.restore``.
        """
        return fill_from(checkpoint, self, partial, select, rename, progress)

    # ---- as something that objects are filled from ---------------------------------------------------------------

    def values(self, keys: Iterable[str]) -> dict[str, Any]:
        """These plain values, which are the caller's own."""
        return {key: copy.deepcopy(self._contents.values[key]) for key in keys}

    def read(self, targets: Targets, progress: Progress | None = None) -> ReadStats:
        """Fill every target with its part of the tensor of that key. DamagedError names the file and the key."""
        meter = Meter(
            sum(tensor.numel() * tensor.element_size() for each in targets.values() for tensor in each), progress
        )
        needed = nbytes = 0
        seconds = 0.0
        for one in self._shelves:
            mine = {key: tensors for key, tensors in targets.items() if key in one.index}
            plain = {key: tensors for key, tensors in mine.items() if self._contents.tensors[key].strides is None}
            stats = read_tensors(one.shelf, one.index, plain, progress and _added(meter))
            needed, nbytes, seconds = needed + stats.bytes_needed, nbytes + stats.bytes_read, seconds + stats.seconds
            for key in mine.keys() - plain.keys():
                stats = _read_strided(one, key, self._contents.tensors[key], mine[key])
                needed, nbytes, seconds = (
                    needed + stats.bytes_needed,
                    nbytes + stats.bytes_read,
                    seconds + stats.seconds,
                )
        return ReadStats(needed, nbytes, seconds)

    def fill(self, wanted: Sequence[Wanted], memory: Sequence[memoryview]) -> None:
        """Fill each memory with its rectangle of a tensor. DamagedError names the file and the key."""
        pairs = list(zip(wanted, memory, strict=True))
        tensors = self._contents.tensors
        for one in self._shelves:
            mine = [(each, view) for each, view in pairs if each.key in one.index]
            plain = [(each, view) for each, view in mine if tensors[each.key].strides is None]
            read_rectangles(one.shelf, one.index, [each for each, _ in plain], [view for _, view in plain])
            for each, view in mine:
                if tensors[each.key].strides is not None:
                    part = _part(_strided(one, each.key, tensors[each.key])[0], each.offset, each.length)
                    view[:] = part.contiguous().reshape(-1).view(torch.uint8).numpy().data

    def check(self, targets: Targets, progress: Progress | None = None) -> ReadStats:
        """Nothing: there is nothing to check it against, and that all of it is there was seen when it was opened."""
        return ReadStats(0, 0, 0.0)


def _added(meter: Meter) -> Progress:
    """Of several readings one after the other, how far all of them have come."""
    last = 0

    def update(done: int, total: int) -> None:
        nonlocal last
        meter.add(done - last)
        last = done

    return update


def _read_strided(one: Shelved, key: str, held: Held | Spread, targets: Sequence[torch.Tensor]) -> ReadStats:
    """All that the tensor reaches over, and from that what is wanted."""
    whole, stats = _strided(one, key, held)
    for target in targets:
        for piece in pieces(target):
            piece.local.copy_(_part(whole, piece.offset, piece.length))
    return stats


def _strided(one: Shelved, key: str, held: Held | Spread) -> tuple[torch.Tensor, ReadStats]:
    assert isinstance(held, Held)
    assert held.strides is not None
    elements = torch.empty(held.span, dtype=dtype_from_name(held.dtype), device="cpu")
    stats = read_tensors(one.shelf, one.index, {key: [elements]})
    return elements.as_strided(held.shape, held.strides), stats


def _part(whole: torch.Tensor, offset: Sequence[int], length: Sequence[int]) -> torch.Tensor:
    for dim, (start, size) in enumerate(zip(offset, length, strict=True)):
        whole = whole.narrow(dim, start, size)
    return whole
