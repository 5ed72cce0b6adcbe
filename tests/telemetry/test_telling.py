"""A training that knows nothing of metrics is watched, because environment variables say so."""

from __future__ import annotations

import http.server
import json
import logging
import os
import re
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from prometheus_client.parser import text_string_to_metric_families

import distckpt
from distckpt.telemetry import telling
from distckpt.telemetry.readings import READINGS
from distckpt.world import World
from tests.support.gang import ROOT, free_port
from tests.support.small_runs import Trainer, assert_loads, run, until
from tests.support.warm import WarmProcess, start_script

PROGRAM = ROOT / "tests" / "ranks" / "watched.py"


@dataclass
class Watched:
    """The process, and the file that has what it logs."""

    process: WarmProcess
    log: Path

    def do(self, *words: object) -> Any:
        """Have it do something; what it answers."""
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        return json.loads(line)

    @property
    def address(self) -> str:
        """Where it says that its metrics are."""
        return re.findall(r"http://127\.0\.0\.1:\d+/metrics", self.log.read_text())[-1]


@contextmanager
def training(folder: Path, **variables: str) -> Iterator[Watched]:
    """A process with these variables, which has ended in good order afterwards."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "DISTCKPT_PROM"))}
    env = {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    log = folder / "log"
    with log.open("a") as errors, start_script(PROGRAM, env=env, stderr=errors.fileno()) as process:
        yield Watched(process, log)
        process.stdin.close()
        assert process.wait(60) == 0, log.read_text()


def scraped(address: str) -> dict[str, dict[str, float]]:
    """The values by name and directory, as Prometheus reads them."""
    with urllib.request.urlopen(address, timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            assert {*sample.labels} == {"directory", "rank", "world_size", "host"}
            by_directory = found.setdefault(sample.name, {})
            assert sample.labels["directory"] not in by_directory, "one series twice"
            by_directory[sample.labels["directory"]] = sample.value
    return found


@pytest.mark.timeout(120)
def test_prometheus_reads_a_training_while_it_goes_on(tmp_path: Path) -> None:
    first, second = str(tmp_path / "a"), str(tmp_path / "b")
    with training(tmp_path, DISTCKPT_PROMETHEUS_PORT="0") as watched:
        watched.do("open", first)
        before = scraped(watched.address)
        assert before["distckpt_saves_total"] == {first: 0}
        assert "distckpt_newest_checkpoint_number" not in before
        stats = watched.do("save", first, 7)
        now = scraped(watched.address)
        assert now["distckpt_saves_total"] == now["distckpt_saves_committed_total"] == {first: 1}
        assert now["distckpt_newest_checkpoint_number"] == {first: 7}
        assert now["distckpt_run_number"] == {first: 1}
        assert now["distckpt_committed_bytes_total"] == {first: stats["bytes_committed"]}
        assert now["distckpt_first_stall_seconds_total"] == {first: pytest.approx(stats["first_stall_seconds"])}
        assert now["distckpt_committed_longest_seconds"] == {first: pytest.approx(stats["committed_longest"])}
        assert now["distckpt_newest_checkpoint_age_seconds"][first] >= 0
        assert now["distckpt_unsaved_seconds"][first] > 0
        watched.do("open", second)
        both = scraped(watched.address)
        assert both["distckpt_saves_total"] == {first: 1, second: 0}
        address = watched.address
        watched.do("close", first)
        assert scraped(address)["distckpt_saves_total"] == {second: 0}
        watched.do("close", second)
        with pytest.raises(urllib.error.URLError, match="refused"):
            scraped(address)
        watched.do("open", first)
        watched.do("restore", first)
        again = scraped(watched.address)
        assert again["distckpt_newest_checkpoint_number"] == {first: 7}
        assert again["distckpt_restored_bytes_total"][first] >= 4000


def test_of_two_managers_of_one_directory_the_newer_one_is_told_of(tmp_path: Path) -> None:
    with training(tmp_path, DISTCKPT_PROMETHEUS_PORT="0") as watched:
        watched.do("open", tmp_path / "a")
        watched.do("save", tmp_path / "a", 1)
        watched.do("open", tmp_path / "a")
        assert [*scraped(watched.address)["distckpt_saves_total"].values()] == [0]


def test_a_port_that_is_taken_is_warned_of_and_costs_nothing_else(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with training(tmp_path, DISTCKPT_PROMETHEUS_PORT=str(port)) as watched:
            for name in ("a", "b"):
                watched.do("open", tmp_path / name)
                watched.do("save", tmp_path / name, 1)
        said = [line for line in watched.log.read_text().splitlines() if line.startswith("WARNING")]
        assert len(said) == 1, said
        assert f"port {port} of 127.0.0.1" in said[0]


@pytest.mark.parametrize("told", ["nonsense", "127.0.0.1:", "65536", "-1", "127.0.0.1:99999999999999999999", "0.0.0.0"])
def test_a_port_that_is_none_is_warned_of(
    told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(telling.PROMETHEUS, told)
    with Trainer(tmp_path) as trainer:
        assert_loads(trainer.saved(1), 1)
    assert f"DISTCKPT_PROMETHEUS_PORT='{told}' is neither PORT nor HOST:PORT" in caplog.text


def test_a_forked_child_holds_no_port_and_tells_nothing(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{(port := free_port())}/metrics"
    with training(tmp_path, DISTCKPT_PROMETHEUS_PORT=f"127.0.0.1:{port}") as watched:
        watched.do("open", tmp_path / "a")
        watched.do("fork")
        watched.do("save", tmp_path / "a", 1)
        watched.do("close", tmp_path / "a")
        with pytest.raises(urllib.error.URLError, match="refused"):
            scraped(address)
        watched.do("open", tmp_path / "a")
        assert "distckpt_saves_total" in scraped(address)
    assert "WARNING" not in watched.log.read_text()


@pytest.mark.parametrize(
    ("variable", "package"),
    [(telling.PROMETHEUS, "prometheus_client"), (telling.OTLP[0], "opentelemetry.exporter.otlp.proto.http")],
)
def test_who_lacks_the_package_is_told_once_which_extra_has_it(
    variable: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:1" if variable.startswith("OTEL") else "0")
    for name in [name for name in sys.modules if name.startswith((package, "distckpt.telemetry."))]:
        if name != telling.__name__:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with caplog.at_level(logging.INFO):
        run(tmp_path / "a", 1)
        run(tmp_path / "b", 1)
    said = [record.message for record in caplog.records if record.name == telling.__name__]
    assert len(said) == 1
    assert "pip install 'distckpt[metrics]'" in said[0]
    assert package.split(".")[0] in said[0]


def test_each_rank_of_a_host_has_a_port_of_its_own() -> None:
    hosts = {0: "a", 1: "b", 2: "a", 3: "b", 4: "a"}
    places = [telling.local_rank({}, World(rank, 5, host=hosts[rank]), hosts) for rank in hosts]
    assert places == [0, 0, 1, 1, 2]
    apart = World(3, 5, None, "run", host="b")
    assert telling.local_rank({"LOCAL_RANK": "1"}, apart, {3: "b"}) == 1
    assert telling.local_rank({"SLURM_LOCALID": "2"}, apart, {3: "b"}) == 2
    assert telling.local_rank({}, apart, {3: "b"}) == 0


# ---- OpenTelemetry ------------------------------------------------------------------------------------------------


@dataclass
class Collector:
    """What has come in, by metric: the newest values; and of which service."""

    url: str
    values: dict[str, list[float]] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    services: set[str] = field(default_factory=set)
    requests: int = 0

    def take(self, request: ExportMetricsServiceRequest) -> None:
        self.requests += 1
        for resource in request.resource_metrics:
            told = {each.key: each.value.string_value for each in resource.resource.attributes}
            self.services.add(told["service.name"])
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    points = (metric.sum if metric.HasField("sum") else metric.gauge).data_points
                    self.values[metric.name] = [
                        point.as_double if point.HasField("as_double") else point.as_int for point in points
                    ]
                    self.attributes = {each.key: each.value.string_value for each in points[0].attributes}


@contextmanager
def collector() -> Iterator[Collector]:
    """A real receiver of OTLP over HTTP."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/metrics"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.take(ExportMetricsServiceRequest.FromString(body))
            answer = ExportMetricsServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Collector(f"http://127.0.0.1:{server.server_address[1]}")
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield found
        finally:
            server.shutdown()
            serving.join()


