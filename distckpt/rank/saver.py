"""What a save does while training waits: collect, copy, and leave the rest to the background."""

from __future__ import annotations

import functools

from distckpt.coordinator.client.client import Client
from distckpt.coordinator.messages import Joined, Skipped
from distckpt.errors import DistckptError, SaveError
from distckpt.rank.background import Background, SaveTask
from distckpt.rank.buffer import Buffer
from distckpt.rank.dialogue import Dialogue
from distckpt.rank.layout import Layout
from distckpt.rank.options import SaverOptions
from distckpt.rank.pending import PendingSave, Progress, progress_of
from distckpt.rank.step_order import StepOrder
from distckpt.rank.turns import Turns
from distckpt.state.collector import Collector, Holding
from distckpt.state.kinds import optimizers_of
from distckpt.state.objects import NamedObjects
from distckpt.storage import Store
from distckpt.threads.coordinator import Coordinator
from distckpt.transfer.staging import Staging


class Saver:
    """Saves this rank's part of ``checkpoint``, again and again. Used from one thread, the training loop's.

    What is done in the background is done in threads of ``threads``.
    """

    def __init__(
        self, client: Client, store: Store, checkpoint: NamedObjects, options: SaverOptions, threads: Coordinator
    ) -> None:
        self._collector = Collector(checkpoint, options.rank, options.world_size, options.check_copies)
        self._order = StepOrder(functools.partial(optimizers_of, checkpoint))
        self._turns = Turns()
        self._dialogue = Dialogue(client, options, self._turns)
        self._background = Background(store, self._dialogue, options, threads)
        self._buffers = [Buffer() for _ in range(options.buffers)]
        self._skip_if_busy = options.skip_if_busy
        self._layout: Layout | None = None
        self._recent: list[PendingSave] = []
        self._committed = False

    def prepare(self) -> None:
        """Make the plan with all ranks and touch the memory of every buffer, so that the first save is like the rest.

        Raises what a save would raise: EncodeError, PlanError, MissingRanksError ...
        """
        order = self._turns.begin(None)
        try:
            holding = self._collect(order, None)
            planned = self._dialogue.plan(order, None, holding)
        finally:
            self._turns.end(order)
        if planned is None:
            raise SaveError(None, "a prepare cannot be skipped")
        self._layout, _ = planned
        for buffer in self._buffers:
            buffer.settle()
            buffer.fit(self._layout, holding)

    def save(self, number: int, path: str) -> PendingSave | None:
        """Copy the state and write it in the background. None if all ranks skip because a save is in flight.

        Raises EncodeError at once; everything that concerns other ranks or storage is in the PendingSave.
        """
        order = self._turns.begin(number)
        pending = PendingSave(path, number)
        progress = progress_of(pending)
        progress.ended.add_done_callback(lambda _: self._turns.end(order))
        try:
            holding = self._collect(order, number)
            room = self._make_room(order, number, holding, progress)
        except BaseException:
            self._turns.end(order)
            raise
        if isinstance(room, Skipped):
            self._turns.end(order)
            return None
        self._look_at_recent()
        self._recent.append(pending)
        if room is not None:
            self._copy(order, number, holding, pending, room)
        progress.stall = progress.seconds()
        return pending

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

    def close(self) -> None:
        """Wait for what is under way, stop the threads and let the memory go."""
        self._order.close()
        for buffer in self._buffers:
            buffer.settle()
        self._background.stop()
        for buffer in self._buffers:
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
            buffer = self._free_buffer()
            return joined, buffer, buffer.fit(self._layout, holding)
        except DistckptError as error:
            progress.fail(error)
            return None
        except Exception as error:  # no memory, say
            self._dialogue.give_up(order, number, f"{type(error).__name__}: {error}")
            raise

    def _copy(
        self,
        order: int,
        number: int,
        holding: Holding,
        pending: PendingSave,
        room: tuple[Joined | None, Buffer, Staging],
    ) -> None:
        """Copy the state, and have the background bring the save to its end."""
        assert self._layout is not None
        (joined, buffer, staging), layout, progress = room, self._layout, progress_of(pending)
        describe = functools.partial(holding.describe, compare=False)
        try:
            self._background.put(SaveTask(order, number, layout, staging, describe, joined, progress))
            buffer.lend(pending, order)
            sources = layout.tensors(holding)
            copied = staging.stage(sources, layout.values(holding))
            self._order.after(copied, sources)
            progress.staged.set_result(copied)
        except BaseException as error:
            # Ctrl-C too, or the background thread would wait for this copy for ever.
            progress.staged.set_exception(SaveError(number, f"its copy was given up: {type(error).__name__}: {error}"))
            raise

    def _free_buffer(self) -> Buffer:
        free = next((buffer for buffer in self._buffers if buffer.is_free()), None)
        if free is None:
            free = min(self._buffers, key=lambda buffer: buffer.order)  # numbers may go down
            free.settle()
        return free

    def _collect(self, order: int, number: int | None) -> Holding:
        try:
            return self._collector.collect()
        except Exception as error:
            self._dialogue.give_up(order, number, str(error) if isinstance(error, DistckptError) else repr(error))
            raise
