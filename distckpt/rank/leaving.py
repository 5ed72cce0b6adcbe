"""How a rank leaves its run: with the word that training is over, or without."""

from __future__ import annotations

import contextlib

from distckpt.coordinator.client.client import Client
from distckpt.coordinator.messages import Leave, Unknown
from distckpt.directory.log import read_tail
from distckpt.errors import CoordinatorFailedError, CoordinatorUnavailableError, DistckptError
from distckpt.storage import Store

LEAVE_SECONDS = 5.0


def leave(client: Client, timeout: float) -> None:
    """Tell the coordinator, which notices by itself if it does not hear of it. Raises nothing."""
    with contextlib.suppress(DistckptError):
        client.open(timeout)
        client.ask(Leave(), LEAVE_SECONDS)


def finish(client: Client, store: Store, timeout: float) -> None:
    """Return once the log says that training is over, which all ranks have to say.

    Raises CoordinatorError, naming them, if some do not within the run's ``save_timeout``, or leave without saying so.
    ``timeout`` is how long the coordinator may be silent.
    """
    try:
        while isinstance(client.ask(Leave(final=True), timeout), Unknown):
            pass  # it was replaced, and the run is open again
    except (CoordinatorUnavailableError, CoordinatorFailedError):
        # It may have gone with the rank that had started it, who was told before us.
        state = read_tail(store).head
        opened = client.opened
        if opened is None or not (state.ended and state.run == opened.run):
            raise
