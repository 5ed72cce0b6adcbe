"""A script that ends without closing its managers has saved all the same."""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from typing import Protocol

logger = logging.getLogger(__name__)


class Closes(Protocol):
    """Something with work under way."""

    def close(self) -> None:
        """Finish it."""


_open: weakref.WeakSet[Closes] = weakref.WeakSet()
_lock = threading.Lock()
_registered = False
_ending = False


def close_at_exit(work: Closes) -> None:
    """Close ``work`` when the interpreter ends, if it is still open then."""
    global _registered
    with _lock:
        _open.add(work)
        if not _registered:
            # Not atexit: its hooks run when concurrent.futures takes no more work, and a save in flight needs some. This
            # is the hook that concurrent.futures itself uses; those that were registered later run earlier.
            threading._register_atexit(_close_all)  # type: ignore[attr-defined]
            # A forked child, such as a data loader's worker, has neither our threads nor any business with our saves.
            os.register_at_fork(after_in_child=_forget_all)
            _registered = True


def forget_at_exit(work: Closes) -> None:
    """``work`` has been closed."""
    with _lock:
        _open.discard(work)


def died() -> bool:
    """Whether the program ends by an error that nobody has caught, after which its managers are closed all the same."""
    return _ending and getattr(sys, "last_value", None) is not None and not hasattr(sys, "ps1")


def _forget_all() -> None:
    global _open
    _open = weakref.WeakSet()


def _close_all() -> None:
    global _ending
    _ending = True
    for work in list(_open):
        try:
            work.close()
        except Exception as error:  # nobody is left to raise it to, and the others are to be closed too
            logger.error("at the end of the program: %s", error, exc_info=error)  # noqa: TRY400 - the message comes first
