"""The coordinator as a Ray actor: a thin, named, detached, restarting shell around the machine."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any, cast

import ray

from distckpt.coordinator.machine.runs import turned_away
from distckpt.coordinator.messages import OpenRun, Refused, Reply, Request, Unknown
from distckpt.coordinator.ray import detached
from distckpt.coordinator.ray.watcher import Teller
from distckpt.coordinator.shell.shell import Settings, Shell
from distckpt.directory.log import read_tail
from distckpt.errors import CoordinatorFailedError, CoordinatorUnavailableError, DistckptError
from distckpt.storage import open_store

logger = logging.getLogger(__name__)

ENDING_SECONDS = 0.2


def actor_name(directory: str) -> str:
    """The name under which the coordinator of a canonical directory is found in its namespace."""
    return detached.name_of("coordinator", directory)


class CoordinatorActor:
    """Answers requests. A restart begins from storage: nothing that matters is only in its memory."""

    def __init__(self, directory: str, storage_options: dict[str, Any] | None, settings: Settings) -> None:
        self._directory = directory
        self._storage_options = storage_options
        self._settings = settings
        self._shell: Shell | None = None

    async def answer(self, request: Request, wait: float) -> Reply | None:
        """The answer to a request, or None when there is none within ``wait`` seconds: then ask again."""
        try:
            shell = self._started_for(request)
            if shell is None:
                return Unknown()
            reply = await asyncio.wait_for(asyncio.wrap_future(shell.submit(request)), wait)
        except asyncio.TimeoutError:
            return None
        except DistckptError as error:
            return Refused(error)
        except Exception as error:
            # Else Ray would tell the asker alone, in words of its own.
            known = CoordinatorFailedError(self._directory, f"{type(error).__name__}: {error}")
            logger.exception("%s", known)
            return Refused(known)
        # One that was idle is about to end; who asks again finds the next one.
        if isinstance(reply, Refused) and isinstance(reply.error, CoordinatorUnavailableError):
            await asyncio.sleep(min(wait, ENDING_SECONDS))
            return None
        return reply

    def _started_for(self, request: Request) -> Shell | None:
        """The running shell, started if a run opens; None if nothing runs yet. Raises what starting it raises.

        Not in __init__: an actor that dies while it is made tells its callers less than an answer does. And not for a
        run that has been superseded, or whose directory is gone: a restarted actor would fence the coordinator of the
        newer run, or make the directory anew.
        """
        if self._shell is None and isinstance(request, OpenRun):
            store = open_store(self._directory, self._storage_options)
            tail = read_tail(store)
            error = turned_away(request, tail.head, store.url, whole=not tail.damaged)
            if error is not None:
                raise error
            shell = Shell(store, self._settings, self._exit, Teller(store.url).tell)
            shell.start()
            self._shell = shell
        return self._shell

    async def describe(self) -> tuple[str, int]:
        """The directory that this actor serves and its process id."""
        return self._directory, os.getpid()

    def _exit(self, reason: str) -> None:
        logger.info("the coordinator of %s stops: %s", self._directory, reason)
        detached.end(f"the coordinator of {self._directory}")


def find_or_start(
    directory: str, storage_options: dict[str, Any] | None, settings: Settings, home: str
) -> ray.actor.ActorHandle[CoordinatorActor]:
    """The running coordinator of ``directory``, or a new one on the node ``home``; answers once before it is returned."""
    actor = detached.find_or_start(CoordinatorActor, actor_name(directory), home, directory, storage_options, settings)
    return cast("ray.actor.ActorHandle[CoordinatorActor]", actor)
