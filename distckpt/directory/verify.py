"""Reading every byte of a checkpoint again, and telling all that is not as it was written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import crc32c
import numpy as np

from distckpt.directory.elsewhere import require_shards
from distckpt.directory.exports import file_problem, read_export
from distckpt.directory.locate import Located, read_index, read_manifest
from distckpt.errors import AccessDeniedError, DamagedError, StorageError
from distckpt.format import names
from distckpt.format.arrow.index import Index
from distckpt.format.arrow.shard_rows import Payload, compare_rows, sparse_image
from distckpt.format.json.manifest import ShardRecord
from distckpt.sharding.match import Wanted, match
from distckpt.storage import Source, cool, place_of
from distckpt.transfer.progress import Meter, Progress
from distckpt.transfer.reader import default_threads, pace_of


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong: with which object, with which tensor or value (None if with none), and what."""

    path: str
    key: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.path}{f', key {self.key!r}' if self.key is not None else ''}: {self.reason}"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a verification found in the checkpoint at ``path``; ``nbytes`` were to be read, in ``shards`` and index.

    ``base`` is the path of the checkpoint that its frozen parameters come from, which is one by itself; '' for none.
    """

    path: str
    keys: int
    shards: int
    nbytes: int
    damages: tuple[Damage, ...]
    base: str = ""

    @property
    def good(self) -> bool:
        """Whether every byte is what was written."""
        return not self.damages


def verify(where: Located, index: Index, progress: Progress | None = None) -> VerifyReport:
    """Read and check manifest, index and every byte of every shard again; all damage is listed, not the first only.
    An export of the checkpoint is read and checked too.

    ``index`` is the checkpoint's, as it was read before. ``progress`` is called now and then, from any thread but one
    at a time, with the bytes done and the bytes there are. Nothing is raised for what cannot be read: it is damage;
    but AccessDeniedError for what may not be read, and DataElsewhereError if shards lie where ``where.store`` does not
    look for them.
    """
    require_shards(where)
    shards = where.manifest.shards
    meter = Meter(sum(shard.size for shard in shards) + where.manifest.index_size, progress)
    damages = [*_manifest_damage(where), *_index_damage(where, index)]
    meter.add(where.manifest.index_size)
    with ThreadPoolExecutor(max(default_threads(), pace_of(where.store).threads)) as pool:
        for found in pool.map(lambda record: list(_shard_damage(where, index, record, meter)), shards):
            damages.extend(found)
    damages.extend(_export_damage(where))
    base = where.manifest.base_path
    return VerifyReport(where.path, len(index.names), len(shards), meter.total, tuple(damages), base)


def _reason(error: DamagedError | StorageError) -> str:
    """What is wrong, without the path. What may not be read is raised: it may be whole."""
    if isinstance(error, AccessDeniedError):
        raise error
    return error.reason if isinstance(error, DamagedError) else str(error).removeprefix(f"{error.path}: ")


# ---- manifest and index -------------------------------------------------------------------------------------------


def _manifest_damage(where: Located) -> Iterator[Damage]:
    path = f"{where.store.url}/{where.object_path(names.MANIFEST)}"
    try:
        if read_manifest(where.store, where.folder) != where.manifest:
            yield Damage(path, None, "it is not what it was when the checkpoint was opened")
    except DamagedError as error:
        yield Damage(error.path, error.key, error.reason)
    except StorageError as error:
        yield Damage(path, None, f"cannot be read: {_reason(error)}")


def _index_damage(where: Located, index: Index) -> Iterator[Damage]:
    path = f"{where.store.url}/{where.object_path(names.INDEX)}"
    try:
        read_index(where)
    except DamagedError as error:
        yield Damage(error.path, error.key, error.reason)
    except StorageError as error:
        yield Damage(path, None, f"cannot be read: {_reason(error)}")
    shapes = (index.info(key).shape for key in index.names)
    whole = [Wanted(key, (0,) * len(shape), shape) for key, shape in zip(index.names, shapes, strict=True)]
    for number in match(index, whole).uncovered:
        yield Damage(path, index.names[number], "its chunks do not cover the tensor exactly once")


# ---- the export, if there is one ------------------------------------------------------------------------------------


def _export_damage(where: Located) -> Iterator[Damage]:
    try:
        export = read_export(where.store, where.folder)
    except (DamagedError, StorageError) as error:
        yield Damage(f"{where.store.url}/{where.object_path(names.EXPORT)}", None, _reason(error))
        return
    for path, file in export.files() if export is not None else ():
        try:
            problem = file_problem(where.store, where.object_path(path), file)
        except (DamagedError, StorageError) as error:
            problem = _reason(error)
        if problem:
            yield Damage(f"{where.store.url}/{where.object_path(path)}", None, problem)


# ---- shards -------------------------------------------------------------------------------------------------------


class _Stretch(NamedTuple):
    """Bytes ``begin`` to ``end`` of a shard: one block of the index's row ``row``, or no payload (row -1).

    The CRC32C of the block, carried on from ``before``, should be ``after``.
    """

    begin: int
    end: int
    row: int
    before: int
    after: int


def _shard_damage(where: Located, index: Index, record: ShardRecord, meter: Meter) -> Iterator[Damage]:
    """What is wrong with a shard when it is read a second time too, if anything was the first time."""
    if list(_shard_damage_once(where, index, record, meter)):
        yield from _shard_damage_once(where, index, record, Meter(0, None))


def _shard_damage_once(where: Located, index: Index, record: ShardRecord, meter: Meter) -> Iterator[Damage]:
    relative = where.shard_path(record.rank, record.shard)
    path = place_of(where.store, relative)
    cool(where.store, relative)  # what memory or a cache keeps of it is not what is stored
    try:
        source = where.store.open(relative)
    except (DamagedError, StorageError) as error:
        meter.add(record.size)
        yield Damage(path, None, f"cannot be opened: {_reason(error)}")
        return
    with contextlib.closing(source):
        check = _ShardCheck(source, path, index, record, pace_of(where.store).piece, meter)
        yield from check.run()


class _ShardCheck:
    """Goes over one shard from its first byte to its last."""

    def __init__(self, source: Source, path: str, index: Index, record: ShardRecord, piece: int, meter: Meter) -> None:
        self._source = source
        self._path = path
        self._index = index
        self._record = record
        self._rows = np.flatnonzero((index.rank == record.rank) & (index.shard == record.shard))
        self._buffer = memoryview(bytearray(min(piece, max(1, record.size))))
        self._meter = meter
        self._crc = 0

    def run(self) -> Iterator[Damage]:
        """All that is wrong with it."""
        size = self._record.size
        if self._source.size != size:
            yield self._damage(None, f"has {self._source.size} bytes and should have {size}")
        try:
            image = sparse_image(size if self._source.size == size else 0)
        except OSError:
            yield self._damage(None, f"its {size} bytes are more than a process can have addresses for")
            return
        at = 0
        try:
            for stretch in self._stretches():
                at = stretch.begin
                if stretch.end > self._source.size:
                    break
                yield from self._pass(stretch, image)
        except (DamagedError, StorageError) as error:
            yield self._damage(self._key_at(at), f"cannot be read from byte {at} on: {_reason(error)}")
            return
        if self._source.size < size:
            yield from self._cut_off()
        if self._source.size == size:
            yield from self._whole(image)

    def _stretches(self) -> Iterator[_Stretch]:
        index, at = self._index, 0
        for row in self._rows[np.argsort(index.position[self._rows], kind="stable")].tolist():
            position, size, block = (int(column[row]) for column in (index.position, index.size, index.block))
            if position > at:
                yield _Stretch(at, position, -1, 0, 0)
            before = 0
            blocks = index.blocks[index.starts[row] : index.starts[row + 1]].tolist()
            for begin, after in zip(range(0, size, block), blocks, strict=False):
                yield _Stretch(position + begin, position + min(begin + block, size), row, before, after)
                before = after
            at = max(at, position + size)
        if at < self._record.size:
            yield _Stretch(at, self._record.size, -1, 0, 0)

    def _pass(self, stretch: _Stretch, image: memoryview) -> Iterator[Damage]:
        crc = stretch.before
        for begin in range(stretch.begin, stretch.end, self._buffer.nbytes):
            view = self._buffer[: min(self._buffer.nbytes, stretch.end - begin)]
            self._source.read_into(begin, view)
            self._crc = crc32c.crc32c(view, self._crc)
            self._meter.add(view.nbytes)
            if stretch.row >= 0:
                crc = crc32c.crc32c(view, crc)
            elif image.nbytes and np.frombuffer(view, dtype=np.uint8).any():  # zeros it has, at no cost of memory
                image[begin : begin + view.nbytes] = view
        if stretch.row >= 0 and crc != stretch.after:
            reason = f"bytes {stretch.begin} to {stretch.end}: CRC32C is {crc:08x} and should be {stretch.after:08x}"
            yield self._damage(self._key(stretch.row), reason)

    def _cut_off(self) -> Iterator[Damage]:
        index, size = self._index, self._source.size
        for row in self._rows[(index.position + index.size)[self._rows] > size].tolist():
            end = int(index.position[row] + index.size[row])
            yield self._damage(self._key(row), f"its bytes end at {end}, and the shard ends at {size}")

    def _whole(self, image: memoryview) -> Iterator[Damage]:
        if self._crc != self._record.crc32c:
            reason = f"CRC32C of the whole shard is {self._crc:08x} and should be {self._record.crc32c:08x}"
            yield self._damage(None, reason)
        for key, reason in compare_rows(image, self._payloads()):
            yield self._damage(key, reason)

    def _payloads(self) -> Sequence[Payload]:
        index = self._index
        return [
            Payload(
                key=self._key(row),
                dtype=index.dtypes[index.key[row]],
                shape=index.shapes[index.key[row], : index.ndims[index.key[row]]].tolist(),
                offset=index.offset[row, : index.ndims[index.key[row]]].tolist(),
                length=index.length[row, : index.ndims[index.key[row]]].tolist(),
                crc32c=int(index.blocks[index.starts[row + 1] - 1]),
                position=int(index.position[row]),
                size=int(index.size[row]),
            )
            for row in self._rows.tolist()
        ]

    def _key(self, row: int) -> str:
        return self._index.names[int(self._index.key[row])]

    def _key_at(self, position: int) -> str | None:
        begins = self._index.position[self._rows]
        inside = self._rows[(begins <= position) & (position < begins + self._index.size[self._rows])]
        return self._key(int(inside[0])) if len(inside) else None

    def _damage(self, key: str | None, reason: str) -> Damage:
        return Damage(self._path, key, reason)
