"""What checkpoints cost this rank's training, measured while it goes on."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from dataclasses import dataclass

from distckpt.format.json.log import CheckpointRecord
from distckpt.format.json.stats import MOST_RECENT, Durations, SaveTook
from distckpt.rank.pending import PendingSave, progress_of

MOST_KNOWN = 256
"""So many committed saves it is remembered of when they began, for a restore that goes back to one."""


_NONE = Durations()


@dataclass(frozen=True, slots=True)
class ManagerStats:
    """What this rank has measured since its manager was made. All durations are seconds of a monotonic clock.

    ``saves`` have begun, of which ``failed`` have failed so far and ``committed.times`` are committed.

    For each save training stands still from the call of ``save`` to its return: in all but the ``first_stall``, which
    also plans and touches memory, for ``stall``; of that it waits in ``queued`` for the save before, which still has the
    buffer, and takes ``copied`` to copy (on a GPU: to have the copying begun). It has ``waited`` as often as it called
    ``wait`` or asked for a ``result`` that was not there yet; ``device_waited`` is what a GPU's next optimizer step waited
    for the copy. ``written`` is from the call until this rank's part was on storage, ``committed`` until this rank knew
    that the checkpoint is committed; ``between`` is from the begin of one save to that of the next.

    ``bytes_written`` are this rank's, ``bytes_committed`` those of whole checkpoints, of all ranks; ``bytes_restored`` this
    rank has read to restore, in ``restored``.

    ``saving_seconds`` is all that training stood still for saves, ``starting_seconds`` what went by before the first
    restore if that came before any save, ``lost_seconds`` what was trained and lost because a restore went back,
    ``rollbacks`` times, and ``unsaved_seconds`` what would be lost if the process were killed now.
    """

    seconds: float = 0.0
    saves: int = 0
    failed: int = 0
    rollbacks: int = 0
    bytes_written: int = 0
    bytes_committed: int = 0
    bytes_restored: int = 0
    starting_seconds: float = 0.0
    saving_seconds: float = 0.0
    lost_seconds: float = 0.0
    unsaved_seconds: float = 0.0
    first_stall: Durations = _NONE
    stall: Durations = _NONE
    queued: Durations = _NONE
    copied: Durations = _NONE
    written: Durations = _NONE
    committed: Durations = _NONE
    waited: Durations = _NONE
    device_waited: Durations = _NONE
    between: Durations = _NONE
    restored: Durations = _NONE

    @property
    def productive_seconds(self) -> float:
        """Training that is not lost: all but what saves, restores and the start took."""
        spent = self.starting_seconds + self.saving_seconds + self.device_waited.total + self.restored.total
        return max(0.0, self.seconds - spent - self.lost_seconds)

    @property
    def goodput(self) -> float:
        """Productive time over all time since the manager was made, from 0 to 1.

        ``distckpt stats`` has that of the whole job, with what restarts took and crashes lost.
        """
        return min(1.0, self.productive_seconds / self.seconds) if self.seconds > 0 else 1.0

    def metrics(self, prefix: str = "checkpoint/") -> dict[str, float]:
        """All of it as flat numbers, for a logger: ``wandb.log(manager.stats().metrics())``."""
        flat: dict[str, float] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Durations):
                flat[f"{prefix}{field.name}_times"] = value.times
                flat[f"{prefix}{field.name}_seconds"] = value.total
                flat[f"{prefix}{field.name}_longest"] = value.longest
            else:
                flat[prefix + field.name] = value
        return {**flat, f"{prefix}goodput": self.goodput}


@dataclass(frozen=True, slots=True)
class _Inside:
    """A call of the manager that training is in since then."""

    call: str
    began: float


class Costs:
    """Measures one rank. Its methods take microseconds, and may be called from any thread.

    ``closed`` says that the run has come to an end in good order.
    """

    def __init__(self) -> None:
        self.closed = False
        self._began = time.monotonic()
        self._lock = threading.RLock()  # a signal handler may ask for the numbers
        self._now = ManagerStats()
        self._newest: CheckpointRecord | None = None
        self._thread = 0
        self._inside: _Inside | None = None
        self._is_restored = False
        self._save: PendingSave | None = None
        self._last_save: float | None = None
        self._kept: dict[str, float] = {}
        self._safe = 0.0
        self._recent: deque[SaveTook] = deque(maxlen=MOST_RECENT)

    def stats(self) -> ManagerStats:
        """The numbers as they are now."""
        with self._lock:
            now, stats = time.monotonic(), self._now
            unsaved = max(0.0, self._trained(now) - self._safe)
            standing = 0.0 if self._inside is None else now - self._inside.began
            restores = self._inside is not None and self._inside.call == "restore"
            return dataclasses.replace(
                stats,
                seconds=now - self._began,
                unsaved_seconds=unsaved,
                saving_seconds=stats.saving_seconds + (0.0 if restores else standing),
                restored=stats.restored.joined(Durations(0, standing, standing)) if restores else stats.restored,
            )

    @property
    def recent(self) -> tuple[SaveTook, ...]:
        """The last MOST_RECENT committed saves, in the order in which they ended."""
        with self._lock:
            return tuple(self._recent)

    @property
    def newest(self) -> CheckpointRecord | None:
        """What was committed last, as far as this rank knows: of what it has saved and restored."""
        return self._newest

    # ---- what the manager tells ----------------------------------------------------------------------------------

    def entered(self, call: str) -> None:
        """Training has called the manager, and stands still; unless another thread is in a call already."""
        with self._lock:
            thread = threading.get_ident()
            if self._inside is None or self._thread == thread:  # what was interrupted just when it ended is over
                self._thread = thread
                self._inside = _Inside(call, time.monotonic())

    def left(self) -> None:
        """It goes on."""
        with self._lock:
            inside = self._inside
            if inside is None or threading.get_ident() != self._thread:
                return
            self._inside = None
            seconds = time.monotonic() - inside.began
            if inside.call == "restore":
                self._add(restored=seconds)
                return
            self._set(saving_seconds=self._now.saving_seconds + seconds)
            if inside.call == "wait":
                self._add(waited=seconds)
            save, self._save = self._save, None
            if save is not None:
                first = not self._now.first_stall.times
                self._add(**{"first_stall" if first else "stall": seconds})
                self._add(queued=progress_of(save).queued, copied=progress_of(save).copied)

    def begun(self, pending: PendingSave) -> None:
        """The call is a save, and this is it."""
        with self._lock:
            began = progress_of(pending).began
            at = self._trained(began)
            if self._last_save is not None:
                self._add(between=began - self._last_save)
            self._last_save, self._save = began, pending
            self._set(saves=self._now.saves + 1)
        progress = progress_of(pending)
        progress.waiting = self.waited
        progress.ended.add_done_callback(lambda _: self._ended(pending, at))

    def waited(self, seconds: float) -> None:
        """Somebody has waited for a save to end. It counts if that is who saves, and if it was not in another call."""
        with self._lock:
            if self._inside is None and threading.get_ident() == self._thread:
                self._add(waited=seconds)
                self._set(saving_seconds=self._now.saving_seconds + seconds)

    def device_waited(self, seconds: float) -> None:
        """A GPU's optimizer step has waited for a copy."""
        with self._lock:
            self._add(device_waited=seconds)

    def restored(self, record: CheckpointRecord | None, nbytes: int) -> None:
        """The call is a restore, and has filled the objects from this one, or (None) there was none."""
        with self._lock:
            at = self._trained(time.monotonic())
            is_start = not (self._is_restored or self._now.saves)
            self._is_restored = True
            self._set(bytes_restored=self._now.bytes_restored + nbytes)
            self._know(record)
            if is_start:
                self._set(starting_seconds=self._now.starting_seconds + at)
            elif record is not None:
                back_to = min(at, self._kept.get(record.attempt, 0.0))
                self._set(lost_seconds=self._now.lost_seconds + at - back_to, rollbacks=self._now.rollbacks + 1)
                self._safe = back_to

    # ---- the rest ------------------------------------------------------------------------------------------------

    def _ended(self, pending: PendingSave, at: float) -> None:
        progress = progress_of(pending)
        with self._lock:
            if progress.ended.exception() is not None:
                self._set(failed=self._now.failed + 1)
                return
            record = progress.ended.result()
            self._know(record)
            self._safe = max(self._safe, at)
            self._kept[record.attempt] = at
            while len(self._kept) > MOST_KNOWN:
                del self._kept[next(iter(self._kept))]
            over, last = progress.over or 0.0, progress.last
            self._add(written=progress.written or 0.0, committed=over)
            who = (None, 0.0) if last is None else (last.rank, last.seconds)
            self._recent.append(SaveTook(pending.number, progress.began - self._began, progress.stall, over, *who))
            self._set(
                bytes_written=self._now.bytes_written + progress.nbytes,
                bytes_committed=self._now.bytes_committed + record.nbytes,
            )

    def _know(self, record: CheckpointRecord | None) -> None:
        if record is not None and (self._newest is None or record.order >= self._newest.order):
            self._newest = record

    def _trained(self, now: float) -> float:
        """Seconds of training behind us at ``now`` that were not lost; while training stands still they stand too."""
        now = now if self._inside is None else min(now, self._inside.began)
        stats = self._now
        spent = stats.starting_seconds + stats.saving_seconds + stats.restored.total + stats.lost_seconds
        return max(0.0, now - self._began - spent)

    def _add(self, **seconds: float) -> None:
        self._set(**{name: getattr(self._now, name).with_one(more) for name, more in seconds.items()})

    def _set(self, **values: object) -> None:
        self._now = dataclasses.replace(self._now, **values)  # type: ignore[arg-type]
