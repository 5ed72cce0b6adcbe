"""An object at the other end of a network, open for reading: ranges put into memory, each length checked."""

from __future__ import annotations

import dataclasses
import time

from distckpt.errors import DamagedError, ObjectNotFoundError, StorageError
from distckpt.storage.bounds import require_within
from distckpt.storage.remote.budget import Budget
from distckpt.storage.remote.http import Answer, Endpoint, NoAnswer, Outcome, Request, retry_after

_SHORT_TRIES = 3


class RemoteSource:
    """One version of the object at ``where``, of ``size`` bytes: ``request`` asks for all of it."""

    def __init__(self, endpoint: Endpoint, budget: Budget, request: Request, size: int, where: str) -> None:
        self._endpoint = endpoint
        self._budget = budget
        self._request = request
        self._size = size
        self._where = where

    @property
    def size(self) -> int:
        """The object's size in bytes."""
        return self._size

    def read_into(self, position: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``position`` on. DamagedError if the object ends before that."""
        require_within(self._size, position, target.nbytes, self._where)
        with self._budget.request():
            fill(self._endpoint, self._request, position, target, self._where)

    def close(self) -> None:
        """Nothing is held open for one object."""


def fill(endpoint: Endpoint, request: Request, position: int, target: memoryview, where: str) -> None:
    """Fill ``target`` with the bytes of an object from ``position`` on, asking again for what is missing.

    ``request`` asks for the whole object, in the version that is wanted. The object at ``where`` is known to be long
    enough: DamagedError if the server says several times that it is not. ObjectNotFoundError if it is gone, StorageError
    if there is no answer. One that takes much longer than others usually take is given up once, and what is still missing
    is asked for on another connection.
    """
    target = target.cast("B")
    done, short = 0, 0
    limit = endpoint.usual.limit(target.nbytes)
    pauses = endpoint.pauses(is_read=True)
    while done < target.nbytes:
        first, last = position + done, position + target.nbytes - 1
        headers = {**request.headers, "Range": f"bytes={first}-{last}"}
        ranged = dataclasses.replace(request, headers=headers, bulk=True)
        asked_for, before, began = 0.0, done, time.monotonic()
        try:
            answer = endpoint.once(ranged, into=target[done:], seconds=limit)
        except NoAnswer as error:
            done += error.received
            if limit is not None and not error.is_final:
                limit = None
                continue
            reason, is_final = str(error), error.is_final
        else:
            if answer.status == 206 and _begins_at(answer, first):
                done += answer.received
                endpoint.usual.note(answer.received, time.monotonic() - began)
                if done == target.nbytes:
                    return
            if answer.status == 404:
                raise ObjectNotFoundError(where)
            reason, asked_for = answer.said, retry_after(answer)
            is_final = answer.outcome is Outcome.REFUSED and answer.status != 416
            if answer.status in (206, 416):
                short += 1
                if short == _SHORT_TRIES:
                    raise DamagedError(where, f"ends before byte {last}, as the store says {short} times")
        if done > before:
            pauses = endpoint.pauses(is_read=True)  # it goes on, however slowly
        if is_final or not pauses.wait(asked_for):
            raise StorageError(where, f"bytes {first} to {last} could not be read: {reason}")


def _begins_at(answer: Answer, first: int) -> bool:
    return answer.headers.get("content-range", "").startswith(f"bytes {first}-")
