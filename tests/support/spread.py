"""Which process of a test run plays a test: a file is one process's, and so are all tests with ranks together."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from xdist.scheduler import LoadFileScheduling

RANKS = "tests with ranks"
"""Each process that has gangs of ranks joins all of their processes to Ray, which takes the time of many tests."""

_WITH_RANKS = re.compile(r"^ *def (test_\w+)\([^)]*\bgangs?\d?: ", re.MULTILINE)


class Spread(LoadFileScheduling):  # type: ignore[misc]  # without types
    """As ``--dist loadfile``, but for tests with ranks."""

    def _split_scope(self, nodeid: str) -> Any:
        file, _, test = nodeid.partition("::")
        name = test.partition("[")[0].rpartition("::")[2]
        return RANKS if name in _with_ranks(self.config.rootpath / file) else file


@functools.cache
def _with_ranks(file: Path) -> frozenset[str]:
    return frozenset(_WITH_RANKS.findall(file.read_text()))
