"""The tests that a store has to pass before anything is committed to it."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator

from distckpt.errors import AlreadyExistsError, ObjectNotFoundError, StorageError, StoreUnsuitableError
from distckpt.storage.bounds import MOST_NAMES, at_most
from distckpt.storage.interface import Store, SupportsExplaining
from distckpt.storage.split import parts_of

FOLDER = "_probe"
_RACERS = 4
_RACERS_FAR, _ROUNDS_FAR, _MOST_ROUNDS_FAR, _SECONDS_FAR = 8, 4, 32, 1.0
"""A store behind a URL may be anybody's, and one that looks and then writes is caught by luck alone. Where that takes long it
is likely; where it takes a tenth of a millisecond a round misses it one time in four, but there is time for many."""


def probe(store: Store) -> None:
    """Make sure that the store can keep what commits rest on; of one for data, that it keeps what is written once.

    StoreUnsuitableError names the promise that was not kept, ``probe_log`` and ``probe_data`` say what is tried.
    """
    log, *data = parts_of(store)
    probe_log(log)
    for each in data:
        probe_data(each)


def probe_data(store: Store) -> None:
    """Make sure that what is written under a name of its own can be read, listed and deleted.

    Six requests. That a name is taken once is not asked of a store for data: there each is used by one writer alone.
    """
    path = f"{FOLDER}/{uuid.uuid4().hex}-data"
    content = f"data {path}".encode()
    try:
        with _step(store, "what is written can be read back"):
            info = store.put_unique(path, len(content), [memoryview(content)])
            _require(store, info.size == len(content), "an object was not as long as what was written")
            _require(store, _holds(store, path, [content]), "what was read back differs from what was written")
        with _step(store, "a new object is listed at once"):
            _require(store, _is_listed(store, path), "a new object was missing from the listing")
        with _step(store, "an object can be deleted"):
            store.delete(path)
            _require(store, store.stat(path) is None, "a deleted object was still there")
    finally:
        _clean_up(store, [path])


def probe_log(store: Store) -> None:
    """Make sure that the store can create an object once and only once, and shows at once what is there.

    Writes a few small objects with unique names into ``_probe/`` and removes them. Of a directory four writers race
    once; of a store behind a URL eight race four times, which is some 110 requests, eight at a time, and up to 32 times
    in the first second. StoreUnsuitableError names the promise that was not kept.
    """
    token = uuid.uuid4().hex
    single, contested = f"{FOLDER}/{token}-single", f"{FOLDER}/{token}-contested"
    try:
        _check_single(store, single)
        _check_races(store, contested)
        _check_delete(store, single)
    finally:
        _clean_up(store, [single])


def _check_single(store: Store, path: str) -> None:
    first, second = f"first {path}".encode(), f"second {path}".encode()
    with _step(store, "put-if-absent creates an object"):
        store.put_if_absent(path, first)
    with _step(store, "what was written can be read back"):
        _require(store, _holds(store, path, [first]), "what was read back differs from what was written")
    with _step(store, "put-if-absent refuses a name that is taken"):
        refused = _is_refused(store, path, second)
        _require(store, refused, "put-if-absent did not refuse a name that is taken")
    with _step(store, "a refused put-if-absent changes nothing"):
        _require(store, _holds(store, path, [first]), "put-if-absent was refused, yet it changed the object")
    with _step(store, "a new object is listed at once"):
        _require(store, _is_listed(store, path), "a new object was missing from the listing")
        info = store.stat(path)
        _require(store, info is not None and info.size == len(first), "a new object had no stat or another size")


def _check_races(store: Store, contested: str) -> None:
    scheme, far, _ = store.url.partition("://")
    is_far = bool(far) and scheme != "memory"
    begun = time.monotonic()
    for number in range(_MOST_ROUNDS_FAR if is_far else 1):
        if number >= _ROUNDS_FAR and time.monotonic() - begun > _SECONDS_FAR:
            break
        path = f"{contested}-{number}"
        try:
            _check_race(store, path, _RACERS_FAR if is_far else _RACERS)
        finally:
            _clean_up(store, [path])


def _check_race(store: Store, path: str, racers: int) -> None:
    contents = [f"racer {number} {path}".encode() for number in range(racers)]
    start = threading.Barrier(racers)
    errors: dict[bytes, Exception] = {}
    won: list[bytes] = []
    whole: list[bool] = []

    def race(content: bytes) -> None:
        start.wait()
        try:
            store.put_if_absent(path, content)
        except Exception as error:  # noqa: BLE001 - raised where the race is judged, if it is no refusal
            errors[content] = error
        else:
            won.append(content)
        try:
            whole.append(_holds(store, path, contents))
        except StorageError:
            pass  # no answer says nothing of what is there
        except Exception as error:  # noqa: BLE001 - likewise
            errors[content] = error

    threads = [threading.Thread(target=race, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with _step(store, "exactly one of several concurrent writers wins"):
        _judge_race(store, path, contents, won, errors)
        _require(store, all(whole), "a reader saw an object that was not written whole yet")


def _judge_race(
    store: Store, path: str, contents: list[bytes], won: list[bytes], errors: dict[bytes, Exception]
) -> None:
    for error in errors.values():
        if not isinstance(error, AlreadyExistsError):
            raise error
    _require(
        store, len(won) < 2, f"put-if-absent told {len(won)} of {len(contents)} concurrent writers that they had won"
    )
    # An answer lost on the way may turn the winner's into a refusal, so nobody may claim to have won.
    stands = _holds(store, path, won or contents)
    _require(store, stands, "after a race the object was not what its winner had written")


def _check_delete(store: Store, path: str) -> None:
    with _step(store, "an object can be deleted"):
        store.delete(path)
        if store.stat(path) is not None or _can_be_read(store, path):
            # Written anew by a request of ours that was given up and came late: it is believed the second time.
            store.delete(path)
        _require(store, store.stat(path) is None, "a deleted object was still there")
        _require(store, not _can_be_read(store, path), "a deleted object could still be read")
        _require(store, not _is_listed(store, path), "a deleted object was still listed")
    with _step(store, "deleting twice does no harm"):
        store.delete(path)


@contextlib.contextmanager
def _step(store: Store, promise: str) -> Iterator[None]:
    try:
        yield
    except StoreUnsuitableError:
        raise
    except StorageError as error:
        raise StoreUnsuitableError(store.url, f"could not make sure that {promise}: {error}{_tried(store)}") from error


def _require(store: Store, kept: bool, complaint: str) -> None:
    if not kept:
        message = f"{complaint}. Checkpoints would not be safe in this store{_tried(store)}"
        raise StoreUnsuitableError(store.url, message)


def _tried(store: Store) -> str:
    explained = store.explain() if isinstance(store, SupportsExplaining) else ""
    return f". {explained}" if explained else ""


def _is_refused(store: Store, path: str, data: bytes) -> bool:
    try:
        store.put_if_absent(path, data)
    except AlreadyExistsError:
        return True
    return False


def _holds(store: Store, path: str, contents: list[bytes]) -> bool:
    """Whether the object is one of these, by the second reading if not by the first: one proves nothing."""
    return any(store.read(path, 1 << 20) in contents for _ in range(2))


def _can_be_read(store: Store, path: str) -> bool:
    try:
        store.read(path, 1 << 20)
    except ObjectNotFoundError:
        return False
    return True


def _is_listed(store: Store, path: str) -> bool:
    return any(info.path == path for info in at_most(MOST_NAMES, store.list(FOLDER), f"{store.url}/{FOLDER}"))


def _clean_up(store: Store, paths: list[str]) -> None:
    for path in paths:
        with contextlib.suppress(StorageError):  # a leftover does no harm, and hides no earlier complaint
            store.delete(path)
