"""What a save does while training waits: collect, copy, and leave the rest to the background."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping

from distckpt.coordinator.client.client import Client
from distckpt.coordinator.messages import Joined, Skipped
from distckpt.directory.reports import Metrics
from distckpt.errors import DistckptError, SaveError
from distckpt.rank.arguments import metrics_of
from distckpt.rank.background import Background, SaveTask
from distckpt.rank.buffer import Buffer
from distckpt.rank.costs import Costs
from distckpt.rank.dialogue import Dialogue
from distckpt.rank.layout import Layout
from distckpt.rank.options import SaverOptions
from distckpt.rank.pending import PendingSave, Progress, progress_of
from distckpt.rank.reference import Reference
from distckpt.rank.step_order import StepOrder
from distckpt.rank.tolerance import Tolerance
from distckpt.rank.turns import Turns
from distckpt.state.collector import Collector, Holding
from distckpt.state.kinds import optimizers_of
from distckpt.state.objects import NamedObjects
from distckpt.storage import Store
from distckpt.threads.coordinator import Coordinator
from distckpt.transfer.staging import Staging


class Saver:
    """Saves this rank's part of ``checkpoint``, again and again. Used from one thread, the training loop's.

    What is done in the background is done in threads of ``threads``. ``costs`` are told what a GPU waits.
    """

    def __init__(
        self,
        client: Client,
        store: Store,
        checkpoint: NamedObjects,
        options: SaverOptions,
        threads: Coordinator,
        costs: Costs,
    ) -> None:
        self._collector = Collector(checkpoint, options.rank, options.world_size, options.check_copies)
        self._order = StepOrder(functools.partial(optimizers_of, checkpoint), costs.device_waited)
        self._reference = Reference(checkpoint, store.url, options.rank)
        self._turns = Turns()
        self._dialogue = Dialogue(client, options, self._turns)
        self._background = Background(store, self._dialogue, options, threads)
        self._buffers = [Buffer() for _ in range(options.buffers)]
        self._skip_if_busy = options.skip_if_busy
        self._tolerance = Tolerance(options.failures_allowed)
        self._layout: Layout | None = None
        self._recent: list[PendingSave] = []
        self._committed = False

    def prepare(self) -> None:
        """Make the plan with all ranks and touch the memory of every buffer, so that the first save is like the rest.

        Raises what a save would raise: EncodeError, PlanError, MissingRanksError ...
        """
        order = 0
        try:
            order = self._turns.begin(None)
            holding = self._collector.collect()
            self._reference.hold()
            planned = self._dialogue.plan(order, None, holding)
        except BaseException as error:
            self._dialogue.give_up(order, None, error)
            raise
        finally:
            self._turns.end(order)
        if planned is None:
            raise SaveError(None, "a prepare cannot be skipped")
        self._layout, _ = planned
        for buffer in self._buffers:
            buffer.settle()
            buffer.fit(self._layout, holding)

    def save(self, number: int, path: str, metrics: Metrics | None) -> PendingSave | None:
        """Copy the state and write it in the background. None if all ranks skip because a save is in flight.

        Raises EncodeError at once, and TypeError or ValueError for metrics that are none; everything that concerns other
        ranks or storage is in the PendingSave. Whatever is raised, by Ctrl-C too, the other ranks have been told that
        this one does not save.
        """
        pending = PendingSave(path, number)
        order, progress = 0, progress_of(pending)
        progress.tolerance = self._tolerance
        try:
            order = self._turns.begin(number)
            progress.ended.add_done_callback(lambda _: self._turns.end(order))
            holding = self._collector.collect()
            self._reference.hold()
            numbers = metrics_of(metrics)
            room = self._make_room(order, number, holding, progress)
            if isinstance(room, Skipped):
                self._turns.end(order)
                return None
            if room is not None:
                self._copy(order, number, holding, pending, room, numbers)
        except BaseException as error:
            if progress.turn.acquire(blocking=False):  # else it is the background's already, which goes on with it
                try:
                    self._dialogue.give_up(order, number, error)
                finally:
                    progress.tolerance = None  # it is raised at once, so nobody has to be told later
                    progress.fail(error)
                    self._turns.end(order)
            raise
        self._look_at_recent()
        self._recent.append(pending)
        progress.stall = progress.seconds()
        return pending

    @property
    def waits_for_readers(self) -> bool:
        """Whether a save has not begun because a group of readers lags: that takes as long as it takes."""
        return self._dialogue.lag is not None

    def await_published(self) -> None:
        """Return once the ``checkpoint`` file shows every save that has been committed. Asks nobody if there is none."""
        self._look_at_recent()
        if self._committed:
            self._committed = False
            self._dialogue.await_published()

    def _look_at_recent(self) -> None:
        """Forget saves that have ended, but not whether one of them was committed since the file was waited for."""
        recent, self._recent = self._recent, []
        for pending in recent:
            if not pending.done():
                self._recent.append(pending)
            elif progress_of(pending).ended.exception() is None:
                self._committed = True

    def close(self, deadline: float = math.inf) -> None:
        """Wait for what is under way, until that monotonic time, stop the threads and let the memory go.

        A save that has not ended by then keeps its memory, which a thread may still be reading.
        """
        self._order.close()
        free = [buffer for buffer in self._buffers if buffer.settle(_left(deadline))]
        self._background.stop()
        for buffer in free:
            buffer.close()

    def _make_room(
        self, order: int, number: int, holding: Holding, progress: Progress
    ) -> tuple[Joined | None, Buffer, Staging] | Skipped | None:
        """Know what this rank writes, and have memory for it. None if the save has ended by an error of all ranks."""
        joined = None
        try:
            # A warm layout asks nobody. To skip is a decision of all ranks, so that mode asks every time.
            if self._skip_if_busy or self._layout is None or self._layout.digest != holding.description.digest:
                planned = self._dialogue.plan(order, number, holding)
                if planned is None:
                    return Skipped()
                self._layout, joined = planned
            began = progress.seconds()
            buffer = self._free_buffer()
            progress.queued = progress.seconds() - began
            return joined, buffer, buffer.fit(self._layout, holding)
        except DistckptError as error:
            progress.fail(error)
            return None

    def _copy(
        self,
        order: int,
        number: int,
        holding: Holding,
        pending: PendingSave,
        room: tuple[Joined | None, Buffer, Staging],
        metrics: Mapping[str, float],
    ) -> None:
        """Copy the state, and have the background bring the save to its end."""
        assert self._layout is not None
        (joined, buffer, staging), layout, progress = room, self._layout, progress_of(pending)
        describe = functools.partial(holding.describe, compare=False)
        buffer.lend(pending, order)
        sources = layout.tensors(holding)
        began = progress.seconds()
        copied = staging.stage(sources, layout.values(holding))
        progress.copied = progress.seconds() - began
        self._order.after(copied, sources)
        progress.staged.set_result(copied)
        self._background.put(SaveTask(order, number, layout, staging, describe, joined, progress, metrics))

    def _free_buffer(self) -> Buffer:
        free = next((buffer for buffer in self._buffers if buffer.is_free()), None)
        if free is None:
            free = min(self._buffers, key=lambda buffer: buffer.order)  # numbers may go down
            free.settle()
        return free


def _left(deadline: float) -> float | None:
    """Seconds until then."""
    return None if deadline == math.inf else max(0.0, deadline - time.monotonic())
