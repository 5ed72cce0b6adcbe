"""For OpenTelemetry: instruments that are looked at by its SDK, which sends. Imports it, as whoever imports this has asked."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.metrics import CallbackOptions, MeterProvider, NoOpMeterProvider, Observation, get_meter_provider
from opentelemetry.sdk.metrics import MeterProvider as SDKMeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

from distckpt.telemetry.outlet import Outlet
from distckpt.telemetry.readings import LABELS, PREFIX, READINGS, Reading

logger = logging.getLogger(__name__)

LAST_WORD_SECONDS = 5.0
"""For so long a manager that closes waits for the last numbers to be taken."""


def users_provider() -> MeterProvider | None:
    """The one that the program has set before, or None."""
    provider = get_meter_provider()
    is_set = isinstance(provider, NoOpMeterProvider) or not type(provider).__module__.startswith(
        "opentelemetry.metrics"
    )
    return provider if is_set else None


class OpenTelemetryOutlet(Outlet):
    """Instruments of ``provider``; without one, of a provider of its own, which is nobody else's.

    Its SDK reads OTEL_* variables for the rest: where to send, how often, as which service.
    """

    def __init__(self, provider: MeterProvider | None) -> None:
        super().__init__()
        self._own: SDKMeterProvider | None = None
        if provider is None:
            reader = PeriodicExportingMetricReader(OTLPMetricExporter())
            provider = self._own = SDKMeterProvider([reader], shutdown_on_exit=False)
        meter = provider.get_meter(PREFIX)
        for reading in READINGS:
            make = meter.create_observable_counter if reading.grows else meter.create_observable_gauge
            make(f"{PREFIX}.{reading.name}", [self._observe(reading)], reading.unit, reading.about)

    def close(self) -> bool:
        """See Outlet. What a program's own provider was told to look at, it looks at for ever.

        The last numbers are sent, if they are taken soon.
        """
        if self._own is None:
            return False
        with contextlib.suppress(Exception):  # the SDK has logged it, and nobody can do anything about it
            self._own.shutdown(LAST_WORD_SECONDS * 1000)
        return True

    def _observe(self, reading: Reading) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            for source in self.told_of:
                value = reading.of(source.now())
                if value is not None:
                    yield Observation(value, dict(zip(LABELS, source.labels, strict=True)))

        return observe
