"""For Prometheus: a page of text, which it asks for. Imports prometheus_client, as whoever imports this has asked for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from distckpt.telemetry.outlet import Outlet
from distckpt.telemetry.readings import LABELS, PREFIX, READINGS

logger = logging.getLogger(__name__)


class PrometheusOutlet(Outlet):
    """Answers at ``host`` and ``port`` (0: any that is free) with how things are then. OSError if it cannot."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Managers(self))
        self._server, self._thread = start_http_server(port, host, registry)
        self._thread.name = "distckpt-prometheus"
        shown = f"[{host}]" if ":" in host else host
        logger.info("metrics for Prometheus are at http://%s:%d/metrics", shown, self._server.server_port)

    def close(self) -> bool:
        """See Outlet. The port is free again."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        return True

    def forget_in_child(self) -> None:
        """See Outlet. The port is the parent's, whose end frees it."""
        super().forget_in_child()
        self._server.socket.close()


class _Managers(Collector):
    """Asks every manager once, when it is asked itself."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet

    def collect(self) -> Iterator[Metric]:
        moments = [(source.labels, source.now()) for source in self._outlet.told_of]
        for reading in READINGS:
            family = CounterMetricFamily if reading.grows else GaugeMetricFamily
            metric = family(f"{PREFIX}_{reading.name}", reading.about, labels=LABELS)
            for labels, moment in moments:
                value = reading.of(moment)
                if value is not None:
                    metric.add_metric(labels, value)
            yield metric
