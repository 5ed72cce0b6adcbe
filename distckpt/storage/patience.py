"""A store that is asked again when it gave no answer, and damage that counts only when it is seen twice."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

from distckpt.errors import AccessDeniedError, DamagedError, ObjectNotFoundError, StorageError
from distckpt.storage.around import StoreAround
from distckpt.storage.interface import ObjectInfo, Source, Store

logger = logging.getLogger(__name__)

PAUSES = (0.0, 0.1, 0.5, 2.0)
"""Seconds between one try and the next."""

_ANSWERS = (ObjectNotFoundError, DamagedError, AccessDeniedError)

_Answer = TypeVar("_Answer")


def twice(read: Callable[[], _Answer], before_again: Callable[[], object] = bool) -> _Answer:
    """What ``read`` finds. It is damaged if it is so a second time: one reading proves nothing about the bytes."""
    try:
        return read()
    except DamagedError as error:
        first = str(error)  # not the error itself, whose traceback holds what was read
    before_again()
    found = read()
    logger.warning("one reading was damaged and the next was not, which counts: %s", first)
    return found


class PatientStore(StoreAround):
    """``inner``, of which every read is tried again when it fails with a StorageError: that is no answer, and may pass.

    What is written is passed on as it is: whether to write again is not for a store to say. One that has failed all
    tries is asked once a call until it has answered again.
    """

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._patience = _Patience()

    def read(self, path: str, max_bytes: int) -> bytes:
        """See Store."""
        return self._patience.answer(lambda: self._inner.read(path, max_bytes))

    def open(self, path: str) -> Source:
        """See Store. What cannot be read of it is read from the object opened anew, as when a handle is stale."""

        def anew() -> Source:
            return self._inner.open(path)

        return _PatientSource(self._patience.answer(anew), anew, self._patience)

    def stat(self, path: str) -> ObjectInfo | None:
        """See Store."""
        return self._patience.answer(lambda: self._inner.stat(path))

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        """See Store."""
        return self._patience.each(lambda: self._inner.list(folder), lambda info: info.path)

    def folders(self, folder: str) -> Iterator[str]:
        """See Store."""
        return self._patience.each(lambda: self._inner.folders(folder), lambda name: name)

    def hidden(self, folder: str) -> Iterator[ObjectInfo]:
        """See SupportsHidden."""
        return self._patience.each(lambda: super(PatientStore, self).hidden(folder), lambda info: info.path)


class _PatientSource:
    def __init__(self, source: Source, anew: Callable[[], Source], patience: _Patience) -> None:
        self._source = source
        self._anew = anew
        self._patience = patience

    @property
    def size(self) -> int:
        return self._source.size

    def read_into(self, position: int, target: memoryview) -> None:
        try:
            self._source.read_into(position, target)
        except ObjectNotFoundError:
            raise
        except StorageError as error:
            logger.info("%s; it is opened anew", error)
        else:
            return
        self._patience.answer(lambda: self._read_anew(position, target))

    def close(self) -> None:
        self._source.close()

    def _read_anew(self, position: int, target: memoryview) -> None:
        with contextlib.closing(self._anew()) as source:
            source.read_into(position, target)


class _Patience:
    """How long a store is waited for that does not answer."""

    def __init__(self) -> None:
        self._is_lost = False

    def answer(self, ask: Callable[[], _Answer]) -> _Answer:
        """What ``ask`` returns. That there is no such object, that it is damaged, or not for us, is an answer too."""
        pauses = iter(() if self._is_lost else PAUSES)
        while True:
            try:
                found = ask()
            except _ANSWERS:
                self._is_lost = False
                raise
            except StorageError as error:
                self._wait(pauses, error)
            else:
                self._is_lost = False
                return found

    def each(self, find: Callable[[], Iterable[_Answer]], name: Callable[[_Answer], Hashable]) -> Iterator[_Answer]:
        """All that is found, each once: a listing that broke off is begun again."""
        given: set[Hashable] = set()
        pauses = iter(() if self._is_lost else PAUSES)
        while True:
            try:
                for one in find():
                    if name(one) not in given:
                        given.add(name(one))
                        yield one
            except AccessDeniedError:
                self._is_lost = False
                raise
            except StorageError as error:
                self._wait(pauses, error)
            else:
                self._is_lost = False
                return

    def _wait(self, pauses: Iterator[float], error: StorageError) -> None:
        """Until it is time to ask again. Raises the error if it is time to stop."""
        pause = next(pauses, None)
        if pause is None:
            self._is_lost = True
            raise error
        logger.log(logging.WARNING if pause else logging.INFO, "%s; it is tried again in %g s", error, pause)
        time.sleep(pause)
