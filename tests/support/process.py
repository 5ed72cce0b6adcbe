"""What belongs to a process and its user, so that a test can say that it is as it was."""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import gc
import logging
import os
import random
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

C = ctypes.CDLL(None)
STATUS = ("Umask", "SigBlk", "SigIgn", "NoNewPrivs", "CapEff")
OF_THE_C_LIBRARY = 0x04000000
LOGGERS = ("", "ray", "ray.rllib", "ray._private.worker", "user", "distckpt")


def adorn() -> None:
    """Make the process a user's own: nothing here is as Python leaves it."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGXCPU):
        signal.signal(number, _handler)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.excepthook = _hook
    threading.excepthook = _hook
    sys.breakpointhook = _hook
    os.environ.update(PYTHONBREAKPOINT="user.stop", RAY_worker_niceness="0", USERS="own")
    os.umask(0o027)
    random.seed(7)
    logging.basicConfig(level=logging.INFO, force=True)
    logging.getLogger("user").setLevel(logging.DEBUG)
    warnings.filterwarnings("ignore", "of the user")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1000, soft), hard))


def _handler(number: int, frame: object) -> None:
    pass


def _hook(*args: object, **kwargs: object) -> None:
    pass


def belongings() -> dict[str, Any]:
    """All that a library might take and never give back, as text."""
    return {
        "what C does at signals": {number: _action(number) for number in sorted(signal.valid_signals())},
        "what Python does at signals": {number: signal.getsignal(number) for number in sorted(signal.valid_signals())},
        "faulthandler": faulthandler.is_enabled(),
        "hooks": [sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook, sys.breakpointhook],
        "environment": dict(os.environ),
        "working folder": os.getcwd(),
        "path": list(sys.path),
        "finders": [sys.meta_path.copy(), sys.path_hooks.copy()],
        "arguments": [sys.executable, *sys.argv],
        "filters of warnings": {repr(each): "there" for each in warnings.filters if not _is_of_sympy(each[2])},
        "loggers": {name: _told(logging.getLogger(name)) for name in LOGGERS},
        "logging": [logging.getLogRecordFactory(), logging.getLoggerClass(), logging.lastResort, logging.root.manager.disable],
        "random numbers": hash(random.getstate()),
        "random numbers of NumPy": hash(str(np.random.get_state())),
        "random numbers of torch": hash(torch.get_rng_state().numpy().tobytes()),
        "torch": [torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()],
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT")},
        "loops": type(asyncio.get_event_loop_policy()),
        "interpreter": [sys.getrecursionlimit(), sys.getswitchinterval(), gc.isenabled(), gc.get_threshold(), sys.gettrace()],
        "kernel": [line for line in Path("/proc/self/status").read_text().splitlines() if line.split(":")[0] in STATUS],
        "group and session": [os.getpgrp(), os.getsid(0), os.getpriority(os.PRIO_PROCESS, 0)],
        "name": Path("/proc/self/comm").read_text(),
    }  # fmt: skip


def _action(number: int) -> str:
    """The handler's address and its flags, as the kernel of a 64-bit Linux has them, but for one that the C library sets."""
    action = ctypes.create_string_buffer(256)
    C.sigaction(number, None, action)
    flags = int.from_bytes(action.raw[136:140], sys.byteorder) & ~OF_THE_C_LIBRARY
    return f"{action.raw[:8].hex()} {flags:x}"


def _is_of_sympy(category: Any) -> bool:
    """Torch loads that when it first needs it."""
    return bool(category.__module__.startswith("sympy"))


def _told(logger: logging.Logger) -> list[Any]:
    return [logger.level, logger.propagate, logger.disabled, logger.handlers.copy(), logger.filters.copy()]


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What is not as it was, and how."""
    found = []
    for name in {**before, **after}:
        was, now = before.get(name), after.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            found += [f"{name}, {change}" for change in changes(was, now)]
        elif repr(was) != repr(now):
            found.append(f"{name}: {was!r} became {now!r}")
    return found
