"""What a run has measured is written down now and then, so that ``distckpt stats`` knows of it when the run is no more."""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid

from distckpt.coordinator.client.client import Client
from distckpt.directory.log import read_tail
from distckpt.directory.stats import PRUNE_EVERY, prune_stats, write_stats
from distckpt.format import names
from distckpt.format.json.stats import FORMAT, MAX_TEXT_LENGTH, End, RunStats
from distckpt.rank.costs import Costs
from distckpt.rank.exit import died
from distckpt.storage import Store
from distckpt.threads.coordinator import Coordinator
from distckpt.threads.looper import LooperThread
from distckpt.world import World

logger = logging.getLogger(__name__)

FIRST_SECONDS = 5.0
"""After so long it is written for the first time, and then whenever the run is twice as old ..."""

EVERY_SECONDS = 60.0
"""... but at least so often. It is one small object, replaced: whatever is saved meanwhile costs no request more."""


class Chronicle(LooperThread):
    """Writes what ``costs`` has measured of this rank's run, until ``threads`` stop; then how it has ended.

    What goes wrong is logged once, and harms nobody.
    """

    def __init__(self, threads: Coordinator, store: Store, client: Client, world: World, costs: Costs) -> None:
        super().__init__(threads, None, name="distckpt-stats")
        self._store = store
        self._client = client
        self._world = world
        self._costs = costs
        self._began = time.time() - costs.stats().seconds
        self._unique = uuid.uuid4().hex
        self._pause = FIRST_SECONDS
        self._is_pruned = False
        self._has_warned = False

    def run_loop(self) -> None:
        """Write when it is time."""
        if not self._coord.wait_for_stop(self._pause):
            self._pause = min(EVERY_SECONDS, max(FIRST_SECONDS, self._costs.stats().seconds))
            self._try_to_write("")

    def stop_loop(self) -> None:
        """The last word."""
        self._try_to_write("closed" if self._costs.closed and not died() else "failed")

    def _try_to_write(self, end: End) -> None:
        try:
            self._write(end)
        except Exception as error:  # noqa: BLE001 - nobody needs it, and what runs beside it must go on
            level = logging.DEBUG if self._has_warned else logging.WARNING
            logger.log(level, "what this run has measured could not be written, for `distckpt stats`: %s", error)
            self._has_warned = True

    def _write(self, end: End) -> None:
        opened = self._client.opened
        if opened is None:
            return  # nobody has given the run a number yet
        if read_tail(self._store).state.origin != opened.origin:
            return  # the directory is gone, or another is in its place, where nothing of this run belongs
        stats = self._costs.stats()
        measured = {field.name: getattr(stats, field.name) for field in dataclasses.fields(stats)}
        record = RunStats(
            format=FORMAT,
            run=opened.run,
            origin=opened.origin,
            host=self._world.host[:MAX_TEXT_LENGTH],
            world_size=self._world.size,
            began=self._began,
            next_within=0.0 if end else self._pause,
            end=end,
            recent=self._costs.recent,
            **measured,
        )
        write_stats(self._store, names.stats_path(opened.run, self._unique), record)
        if opened.run % PRUNE_EVERY == 0 and not self._is_pruned:
            self._is_pruned = True
            prune_stats(self._store)
