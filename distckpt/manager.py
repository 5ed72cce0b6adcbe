"""CheckpointManager: save and restore together with all ranks, keep what is to be kept."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

from distckpt.coordinator.client.client import Client
from distckpt.coordinator.client.gathering import Gathering
from distckpt.coordinator.client.membership import RankCluster
from distckpt.coordinator.client.opening import client_of, meet
from distckpt.coordinator.messages import OpenRun
from distckpt.coordinator.shell.shell import Settings
from distckpt.directory.newest import newest_committed
from distckpt.directory.reports import Metrics
from distckpt.errors import CheckpointNotFoundError, CommitUnknownError, CoordinatorError
from distckpt.format import names
from distckpt.keep import Rule
from distckpt.rank.alone import Alone
from distckpt.rank.arguments import check_allowed, check_arguments, number_of, retention_of, wanted_folder
from distckpt.rank.chronicle import Chronicle
from distckpt.rank.costs import Costs, ManagerStats
from distckpt.rank.exit import close_at_exit, forget_at_exit
from distckpt.rank.heartbeat import beat
from distckpt.rank.leaving import finish, leave
from distckpt.rank.managed import managed
from distckpt.rank.options import SaverOptions
from distckpt.rank.pending import MaybeNone, PendingSave, PendingSaves
from distckpt.rank.restorer import Restorer
from distckpt.rank.saved_steps import SavedSteps, StepCounter
from distckpt.rank.saver import Saver
from distckpt.state.objects import NamedObjects
from distckpt.state.selection import EVERYTHING, Rename, Selection
from distckpt.state.status import LoadStatus
from distckpt.storage import join, open_store, placed, with_patience
from distckpt.telemetry.telling import Telling
from distckpt.threads.coordinator import Coordinator
from distckpt.world import find_world

IDLE_SECONDS = 600.0
CLOSE_SECONDS = 60.0
LAST_SAVE_SECONDS = 30.0
"""How long a manager that is left by an exception still waits for a save in flight."""


class CheckpointManager:
    """Saves checkpoints that are whole or not there at all, restores the newest good one, deletes old ones.

    One manager for a directory and a run, made by every rank alike. A newer one, of a restarted job say, takes over;
    the older is told so and can do no harm. Where ranks have a torch process group or torchrun's store, the coordinator
    comes up in the background: restores do not need it, the first save waits for it, and raises what keeps it away.

    Args:
        checkpoint: what to save, a Checkpoint.
        directory: a path that all hosts share. It is made, with a log that turns older runs away, when the manager is
            (TensorFlow makes it with the first save); not if the manager cannot be made.
        max_to_keep: how many checkpoints stay, oldest deleted first; None keeps all. Nothing is deleted before the
            first save.
        keep_checkpoint_every_n_hours: a checkpoint about to be deleted is preserved for ever if it is at least this
            many hours newer than the last one preserved.
        keep: rules that say what stays, in place of these two: ``LatestN(3) | BestN(3, metric="loss", mode="min")``.
        checkpoint_name: the first part of ``<name>-<number>``.
        step_counter: the training step, for ``checkpoint_interval``, read at each save: a callable, a tensor or array
            of one element, or anything else that int() takes.
        checkpoint_interval: least number of steps between two saves.
        init_fn: called by ``restore_or_initialize`` on every rank when there is no checkpoint.
        last_checkpoint_step: the step of the last save, if known; for ``checkpoint_interval``.
        save_timeout: seconds until a rank that is missing fails the save for all.
        buffers: how many saves may be in the making at once; each costs host memory of this rank's part.
        on_busy: what a save does that finds its buffer still in use: "wait", or "skip" on all ranks alike.
        save_failures_allowed: how many saves in a row may fail, of the store or of a rank, and be only logged. ``wait``
            and ``close`` raise such a failure if no commit followed it.
        storage_options: for the store behind ``directory``. Stores with a ``patience`` have ``save_timeout``, unless they
            are given one.
        data, data_options: a path or URL where shards go instead, alone, and options for the store there; readers need both.
            ``{spread}`` in the URL of a bucket spreads them over sixteen key prefixes.
        cache_dir: a directory of this host in which restores find what another process there has downloaded.
        rank, world_size: given, or found in torch.distributed, Ray Train, torchrun's variables; else a world of one.
        run_id: names this incarnation of the job; needed only with rank and world_size and without torch.distributed.
        verify: read every shard back and compare before it is reported as landed.
        check_copies: compare at every save, not only when the layout is new, the tensors of which several ranks hold
            copies; to find out where ranks drift apart. Every save then plans, and reads all of them.
        progress: rank 0 shows on its terminal how far restores and a long first save have come.

    Raises:
        ValueError: wrong arguments, or a directory that is a checkpoint of another.
        StorageError, StoreUnsuitableError: the directory cannot be used.
        LogMissingError: it has checkpoints, but no log.
        DataElsewhereError: the newest checkpoint has its shards in another place than this manager was told.
        AbsentRanksError: ranks that have not made theirs within ``save_timeout`` seconds, named.

    What stays, and what numbers, intervals, restarts and clocks that go back mean, is as in TensorFlow. Where
    TensorFlow's differs: it has no default for ``max_to_keep``; it overwrites a number that is saved again in place, be
    it a preserved one; it counts a step as saved when its save fails; its ``restore_or_initialize`` initializes while the
    first save is in flight, and falls back to nothing when the newest checkpoint is damaged; two at once do harm.
    """

    def __init__(
        self,
        checkpoint: NamedObjects,
        directory: str | os.PathLike[str],
        max_to_keep: int | None = 5,
        keep_checkpoint_every_n_hours: float | None = None,
        checkpoint_name: str = "ckpt",
        step_counter: StepCounter | None = None,
        checkpoint_interval: int | None = None,
        init_fn: Callable[[], object] | None = None,
        last_checkpoint_step: int | None = None,
        *,
        keep: Rule | None = None,
        save_timeout: float = 300.0,
        buffers: int = 1,
        on_busy: Literal["wait", "skip"] = "wait",
        save_failures_allowed: int = 0,
        storage_options: Mapping[str, Any] | None = None,
        data: str | os.PathLike[str] | None = None,
        data_options: Mapping[str, Any] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        run_id: str | None = None,
        verify: bool = False,
        check_copies: bool = False,
        progress: bool = False,
    ) -> None:
        retention = retention_of(max_to_keep, keep_checkpoint_every_n_hours, keep)
        check_arguments(checkpoint_name, step_counter, checkpoint_interval, save_timeout, buffers, on_busy)
        check_allowed(save_failures_allowed)
        self._costs = Costs()
        self._checkpoint = checkpoint
        self._name = checkpoint_name
        self._init_fn = init_fn
        self._saved_steps = SavedSteps(last_checkpoint_step, step_counter, checkpoint_interval)
        storage_options = placed(storage_options, cache_dir=cache_dir, data=data, data_options=data_options)
        storage_options = with_patience(directory, storage_options, save_timeout)
        self._store = open_store(directory, storage_options)
        self._world = world = find_world(rank, world_size, run_id, save_timeout)
        opening = OpenRun("", world.rank, world.size, world.host, checkpoint_name, retention, save_timeout)
        meeting = meet(self._store, self._world)
        self._gathering: Gathering | None = None
        settings = Settings(idle_timeout=IDLE_SECONDS)

        def check() -> None:  # nobody else commits any more: what was restored before must still be the newest
            if self._gathering is not None:
                self._gathering.check_newest()

        self._client: Client = client_of(self._store, storage_options, self._world, meeting, opening, settings, check)
        if meeting.council is not None:
            there = meeting.council, self._store, checkpoint_name, meeting.hosts
            self._gathering = Gathering(*there, save_timeout, self._client)
        self._cluster = RankCluster(self._client, self._world)
        self._background = Coordinator([])
        saving = SaverOptions(
            rank=self._world.rank,
            world_size=self._world.size,
            name=checkpoint_name,
            timeout=save_timeout,
            buffers=buffers,
            skip_if_busy=on_busy == "skip",
            verify=verify,
            check_copies=check_copies,
            failures_allowed=save_failures_allowed,
            shown=progress,
        )
        self._saver = Saver(self._client, self._store, checkpoint, saving, self._background, self._costs)
        asked = self._gathering or self._client
        self._restorer = Restorer(asked, self._store, checkpoint, world, save_timeout, progress)
        self._pending = PendingSaves()
        self._alone = Alone(self._store.url, self._costs)
        self._closed = self._left = self._final = False
        self._patience = 2 * save_timeout + CLOSE_SECONDS
        beat(self._client, self._background)
        if self._keeps_stats and self._world.rank == 0:
            Chronicle(self._background, self._store, self._client, self._world, self._costs).start()
        self._telling = Telling(os.environ if self._keeps_stats else {}, self._costs, self._client, world, meeting)
        close_at_exit(self)

    # ---- what there is -----------------------------------------------------------------------------------------

    @property
    def directory(self) -> str:
        """Where the checkpoints are: an absolute path or a URL."""
        return self._store.url

    @property
    def checkpoint(self) -> NamedObjects:
        """What is saved: the Checkpoint that was given."""
        return self._checkpoint

    @property
    def checkpoint_interval(self) -> int | None:
        """Least number of steps between two saves."""
        return self._saved_steps.interval

    @property
    def checkpoints(self) -> list[str]:
        """Paths of the managed checkpoints, oldest first, read from storage. Preserved ones are not among them."""
        return [self._path(record.name, record.number) for record in managed(self._store, self._client.open())]

    @property
    def latest_checkpoint(self) -> str | None:
        """The path of the newest committed checkpoint, managed or not; as ``distckpt.latest_checkpoint`` finds it."""
        record = newest_committed(self._store)
        return None if record is None else self._path(record.name, record.number)

    @property
    def cluster(self) -> RankCluster:
        """All ranks of this run, for ``Coordinator(cluster=...)``."""
        return self._cluster

    def stats(self) -> ManagerStats:
        """What checkpoints have cost this rank so far, cheap enough for every step: stalls, bytes, commit times, goodput.

        ``distckpt stats DIR`` has it of the whole job, over restarts, and the interval to save at that it suggests.
        """
        return self._costs.stats()

    # ---- save --------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Plan with all ranks and warm the buffers, so that already the first save only copies.

        Raises what a save would raise: EncodeError, PlanError, MissingRanksError ...
        """
        with self._alone("prepare"):
            self._check_open()
            self._saver.prepare()

    def save(
        self, checkpoint_number: Any = None, check_interval: bool = True, *, metrics: Metrics | None = None
    ) -> PendingSave | MaybeNone:
        """Copy the state, write it in the background, and return at once; all ranks call it alike.

        ``checkpoint_number`` is an int, or a NumPy or torch scalar that is a whole number; numbers may go down. A number
        that was saved before becomes the newest, and its older content is deleted, or stays if it was preserved. None
        numbers by ``checkpoint.save_counter``, which counts every save. Returns None when nothing is saved: the step was
        saved already or, with ``check_interval``, fewer than ``checkpoint_interval`` steps have passed; or when all
        ranks skip a save because one is in flight. Many ranks count a step as saved once its save has begun, as
        TensorFlow does, since they do not learn of a failure at the same moment; a world of one may try it again.
        ``metrics``, rank 0's, are committed with it, and judged by ``keep`` like what is reported later; finite ones.

        Raises EncodeError for what cannot be stored, and the failure of an earlier save that nobody has collected. The
        latter comes out after this save has begun, so that the ranks stay in step; ``wait`` waits for it. CoordinatorError
        inside another call of the same thread, from a signal handler or a hook, and while another thread saves or restores.
        """
        with self._alone("save"):
            self._check_open()
            earlier = list(self._pending)
            pending = self._begin(checkpoint_number, check_interval, metrics)
            self._pending.raise_failure(earlier)
            return pending

    def wait(self) -> None:
        """Return once no save is under way, and the text file ``checkpoint`` shows every one that was committed.

        Raises the first failure that nobody has collected.
        """
        with self._alone("wait"):
            self._finish()

    def _finish(self, timeout: float | None = None) -> None:
        late = self._pending.settle(timeout, lambda: self._saver.waits_for_readers)
        if not late:
            self._saver.await_published()
        self._pending.raise_failure(list(self._pending), at_end=True)
        if late:
            raise CommitUnknownError(late[0].number, f"it is not decided after {timeout:g} s: does the store answer?")

    def sync(self) -> None:
        """TensorFlow's name for ``wait``."""
        self.wait()

    def _begin(self, checkpoint_number: Any, check_interval: bool, metrics: Metrics | None) -> PendingSave | None:
        step = self._saved_steps.now()
        if step is not None and self._saved_steps.too_early(step, check_interval):
            return None
        many, counter = self._world.size > 1, self._checkpoint.save_counter
        number = counter + 1 if checkpoint_number is None else number_of(checkpoint_number)
        self._checkpoint.save_counter = counter + 1
        try:
            pending = self._saver.save(number, self._path(self._name, number), metrics)
        except BaseException:
            if step is not None and many:
                self._saved_steps.add(step, None)
            raise
        if pending is None:  # all ranks skip it
            self._checkpoint.save_counter = counter
            return None
        self._pending.add(pending)
        self._costs.begun(pending)
        self._final = False
        self._begun(pending)
        if step is not None:
            # Ranks could disagree on whether it failed.
            self._saved_steps.add(step, None if many else pending)
        return pending

    # ---- restore -----------------------------------------------------------------------------------------------

    def restore_or_initialize(self) -> str | None:
        """Restore the newest good checkpoint on all ranks and return its path; else call ``init_fn``, return None.

        Waits for saves in flight: they are what is to be restored. Raises what ``restore`` raises.
        """
        path = self._restore(None, partial=False)
        if path is None and self._init_fn is not None:
            self._init_fn()
        return path

    def restore(
        self,
        which: int | str | os.PathLike[str] | None = None,
        partial: bool = False,
        *,
        select: str | Sequence[str] | None = None,
        rename: Rename | None = None,
    ) -> str:
        """Restore one checkpoint on all ranks, in place, and return its path.

        ``which`` is a number or a path of this directory; None means the newest good one: what any rank finds
        damaged is refused by all, with the reason in the log, and the next older is tried. ``partial``, on all ranks
        alike, allows keys that the checkpoint lacks, that no rank's objects ask for, or that do not fit: they are left
        as they are, and named in the log and by ``restore_status``. ``select`` and ``rename``, on all ranks alike, are
        as in ``Checkpoint.restore``, which takes a checkpoint of any directory.

        Nothing of a refused checkpoint stays in the objects: what it has touched, the one that is restored fills. Only
        tensors are filled in their places while others may still refuse; everything else gets its state when all ranks
        have read all of theirs. With ``partial`` an older checkpoint may leave out what a refused one had, so every
        byte is checked on all ranks before anything is changed, which costs one more read of them.

        Raises MismatchError, the same one on every rank and before anything is changed on any, also with ``partial``
        if nothing matches; CheckpointNotFoundError, ResizeError, MissingRanksError; NoGoodCheckpointError, whose
        ``spoiled`` says whether tensors hold parts of what was refused; FencedError, StaleRunError: a newer run has begun.
        """
        path = self._restore(wanted_folder(which, self._store.url), partial, Selection.of(select, rename))
        if path is None:
            raise CheckpointNotFoundError(self._store.url, "no checkpoint has been committed here")
        return path

    @property
    def restore_status(self) -> LoadStatus | None:
        """How keys matched on all ranks in the last restore of a checkpoint; None if this manager restored none."""
        return self._restorer.status

    def _restore(self, which: int | str | None, partial: bool, selection: Selection = EVERYTHING) -> str | None:
        with self._alone("restore"):
            self._check_open()
            self._pending.settle()
            record = self._restorer.restore(which, partial, selection)
            self._costs.restored(record, self._restorer.bytes_read)
            self._restored()
        if record is None:
            return None
        self._saved_steps.restart()
        return self._path(record.name, record.number)

    # ---- life --------------------------------------------------------------------------------------------------

    def close(self, final: bool = False) -> None:
        """Wait for saves under way and leave the run. Raises the first failure that nobody has collected.

        ``final``, on all ranks alike, says that training is over, so that those who follow it come to an end; a later
        run takes that back. Ranks wait for each other, and return once the log says so; CoordinatorError names those
        that do not come within ``save_timeout``, or leave without saying so, and StorageError says why it could not be written.

        A store that hangs is waited for as long as a save may take, twice ``save_timeout`` and a minute, and then another
        minute for what retention does; what is left undone then is raised, if it is a save, or logged.
        """
        if self._left:
            if final:
                raise CoordinatorError(f"{self.directory}: it was closed before it could say that training is over")
            return
        with self._alone("close"):
            self._closed = True
            deadline = time.monotonic() + self._patience
            try:
                self._finish(self._patience)
                if final or self._final:
                    finish(self._client, self._store, self._patience)
                self._costs.closed = True
            finally:
                self._leave(deadline)

    def _check_open(self) -> None:
        if self._closed:
            raise CoordinatorError(f"{self.directory}: this manager has been closed; make another one to go on")
        self._client.check()

    def _leave(self, deadline: float = math.inf) -> None:
        self._left = True
        forget_at_exit(self)
        self._cluster.close()
        self._saver.close(deadline)
        self._telling.close()
        self._background.request_stop()
        grace = min(CLOSE_SECONDS, max(1.0, deadline - time.monotonic()))
        self._background.join(stop_grace_period_secs=grace, ignore_live_threads=True)
        leave(self._client, CLOSE_SECONDS)
        self._client.close()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._abandon(error)

    def _path(self, name: str, number: int) -> str:
        return join(self._store.url, names.checkpoint_folder(name, number))

    # ---- what a subclass adds to --------------------------------------------------------------------------------

    _keeps_stats = True

    def _begun(self, pending: PendingSave) -> None:
        """A save has begun."""

    def _restored(self) -> None:
        """The ranks have agreed on what is restored, or that there is nothing to restore."""

    def _abandon(self, error: BaseException) -> None:
        """Leave the run because of ``error``, which ended the training loop. Failed saves are only logged."""
        self._cluster.fail(error)
        self._pending.log_failures(error, LAST_SAVE_SECONDS)
        self._closed = True
        if all(pending.done() for pending in self._pending):
            self._leave()


def settle(manager: CheckpointManager) -> None:
    """Return once no save of ``manager`` is under way. What failed is left for the manager to raise."""
    manager._pending.settle()


def conclude(manager: CheckpointManager) -> None:
    """Have the next ``close`` of ``manager`` say that training is over, unless something is saved before."""
    manager._final = True


def abandon(manager: CheckpointManager, error: BaseException) -> None:
    """Close ``manager`` as its with-statement does when ``error`` ends the block."""
    manager._abandon(error)
