"""Reports: what evaluations found out about an attempt, an object each, until the coordinator folds them into the log."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import SupportsFloat, TypeAlias

from distckpt.directory.log import read_tail
from distckpt.errors import AlreadyExistsError, DamagedError, ObjectNotFoundError, StoreOutcomeUnknownError
from distckpt.errors.base import some
from distckpt.format import names
from distckpt.format.json.report import (
    FORMAT,
    MAX_METRIC_NAME,
    MAX_METRICS,
    MAX_REPORT_BYTES,
    Report,
    Reported,
    is_metric,
    merged_metrics,
)
from distckpt.format.json.sealed import seal, unseal
from distckpt.storage import MOST_NAMES, Store, at_most

Metrics: TypeAlias = Mapping[str, SupportsFloat]
"""Numbers by name: anything that float takes."""

logger = logging.getLogger(__name__)

TRIES = 3


@dataclass(frozen=True, slots=True)
class Reports:
    """What was ``found``, in the order in which the store got it; ``unclear``: attempts with one that cannot be read."""

    found: tuple[Reported, ...]
    unclear: frozenset[str]


def write_report(store: Store, attempt: str, metrics: Metrics, reporter: str = "") -> Report:
    """Say what was found out about ``attempt``; durable on return, and seen by whoever lists from then on.

    It is of that attempt alone, also if its number is saved again. Of a metric that is reported twice the later report
    counts. ``reporter`` says who reports, for people. Raises TypeError for what is no number, ValueError for one that is
    not finite, a name of more than 128 or of unprintable characters, and more than 64 metrics, with those that the attempt
    has already; StorageError if it could not be written: then it may or may not be there, and to report again does no harm.
    """
    report = Report(FORMAT, attempt, numbers_of(metrics), time.time(), reporter)
    known = reported_metrics(store, attempt, quietly=True)
    new = report.metrics.keys() - known.keys()
    if known and new and len(known) + len(new) > MAX_METRICS:
        raise ValueError(
            f"the checkpoint has {len(known)} metrics, and {MAX_METRICS} is the most: {some(sorted(new), most=8)} cannot be "
            "added. Report fewer, or under names that are there"
        )
    _put(store, names.report_path(attempt, uuid.uuid4().hex), seal(report))
    return report


def numbers_of(metrics: Metrics, finite: bool = True) -> dict[str, float]:
    """Each metric as a number. Raises what ``write_report`` raises, but for how many there may be."""
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics are reported as a dict, such as {{'loss': 1.2}}, and this is {metrics!r:.200}")
    return {_checked_name(name): _number(name, value, finite) for name, value in metrics.items()}


def _checked_name(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"a metric's name is a str, and this is {name!r}")
    if not is_metric(name):
        raise ValueError(f"{name!r} is not the name of a metric: 1 to {MAX_METRIC_NAME} printable characters")
    return name


def _number(name: str, value: SupportsFloat, finite: bool) -> float:
    """Asked for once: what it says may come from a device, and change."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"metric {name!r} must be one number, not {value!r:.200}: {error}") from error
    if finite and not math.isfinite(number):
        raise ValueError(f"metric {name!r} is {number}: only finite numbers can be reported")
    return number


def _put(store: Store, path: str, data: bytes) -> None:
    """Nobody else has this name, so what is there is ours, whatever the store has answered."""
    for left in reversed(range(TRIES)):
        try:
            store.put_if_absent(path, data)
        except AlreadyExistsError:
            return
        except StoreOutcomeUnknownError:
            if not left:
                raise
        else:
            return


def read_reports(
    store: Store,
    attempt: str | None = None,
    told: set[str] | None = None,
    most: int = MOST_NAMES,
    quietly: bool = False,
) -> Reports:
    """What is reported and not folded into the log yet: the ``most`` oldest.

    Who shows them reads the log after them: what is folded meanwhile is in one of the two. ``attempt`` is whose, None for
    all. One that is damaged, or of a later release, is left out, with a warning unless ``quietly``; once, if ``told`` is kept
    by the caller. What the store does not answer raises StorageError.
    """
    listed = at_most(MOST_NAMES, store.list(names.REPORTS), f"{store.url}/{names.REPORTS}")
    ours = [info for info in listed if (named := names.reported_attempt(info.path)) and attempt in (None, named)]
    found: list[tuple[float, Reported]] = []
    unclear: set[str] = set()
    for info in sorted(ours, key=lambda info: (info.modified, info.path))[:most]:
        try:
            found.append((info.modified, Reported(info.path, _read(store, info.path))))
        except ObjectNotFoundError:
            continue  # folded since the listing, or its checkpoint has gone
        except DamagedError as error:
            unclear.add(names.reported_attempt(info.path) or "")
            if not quietly:
                _tell(info.path, error, told)
    # What came within one tick of the store's clock: as its reporters say.
    found.sort(key=lambda one: (one[0], one[1].report.time, one[1].path))
    return Reports(tuple(reported for _, reported in found), frozenset(unclear))


def _read(store: Store, path: str) -> Report:
    report = unseal(store.read(path, MAX_REPORT_BYTES), Report, path, MAX_REPORT_BYTES)
    if report.attempt != names.reported_attempt(path):
        raise DamagedError(path, f"it reports on attempt {report.attempt}")
    return report


def _tell(path: str, error: DamagedError, told: set[str] | None) -> None:
    if told is None or path not in told:
        logger.warning("a report cannot be read, and can be deleted by hand: %s", error)
    if told is not None:
        told.add(path)


def reported_metrics(store: Store, attempt: str, quietly: bool = False) -> dict[str, float]:
    """All metrics of an attempt, those that are in the log already and those that are not. Empty if there are none."""
    reports = read_reports(store, attempt, quietly=quietly).found
    record = read_tail(store).having_attempt(attempt).find(attempt)
    known = dict(record.metrics) if record is not None else {}
    return merged_metrics(known, (one.report for one in reports))
