"""A rank's line to the coordinator, and the one to a coordinator in this very process."""

from __future__ import annotations

from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Protocol

from distckpt.coordinator.messages import Reply, Request, kind_of
from distckpt.coordinator.shell.shell import Shell
from distckpt.errors import CoordinatorUnavailableError


class Line(Protocol):
    """Carries requests to the coordinator and answers back. Safe to use from several threads."""

    def ask(self, request: Request, timeout: float) -> Reply:
        """The answer. CoordinatorUnavailableError when there is none within ``timeout`` seconds."""

    def close(self) -> None:
        """Hang up."""


class LocalLine:
    """The coordinator lives in this process, for a world of one: no Ray is needed."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    def ask(self, request: Request, timeout: float) -> Reply:
        """See Line.ask."""
        future = self._shell.submit(request)
        try:
            return future.result(timeout)
        except FutureTimeoutError:
            future.cancel()
            raise CoordinatorUnavailableError(
                f"no answer to {kind_of(request)} within {timeout:g} s: the store may be slow or unreachable"
            ) from None
        except BaseException:  # Ctrl-C: nobody waits for this answer any more
            future.cancel()
            raise

    def close(self) -> None:
        """Stop the coordinator once it has finished what it is doing."""
        self._shell.close()
