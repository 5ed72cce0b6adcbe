"""What pyproject.toml requires."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
WITH_A_FLOOR = re.compile(r"[\w.-]+(\[[\w,]*\])?>=[\d.]+")
OURSELVES = re.compile(r"distckpt\[[\w,]*\]")


def test_every_requirement_says_the_lowest_version_that_is_supported() -> None:
    """As ``make test-floors`` installs these, and lets what they bring be the newest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = sum(project["optional-dependencies"].values(), project["dependencies"])
    assert len(requirements) > 30
    without = [each for each in requirements if not (WITH_A_FLOOR.fullmatch(each) or OURSELVES.fullmatch(each))]
    assert without == []
