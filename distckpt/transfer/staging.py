"""Staging: copying a rank's state into the images of its shards. The layout is made once, each save only copies."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from distckpt.errors import SaveError
from distckpt.format.arrow.dtypes import VALUE
from distckpt.format.arrow.shard import Chunk, ShardImage, build_image
from distckpt.format.tree.values import capacity_for, pad_value
from distckpt.transfer.arena import Arena
from distckpt.transfer.filecrc import FileCrc
from distckpt.transfer.memcopy import MemoryCopier, Move

MAX_SHARD_BYTES = 8 << 30
MOST_THREADS = 16


class StagedCopy:
    """Tensors on their way into the images. On CPU they have arrived as soon as this exists.

    What changes a tensor in place before the copy has arrived must have been ordered after it: else nobody knows
    what has been copied, and ``check`` says so.
    """

    def __init__(
        self, events: Sequence[torch.cuda.Event] = (), sources: Sequence[tuple[str, torch.Tensor]] = ()
    ) -> None:
        self._events = tuple(events)
        # Their memory must not be given to others while a GPU still reads it on a stream that PyTorch knows nothing of.
        self._sources = tuple((key, source, _version(source)) for key, source in sources)
        self._ordered = False
        self._disturbed: tuple[str, ...] = ()

    @property
    def has_arrived(self) -> bool:
        """Whether somebody has waited until all bytes had arrived, or they had from the start."""
        return not self._events

    def wait(self) -> None:
        """Return once all bytes have arrived: from then on the sources may change."""
        for event in self._events:
            event.synchronize()
        changed = self._changed()
        if not self._ordered:  # looked at after the sources, since what is ordered may change them at once
            self._disturbed = changed
        self._events = self._sources = ()

    def order_after(self, stream: torch.cuda.Stream) -> None:
        """Whatever is queued on ``stream`` from now on, such as an optimizer's step, runs after the copy."""
        if not self._ordered:
            self._disturbed = self._changed()
            self._ordered = True
        for event in self._events:
            stream.wait_event(event)

    def check(self) -> None:
        """SaveError if a tensor has changed while it was copied. To be asked after ``wait``."""
        if self._disturbed:
            first, *others = self._disturbed
            more = f" and {len(others)} more" if others else ""
            raise SaveError(
                None,
                f"{first}{more} changed on its GPU while it was copied, by something else than the step of an optimizer that "
                "is saved: it is not known what was copied. Change it before save or after step",
            )

    def _changed(self) -> tuple[str, ...]:
        return tuple(key for key, source, version in self._sources if _version(source) != version)


class StagedShard:
    """One shard: its image, the memory that it is made in, and what was last copied there."""

    def __init__(self, number: int, chunks: Sequence[Chunk]) -> None:
        self.number = number
        self.image: ShardImage = build_image(chunks)
        self.file_crc = FileCrc(self.image)
        self.copied: StagedCopy | None = None
        self._arena = Arena(self.image.size)
        for position, text in self.image.fixed:
            self._arena.view[position : position + len(text)] = text
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self.pin()

    @property
    def pinned(self) -> bool:
        """Whether a GPU copies straight into the image."""
        return self._arena.pinned

    @property
    def content(self) -> memoryview:
        """The bytes of the file; writable."""
        return self._arena.view[: self.image.size]

    def value_slots(self) -> Iterator[memoryview]:
        """The places of the plain values, in order."""
        content = self.content
        for chunk, position in self._placed():
            if chunk.dtype == VALUE:
                yield content[position : position + chunk.nbytes]

    def tensor_slots(self) -> Iterator[_Slot]:
        """The places of the tensors, in order."""
        for chunk, position in self._placed():
            if chunk.dtype != VALUE:
                yield _slot(chunk, position, self._arena.tensor(position, chunk.nbytes))

    def pin(self) -> None:
        """Let a GPU copy straight into the image."""
        self._arena.pin()

    def close(self) -> None:
        """Let the memory go."""
        if self.copied is not None:
            self.copied.wait()
        self._arena.close()

    def _placed(self) -> Iterator[tuple[Chunk, int]]:
        return zip(self.image.chunks, self.image.positions.tolist(), strict=True)


