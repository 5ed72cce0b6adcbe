"""What importing a module costs: who needs no torch or Ray does not load it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.house.source import ROOT, modules, part

RAY = [name for name in modules() if name.startswith("distckpt.coordinator.ray")]
HEAVY = ["distckpt.manager", *RAY]
IMPORTING = """
import importlib, sys

def tell(name):
    print(name, *[heavy for heavy in ("torch", "ray", "fsspec", "gcsfs", "google.cloud", "pandas") if heavy in sys.modules])

for name in sys.argv[1].split(","):
    importlib.import_module(name)
    tell(name)
from tests.support.small_runs import assert_loads, run
run(sys.argv[2], 1)
assert_loads(sys.argv[2] + "/ckpt-1", 1)
tell("saved")
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Which heavy packages are loaded after each module has been imported, in the order of the keys; last: "saved"."""
    light = ["distckpt", "distckpt.errors", "distckpt.iterators", "distckpt.state_file", "distckpt.reader"]
    light += ["distckpt.directory.lease", "distckpt.export.listing", "distckpt.evaluation.watch"]
    below = [name for name in modules() if part(name) in ("storage", "format", "coordinator", "cli")]
    below = [name for name in below if not name.endswith("__main__") and name not in RAY]
    below = [name for name in below if not name.startswith("distckpt.storage.remote")]  # a URL pays for those
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, ",".join([*light, *below, *HEAVY]), str(tmp_path_factory.mktemp("saved"))],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: set(heavy) for name, *heavy in lines}


@pytest.mark.timeout(150)
def test_what_needs_no_torch_does_not_import_it(loaded: dict[str, set[str]]) -> None:
    with_torch = {name for name, heavy in loaded.items() if "torch" in heavy}
    assert with_torch == {*HEAVY, "saved"}, "the last of all"
    assert loaded["distckpt"] == set()


def test_a_manager_of_one_process_needs_no_ray(loaded: dict[str, set[str]]) -> None:
    assert loaded["distckpt.manager"] == {"torch"}
    assert {name for name, heavy in loaded.items() if "ray" in heavy} == {*RAY, "saved"}


def test_saving_and_reading_do_without_pandas(loaded: dict[str, set[str]]) -> None:
    """pyarrow would import it at the first number, for half a second."""
    assert not [name for name, heavy in loaded.items() if "pandas" in heavy]
