"""What lies at a path at which a checkpoint, or a run's directory, was looked for: told apart, and named."""

from __future__ import annotations

import difflib
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distckpt.directory.contents import attempts
from distckpt.directory.locate import foreign_advice
from distckpt.directory.log import Tail, read_tail
from distckpt.directory.pages import known
from distckpt.directory.strays import strays_in
from distckpt.directory.tags import tagged, tags
from distckpt.errors import CheckpointNotFoundError, DamagedError, StorageError
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord
from distckpt.format.others import FSDP, TORCH_WEIGHTS, WEIGHTS
from distckpt.storage import PathLike, Store, join, open_store, split_path

logger = logging.getLogger(__name__)

MOST_LISTED = 2000
"""Names of a folder that are looked at."""

HEAD_BYTES = 4096

_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files begin that torch.save wrote before it wrote zip archives."""


def what_is(path: PathLike, storage_options: Mapping[str, Any] | None = None) -> str:
    """What lies at ``path``, which was taken for a run's directory or a checkpoint, and what may have been meant.

    One or two clauses that go on after the path: "it is a checkpoint of the run /shared/run-7". '' if it is a run's
    directory, or nobody can tell. Some objects are listed, and of a file the first bytes are read; nothing is raised.
    """
    try:
        return _said(path, storage_options)
    except (StorageError, DamagedError, CheckpointNotFoundError, ValueError) as error:
        logger.debug("it cannot be told what is at %s: %s", path, error)
        return ""


def _said(path: PathLike, options: Mapping[str, Any] | None) -> str:
    store = open_store(path, options)
    tail = read_tail(store)
    if tail.entry is not None:
        return ""
    above, name = split_path(path)
    parent = open_store(above, options)
    info = parent.stat(name)
    if info is not None:
        what = _file(parent, name, info.size)
        return f"it is {what}, and no checkpoint of distckpt{_IMPORTED if what in _IMPORTS else ''}"
    run = read_tail(parent)
    if run.entry is not None:
        return _in_run(parent, run, name) or _inside_run(store, parent, name) or _nearest_of_run(parent, run, name)
    if names.is_attempt(name) and names.parse_checkpoint(above.rpartition("/")[2]):
        return f"it is the inside of a checkpoint: give {above}"
    return _folder(store) or _nearest(store.url, options)


# ---- in a run's directory -------------------------------------------------------------------------------------------


def _in_run(parent: Store, run: Tail, name: str) -> str:
    checkpoint = names.parse_checkpoint(name)
    if checkpoint is None:
        record = tagged(parent, name)
        return "" if record is None else f"it is a tag, of {join(parent.url, _called(record))}"
    for record in run.having_numbers(checkpoint[1]).newest_first():
        if (record.name, record.number) == checkpoint:
            return f"it is a checkpoint of the run {parent.url}, whose directory is wanted here"
    return ""


def _inside_run(store: Store, parent: Store, name: str) -> str:
    """Of what is no checkpoint of the run that is around it."""
    if names.parse_checkpoint(name) is None or not attempts(store, ""):
        return _folder(store)
    if next(strays_in(parent, name, ()), None) is None:
        return ""  # a save began there, and never came to an end
    return f"the run {parent.url} does not know it by that name: `distckpt adopt {parent.url}` says what to do"


def _nearest_of_run(parent: Store, run: Tail, name: str) -> str:
    if foreign_advice(parent, name, known(parent, run.head)):
        return ""  # which is said already
    state, _ = run.readable()
    records = state.newest_first()
    if not records:
        return f"no checkpoint has been committed in {parent.url}"
    wanted = names.parse_checkpoint(name)
    folders = [_called(record) for record in records]
    if wanted is not None and any(record.name == wanted[0] for record in records):
        nearest = min(
            (record for record in records if record.name == wanted[0]), key=lambda one: abs(one.number - wanted[1])
        )
        return f"there is none of that number. The nearest is {join(parent.url, _called(nearest))}"
    if close := difflib.get_close_matches(name, [*folders, *tags(parent)], 1):
        return f"there is none of that name. Was {join(parent.url, close[0])} meant?"
    return f"there is none of that name. The newest is {join(parent.url, folders[0])}"


def _called(record: CheckpointRecord) -> str:
    return names.checkpoint_folder(record.name, record.number)


# ---- folders --------------------------------------------------------------------------------------------------------


def _ends(*ends: str) -> Callable[[Sequence[str]], bool]:
    return lambda files: any(file.endswith(ends) for file in files)


def _has(*wanted: str) -> Callable[[Sequence[str]], bool]:
    return lambda files: set(wanted) <= set(files)


_DCP = ".distcp"

_FOLDERS: tuple[tuple[Callable[[Sequence[str]], bool], str], ...] = (
    (_ends(_DCP), "a checkpoint of torch.distributed.checkpoint"),
    (_has("_CHECKPOINT_METADATA"), "a checkpoint of Orbax"),
    (_has("trainer_state.json"), "a checkpoint of the Transformers Trainer"),
    (_has("random_states_0.pkl"), "a state that Accelerate saved"),
    (_ends(".safetensors"), "a folder of safetensors, as Transformers and Diffusers save models"),
    (_ends(".ckpt.index", ".index"), "a folder of TensorFlow checkpoints"),
    (_ends(".ckpt"), "a folder of Lightning checkpoints"),
    (_ends(".pt", ".pth", ".bin"), "a folder of files as torch.save writes them"),
)


_IMPORTS = {
    "a checkpoint of torch.distributed.checkpoint",
    "a folder of files as torch.save writes them",
    "a checkpoint of the Transformers Trainer",
    "a state that Accelerate saved",
    "a folder of safetensors, as Transformers and Diffusers save models",
    "a safetensors file",
    "a file that torch.save wrote",
    "a file that torch.save wrote, in its old format",
    "a Lightning checkpoint",
}
_WEIGHTS = {f"{name}{index}" for name in (*WEIGHTS, *TORCH_WEIGHTS) for index in ("", ".index.json")} | {f"{FSDP}_0"}
"""What a folder has one of that an import takes, unless DCP has written it."""

_IMPORTED = ", which `distckpt import` makes one of"


def _folder(store: Store) -> str:
    """What is in it; '' if there is nothing."""
    if attempts(store, ""):
        return "it is a checkpoint that was copied without its run's directory, which is wanted here"
    files = [info.path for info in itertools.islice(store.list(""), MOST_LISTED)]
    folders = sorted(itertools.islice(store.folders(""), MOST_LISTED))
    runs = [folder for folder in folders[:50] if read_tail(open_store(join(store.url, folder))).entry is not None]
    if runs:
        shown = ", ".join(join(store.url, run) for run in runs[:3])
        return f"no run has saved here, but below it: {shown}{', ...' if len(runs) > 3 else ''}"
    for is_it, what in _FOLDERS:
        if is_it(files):
            is_read = what in _IMPORTS and any(name in _WEIGHTS or name.endswith(_DCP) for name in (*files, *folders))
            return f"it is {what}, and none of distckpt{_IMPORTED if is_read else ''}"
    return "no run has saved in this folder" if files or folders else ""


def _nearest(url: str, options: Mapping[str, Any] | None) -> str:
    """Of a path at which there is nothing: the nearest to it that there is."""
    tail: list[str] = []
    while True:
        try:
            above, name = split_path(url)
        except ValueError:
            return "there is nothing"
        parent = open_store(above, options)
        files = (info.path for info in parent.list(""))
        there = list(itertools.islice(itertools.chain(parent.folders(""), files), MOST_LISTED))
        if there:
            break
        url = above
        tail.insert(0, name)
    if name in there:
        return "the folder is empty" if not tail else f"there is nothing in {join(parent.url, name)}"
    close = difflib.get_close_matches(name, there, 1)
    if not close:
        return f"there is nothing, and in {parent.url} nothing of a name like {name}"
    return f"there is nothing. Was {join(parent.url, close[0], *tail)} meant?"


# ---- files ----------------------------------------------------------------------------------------------------------


def _file(store: Store, name: str, size: int) -> str:
    source = store.open(name)
    try:
        head = bytearray(min(size, HEAD_BYTES))
        source.read_into(0, memoryview(head))
    finally:
        source.close()
    return _by_content(bytes(head), size)


def _by_content(head: bytes, size: int) -> str:
    if head.startswith(b"PK\x03\x04"):
        first = head[30 : 30 + int.from_bytes(head[26:28], "little")].decode("utf-8", "replace")
        return _zip(first, head)
    if head.startswith(_LEGACY_TORCH):
        return "a file that torch.save wrote, in its old format"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle"
    if size > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "a safetensors file"
    for begin, what in {
        b"ARROW1": "an Arrow file, as the shards inside a checkpoint are",
        b"\x89HDF\r\n": "an HDF5 file",
        b"\x93NUMPY": "a NumPy array",
        b"GGUF": "a GGUF file",
        b"{": "a JSON file",
    }.items():
        if head.startswith(begin):
            return what
    return "an empty file" if not size else "a file"


def _zip(first: str, head: bytes) -> str:
    if first.endswith((".npy", ".npz")):
        return "a NumPy archive"
    if first.endswith(("/data.pkl", "/.format_version", "/byteorder")):
        return "a Lightning checkpoint" if b"pytorch-lightning_version" in head else "a file that torch.save wrote"
    return "a zip archive"
