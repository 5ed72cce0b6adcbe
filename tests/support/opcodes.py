"""Tracing that hears of every instruction, on each Python that we run on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def settrace(trace: Callable[..., Any]) -> None:
    """As ``sys.settrace``, for a function that sets ``f_trace_opcodes`` in the frames that it is told of.

    From Python 3.12 on such events are only made if a frame has asked for them before tracing begins: without this,
    the first function that is traced in a process would have none.
    """
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)
