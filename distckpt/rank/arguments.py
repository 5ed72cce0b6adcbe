"""What a manager is told: whether it makes sense, before anything is done with it."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from distckpt.errors import CheckpointNotFoundError
from distckpt.format import names
from distckpt.storage import canonical, join


def whole(value: Any, what: str) -> int:
    """The int that ``value`` equals, whatever its type."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, str | bytes) and (whole := int(value)) == value:
            return whole
    raise TypeError(f"{what} must be a whole number, not {value!r}")


def check_arguments(
    max_to_keep: int | None,
    name: str,
    step_counter: Any,
    interval: int | None,
    save_timeout: float,
    buffers: int,
    on_busy: str,
) -> None:
    """ValueError, saying which, for an argument of a manager that means nothing."""
    if max_to_keep is not None and max_to_keep <= 0:
        raise ValueError(f"max_to_keep must be a positive number, or None to keep all, not {max_to_keep!r}")
    if not names.is_name(name):
        raise ValueError(f"{name!r} cannot name checkpoints: letters, digits, '.', '_' and '-' only")
    if interval is not None and step_counter is None:
        raise ValueError("checkpoint_interval needs a step_counter that says which step it is")
    if save_timeout <= 0:
        raise ValueError(f"save_timeout must be a positive number of seconds, not {save_timeout!r}")
    if buffers < 1:
        raise ValueError(f"buffers must be at least 1, not {buffers!r}")
    if on_busy not in ("wait", "skip"):
        raise ValueError(f'on_busy must be "wait" or "skip", not {on_busy!r}')


def check_allowed(failures: int) -> None:
    """ValueError if so many saves cannot be allowed to fail in a row."""
    if failures < 0:
        raise ValueError(f"save_failures_allowed must not be negative, as {failures!r} is")


def wanted_folder(which: int | str | os.PathLike[str] | None, directory: str) -> int | str | None:
    """A number, the folder that a path means, or None for the newest. CheckpointNotFoundError for a path elsewhere."""
    if which is None:
        return None
    if not isinstance(which, str | os.PathLike):
        return whole(which, "a checkpoint's number")
    path = canonical(which)
    if path == directory:
        return None
    folder = path.rpartition("/")[2]
    if names.parse_checkpoint(folder) is None or path != join(directory, folder):
        raise CheckpointNotFoundError(path, f"not a checkpoint of {directory}")
    return folder
