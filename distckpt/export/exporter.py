"""Which checkpoints still lack an export, and making those one after the other, beside the training."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from distckpt.directory.contents import is_there
from distckpt.directory.log import read_tail
from distckpt.errors import ExportError
from distckpt.export.places import Place
from distckpt.export.recipes import Recipe
from distckpt.export.task import Order, Outcome
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord
from distckpt.storage import Store
from distckpt.terminal.bar import pulse

logger = logging.getLogger(__name__)

TRIES = 2
"""How often one manager begins an export that fails. The next manager begins anew."""

RETRY_SECONDS = 1.0

STOP_SECONDS = 5.0


class Exporter:
    """A thread that sees to it that every committed checkpoint of a name gets its export.

    Whenever it is woken it looks at storage for those that have none, and makes them one at a time, the lowest number
    first. So nothing is lost when it dies: what one manager has not done the next one finds.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        storage_options: Mapping[str, Any] | None,
        recipes: tuple[Recipe, ...],
        place: Place,
        shown: bool = False,
    ) -> None:
        self._store = store
        self._name = name
        self._storage_options = storage_options
        self._recipes = recipes
        self._place = place
        self._shown = shown
        self._changed = threading.Condition()
        self._asked = 0
        self._looked = 0
        self._stopping = False
        self._settled: set[str] = set()
        self._failures: dict[str, int] = {}
        self._errors: dict[str, Exception] = {}
        self._thread = threading.Thread(target=self._run, name="distckpt-export", daemon=True)
        self._thread.start()

    def wake(self) -> int:
        """Look at storage soon. Returns at once."""
        with self._changed:
            self._asked += 1
            self._changed.notify_all()
            return self._asked

    def wait(self, timeout: float | None = None) -> None:
        """Return once every checkpoint that is committed now has its export, or could not be exported.

        Raises the first failure that has not been raised yet, TimeoutError after ``timeout`` seconds.
        """
        asked = self.wake()
        with self._changed:
            if not self._changed.wait_for(lambda: self._looked >= asked or self._stopping, timeout):
                raise TimeoutError(f"exports to {self._store.url} are still under way after {timeout:g} s")
            if self._errors:
                raise self._errors.pop(next(iter(self._errors)))

    def stop(self) -> None:
        """Give up what is under way and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._place.stop()
        self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked > self._looked or self._stopping)
                if self._stopping:
                    return
                asked = self._asked
            try:
                self._errors.pop("", None)
                self._export_all()
            except Exception as error:  # kept for wait, which raises it
                logger.error("exports to %s: %s", self._store.url, error, exc_info=error)  # noqa: TRY400
                self._errors[""] = error
            with self._changed:
                self._looked = asked
                self._changed.notify_all()

    def _export_all(self) -> None:
        while not self._stopping and (record := self._next()) is not None:
            self._export(record)

    def _next(self) -> CheckpointRecord | None:
        """The committed checkpoint with the lowest number that has no export and has not failed too often."""
        alive = read_tail(self._store).state.alive().values()
        ours = [record for record in alive if record.name == self._name]
        for record in sorted(ours, key=lambda record: (record.number, names.attempt_age(record.attempt))):
            attempt = record.attempt
            if attempt in self._settled or self._failures.get(attempt, 0) >= TRIES:
                continue
            folder = names.attempt_folder(record.name, record.number, attempt)
            if not is_there(self._store, f"{folder}/{names.EXPORT}"):
                return record
            self._settled.add(attempt)
        return None

    def _export(self, record: CheckpointRecord) -> None:
        started = time.monotonic()
        order = Order(self._store.url, self._storage_options, record, self._recipes)
        with pulse(f"exporting {names.checkpoint_folder(record.name, record.number)}", self._shown):
            outcome = self._place.run(order)
        if outcome.kind == "failed":
            self._failed(record, outcome)
            return
        self._settled.add(record.attempt)
        self._errors.pop(record.attempt, None)
        if outcome.kind == "exported":
            logger.info("exported to %s in %.1f s", outcome.text, time.monotonic() - started)
        elif outcome.kind == "gone":
            logger.info("checkpoint %d was retired before it could be exported: %s", record.number, outcome.text)

    def _failed(self, record: CheckpointRecord, outcome: Outcome) -> None:
        if self._stopping:
            return  # nobody waits for it, and the next manager makes it
        error = ExportError(record.number, outcome.module, outcome.text)
        logger.error("%s\n%s", error, outcome.trace)
        self._failures[record.attempt] = self._failures.get(record.attempt, 0) + 1
        self._errors[record.attempt] = error
        with self._changed:
            self._changed.wait_for(lambda: self._stopping, RETRY_SECONDS)
