"""A rank's line to a coordinator that is a Ray actor."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distckpt.coordinator.messages import Status, Unknown
from distckpt.coordinator.shell.shell import Settings
from distckpt.errors import CoordinatorUnavailableError
from tests.support.actors import coordinator_pid


@pytest.mark.usefixtures("connected")
def test_a_question_is_given_up_in_its_own_time_though_the_coordinator_stands_still(tmp_path: Path) -> None:
    import ray

    from distckpt.coordinator.ray.line import RayLine

    line = RayLine(str(tmp_path), None, Settings(), ray.get_runtime_context().get_node_id())
    assert line.ask(Status(), 60) == Unknown()  # no run has been opened
    pid = coordinator_pid(str(tmp_path))
    with ThreadPoolExecutor(1) as elsewhere:
        os.kill(pid, signal.SIGSTOP)
        try:
            asked = elsewhere.submit(line.ask, Status(), 1.0)
            with pytest.raises(CoordinatorUnavailableError, match="no answer to Status within 1 s"):
                asked.result(15)
        finally:
            os.kill(pid, signal.SIGCONT)
    assert line.ask(Status(), 60) == Unknown()
    line.replace()
