"""JAX, in a process of its own: where it has been imported, it objects to any fork."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.gang import ROOT


@pytest.mark.timeout(400)
def test_what_is_said_of_jax_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", ROOT / "tests" / "training" / "in_jax.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=390,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
