"""A training that does what lines on its standard input say, one after the other, and answers each. Who watches it, it
does not know: nothing in it is about metrics, but where it has a provider of OpenTelemetry of its own.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

import distckpt


class Training:
    """Managers of directories, and what can be done with them; each method is a word that may be said."""

    def __init__(self) -> None:
        self.managers: dict[str, distckpt.CheckpointManager] = {}
        self.reader: Any = None

    def open(self, directory: str) -> None:
        checkpoint = distckpt.Checkpoint(state={"weights": torch.zeros(1000)})
        self.managers[directory] = distckpt.CheckpointManager(checkpoint, directory)

    def save(self, directory: str, number: str) -> dict[str, float]:
        self.managers[directory].save(int(number)).result(60)
        self.managers[directory].wait()
        return self.managers[directory].stats().metrics("")

    def restore(self, directory: str) -> None:
        self.managers[directory].restore_or_initialize()

    def close(self, directory: str) -> None:
        self.managers.pop(directory).close()

    def fork(self) -> None:
        """A child, as a data loader's worker is one, that lives for as long as this process."""
        come, go = os.pipe()
        if os.fork() == 0:
            os.close(go)
            os.read(come, 1)
            os._exit(0)

    def provide(self) -> None:
        """Set a provider of the program's own."""
        from opentelemetry import metrics
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader

        self.reader = InMemoryMetricReader()
        metrics.set_meter_provider(MeterProvider([self.reader]))

    def read(self) -> dict[str, list[float]]:
        """What the program's own provider has."""
        data = self.reader.get_metrics_data()
        return dict(_values(data)) if data is not None else {}


def _values(data: Any) -> Iterator[tuple[str, list[float]]]:
    for resource in data.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                yield metric.name, [point.value for point in metric.data.data_points]


def main() -> None:
    """Do as told until there is nothing more to do."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
    training = Training()
    for line in sys.stdin:
        word, *arguments = line.split()
        print(json.dumps(getattr(training, word)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
