"""Writer: what torch.distributed.checkpoint saves by, into one of our directories."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from distckpt.dcp.items import items_of
from distckpt.dcp.parts import write_items
from distckpt.dcp.session import Flight, Part, Terms, forget, session_of
from distckpt.errors import NumberMismatchError, SaveError
from distckpt.format import names
from distckpt.keep import Rule
from distckpt.rank.arguments import number_of, retention_of
from distckpt.storage import Store, canonical, join, open_store, placed, with_patience

SAVE_SECONDS = 300.0

_USUAL = 5
"""What a manager takes for max_to_keep when none is given."""


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a rank asks for: the number that it saves, None for the next one; and where it runs."""

    number: int | None
    host: str


@dataclass(frozen=True, slots=True)
class _Order:
    """What the coordinator answers ``rank``: it writes for this attempt of that number."""

    rank: int
    number: int
    attempt: str


def _is_whole(plan: SavePlan) -> bool:
    """Whether it says itself what is to be written. Older releases of torch have no other plans."""
    return bool(getattr(plan, "usable", True))


class Writer(StorageWriter):
    """Saves checkpoints of ours through DCP: ``dcp.save(state_dict, storage_writer=Writer(directory, number=step))``.

    What is written is what a CheckpointManager writes: Arrow shards, an index and a manifest, committed by one entry of the
    directory's log, durable when ``dcp.save`` returns; so all that reads a directory reads it, and ``Reader`` too. DCP's
    planner says who writes what, its process group gathers it, and the rank that is DCP's coordinator commits, without Ray.
    All ranks make it alike, for one save or for many, also for ``dcp.async_save``, with ``no_dist`` and for a process group.

    Args:
        directory: a path that all hosts share, or a URL.
        number: which checkpoint it is; None counts on from the newest. A ``checkpoint_id`` that ``dcp.save`` is given is
            another one: a number, or a path ``<directory>/<name>-<number>``. A number that was saved before becomes the
            newest, and its older content makes room.
        name: the first part of ``<name>-<number>``.
        max_to_keep, keep_checkpoint_every_n_hours, keep: what stays, as in CheckpointManager; all of it by default, as DCP
            deletes nothing.
        storage_options, data, data_options: as in CheckpointManager.
        patience: seconds for which a store that does not answer is asked again.
        verify: read every shard back before it counts.

    A process is one run in a directory, from its first save there. Whoever comes later, a manager or another process, takes
    the directory over; then saves of this one raise StaleRunError or FencedError and change nothing.

    What goes wrong comes as DCP's CheckpointException on every rank, our own errors in its ``failures``, and nothing is
    committed; what was written is garbage, of which the next save and ``distckpt gc`` know. EncodeError names the key of a
    value that cannot be stored without pickle; PlanError parts that do not add up.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        number: Any = None,
        *,
        name: str = "ckpt",
        max_to_keep: int | None = None,
        keep_checkpoint_every_n_hours: float | None = None,
        keep: Rule | None = None,
        storage_options: Mapping[str, Any] | None = None,
        data: str | os.PathLike[str] | None = None,
        data_options: Mapping[str, Any] | None = None,
        patience: float = SAVE_SECONDS,
        verify: bool = False,
    ) -> None:
        super().__init__()
        if not names.is_name(name):
            raise ValueError(f"{name!r} cannot name checkpoints: letters, digits, '.', '_' and '-' only")
        self._directory = os.fspath(directory)
        self._number = None if number is None else number_of(number)
        self._name = name
        none_given = keep is not None and max_to_keep is None
        most = _USUAL if none_given else max_to_keep
        self._retention = retention_of(most, keep_checkpoint_every_n_hours, keep)
        options = placed(storage_options, data=data, data_options=data_options)
        self._options = with_patience(directory, options, patience)
        self._patience = patience
        self._verify = verify
        self._order: _Order | None = None
        self._path: str | None = None
        self._commits = False
        self._flight: Flight | None = None

    @property
    def path(self) -> str | None:
        """Of the checkpoint that was written last: ``<directory>/<name>-<number>``. None before."""
        return self._path

    @property
    def checkpoint_id(self) -> str:
        """The path of the checkpoint, as far as its number is known; else the directory."""
        directory = canonical(self._directory)
        return directory if self._number is None else join(directory, names.checkpoint_folder(self._name, self._number))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path or URL may be one."""
        return bool(os.fspath(checkpoint_id))

    def storage_meta(self) -> StorageMeta:
        """Where it goes."""
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    # ---- what DCP calls, in this order ---------------------------------------------------------------------------

    def reset(self, checkpoint_id: Any = None) -> None:
        """Another save begins, of another number if one is given."""
        if checkpoint_id is not None:
            self._number = self._number_in(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Raises SaveError for a save in which every rank would commit alone."""
        self._order = None
        self._commits = is_coordinator
        self._flight = Flight(self._waits)
        if not kwargs.get("use_collectives", True):
            raise SaveError(
                self._number,
                "use_collectives=False has every rank save alone, and a checkpoint is all ranks' or none's",
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan, with the number that this rank saves."""
        return dataclasses.replace(plan, storage_data=_Wish(self._number, socket.gethostname()))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator rank: a new attempt, and each plan with it."""
        wishes = [plan.storage_data for plan in plans]
        if not all(isinstance(wish, _Wish) for wish in wishes) or not all(map(_is_whole, plans)):
            raise SaveError(
                self._number,
                "the planner hands over the plan of an earlier save, as enable_plan_caching=True has it. Make it without",
            )
        if len({wish.number for wish in wishes}) > 1:
            numbers = {rank: wish.number for rank, wish in enumerate(wishes)}
            raise NumberMismatchError(self._number, numbers, {rank: wish.host for rank, wish in enumerate(wishes)})
        store = self._store()
        terms = Terms(self._name, len(plans), self._retention)
        try:
            session = session_of(store)
            number, attempt = session.begin(self._number, terms, [wish.host for wish in wishes], self._waits)
        except BaseException:
            forget(store)
            raise
        return [
            dataclasses.replace(plan, storage_data=_Order(rank, number, attempt)) for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's part. One result for all of it, with what the coordinator needs to know of it."""
        order = plan.storage_data
        assert isinstance(order, _Order)
        self._order = order
        folder = names.attempt_folder(self._name, order.number, order.attempt)
        with self._until_end(is_last=not self._commits):
            part = write_items(self._store(), folder, order.rank, items_of(plan, planner), self._verify)
        self._path = join(canonical(self._directory), names.checkpoint_folder(self._name, order.number))
        size = sum(receipt.size for receipt in part.shards)
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(MetadataIndex(folder), size, part)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator rank, once all have written: seal, commit, and do what retention says."""
        with self._until_end():
            self._commit(results)

    def _commit(self, results: list[list[WriteResult]]) -> None:
        order = self._order
        parts = [result.storage_data for of_rank in results for result in of_rank]
        if order is None or len(parts) != len(results) or not all(isinstance(part, Part) for part in parts):
            raise SaveError(self._number, "a rank has written with another writer than this one. Nothing was committed")
        session_of(self._store()).commit(order.number, order.attempt, parts, self._waits)

    @contextlib.contextmanager
    def _until_end(self, is_last: bool = True) -> Iterator[None]:
        """This rank's part of the save ends with the block, if ``is_last``, or if it raises."""
        try:
            yield
        except BaseException:
            is_last = True
            raise
        finally:
            if is_last and self._flight is not None:
                self._flight.end()

    # ---- what it needs -------------------------------------------------------------------------------------------

    @property
    def _waits(self) -> float:
        """Seconds for an answer that a store may keep waiting for as long as its patience lasts."""
        return 2 * self._patience + 60

    def _store(self) -> Store:
        return open_store(self._directory, self._options)

    def _number_in(self, checkpoint_id: Any) -> int:
        """The number that a ``checkpoint_id`` means. ValueError for one of another directory or name."""
        if not isinstance(checkpoint_id, str | os.PathLike):
            return number_of(checkpoint_id)
        text = os.fspath(checkpoint_id)
        if re.fullmatch("[0-9]+", text):
            return number_of(int(text))
        directory, _, folder = canonical(text).rpartition("/")
        found = names.parse_checkpoint(folder)
        if found is None or found[0] != self._name or directory != canonical(self._directory):
            raise ValueError(
                f"checkpoint_id={text!r} is neither a number nor {join(canonical(self._directory), self._name)}-<number>: the "
                "writer has the directory, so give it the number"
            )
        return found[1]