class Staging:
    """The shards of one rank, and the slots in them. One save at a time.

    ``chunks`` are what the rank writes, in order; those of dtype ``json`` stand for ``values``, in order, and get slots
    with room to grow, whatever their nbytes. A shard holds up to ``max_shard_bytes``, or one larger chunk; the number of the
    ``first`` is given where there are others.
    Raises MemoryError if there is no memory for it, ValueError for a chunk that does not fit together.
    """

    def __init__(
        self, chunks: Sequence[Chunk], values: Sequence[bytes], max_shard_bytes: int = MAX_SHARD_BYTES, first: int = 0
    ) -> None:
        parts = _split(_with_capacities(chunks, values), max_shard_bytes)
        self.shards = tuple(StagedShard(number, part) for number, part in enumerate(parts, first))
        self._slots = [slot for shard in self.shards for slot in shard.tensor_slots()]
        self._value_slots = [slot for shard in self.shards for slot in shard.value_slots()]
        self._copier = MemoryCopier(min(torch.get_num_threads(), MOST_THREADS))
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._owner = os.getpid()

    def fits(self, values: Sequence[bytes]) -> bool:
        """Whether every value has room in its slot; if not, a new Staging is due."""
        return all(len(value) <= len(slot) for value, slot in zip(values, self._value_slots, strict=True))

    def stage(self, sources: Sequence[torch.Tensor], values: Sequence[bytes]) -> StagedCopy:
        """Copy every tensor and value, in the order of the chunks, to its slot, bit for bit.

        Tensors on CPU have been copied on return. Those on a GPU are copied beside what its current stream does next;
        what was queued there before is waited for. Raises ValueError for a tensor of another shape or dtype than its
        chunk, and for a value that does not fit.
        """
        if os.getpid() != self._owner:
            raise SaveError(None, "a forked process cannot save with the buffers of its parent")
        tensors = self._checked(sources)
        for shard in self.shards:
            if shard.copied is not None:
                shard.copied.wait()
        for slot, value in zip(self._value_slots, values, strict=True):
            slot[:] = pad_value(value, len(slot))
        copied = self._copy(tensors)
        for shard in self.shards:
            shard.copied = copied
        return copied

    def close(self) -> None:
        """Let the memory go. Closing twice does no harm."""
        for shard in self.shards:
            shard.close()
        self._copier.close()
        self._slots, self._value_slots = [], []

    def _checked(self, sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The sources, as bytes where their slots are."""
        if len(sources) != len(self._slots):
            raise ValueError(f"{len(sources)} tensors for {len(self._slots)} slots")
        tensors = []
        for source, slot in zip(sources, self._slots, strict=True):
            # PyTorch would broadcast or convert, and so store something else.
            if source.shape != slot.shape or source.dtype != slot.dtype:
                raise ValueError(
                    f"{slot.key}: a tensor of {source.dtype} and shape {tuple(source.shape)} "
                    f"for a slot of {slot.dtype} and shape {slot.shape}"
                )
            tensors.append(source if slot.typed else _as_bytes(source))
        return tensors

    def _copy(self, tensors: list[torch.Tensor]) -> StagedCopy:
        events = []
        with torch.no_grad():
            for device, pairs in _by_device(self._slots, tensors):
                if device.type == "cuda":
                    events.append(self._copy_from_gpu(device, pairs))
                elif device.type == "cpu":
                    self._copy_from_cpu(pairs)
                else:
                    torch._foreach_copy_([slot.memory for slot, _ in pairs], [source for _, source in pairs])
        on_gpu = [(slot.key, source) for slot, source in zip(self._slots, tensors, strict=True) if source.is_cuda]
        return StagedCopy(events, on_gpu)

    def _copy_from_cpu(self, pairs: Sequence[_Pair]) -> None:
        moves: list[Move] = []
        slots, sources = [], []
        for slot, source in pairs:
            if _is_plain(source):
                moves.append((slot.address, source.data_ptr(), slot.nbytes))
            else:
                slots.append(slot.memory)
                sources.append(source)
        self._copier.copy(moves)
        if slots:
            torch._foreach_copy_(slots, sources)

    def _copy_from_gpu(self, device: torch.device, pairs: Sequence[_Pair]) -> torch.cuda.Event:
        for shard in self.shards:
            shard.pin()
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            torch._foreach_copy_([slot.memory for slot, _ in pairs], [source for _, source in pairs], non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(stream)
        return event


def _version(source: torch.Tensor) -> int:
    """It grows with every change in place that PyTorch knows of."""
    return 0 if source.is_inference() else source._version


def _by_device(
    slots: Sequence[_Slot], tensors: Sequence[torch.Tensor]
) -> Iterable[tuple[torch.device, Sequence[_Pair]]]:
    found: dict[torch.device, list[_Pair]] = {}
    for slot, tensor in zip(slots, tensors, strict=True):
        found.setdefault(tensor.device, []).append((slot, tensor))
    # GPUs first: they copy while this thread copies what is on CPU.
    return sorted(found.items(), key=lambda item: item[0].type != "cuda")


def _is_plain(source: torch.Tensor) -> bool:
    """Whether a tensor on CPU is one stretch of memory that reads as it is."""
    return (
        type(source) in _PLAIN_TYPES
        and source.layout is torch.strided
        and source.is_contiguous()
        and not source.is_conj()
        and not source.is_neg()
    )


def _with_capacities(chunks: Sequence[Chunk], values: Sequence[bytes]) -> list[Chunk]:
    expected = sum(chunk.dtype == VALUE for chunk in chunks)
    if expected != len(values):
        raise ValueError(f"{len(values)} values for {expected} chunks of values")
    left = iter(values)
    return [replace(chunk, nbytes=capacity_for(len(next(left)))) if chunk.dtype == VALUE else chunk for chunk in chunks]


def _split(chunks: Sequence[Chunk], max_bytes: int) -> list[list[Chunk]]:
    parts: list[list[Chunk]] = []
    total = 0
    for chunk in chunks:
        if not parts or total + chunk.nbytes > max_bytes:
            parts.append([])
            total = 0
        parts[-1].append(chunk)
        total += chunk.nbytes
    return parts


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a tensor of ``dtype`` and ``shape`` is copied to; ``typed`` says that ``memory`` is a tensor like that."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    memory: torch.Tensor
    address: int
    nbytes: int
    typed: bool


_Pair = tuple[_Slot, torch.Tensor]
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def _slot(chunk: Chunk, position: int, memory: torch.Tensor) -> _Slot:
    dtype = getattr(torch, chunk.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{chunk.key}: torch {torch.__version__} has no dtype {chunk.dtype!r}")  # noqa: TRY004
    if math.prod(chunk.length) * dtype.itemsize != chunk.nbytes:
        raise ValueError(f"{chunk.key}: {chunk.length} elements of {dtype} are not {chunk.nbytes} bytes")
    # Among small chunks a position can be odd. PyTorch's loops assume aligned elements, so such a slot stays bytes.
    typed = position % dtype.itemsize == 0
    place = memory.view(dtype).view(chunk.length) if typed else memory
    return _Slot(chunk.key, chunk.length, dtype, place, memory.data_ptr(), chunk.nbytes, typed)


def _as_bytes(source: torch.Tensor) -> torch.Tensor:
    plain = source.detach().resolve_conj().resolve_neg().contiguous()
    return plain.view(-1).view(torch.uint8)
