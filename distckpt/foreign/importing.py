"""``distckpt import``: files of another program written as one committed checkpoint, a part at a time."""

from __future__ import annotations

import contextlib
import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec

from distckpt.coordinator.machine.actions import Seal
from distckpt.coordinator.messages import Receipt
from distckpt.coordinator.shell.sealing import seal_checkpoint
from distckpt.directory.by_hand import Hand, check_nothing_sealed
from distckpt.directory.garbage import delete_attempt
from distckpt.directory.locate import read_sealed
from distckpt.directory.log import Tail, read_tail
from distckpt.errors import CoordinatorError, EncodeError, StorageError
from distckpt.foreign.contents import Held, Spread, why_not_encoded
from distckpt.foreign.reader import ForeignReader
from distckpt.format import names
from distckpt.format.arrow.dtypes import ITEM_SIZES, VALUE
from distckpt.format.arrow.receipt import ShardReceipt
from distckpt.format.arrow.shard import Chunk
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.format.tree.values import capacity_for, encode_value, pad_value
from distckpt.sharding.description import Row, build_description
from distckpt.sharding.match import Wanted
from distckpt.sharding.plan import make_plan
from distckpt.storage import Store, join
from distckpt.transfer.progress import Meter, Progress
from distckpt.transfer.staging import StagedCopy, StagedShard
from distckpt.transfer.writer import read_back, write_shard

SHARD_BYTES = 128 << 20
"""About what is in memory twice: one shard is read while the one before it is written."""

MOST_SHARDS = 4096


