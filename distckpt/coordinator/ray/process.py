"""The user's process stays the user's: what Ray puts in the place of what was there is put back."""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

_Result = TypeVar("_Result")
_Action = ctypes.Array[ctypes.c_char]

_C: Any = ctypes.CDLL(None)
_ACTION_BYTES = 256
"""At least as many as a ``struct sigaction`` has anywhere. It begins with the handler's address."""

_LIBRARY = b"_raylet"
_LOGGER = "ray"
_BREAKPOINT = "PYTHONBREAKPOINT"
_lock = threading.RLock()


class _Symbol(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


@contextmanager
def process_kept() -> Iterator[None]:
    """Import Ray, or join a cluster, in this context, and the process is as it was before, whoever had made it so.

    Signal handlers, those of C too, and faulthandler; hooks; Ray's variables and PYTHONBREAKPOINT in the environment; the
    path of modules, filters of warnings, logging, and limits. May be used in any thread. Only what Ray has changed is put
    back: what another thread sets meanwhile stays.
    """
    with _lock, ExitStack() as kept:
        for keeping in _KEPT:
            kept.enter_context(keeping())
        yield


def apart(call: Callable[[], _Result]) -> _Result:
    """What ``call`` returns, which runs in a thread of its own: in the main thread Ray replaces what SIGTERM does."""
    returned: list[_Result] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            with process_kept():
                returned.append(call())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is waited for
            raised.append(error)

    thread = threading.Thread(target=run, name="distckpt-ray", daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return returned[0]


def users_environment() -> dict[str, str]:
    """The environment as the user has it, whatever Ray is told just now in another thread."""
    with _lock:
        return dict(os.environ)


# ---- signals --------------------------------------------------------------------------------------------------------


@contextmanager
def _signals_kept() -> Iterator[None]:
    """The handlers, below Python's, where Ray's library has put its own: one that reports a crash at a SIGTERM."""
    before = {number: (signal.getsignal(number), _action(number)) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, (handler, action) in before.items():
            if _is_of_ray(_action(number)):
                now = signal.getsignal(number)
                _C.sigaction(number, action if now is handler else _action_of(now), None)


def _action(number: int) -> _Action:
    """What the kernel does at a signal, as ``sigaction`` has it."""
    action = ctypes.create_string_buffer(_ACTION_BYTES)
    _C.sigaction(number, None, action)
    return action


def _is_of_ray(action: _Action) -> bool:
    found = _Symbol()
    known = _C.dladdr(ctypes.c_void_p(_address(action)), ctypes.byref(found))
    return bool(known) and _LIBRARY in os.path.basename(found.file or b"")


def _address(action: _Action) -> int:
    return int.from_bytes(action.raw[: ctypes.sizeof(ctypes.c_void_p)], sys.byteorder)


def _action_of(handler: Any) -> _Action:
    """The one behind what another thread has given to ``signal.signal`` in the meantime."""
    if callable(handler):  # all functions of Python are behind the same
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)) and not _is_of_ray(action := _action(number)):
                return action
    address = int(handler == signal.SIG_IGN).to_bytes(ctypes.sizeof(ctypes.c_void_p), sys.byteorder)
    return ctypes.create_string_buffer(address, _ACTION_BYTES)


@contextmanager
def _faults_kept() -> Iterator[None]:
    before = faulthandler.is_enabled()
    try:
        yield
    finally:
        if faulthandler.is_enabled() and not before:
            faulthandler.disable()


# ---- what Python keeps ----------------------------------------------------------------------------------------------


@contextmanager
def _hook_kept() -> Iterator[None]:
    before = sys.excepthook
    try:
        yield
    finally:
        if sys.excepthook is not before and _made_by_ray(sys.excepthook):
            sys.excepthook = before


def _made_by_ray(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("ray.")


@contextmanager
def _environment_kept() -> Iterator[None]:
    before = _own_variables()
    try:
        yield
    finally:
        for name in _own_variables().keys() - before.keys():
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


def _own_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_") or name == _BREAKPOINT}


@contextmanager
def _path_kept() -> Iterator[None]:
    """Ray brings copies of some packages, and puts them before all others."""
    before = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = [place for place in sys.path if place in before or f"{os.sep}ray{os.sep}" not in place]


@contextmanager
def _filters_kept() -> Iterator[None]:
    """Those for kinds of warnings that came with Ray go. What others add meanwhile is for kinds that were there."""
    packages = set(sys.modules)
    before = list(warnings.filters)
    try:
        yield
    finally:
        new = [each for each in warnings.filters if each not in before]
        for each in new:
            if each[2].__module__.partition(".")[0] not in packages:
                warnings.filters.remove(each)  # type: ignore[attr-defined] # a list, whatever is written of it


@contextmanager
def _logging_kept() -> Iterator[None]:
    """Ray speaks up here from warnings on, as the user's handlers have it, but not of what is no news to anybody."""
    factory = logging.getLogRecordFactory()
    before = {name: _told(logger) for name, logger in _loggers().items()}
    logger = logging.getLogger(_LOGGER)
    logger.setLevel(max(logger.level, logging.WARNING))
    for name in ("worker", "authentication.authentication_token_setup"):
        logging.getLogger(f"{_LOGGER}._private.{name}").addFilter(_is_news)
    try:
        yield
    finally:
        if logging.getLogRecordFactory() is not factory and _made_by_ray(logging.getLogRecordFactory()):
            logging.setLogRecordFactory(factory)
        for name, logger in _loggers().items():
            level, logger.propagate, logger.disabled, logger.handlers[:], logger.filters[:] = before.get(
                name, (logging.NOTSET, True, False, [], [])
            )
            logger.setLevel(level)


def _loggers() -> dict[str, logging.Logger]:
    found = logging.root.manager.loggerDict.copy()
    return {
        name: each
        for name, each in found.items()
        if isinstance(each, logging.Logger) and name.partition(".")[0] == _LOGGER
    }


def _told(logger: logging.Logger) -> tuple[int, bool, bool, list[Any], list[Any]]:
    return logger.level, logger.propagate, logger.disabled, list(logger.handlers), list(logger.filters)


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(("SIGTERM handler is not set", "Token authentication is enabled"))


@contextmanager
def _limits_kept() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        yield
    finally:
        if resource.getrlimit(resource.RLIMIT_NOFILE) != before:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


_KEPT: tuple[Callable[[], AbstractContextManager[None]], ...] = (
    _signals_kept,
    _faults_kept,
    _hook_kept,
    _environment_kept,
    _path_kept,
    _filters_kept,
    _logging_kept,
    _limits_kept,
)
"""The last is left first: faulthandler puts back the handlers that it has found, then come those that are left."""
