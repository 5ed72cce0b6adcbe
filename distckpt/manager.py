"""CheckpointManager: save and restore together with all ranks, keep what is to be kept."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal

from distckpt.checkpoint import Checkpoint, LoadStatus
from distckpt.collecting import Collector, optimizers_of
from distckpt.coordinator.client import Session, open_session
from distckpt.coordinator.messages import (
    Heartbeat,
    Leave,
    OpenRun,
    Restored,
    RestoreFrom,
    RestoreRound,
    Retention,
    Unknown,
)
from distckpt.coordinator.shell import Settings
from distckpt.ending import close_at_exit, forget_at_exit
from distckpt.errors import (
    CheckpointNotFoundError,
    CoordinatorError,
    DamagedError,
    DistckptError,
    MismatchError,
    RestoreError,
    StorageError,
)
from distckpt.format import names
from distckpt.format.limits import MAX_NUMBER
from distckpt.format.log import CheckpointRecord
from distckpt.restoring import restore_objects
from distckpt.saving import PendingSave, Saver
from distckpt.storage import open_store
from distckpt.transfer.catalog import Located, located, read_index
from distckpt.transfer.log import read_tail
from distckpt.world import find_world

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 20.0
IDLE_SECONDS = 600.0
READ_PAUSES = (0.2, 1.0)
LAST_SAVE_SECONDS = 30.0
"""How long a manager that is left by an exception still waits for a save in flight."""

StepCounter = int | Callable[[], int] | Any


class CheckpointManager:
    """Saves checkpoints that are whole or not there at all, restores the newest good one, deletes old ones.

    One manager for a directory and a run, made by every rank alike. A newer one, of a restarted job say, takes over;
    the older is told so and can do no harm.

    Args:
        checkpoint: what to save.
        directory: a local path that all hosts share, or an object store's URL.
        max_to_keep: how many checkpoints stay, oldest deleted first; None keeps all.
        keep_checkpoint_every_n_hours: a checkpoint about to be deleted is preserved for ever if it is at least this
            many hours newer than the last one preserved.
        checkpoint_name: the first part of ``<name>-<number>``.
        step_counter: the training step, for ``checkpoint_interval``: an int-like, a tensor or a callable.
        checkpoint_interval: least number of steps between two saves.
        init_fn: called by ``restore_or_initialize`` on every rank when there is no checkpoint.
        last_checkpoint_step: the step of the last save, if it is known.
        save_timeout: seconds until a rank that is missing fails the save for all.
        buffers: how many saves may be in the making at once; each costs host memory of this rank's part.
        on_busy: what a save does that finds its buffer still in use: "wait", or "skip" on all ranks alike.
        storage_options: for the store behind ``directory``.
        rank, world_size: given, or found in torch.distributed, Ray Train, torchrun's variables; else a world of one.
        run_id: names this incarnation of the job; needed only with rank and world_size and without torch.distributed.
        verify: read every shard back and compare before it is reported as landed.

    Raises:
        ValueError: wrong arguments.
        StorageError, StoreUnsuitableError: the directory cannot be used.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        directory: str | os.PathLike[str],
        max_to_keep: int | None = 5,
        keep_checkpoint_every_n_hours: float | None = None,
        checkpoint_name: str = "ckpt",
        step_counter: StepCounter | None = None,
        checkpoint_interval: int | None = None,
        init_fn: Callable[[], object] | None = None,
        last_checkpoint_step: int | None = None,
        *,
        save_timeout: float = 300.0,
        buffers: int = 1,
        on_busy: Literal["wait", "skip"] = "wait",
        storage_options: Mapping[str, Any] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        run_id: str | None = None,
        verify: bool = False,
    ) -> None:
        _check_arguments(
            max_to_keep, checkpoint_name, step_counter, checkpoint_interval, save_timeout, buffers, on_busy
        )
        self._checkpoint = checkpoint
        self._name = checkpoint_name
        self._step_counter = step_counter
        self._interval = checkpoint_interval
        self._init_fn = init_fn
        self._last_step = last_checkpoint_step
        self._timeout = save_timeout
        self._store = open_store(directory, storage_options)
        self._world = find_world(rank, world_size, run_id)
        opening = OpenRun(
            token="",
            rank=self._world.rank,
            world_size=self._world.size,
            host=self._world.host,
            name=checkpoint_name,
            retention=Retention(max_to_keep, keep_checkpoint_every_n_hours),
            save_timeout=save_timeout,
        )
        options = dict(storage_options) if storage_options is not None else None
        self._session: Session = open_session(
            self._store, options, self._world, opening, Settings(idle_timeout=IDLE_SECONDS)
        )
        self._saver = Saver(
            self._session,
            self._store,
            Collector(checkpoint, self._world.rank),
            self._world.rank,
            checkpoint_name,
            save_timeout,
            buffers,
            on_busy == "skip",
            verify,
            optimizers_of(checkpoint),
        )
        self._pending: list[PendingSave] = []
        self._restores = 0
        self._closed = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="distckpt-heartbeat", daemon=True)
        self._heart.start()
        close_at_exit(self)

    # ---- what there is -----------------------------------------------------------------------------------------

    @property
    def directory(self) -> str:
        """Where the checkpoints are: an absolute path or a URL."""
        return self._store.url

    @property
    def checkpoint(self) -> Checkpoint:
        """What is saved."""
        return self._checkpoint

    @property
    def checkpoint_interval(self) -> int | None:
        """Least number of steps between two saves."""
        return self._interval

    @property
    def checkpoints(self) -> list[str]:
        """Paths of the managed checkpoints, oldest first, read from storage. Preserved ones are not among them."""
        return [self._path(record.name, record.number) for record in read_tail(self._store).state.active]

    @property
    def latest_checkpoint(self) -> str | None:
        """The path of the newest committed checkpoint, read from storage, or None."""
        paths = self.checkpoints
        return paths[-1] if paths else None

    # ---- save --------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Plan with all ranks and warm the buffers, so that already the first save only copies.

        Raises what a save would raise: EncodeError, PlanError, MissingRanksError ...
        """
        self._check_open()
        self._saver.prepare()

    def save(self, checkpoint_number: Any = None, check_interval: bool = True) -> PendingSave | None:
        """Copy the state, write it in the background, and return at once; all ranks call it alike.

        ``checkpoint_number`` is an int or anything int() takes; None numbers by ``checkpoint.save_counter``, which
        counts every save. Returns None when nothing is saved: the step was saved already or, with
        ``check_interval``, the interval has not passed; or when all ranks skip a save because one is in flight.

        Raises EncodeError for what cannot be stored, and the failure of an earlier save that nobody has collected.
        """
        self._check_open()
        self._raise_uncollected()
        step = self._step()
        if step is not None and self._too_early(step, check_interval):
            return None
        number = int(checkpoint_number) if checkpoint_number is not None else self._checkpoint.save_counter + 1
        if not 0 <= number <= MAX_NUMBER:
            raise ValueError(f"checkpoint numbers go from 0 to {MAX_NUMBER}, but this one is {number}")
        self._checkpoint.save_counter += 1
        pending = self._saver.save(number, self._path(self._name, number))
        if pending is None:
            self._checkpoint.save_counter -= 1
            return None
        self._remember(pending, step)
        return pending

    def wait(self) -> None:
        """Return once no save is under way. Raises the first failure that nobody has collected."""
        for pending in self._pending:
            pending._settle()
        self._raise_uncollected()

    def _too_early(self, step: int, check_interval: bool) -> bool:
        if self._interval is None or self._last_step is None:
            return False
        return step == self._last_step or (check_interval and step < self._last_step + self._interval)

    def _step(self) -> int | None:
        counter = self._step_counter
        if self._interval is None or counter is None:
            return None
        return int(counter() if callable(counter) else counter)

    def _remember(self, pending: PendingSave, step: int | None) -> None:
        before = self._last_step
        self._last_step = step if step is not None else before
        self._pending.append(pending)

        def undo(done: Any) -> None:
            # A failed save does not count, so the same step may be tried again.
            if done.exception() is not None and self._last_step == step:
                self._last_step = before

        pending._future.add_done_callback(undo)

    def _raise_uncollected(self) -> None:
        failed = [error for pending in self._pending if (error := pending._uncollected_error()) is not None]
        self._pending = [pending for pending in self._pending if not pending.done()]
        for error in failed[1:]:
            logger.error("another save failed too: %s", error)
        if failed:
            raise failed[0]

    # ---- restore -----------------------------------------------------------------------------------------------

    def restore_or_initialize(self) -> str | None:
        """Restore the newest good checkpoint on all ranks and return its path; else call ``init_fn``, return None."""
        record = self._restore(None, partial=False)
        if record is None:
            if self._init_fn is not None:
                self._init_fn()
            return None
        return self._path(record.name, record.number)

    def restore(self, which: int | str | os.PathLike[str] | None = None, partial: bool = False) -> str:
        """Restore one checkpoint on all ranks, in place, and return its path.

        ``which`` is a number or a path of this directory; None means the newest good one: what any rank finds
        damaged is refused by all, with the reason in the log, and the next older is tried. ``partial`` allows keys
        that the checkpoint lacks, or that no object asked for (with many ranks: whole objects, since ranks may hold
        different keys of one).

        Raises CheckpointNotFoundError, NoGoodCheckpointError, MismatchError, ResizeError, MissingRanksError.
        """
        number = self._number(which)
        record = self._restore(number, partial)
        if record is None:
            raise CheckpointNotFoundError(self._store.url, "no checkpoint has been committed here")
        return self._path(record.name, record.number)

    def _restore(self, number: int | None, partial: bool) -> CheckpointRecord | None:
        self._check_open()
        self._restores += 1
        ask, tried, refused = f"restore-{self._restores}", "", ""
        while True:
            question = RestoreRound(0, self._world.rank, ask, number, tried, refused)
            reply = self._session.ask(_with_run(question), 2 * self._timeout + 60)
            if isinstance(reply, Restored):
                self._report_refused(reply.refused)
                return self._restored(reply.record)
            if isinstance(reply, RestoreFrom):
                tried = reply.record.attempt
                refused = self._try(reply.record, partial)
            elif isinstance(reply, Unknown):
                tried, refused = "", ""
            else:
                raise RestoreError(f"unexpected answer from the coordinator: {reply!r}")

    def _try(self, record: CheckpointRecord, partial: bool) -> str:
        """Restore this one; the reason if its bytes are not what was written, '' if all went well."""
        try:
            where = located(self._store, record)
            status = self._filled(where)
        except (DamagedError, StorageError) as error:
            logger.warning("checkpoint %d cannot be restored here: %s", record.number, error)
            return str(error) or type(error).__name__
        unexpected = [key for key in status.unexpected if self._is_nobodys(key)]
        if not partial and (status.missing or unexpected):
            raise MismatchError(where.path, status.missing, unexpected, {})
        return ""

    def _filled(self, where: Located) -> LoadStatus:
        """Fill the objects. A store that fails to answer is asked again before an older checkpoint is considered."""
        for pause in READ_PAUSES:
            try:
                return restore_objects(self._checkpoint, where, read_index(where), self._world.rank, self._world.size)
            except StorageError as error:
                logger.warning("reading %s failed and is tried again in %g s: %s", where.path, pause, error)
                time.sleep(pause)
        return restore_objects(self._checkpoint, where, read_index(where), self._world.rank, self._world.size)

    def _is_nobodys(self, key: str) -> bool:
        """Whether no rank asks for a key that this one does not: of an object of ours, another rank may hold it."""
        name = key.partition(".")[0].partition("@")[0]
        return self._world.size == 1 or name not in self._checkpoint.objects

    def _restored(self, record: CheckpointRecord | None) -> CheckpointRecord | None:
        if record is not None and self._interval is not None:
            self._last_step = self._step()
        return record

    def _report_refused(self, refused: tuple[tuple[str, str], ...]) -> None:
        for path, reason in refused:
            logger.warning("%s was refused and an older checkpoint restored: %s", path, reason)

    def _number(self, which: int | str | os.PathLike[str] | None) -> int | None:
        if which is None or isinstance(which, int):
            return which
        path = os.fspath(which).rstrip("/")
        parsed = names.parse_checkpoint(path.rpartition("/")[2])
        if path == self._store.url or open_store(path).url == self._store.url:
            return None
        if parsed is None or parsed[0] != self._name or open_store(path).url != self._path(*parsed):
            raise CheckpointNotFoundError(path, f"not a checkpoint of {self._store.url}")
        return parsed[1]

    # ---- life --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for saves under way and leave the run. Raises the first failure that nobody has collected."""
        if self._closed.is_set():
            return
        try:
            self.wait()
        finally:
            self._leave()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise CoordinatorError(f"{self.directory}: this manager has been closed; make another one to go on")

    def _leave(self) -> None:
        self._closed.set()
        forget_at_exit(self)
        self._saver.close()
        self._heart.join()
        with contextlib.suppress(DistckptError):  # the coordinator notices by itself that we are gone
            self._session.ask(lambda run: Leave(run, self._world.rank), 5.0)
        self._session.close()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        deadline = time.monotonic() + LAST_SAVE_SECONDS
        for pending in self._pending:
            try:
                failure = pending.exception(max(0.0, deadline - time.monotonic()))
            except TimeoutError as late:
                failure = late
            if failure is not None:
                logger.error("while the training loop ended with %r, a save failed too: %s", error, failure)
        self._closed.set()
        if all(pending.done() for pending in self._pending):
            self._leave()

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS):
            try:
                self._session.ask(lambda run: Heartbeat(run, self._world.rank), HEARTBEAT_SECONDS)
            except DistckptError as error:
                # A save that needs the coordinator says so itself; until then training has nothing to gain from this.
                logger.warning("heartbeat to the coordinator: %s", error)

    def _path(self, name: str, number: int) -> str:
        return f"{self._store.url}/{names.checkpoint_folder(name, number)}"


def _with_run(question: RestoreRound) -> Callable[[int], RestoreRound]:
    return lambda run: dataclasses.replace(question, run=run)


def _check_arguments(
    max_to_keep: int | None,
    name: str,
    step_counter: Any,
    interval: int | None,
    save_timeout: float,
    buffers: int,
    on_busy: str,
) -> None:
    if max_to_keep is not None and max_to_keep <= 0:
        raise ValueError(f"max_to_keep must be a positive number, or None to keep all, not {max_to_keep!r}")
    if not names.is_name(name):
        raise ValueError(f"{name!r} cannot name checkpoints: letters, digits, '.', '_' and '-' only")
    if interval is not None and step_counter is None:
        raise ValueError("checkpoint_interval needs a step_counter that says which step it is")
    if save_timeout <= 0:
        raise ValueError(f"save_timeout must be a positive number of seconds, not {save_timeout!r}")
    if buffers < 1:
        raise ValueError(f"buffers must be at least 1, not {buffers!r}")
    if on_busy not in ("wait", "skip"):
        raise ValueError(f'on_busy must be "wait" or "skip", not {on_busy!r}')