class Import:
    """One checkpoint in the making, number ``number`` of the directory ``store``, whose log ``tail`` is.

    ``clock`` gives epoch seconds. ValueError if the log has that number already, if there is
    nothing to be written, and for a value that cannot be stored.
    """

    def __init__(
        self,
        reader: ForeignReader,
        store: Store,
        tail: Tail,
        name: str,
        number: int,
        clock: Callable[[], float],
        progress: Progress | None = None,
    ) -> None:
        check_nothing_sealed(store, tail)
        alive = tail.having_numbers(number).alive().values()
        if any((record.name, record.number) == (name, number) for record in alive):
            folder = names.checkpoint_folder(name, number)
            raise ValueError(f"{join(store.url, folder)} is there already. Give another number")
        self._reader = reader
        self._store = store
        self._clock = clock
        self._name, self._number = name, number
        self._epoch = (tail.entry.epoch if tail.entry is not None else 0) + 1
        self._attempt = f"e{self._epoch}-{uuid.uuid4().hex}"
        # Of an epoch after the attempt's: so what a killed import leaves is garbage as soon as it has begun.
        self._hand = Hand(store, tail, "import", [self._epoch])
        self._state = tail.head
        if not reader.texts:
            raise ValueError(f"{reader.path}: there is nothing in it to import")
        self._shard_bytes = max(SHARD_BYTES, reader.contents.nbytes // MOST_SHARDS)
        self._cuts = list(_cuts(reader, self._shard_bytes))
        self._meter = Meter(sum(cut.chunk.nbytes for cut in self._cuts), progress)

    def run(self) -> CheckpointRecord:
        """Write and commit it: on return it is durable and every reader finds it.

        Raises what reading and writing raise, and what ``Hand.write`` raises; then nothing was committed, and what was
        written is deleted as far as that is possible.
        """
        self._hand.write("claim", self._state, self._clock())
        try:
            receipts = self._write()
            record = self._seal(receipts)
        except BaseException:
            self._discard()
            raise
        try:
            self._hand.write("commit", _with(self._state, record), self._clock())
        except CoordinatorError:  # somebody else has taken over: before it, or from it
            if read_tail(self._store).having_attempt(self._attempt).find(self._attempt) is None:
                self._discard()
                raise
        return record

    def _discard(self) -> None:
        with contextlib.suppress(StorageError):
            delete_attempt(self._store, self._folder)

    @property
    def _folder(self) -> str:
        return names.attempt_folder(self._name, self._number, self._attempt)

    def _write(self) -> list[ShardReceipt]:
        receipts: list[ShardReceipt] = []
        parts = list(_parts(self._cuts, self._shard_bytes))
        with ThreadPoolExecutor(1, thread_name_prefix="distckpt-import") as pool:
            ahead = pool.submit(self._filled, 0, parts[0])
            for number in range(len(parts)):
                shard = ahead.result()
                if number + 1 < len(parts):
                    ahead = pool.submit(self._filled, number + 1, parts[number + 1])
                with contextlib.closing(shard):
                    receipts.append(self._put(shard))
        return receipts

    def _filled(self, number: int, part: Sequence[_Cut]) -> StagedShard:
        """A shard in memory with all that it holds, read from the files."""
        shard = StagedShard(number, [cut.chunk for cut in part])
        content, image = shard.content, shard.image
        places = zip(part, image.positions.tolist(), image.sizes.tolist(), strict=True)
        wanted, memory = [], []
        for cut, position, size in places:
            if cut.text is not None:
                content[position : position + size] = pad_value(cut.text, size)
            elif size:
                wanted.append(Wanted(cut.chunk.key, cut.chunk.offset, cut.chunk.length))
                memory.append(content[position : position + size])
        self._reader.fill(wanted, memory)
        shard.copied = StagedCopy()
        return shard

    def _put(self, shard: StagedShard) -> ShardReceipt:
        path = f"{self._folder}/{names.shard_name(0, shard.number)}"
        receipt = write_shard(self._store, path, shard)
        read_back(self._store, path, receipt)
        self._meter.add(int(shard.image.sizes.sum()))
        return receipt

    def _seal(self, receipts: Sequence[ShardReceipt]) -> CheckpointRecord:
        rows = [cut.row for cut in self._cuts]
        plan = make_plan(self._number, {0: build_description(rows).encode()})
        receipt = Receipt(self._attempt, tuple(receipts))
        seal = Seal(self._attempt, self._name, self._number, self._epoch, self._clock(), plan, {0: receipt}, {})
        seal_checkpoint(self._store, seal, plan.table)
        return read_sealed(self._store, self._folder)[1]


@dataclass(frozen=True, slots=True)
class _Cut:
    """A chunk to be written, as shard and plan have it. ``text`` is that of a plain value."""

    chunk: Chunk
    row: Row
    text: bytes | None = None


def _cuts(reader: ForeignReader, most: int) -> Iterator[_Cut]:
    """All of it in order. What is larger than ``most`` bytes is cut along its first dimension."""
    for key, path in reader.texts.items():
        dtype, shape = reader.layout(key)
        if dtype == VALUE:
            text = _text(reader, key)
            chunk = Chunk(key, VALUE, (), (), (), capacity_for(len(text)))
            yield _Cut(chunk, Row(key, path, VALUE, (), (), (), 0), text)
            continue
        for first, count in _groups(reader.contents.tensors[key], most):
            offset = (first, *(0,) * (len(shape) - 1)) if shape else ()
            length = (count, *shape[1:]) if shape else ()
            nbytes = math.prod(length) * ITEM_SIZES[dtype]
            box = (dtype, shape, offset, length, nbytes)
            yield _Cut(Chunk(key, *box), Row(key, path, *box))


def _text(reader: ForeignReader, key: str) -> bytes:
    """That of a plain value. ValueError, naming the key, if it cannot be stored."""
    try:
        return encode_value(reader.value(key), key)
    except EncodeError as error:
        why = why_not_encoded(error)
        raise ValueError(f"{reader.path}, key {error.key!r}: {why}. Go without it by --leave-out KEY") from error


def _groups(held: Held | Spread, most: int) -> Iterator[tuple[int, int]]:
    """First index and number of indices of the first dimension that go into one chunk."""
    rows = held.shape[0] if held.shape else 1
    if held.nbytes <= most or held.strides is not None:  # what lies apart is read as a whole
        yield 0, rows
        return
    at_once = max(1, most // (held.nbytes // rows))
    for first in range(0, rows, at_once):
        yield first, min(at_once, rows - first)


def _parts(cuts: Sequence[_Cut], most: int) -> Iterator[list[_Cut]]:
    """What goes into which shard; one at least."""
    part: list[_Cut] = []
    room = most
    for cut in cuts:
        if part and cut.chunk.nbytes > room:
            yield part
            part, room = [], most
        part.append(cut)
        room -= cut.chunk.nbytes
    yield part


def _with(state: State, record: CheckpointRecord) -> State:
    """The state with one more checkpoint, the newest, as if a run had saved it."""
    is_first = state.newest() is None and not state.pages
    state, (record,) = state.counted(record)
    if is_first:
        state = msgspec.structs.replace(state, last_preserved_timestamp=record.time - 1.0)
    return msgspec.structs.replace(state, active=(*state.active, record))
