"""A rank's sign of life, from time to time."""

from __future__ import annotations

import logging

from distckpt.coordinator.client.client import Client
from distckpt.coordinator.messages import Heartbeat
from distckpt.threads.coordinator import Coordinator
from distckpt.threads.looper import LooperThread

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 20.0


def beat(client: Client, threads: Coordinator) -> None:
    """Tell the coordinator every HEARTBEAT_SECONDS that this rank lives, in a thread of ``threads``."""

    def once() -> None:
        try:
            client.ask(Heartbeat(), HEARTBEAT_SECONDS)
        except Exception as error:  # noqa: BLE001 - a save that needs the coordinator says so itself; training goes on
            logger.warning("heartbeat to the coordinator: %s", error)

    LooperThread.loop(threads, HEARTBEAT_SECONDS, once, name="distckpt-heartbeat", skip_missed=True)
