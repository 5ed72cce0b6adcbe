"""A rank's line to a coordinator that is a Ray actor, which may die and come back."""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
import ray.exceptions

from distckpt.coordinator.messages import Reply, Request, kind_of
from distckpt.coordinator.ray.actor import find_or_start
from distckpt.coordinator.ray.detached import Search, answer
from distckpt.coordinator.shell.shell import Settings
from distckpt.errors import CoordinatorFailedError, CoordinatorUnavailableError, DistckptError

logger = logging.getLogger(__name__)

POLL_SECONDS = 20.0
"""How long one question waits at the coordinator before it is asked again."""

GRACE_SECONDS = 60.0
"""How long a rank waits for a coordinator that does not answer at all (it may be restarting)."""


class RayLine:
    """The coordinator is a named actor. Lost calls are repeated; a dead actor is looked up, or started, again."""

    def __init__(self, directory: str, storage_options: dict[str, Any] | None, settings: Settings, home: str) -> None:
        self._directory = directory
        self._search = Search(lambda: find_or_start(directory, storage_options, settings, home), self._left)

    def ask(self, request: Request, timeout: float) -> Reply:
        """See Line.ask."""
        deadline = time.monotonic() + timeout
        silent_since: float | None = None
        while (left := deadline - time.monotonic()) > 0:
            wait = min(POLL_SECONDS, left)
            try:
                actor = self._search.find(wait)
                patience = min(wait + POLL_SECONDS, deadline - time.monotonic())
                reply: Reply | None = answer(actor.answer.remote(request, wait), patience, self._left)
            except DistckptError:
                raise
            except ray.exceptions.RayTaskError as error:  # the actor lives; what was asked of it could not be read, say
                raise CoordinatorFailedError(self._directory, _text(error).strip().rpartition("\n")[2]) from error
            except Exception as error:  # noqa: BLE001 - Ray has no list of what it raises; silence ends it
                self._search.drop()
                if time.monotonic() >= deadline:
                    break  # it may be at work on the answer, or dead: this time is too short to tell
                if silent_since is None:
                    silent_since = time.monotonic()
                    logger.warning(
                        "the coordinator of %s does not answer: %s; asking again", self._directory, _text(error)
                    )
                self._check_silence(error, silent_since)
                time.sleep(0.2)
                continue
            silent_since = None
            if reply is not None:
                return reply
        raise CoordinatorUnavailableError(f"{self._directory}: no answer to {kind_of(request)} within {timeout:g} s")

    def replace(self) -> None:
        """Put a fresh coordinator in the place of one that has stopped for ever."""
        actor = self._search.drop()
        if actor is not None:
            ray.kill(actor, no_restart=True)

    def close(self) -> None:
        """The actor goes on without us, and exits by itself when it is idle."""

    def _left(self) -> CoordinatorUnavailableError:
        return CoordinatorUnavailableError(
            f"{self._directory}: this process has left its Ray cluster (ray.shutdown) before its manager was closed. "
            "Close the manager first, or join the cluster again with ray.init"
        )

    def _check_silence(self, error: Exception, since: float) -> None:
        if time.monotonic() - since > GRACE_SECONDS:
            raise CoordinatorUnavailableError(
                f"{self._directory}: the coordinator has not answered for {GRACE_SECONDS:g} s: {_text(error)}"
            ) from error


def _text(error: BaseException) -> str:
    return str(error) or "Ray itself does not answer; has its head node died?"
