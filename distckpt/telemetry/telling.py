"""Who is told of a manager: those for whom the environment asks. None of it may end or hold up training."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping

from distckpt.coordinator.client.client import Client
from distckpt.coordinator.client.opening import Meeting
from distckpt.rank.costs import Costs
from distckpt.telemetry.outlet import Outlet, Source
from distckpt.world import World

logger = logging.getLogger(__name__)

PROMETHEUS = "DISTCKPT_PROMETHEUS_PORT"
OTLP = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
OTLP_PROTOCOL = ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
SPOKEN = "http/protobuf"
LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
LOOPBACK = "127.0.0.1"
MAX_PORT = 65535

Found = tuple[Hashable, Callable[[], Outlet]]
"""Which outlet of this process it is, and how it is made if it is not there yet."""


class Telling:
    """Tells of one manager, until it is closed. ``environ`` says to whom.

    Raises nothing: what does not work is warned of, once in a process.
    """

    def __init__(
        self, environ: Mapping[str, str], costs: Costs, client: Client, world: World, meeting: Meeting
    ) -> None:
        self._source = Source((meeting.directory, str(world.rank), str(world.size), world.host), costs, client)
        self._keys: list[Hashable] = []
        for find in (_prometheus, _opentelemetry):
            try:
                for key, make in find(environ, world, meeting.hosts):
                    _join(key, make, self._source)
                    self._keys.append(key)
            except ImportError as error:
                _warn(f"not told of, for {error.name} is missing: pip install 'distckpt[metrics]'")
            except Exception as error:  # noqa: BLE001 - whatever becomes of it, training goes on
                _warn(f"not told of: {error}")

    def close(self) -> None:
        """Tell of it no more."""
        while self._keys:
            _leave(self._keys.pop(), self._source)


def local_rank(environ: Mapping[str, str], world: World, hosts: Mapping[int, str]) -> int:
    """Which rank of its host it is; as its launcher says, where the ranks do not know each other's hosts. Else 0."""
    if len(hosts) == world.size:
        return sum(hosts[rank] == world.host for rank in range(world.rank))
    told = (environ.get(name, "") for name in LOCAL_RANKS)
    return next((int(text) for text in told if text.isdecimal()), 0)


def _prometheus(environ: Mapping[str, str], world: World, hosts: Mapping[int, str]) -> Iterator[Found]:
    told = environ.get(PROMETHEUS, "").strip()
    if not told:
        return
    from distckpt.telemetry.prometheus import PrometheusOutlet

    host, _, text = told.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or LOOPBACK
    if not (text.isdecimal() and int(text) <= MAX_PORT):
        raise ValueError(f"{PROMETHEUS}={told!r} is neither PORT nor HOST:PORT")
    first = int(text)
    port = first + local_rank(environ, world, hosts) if first else 0

    def listen() -> PrometheusOutlet:
        try:
            return PrometheusOutlet(host, port)
        except (OSError, OverflowError) as error:
            raise OSError(f"{PROMETHEUS}={told!r} has this rank listen at port {port} of {host}: {error}") from error

    yield (PROMETHEUS, host, port), listen


def _opentelemetry(environ: Mapping[str, str], world: World, hosts: Mapping[int, str]) -> Iterator[Found]:
    asked = next((name for name in OTLP if environ.get(name)), None)
    if (
        asked is None
        or environ.get("OTEL_METRICS_EXPORTER") == "none"
        or _is_true(environ.get("OTEL_SDK_DISABLED", ""))
    ):
        return
    from distckpt.telemetry.opentelemetry import OpenTelemetryOutlet, users_provider

    provider = users_provider()
    protocol = next((environ[name] for name in OTLP_PROTOCOL if environ.get(name)), SPOKEN)
    if provider is None and protocol != SPOKEN:
        raise ValueError(f"{asked} is to be spoken to in {protocol}, and distckpt speaks {SPOKEN} alone")
    yield ("opentelemetry", provider), lambda: OpenTelemetryOutlet(provider)


def _is_true(text: str) -> bool:
    return text.strip().lower() == "true"


# ---- of this process ----------------------------------------------------------------------------------------------

_lock = threading.Lock()
_outlets: dict[Hashable, Outlet] = {}
_warned: set[str] = set()


def _join(key: Hashable, make: Callable[[], Outlet], source: Source) -> None:
    with _lock:
        if key not in _outlets:
            _outlets[key] = make()
        _outlets[key].add(source)


def _leave(key: Hashable, source: Source) -> None:
    with _lock:
        outlet = _outlets.get(key)
        if outlet is not None and outlet.remove(source):
            del _outlets[key]


def _warn(text: str) -> None:
    with _lock:
        is_new = text not in _warned
        _warned.add(text)
    if is_new:
        logger.warning("what checkpoints cost is %s", text)


def _forget() -> None:
    """In a forked child, such as a data loader's worker, there are no managers."""
    global _lock
    _lock = threading.Lock()  # whoever held it is in the parent
    for outlet in _outlets.values():
        outlet.forget_in_child()
    _outlets.clear()


os.register_at_fork(after_in_child=_forget)
