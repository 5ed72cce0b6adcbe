"""Reading checkpoints: whole or in part, on any machine, with nothing but access to the storage."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsFloat

from distckpt.directory.lease import HeldLease
from distckpt.directory.locate import Located, locate, read_index
from distckpt.directory.newest import newest_committed
from distckpt.directory.reports import reported_metrics, write_report
from distckpt.directory.verify import Damage, VerifyReport, verify
from distckpt.errors import CheckpointNotFoundError, DamagedError
from distckpt.format import names
from distckpt.format.arrow.dtypes import VALUE
from distckpt.format.arrow.index import Index, KeyInfo
from distckpt.format.json.manifest import Manifest
from distckpt.format.tree.select import unknown_key
from distckpt.state_file import get_checkpoint_state
from distckpt.storage import PathLike, join, open_store, placed
from distckpt.transfer.progress import Progress

if TYPE_CHECKING:
    import torch  # imported late where it is needed: opening a checkpoint and verifying it do without
    from typing_extensions import Self

__all__ = [
    "CheckpointReader",
    "Damage",
    "VerifyReport",
    "checkpoint_exists",
    "get_checkpoint_mtimes",
    "latest_checkpoint",
    "list_variables",
    "load",
    "load_variable",
    "open",
]

logger = logging.getLogger(__name__)


def open(
    path: PathLike,
    storage_options: Mapping[str, Any] | None = None,
    *,
    lease: bool = False,
    cache_dir: PathLike | None = None,
    data: PathLike | None = None,
    data_options: Mapping[str, Any] | None = None,
) -> CheckpointReader:
    """The checkpoint at ``path``, open for reading: ``<directory>/ckpt-42``, a directory (its newest), or a lone copy.

    Of a directory whose newest was deleted by hand it is the next one, with a warning. With ``lease`` the job that writes
    there does not delete the checkpoint until the reader is closed; if that cannot be kept up, since storage does not
    answer, reads raise LeaseLostError rather than go on. That writes to the directory. ``cache_dir`` is a directory of
    this host in which all its processes find what one of them has downloaded of shards. ``data``, with ``data_options``
    for the store there, is where shards are if the manager was given it: a DataElsewhereError says so to whoever reads
    without, or in another place. Raises CheckpointNotFoundError
    when nothing committed answers to the path, LogMissingError for a directory that has checkpoints but no log,
    DamagedError when manifest or index is not what was written, StorageError when the lease cannot be written.
    """
    options = placed(storage_options, cache_dir=cache_dir, data=data, data_options=data_options)
    if not lease:
        return CheckpointReader(locate(path, options))
    where, held = _leased(path, options)
    if held is None:
        return CheckpointReader(where)
    try:
        return CheckpointReader(where, held.check, held.release)
    except BaseException:
        held.release()
        raise


def _leased(path: PathLike, options: Mapping[str, Any] | None) -> tuple[Located, HeldLease | None]:
    """The checkpoint, and a lease on it. None for a lone copy, which no log names and so nobody retires."""
    while True:
        where = locate(path, options)
        if where.is_lone:
            return where, None
        try:
            return where, HeldLease.take(where.store, where.manifest.attempt, _reader_here())
        except CheckpointNotFoundError:  # it has retired meanwhile: look which there is now, if any
            logger.info("%s retired before there was a lease on it", where.path)


def _reader_here() -> str:
    return f"a reader on {socket.gethostname()}, process {os.getpid()}"


def load(
    path: PathLike,
    select: str | Sequence[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    *,
    cache_dir: PathLike | None = None,
    data: PathLike | None = None,
    data_options: Mapping[str, Any] | None = None,
) -> Any:
    """What was saved, as a tree of dicts, lists and tuples with CPU tensors and plain values; see CheckpointReader.load.

    ``cache_dir``, ``data`` and ``data_options`` as for ``open``.
    """
    with open(path, storage_options, cache_dir=cache_dir, data=data, data_options=data_options) as reader:
        return reader.load(select)


def latest_checkpoint(
    checkpoint_dir: PathLike,
    latest_filename: str | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> str | None:
    """The path of the newest committed checkpoint, or None if there is none (or no such directory).

    It is what the log says. One that was deleted by hand is passed over with a warning. With a ``latest_filename``
    other than "checkpoint" it is what that state file says, as in TensorFlow. LogMissingError if the directory has
    checkpoints but no log, DamagedError if there is a log of which no entry can be read, or that state file is damaged.
    """
    if latest_filename not in (None, names.STATE_FILE):
        return _latest_of_state_file(checkpoint_dir, latest_filename, storage_options)
    store = open_store(checkpoint_dir, storage_options)
    record = newest_committed(store)
    return None if record is None else join(store.url, names.checkpoint_folder(record.name, record.number))


def _latest_of_state_file(
    checkpoint_dir: PathLike, latest_filename: str | None, storage_options: Mapping[str, Any] | None
) -> str | None:
    state = get_checkpoint_state(checkpoint_dir, latest_filename, storage_options=storage_options)
    if state is None:
        return None
    if _committed_at(state.model_checkpoint_path, storage_options) is None:
        logger.error("%s names a checkpoint that cannot be opened: %s", latest_filename, state.model_checkpoint_path)
        return None
    return state.model_checkpoint_path


def list_variables(
    ckpt_dir_or_file: PathLike, *, storage_options: Mapping[str, Any] | None = None
) -> list[tuple[str, list[int]]]:
    """The keys of a checkpoint, sorted, each with its shape; of a plain value that is ``[]``. Raises what ``open`` raises.

    As in TensorFlow a directory means its newest checkpoint.
    """
    with open(ckpt_dir_or_file, storage_options) as reader:
        return [(key, list(reader.info(key).shape)) for key in sorted(reader.keys())]


def load_variable(
    ckpt_dir_or_file: PathLike,
    name: str,
    *,
    storage_options: Mapping[str, Any] | None = None,
    cache_dir: PathLike | None = None,
    data: PathLike | None = None,
    data_options: Mapping[str, Any] | None = None,
) -> Any:
    """One tensor, whole and on the CPU, or plain value of a checkpoint. KeyError, naming similar keys, for an unknown one.

    TensorFlow's is a NumPy array: ``load_variable(...).numpy()``, for dtypes that NumPy has. ``cache_dir``, ``data`` and
    ``data_options`` as for ``open``.
    """
    with open(ckpt_dir_or_file, storage_options, cache_dir=cache_dir, data=data, data_options=data_options) as reader:
        return reader.value(name) if reader.info(name).dtype == VALUE else reader.tensor(name)


def checkpoint_exists(checkpoint_prefix: PathLike, *, storage_options: Mapping[str, Any] | None = None) -> bool:
    """Whether a committed checkpoint answers to this path and its manifest is what was written.

    One that is being retired does not exist any more, and an unfinished save not yet. A path is no pattern here.
    """
    return _committed_at(checkpoint_prefix, storage_options) is not None


def get_checkpoint_mtimes(
    checkpoint_prefixes: Sequence[PathLike], *, storage_options: Mapping[str, Any] | None = None
) -> list[float | None]:
    """When each of these checkpoints was saved, in epoch seconds.

    None for a path to which ``checkpoint_exists`` says no; TensorFlow leaves those out, so that nobody knows which is
    which.
    """
    found = [_committed_at(path, storage_options) for path in checkpoint_prefixes]
    return [None if where is None else where.manifest.time for where in found]


def _committed_at(path: PathLike, storage_options: Mapping[str, Any] | None) -> Located | None:
    try:
        return locate(path, storage_options)
    except CheckpointNotFoundError:
        return None
    except DamagedError as error:
        logger.warning("taken for no checkpoint: %s", error)
        return None


class CheckpointReader:
    """One committed checkpoint. Its manifest and index have been read and checked; tensors are read when asked for.

    Safe to use from several threads. Every byte that comes out has been checked against its CRC32C: DamagedError,
    naming shard and key, for what is not as it was written.
    """

    def __init__(
        self, where: Located, check: Callable[[], object] = bool, release: Callable[[], object] = bool
    ) -> None:
        """``check`` raises if what has been read need not be there any more; ``release`` is called at the end."""
        self._where = where
        self._check = check
        self._release = release
        with self._checked():
            self._opened: Index | None = read_index(where)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<CheckpointReader {self.path}>"

    def close(self) -> None:
        """Let go of the index, and of the lease. Closing twice does no harm; reading after it raises ValueError."""
        if self._opened is not None:
            self._opened = None
            self._release()

    @property
    def path(self) -> str:
        """``<directory>/<name>-<number>``."""
        return self._where.path

    @property
    def manifest(self) -> Manifest:
        """Name, number, attempt, time and world size of the save, and its shards."""
        return self._where.manifest

    @property
    def metrics(self) -> dict[str, float]:
        """What has been reported about this attempt by now; read anew each time. Empty for a lone copy."""
        return reported_metrics(self._where.store, self.manifest.attempt)

    def report(self, metrics: Mapping[str, SupportsFloat], reporter: str = "") -> None:
        """Say what was found out about this attempt, which ``ls`` shows and ``keep`` rules like BestN judge by.

        It belongs to what was read, also if the number is saved again meanwhile. Of a metric that is reported twice the
        later report counts. Raises TypeError for what is no number, ValueError for one that is not finite, names of more
        than 128 or of unprintable characters, and more than 64 metrics, with those that are there; StorageError if it
        could not be written, after which it can be repeated.
        """
        write_report(self._where.store, self.manifest.attempt, metrics, reporter)

    @property
    def _index(self) -> Index:
        if self._opened is None:
            raise ValueError(f"{self.path} has been closed")
        return self._opened

    def keys(self) -> list[str]:
        """The keys of all tensors and plain values, in the order in which they were written."""
        return list(self._index.names)

    def info(self, key: str) -> KeyInfo:
        """Type, shape, size in bytes, and the ranks that wrote it. KeyError, naming similar keys, if there is none."""
        if key not in self._index:
            raise unknown_key(key, self._index.names, self.path, self.manifest.left_out)
        return self._index.info(key)

    def tensor(self, key: str) -> torch.Tensor:
        """The whole tensor, of its global shape, on the CPU. KeyError for an unknown key, ValueError for a value's."""
        if self.info(key).dtype == VALUE:
            raise ValueError(f"{key!r} of {self.path} is a plain value: read it with value()")
        tensor: torch.Tensor = self._read(key)
        return tensor

    def value(self, key: str) -> Any:
        """The plain value. KeyError for an unknown key, ValueError for a tensor's."""
        if self.info(key).dtype != VALUE:
            raise ValueError(f"{key!r} of {self.path} is a tensor: read it with tensor()")
        return self._read(key)

    def load(self, select: str | Sequence[str] | None = None) -> Any:
        """What was saved, as a tree of dicts, lists and tuples with CPU tensors and plain values.

        State of single ranks comes as a list ordered by rank. ``select`` is a key, or what keys begin with up to a
        ``.`` or ``@``: then only what is below that place is read and returned, so that
        ``model.load_state_dict(reader.load("model"))`` works. Several make a dict from each to what is below it.
        KeyError, naming similar keys, if there is no such place, and a warning in the log if some of it was left out
        when it was saved.
        """
        from distckpt.state.stored import Committed, load_tree  # it imports torch

        self._tell_left_out((select,) if isinstance(select, str) else select)
        with self._checked():
            return load_tree(Committed(self._where, self._index), select)

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Read every byte of the checkpoint again and report all that is not as it was written.

        Checks manifest, index, and of each shard: size, CRC32C of the whole and of every block, and that what Arrow
        finds in it is what the index says. ``progress`` is called with the bytes done and the bytes there are.
        """
        with self._checked():
            return verify(self._where, self._index, progress)

    def _tell_left_out(self, select: Sequence[str] | None) -> None:
        left_out = self.manifest.left_out
        if left_out is not None and (select is None or any(map(left_out.covers, select))):
            logger.warning(
                "%s does not have all of it: some was left out when it was saved, with %s", self.path, left_out
            )

    def _read(self, key: str) -> Any:
        from distckpt.state.stored import Committed, load_leaves  # it imports torch

        with self._checked():
            return load_leaves(Committed(self._where, self._index), [key])[key]

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        """What is read in between was there for as long as that took, or the lease was lost: then it raises that."""
        self._check()
        try:
            yield
        finally:
            self._check()
