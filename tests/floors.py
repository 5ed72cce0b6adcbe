"""Prints the lowest version of every package that pyproject.toml allows, as constraints for pip.

What constraints.txt pins keeps the version given there: of torch, other releases than that one come with gigabytes of
CUDA. Before Python 3.11 needs tomli, which pytest brings.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FLOOR = re.compile(r"([\w.-]+)(?:\[[\w,]*\])?>=([\d.]+)")
OURSELVES = re.compile(r"distckpt\[[\w,]*\]")


def floors() -> Iterator[tuple[str, str]]:
    """Name and lowest version. ValueError for a requirement without one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in sum(project["optional-dependencies"].values(), project["dependencies"]):
        floor = FLOOR.fullmatch(requirement)
        if floor is not None:
            yield floor[1], floor[2]
        elif not OURSELVES.fullmatch(requirement):
            raise ValueError(f"{requirement!r} does not say the lowest version that is supported, as name>=version")


def pins() -> list[str]:
    """The lines of constraints.txt that are not comments."""
    return [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]


def main() -> None:
    """Print them, one a line."""
    pinned = {pin.partition("==")[0] for pin in pins()}
    lowest = {f"{name}=={version}" for name, version in floors() if name not in pinned}
    print("\n".join([*pins(), *sorted(lowest)]))


if __name__ == "__main__":
    main()