def otel(found: Collector, **more: str) -> Mapping[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": found.url, "OTEL_METRIC_EXPORT_INTERVAL": "200", **more}


@pytest.mark.timeout(120)
def test_a_collector_of_opentelemetry_is_told_while_training_goes_on_and_at_its_end(tmp_path: Path) -> None:
    directory = str(tmp_path / "a")
    with collector() as found, training(tmp_path, **otel(found, OTEL_SERVICE_NAME="pretraining")) as watched:
        watched.do("open", directory)
        stats = watched.do("save", directory, 7)
        expected = {
            "distckpt.saves": [1],
            "distckpt.committed_bytes": [stats["bytes_committed"]],
            "distckpt.newest_checkpoint_number": [7],
            "distckpt.run_number": [1],
        }
        assert until(lambda: expected.items() <= found.values.copy().items()), found
        assert found.services == {"pretraining"}
        assert found.attributes | {"host": ""} == {"directory": directory, "rank": "0", "world_size": "1", "host": ""}
        assert {*found.values} == {f"distckpt.{reading.name}" for reading in READINGS}
        watched.do("save", directory, 8)
        watched.do("close", directory)
        assert found.values["distckpt.saves"] == [2], "the last word"
        watched.do("open", directory)
        assert until(lambda: found.values["distckpt.saves"] == [0])
    assert "WARNING" not in watched.log.read_text()


@pytest.mark.parametrize("variable", [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_METRICS_EXPORTER": "none"}])
def test_nothing_is_sent_where_opentelemetry_is_told_to_be_silent(variable: dict[str, str], tmp_path: Path) -> None:
    with collector() as found:
        with training(tmp_path, **otel(found, **variable)) as watched:
            watched.do("open", tmp_path / "a")
            watched.do("save", tmp_path / "a", 1)
        assert found.requests == 0


@pytest.mark.timeout(120)
def test_a_programs_own_provider_is_used_and_no_other(tmp_path: Path) -> None:
    with collector() as found:
        with training(tmp_path, **otel(found)) as watched:
            watched.do("provide")
            watched.do("open", tmp_path / "a")
            watched.do("save", tmp_path / "a", 1)
            assert watched.do("read")["distckpt.saves"] == [1]
            watched.do("open", tmp_path / "b")
            assert watched.do("read")["distckpt.saves"] == [1, 0]
            watched.do("close", tmp_path / "a")
            watched.do("close", tmp_path / "b")
            assert watched.do("read") == {}
            watched.do("open", tmp_path / "a")
            assert watched.do("read")["distckpt.saves"] == [0]
        assert found.requests == 0
    assert "WARNING" not in watched.log.read_text()


def test_who_asks_for_another_protocol_is_told_which_is_spoken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(telling.OTLP[1], "http://127.0.0.1:4317")
    monkeypatch.setenv(telling.OTLP_PROTOCOL[1], "grpc")
    run(tmp_path, 1)
    assert "is to be spoken to in grpc, and distckpt speaks http/protobuf alone" in caplog.text


@pytest.mark.timeout(120)
def test_a_collector_that_does_not_answer_does_no_harm(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with training(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=url) as watched:
            watched.do("open", tmp_path / "a")
            watched.do("save", tmp_path / "a", 1)
            watched.do("close", tmp_path / "a")
    with distckpt.open(tmp_path / "a" / "ckpt-1") as reader:
        assert reader.verify().good


def test_names_are_as_prometheus_wants_them() -> None:
    names = [reading.name for reading in READINGS]
    assert len({*names}) == len(names)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", name) for name in names)
    assert not [name for name in names if name.endswith(("_total", "_count", "_sum", "_info", "_bucket"))]
