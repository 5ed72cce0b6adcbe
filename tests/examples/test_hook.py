"""The example with hooks under torchrun: a SIGTERM loses nothing, and when ranks are killed nothing is left running."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import distckpt
from tests.support.gang import ROOT
from tests.support.small_runs import until

pytestmark = pytest.mark.timeout(400)

HOOK = ROOT / "examples" / "hook.py"
FIRST_SAVE_SECONDS = 150
ALL_GONE_SECONDS = 30
RAYS = ["gcs_server", "python", "ray::CoordinatorActor", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "raylet"]
"""The processes of a local Ray: those that it cannot do without, the coordinator, and who ends them."""


class Job:
    """The example, run by torchrun on two ranks, with a Ray, a home and temporary files of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.directory = folder / "run"
        self.home = folder / "home"
        self.home.mkdir(exist_ok=True)
        self._temporary = tempfile.TemporaryDirectory(prefix="dc-")  # a short name, as Ray's sockets need
        self.temporary = Path(self._temporary.name)
        self.log = folder / "log"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(HOOK)]
        command += ["--directory", str(self.directory), "--steps", "1000000", "--save-steps", "20", "--loss", "0"]
        own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with self.log.open("w") as log:
            self.process = psutil.Popen(
                command,
                env={**own, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(self.home),
                     "RAY_TMPDIR": str(self.temporary), "GLOO_SOCKET_IFNAME": "lo"},
                stdout=log, stderr=subprocess.STDOUT, cwd=folder,
            )  # fmt: skip

    def await_save(self) -> None:
        """Return once a checkpoint is there that this job has saved."""
        deadline = time.monotonic() + FIRST_SAVE_SECONDS
        while "is saved" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def ranks(self) -> list[psutil.Process]:
        """The two, in order of rank."""
        return sorted(self.process.children(), key=lambda each: each.environ()["RANK"])

    def rays(self) -> list[psutil.Process]:
        """All of the session that rank 0 has started for Ray."""
        (keeper,) = self.ranks()[0].children()
        return [each for each in psutil.process_iter() if _session(each) == keeper.pid]

    def end(self) -> None:
        """Whatever is left of it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in (*self.process.children(recursive=True), self.process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        self.process.wait()
        self._temporary.cleanup()


def _session(process: psutil.Process) -> int:
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(process.pid)
    return 0


@contextlib.contextmanager
def job(folder: Path) -> Iterator[Job]:
    """A job that has saved once. Ray gives its own node 30 s to start, which a busy machine may need: then it is another."""
    running = Job(folder)
    try:
        try:
            running.await_save()
        except AssertionError as error:
            if "The current node timed out during startup" not in str(error):
                raise
            running.end()
            running = Job(folder)
            running.await_save()
        yield running
    finally:
        running.end()


@pytest.mark.long
def test_a_sigterm_saves_the_last_step_and_a_job_that_ends_in_peace_or_is_killed_leaves_nothing(tmp_path: Path) -> None:
    with job(tmp_path) as running:
        rays = assert_small_and_private(running)
        running.ranks()[1].send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0, running.log.read_text()
        assert_gone(rays, running)
    said = running.log.read_text()
    (last,) = (int(line.split()[-1]) for line in said.splitlines() if line.startswith("ended at step"))
    assert last > 0
    with distckpt.open(running.directory) as newest:
        assert newest.path == f"{running.directory}/model.ckpt-{last}"
        assert newest.value("progress.step") == last
    for report in ("***", "Fatal", "Traceback", "SIGABRT", "core dumped"):
        assert report not in said
    assert list(tmp_path.glob("core*")) == []

    with job(tmp_path) as running:
        said = running.log.read_text()
        assert min(int(line.split()[1]) for line in said.splitlines() if "is saved" in line) >= last, "it goes on"
        rays = running.rays()
        for each in running.ranks():
            each.kill()
        running.process.wait()
        assert_gone(rays, running)


def assert_small_and_private(running: Job) -> list[psutil.Process]:
    """What Ray has in this job, which is no more than it needs, and nobody else can reach; its processes."""
    wanted = [name[:15] for name in RAYS]
    assert until(lambda: names_of(running.rays()) == wanted, 120), names_of(running.rays())  # a worker may come and go
    rays = running.rays()
    ours = [*rays, *running.ranks()]
    listening = [each for process in ours for each in process.net_connections() if each.status == "LISTEN"]
    assert len(listening) > len(rays)
    assert {each.laddr.ip.removeprefix("::ffff:") for each in listening} == {"127.0.0.1"}
    (folder,) = running.temporary.iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    assert list(running.home.iterdir()) == [], "no token is left where others may read it"
    return rays


def names_of(processes: list[psutil.Process]) -> list[str]:
    """Of those that are still there."""
    found = []
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(each.name()[:15])
    return sorted(found)


def assert_gone(rays: list[psutil.Process], running: Job) -> None:
    """Nothing is left of this job's Ray."""
    _, alive = psutil.wait_procs(rays, ALL_GONE_SECONDS)
    assert alive == []
    assert list(running.temporary.iterdir()) == []
