"""What a manager is told: whether it makes sense, before anything is done with it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from typing import Any

from distckpt.directory.reports import Metrics, numbers_of
from distckpt.errors import CheckpointNotFoundError
from distckpt.format import names
from distckpt.format.json.report import MAX_METRICS
from distckpt.format.limits import MAX_NUMBER
from distckpt.keep import Retention, Rule
from distckpt.storage import canonical, join

logger = logging.getLogger(__name__)


def whole(value: Any, what: str) -> int:
    """The int that ``value`` equals, whatever its type."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, str | bytes) and (whole := int(value)) == value:
            return whole
    raise TypeError(f"{what} must be a whole number, not {value!r}")


def number_of(value: Any) -> int:
    """A checkpoint's number. ValueError if no checkpoint can have it."""
    number = whole(value, "checkpoint_number")
    if not 0 <= number <= MAX_NUMBER:
        raise ValueError(f"checkpoint numbers go from 0 to {MAX_NUMBER}, but this one is {number}")
    return number


def metrics_of(given: Metrics | None) -> dict[str, float]:
    """What a save is committed with: the finite ones. TypeError, ValueError for what could not be reported either."""
    metrics = numbers_of(given or {}, finite=False)
    for name in [name for name, number in metrics.items() if not math.isfinite(number)]:
        logger.warning("the metric %r is %s, and is left out of the checkpoint", name, metrics.pop(name))
    if len(metrics) > MAX_METRICS:
        raise ValueError(f"a checkpoint has at most {MAX_METRICS} metrics, and these are {len(metrics)}")
    return metrics


def retention_of(max_to_keep: int | None, hours: float | None, keep: Rule | None) -> Retention:
    """What is to be kept. ValueError for a number that means nothing, and for rules beside TensorFlow's arguments."""
    if max_to_keep is not None and max_to_keep <= 0:
        raise ValueError(f"max_to_keep must be a positive number, or None to keep all, not {max_to_keep!r}")
    if keep is None:
        return Retention(max_to_keep, hours)
    if not isinstance(keep, Rule):
        raise TypeError(f"keep must be a rule, such as LatestN(3), not {keep!r}")
    if max_to_keep != Retention().max_to_keep or hours is not None:
        raise ValueError(
            "give keep or max_to_keep and keep_checkpoint_every_n_hours, not both: LatestN and EveryHours say the like"
        )
    return Retention(None, None, keep)


def check_arguments(
    name: str,
    step_counter: Any,
    interval: int | None,
    save_timeout: float,
    buffers: int,
    on_busy: str,
) -> None:
    """ValueError, saying which, for an argument of a manager that means nothing."""
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
