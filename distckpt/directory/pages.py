"""Pages on a store: older records of a log, read when something hangs on them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

import crc32c

from distckpt.errors import AlreadyExistsError, DamagedError, DistckptError, ObjectNotFoundError, StorageError
from distckpt.format import names
from distckpt.format.json.log import State
from distckpt.format.json.page import MAX_PAGE_BYTES, ListName, PageRef
from distckpt.format.json.paging import Page, Records, opened, ref_of, sealed_page
from distckpt.format.json.sealed import unseal
from distckpt.storage import MOST_NAMES, ObjectInfo, Store, at_most, join, twice

logger = logging.getLogger(__name__)

KEPT_PAGES = 2
"""How many pages a cache keeps."""


def read_page(store: Store, ref: PageRef) -> Records:
    """The records of a page. DamagedError, which names it, if it is not what was written, or is gone."""
    return twice(lambda: _read_once(store, ref))


def _read_once(store: Store, ref: PageRef) -> Records:
    path = names.page_path(ref.id)
    shown = join(store.url, path)
    try:
        data = store.read(path, ref.size)
    except ObjectNotFoundError as error:
        raise DamagedError(shown, f"missing: it has {_holds(ref)}") from error
    if (len(data), crc32c.crc32c(data)) != (ref.size, ref.crc32c):
        raise DamagedError(shown, f"size or CRC32C is not what the log says: it has {_holds(ref)}")
    page = unseal(data, Page, shown, MAX_PAGE_BYTES)
    if (page.id, len(page.records)) != (ref.id, ref.count):
        raise DamagedError(shown, "it is not the page that the log refers to")
    return page.records


def _holds(ref: PageRef) -> str:
    return f"{ref.count} {ref.of} checkpoints, numbers {ref.numbers[0]} to {ref.numbers[1]}"


class PageCache:
    """Reads pages of one store, and keeps the last few: a save after the other may need the same. Safe from any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._kept: dict[PageRef, Records] = {}

    def read(self, pages: Iterable[PageRef]) -> tuple[dict[str, Records], dict[str, DistckptError]]:
        """The records of pages by their ids, and why others cannot be read."""
        found: dict[str, Records] = {}
        failed: dict[str, DistckptError] = {}
        for page in pages:
            with self._lock:
                records = self._kept.pop(page, None)
            try:
                found[page.id] = records = read_page(self._store, page) if records is None else records
            except (DamagedError, StorageError) as error:
                logger.warning("a page of the log cannot be read, and what it has stays as it is: %s", error)
                failed[page.id] = error
                continue
            with self._lock:
                self._kept[page] = records
                for old in list(self._kept)[:-KEPT_PAGES]:
                    del self._kept[old]
        return found, failed


def write_page(store: Store, page: str, of: ListName, records: Records) -> PageRef:
    """Put a page under a name that nobody else uses; it is durable on return. StorageError if it cannot be written."""
    data = sealed_page(page, records)
    path = names.page_path(page)
    try:
        store.put_if_absent(path, data)
    except AlreadyExistsError:
        # Our own earlier try, whose answer was lost, left the very same bytes; anything else is not ours.
        if store.read(path, MAX_PAGE_BYTES) != data:
            raise StorageError(join(store.url, path), "exists with other content") from None
    return ref_of(page, of, records, len(data), crc32c.crc32c(data))


# ---- states with the pages that are wanted at hand -----------------------------------------------------------------


def whole(store: Store, state: State) -> State:
    """The state with everything at hand. DamagedError, which names it, if a page cannot be read."""
    return with_pages(store, state, lambda page: True)


def with_pages(store: Store, state: State, wanted: Callable[[PageRef], bool]) -> State:
    """The state with the records of those pages at hand that are ``wanted``. Raises as ``whole``."""
    return opened(state, {page.id: read_page(store, page) for page in state.pages if wanted(page)})


@dataclass(frozen=True, slots=True)
class Lost:
    """A page that a state refers to and that cannot be read, and why."""

    page: PageRef
    error: DamagedError | StorageError


def readable(store: Store, state: State) -> tuple[State, tuple[Lost, ...]]:
    """As ``whole``, but what cannot be read stays in its page, and is named."""
    pages: dict[str, Records] = {}
    lost: list[Lost] = []
    for page in state.pages:
        try:
            pages[page.id] = read_page(store, page)
        except (DamagedError, StorageError) as error:
            lost.append(Lost(page, error))
    return opened(state, pages), tuple(lost)


class Known(Container[str]):
    """Every attempt that a state names; and, as nobody knows better, all that may be in pages that cannot be read."""

    def __init__(self, attempts: Iterable[str], lost: Sequence[PageRef] = ()) -> None:
        self._attempts = frozenset(attempts)
        self._lost = tuple(lost)

    def __contains__(self, attempt: object) -> bool:
        if attempt in self._attempts:
            return True
        return isinstance(attempt, str) and any(page.may_have_attempt(attempt) for page in self._lost)


def known(store: Store, state: State) -> Known:
    """What must not be taken for garbage, or for somebody else's."""
    return known_of(store, state.known(), state.pages)


def known_of(store: Store, attempts: Iterable[str], pages: Iterable[PageRef]) -> Known:
    """As ``known``, for a state that names these attempts and refers to these pages."""
    found, lost = set(attempts), []
    for page in pages:
        try:
            found.update(record.attempt for record in read_page(store, page))
        except (DamagedError, StorageError) as error:
            logger.warning("what may be in a page is left alone, as it cannot be read: %s", error)
            lost.append(page)
    return Known(found, lost)


# ---- pages that nobody needs --------------------------------------------------------------------------------------


def old_pages(store: Store, epoch: int, dropped: Container[str]) -> list[ObjectInfo]:
    """Pages to which no new entry will begin to refer, beside those which the newest refers to.

    Those are of epochs before ``epoch``, whose coordinators cannot append any more; and what the present one, of ``epoch``,
    has ``dropped``.
    """
    found = []
    for info in at_most(MOST_NAMES, store.list(names.PAGES), f"{store.url}/{names.PAGES}"):
        page = names.page_id(info.path)
        if page is not None and (names.attempt_epoch(page) < epoch or page in dropped):
            found.append(info)
    return found
