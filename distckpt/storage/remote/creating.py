"""What exactly one of many may create, decided although answers get lost."""

from __future__ import annotations

from collections.abc import Callable

from distckpt.errors import AccessDeniedError, AlreadyExistsError, StorageError, StoreOutcomeUnknownError
from distckpt.storage.remote.http import DENIED, Answer, Endpoint, NoAnswer, Outcome, Pauses, Request, retry_after

_TAKEN = 412


def create(endpoint: Endpoint, request: Request, look: Callable[[], bool | None], where: str) -> Answer | None:
    """Send ``request``, which creates the object at ``where`` unless the name is taken; return only if ours is there.

    That is the answer, or None if it got lost. ``look`` says what is there now: ours (True), another's (False), nothing
    (None). It is asked whenever the answer was neither yes nor a refusal for good: even "it exists" may be about our
    own, created by a request whose answer nobody heard. If there is nothing, the same goes again, as long as patience
    lasts: a request that got no answer may still be on its way, and must not be followed by another one.

    AlreadyExistsError if another's is there, StorageError if the server refuses, which is an AccessDeniedError if nothing
    sent before can have created it; StoreOutcomeUnknownError in the end.
    """
    pauses = Pauses(endpoint.patience)
    is_first = True
    while True:
        asked_for = 0.0
        try:
            answer = endpoint.once(request)
        except NoAnswer as error:
            if error.is_final:
                raise StorageError(where, str(error)) from error
            reason = str(error)
        else:
            if answer.outcome is Outcome.DONE:
                return answer
            if answer.outcome is Outcome.REFUSED and answer.status != _TAKEN:
                kind = AccessDeniedError if answer.status in DENIED and is_first else StorageError
                raise kind(where, f"the store refuses to create it: {answer.said}")
            reason, asked_for = answer.said, retry_after(answer)
        is_first = False
        try:
            ours = look()
        except (NoAnswer, StorageError) as error:
            reason = f"{reason}; then, when it was looked for: {error}"
        else:
            if ours:
                return None
            if ours is not None:
                raise AlreadyExistsError(where)
        if not pauses.wait(asked_for):
            message = f"no answer in {endpoint.patience:g} s says whether it was created; the last one: {reason}"
            raise StoreOutcomeUnknownError(where, message)


def require_ours(look: Callable[[], bool | None], where: str) -> None:
    """Look at what was created, as the server's word on it is another one. StorageError if it is not what was sent."""
    try:
        ours = look()
    except NoAnswer as error:
        message = f"it was created, perhaps of other bytes than were sent, and cannot be read: {error}"
        raise StoreOutcomeUnknownError(where, message) from error
    if not ours:
        raise StorageError(where, "the store took it in and holds other bytes than were sent: they came there damaged")
