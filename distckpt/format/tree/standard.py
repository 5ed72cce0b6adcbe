"""Values of the standard library that have a typed form of their own, each written and read side by side."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from datetime import time as time_of_day
from decimal import Decimal
from fractions import Fraction
from random import Random
from typing import Any, TypeVar

from distckpt.format.tree.classes import (
    BASES,
    Refused,
    Unresolved,
    find_class,
    form_of,
    made_of_plain,
    named,
    names_of,
    plain_of,
    type_name,
)
from distckpt.format.tree.containers import is_container
from distckpt.format.tree.content import HERE, Read, Write, as_text, bytes_in, int_in, list_in, text_in

# ---- numbers ------------------------------------------------------------------------------------------------------

_DECIMAL = re.compile(r"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)(E[+-][0-9]{1,19})?|-?Infinity|-?s?NaN[0-9]*")


def _write_decimal(value: Decimal, write: Write) -> Any:
    return {"$Decimal": str(value)}


def _read_decimal(content: Any, read: Read) -> Decimal:
    found = Decimal(text_in(content, _DECIMAL))
    if str(found) != content:
        raise ValueError("a decimal number that is written otherwise")
    return found


def _write_fraction(value: Fraction, write: Write) -> Any:
    return {"$Fraction": [write(value.numerator, "numerator"), write(value.denominator, "denominator")]}


def _read_fraction(content: Any, read: Read) -> Fraction:
    above, below = _ints([read(part) for part in list_in(content, 2)])
    found = Fraction(above, below)
    if found.denominator != below:
        raise ValueError("a fraction that is not in lowest terms")
    return found


def _write_range(value: range, write: Write) -> Any:
    return {"$range": [write(part, "range") for part in (value.start, value.stop, value.step)]}


def _read_range(content: Any, read: Read) -> range:
    return range(*_ints([read(part) for part in list_in(content, 3)]))


def _write_slice(value: slice, write: Write) -> Any:
    return {"$slice": [write(value.start, "start"), write(value.stop, "stop"), write(value.step, "step")]}


def _read_slice(content: Any, read: Read) -> slice:
    return slice(*[read(part) for part in list_in(content, 3)])


def _write_bytearray(value: bytearray, write: Write) -> Any:
    return {"$bytearray": as_text(bytes(value))}


def _read_bytearray(content: Any, read: Read) -> bytearray:
    return bytearray(bytes_in(content))


def _ints(parts: list[Any]) -> list[int]:
    if any(type(part) is not int for part in parts):
        raise ValueError("ints are expected")
    return parts


# ---- times --------------------------------------------------------------------------------------------------------

_Calendar = TypeVar("_Calendar", date, datetime, time_of_day)
_Clock = TypeVar("_Clock", datetime, time_of_day)


def _write_date(value: date, write: Write) -> Any:
    return {"$date": value.isoformat()}


def _read_date(content: Any, read: Read) -> date:
    return _as_written(date.fromisoformat(text_in(content)), content)


def _write_clock(value: datetime | time_of_day, write: Write) -> Any:
    zone = value.tzinfo
    if zone is not None and type(zone) is not timezone:
        raise Refused(
            f"has a time zone of type {type_name(type(zone))}: only None and datetime.timezone can be stored. "
            "Convert it with astimezone(timezone.utc)"
        )
    tag = "$datetime" if type(value) is datetime else "$time"
    return {tag: [value.replace(tzinfo=None).isoformat(), write(zone, "tzinfo"), value.fold]}


def _read_datetime(content: Any, read: Read) -> datetime:
    return _read_clock(datetime.fromisoformat, content, read)


def _read_time(content: Any, read: Read) -> time_of_day:
    return _read_clock(time_of_day.fromisoformat, content, read)


def _read_clock(parse: Callable[[str], _Clock], content: Any, read: Read) -> _Clock:
    text, zone, fold = list_in(content, 3)
    found = _as_written(parse(text_in(text)), text)
    zone = read(zone)
    if found.tzinfo is not None or (zone is not None and type(zone) is not timezone):
        raise ValueError("a time without a zone, and its zone, are expected")
    return found.replace(tzinfo=zone, fold=int_in(fold, 0, 1))


def _as_written(found: _Calendar, text: str) -> _Calendar:
    if found.isoformat() != text:
        raise ValueError("a date or time that is written otherwise")
    return found


def _write_timedelta(value: timedelta, write: Write) -> Any:
    return {"$timedelta": [value.days, value.seconds, value.microseconds]}


def _read_timedelta(content: Any, read: Read) -> timedelta:
    days, seconds, microseconds = list_in(content, 3)
    return timedelta(
        int_in(days, -999_999_999, 999_999_999), int_in(seconds, 0, 86_399), int_in(microseconds, 0, 999_999)
    )


def _write_timezone(value: timezone, write: Write) -> Any:
    # tzname cannot tell a name that was given from one that was made; these are the arguments it was made with.
    offset, *name = value.__getinitargs__()  # type: ignore[attr-defined]
    return {"$timezone": [write(offset, "offset"), *name]}


def _read_timezone(content: Any, read: Read) -> timezone:
    offset, *name = list_in(content)
    offset = read(offset)
    if type(offset) is not timedelta or len(name) > 1:
        raise ValueError("a timedelta and perhaps a name are expected")
    return timezone(offset, *map(text_in, name))


# ---- paths --------------------------------------------------------------------------------------------------------

_PATHS = {"PosixPath": "Path", "WindowsPath": "Path"} | {"PurePosixPath": "PurePosixPath"} | {"PureWindowsPath": "PureWindowsPath"}  # fmt: skip


def _write_path(value: Any) -> Any:
    return {"$path": [_PATHS[names_of(type(value))[1]], str(value)]}


def _is_path(kind: type) -> bool:
    # pathlib is not imported here: it opens files, and only storage/ may. Whoever has a path has imported it.
    name = names_of(kind)[1]
    return name in _PATHS and find_class("pathlib", name) is kind


def _read_path(content: Any, read: Read) -> Any:
    name, text = map(text_in, list_in(content, 2))
    if name not in _PATHS.values():
        raise ValueError("an unknown kind of path")
    kind: Any = find_class("pathlib", name)
    return Unresolved("path", f"pathlib:{name}", text) if kind is None else kind(text)


# ---- generators of random numbers ---------------------------------------------------------------------------------

_RANDOM_WORDS = 625


def _write_random(value: Random, write: Write) -> Any:
    version, words, gauss = value.getstate()
    return {"$Random": [version, list(words), write(gauss, "gauss")]}


def _read_random(content: Any, read: Read) -> Random:
    version, words, gauss = list_in(content, 3)
    *_, position = list_in(words, _RANDOM_WORDS)
    gauss = read(gauss)
    if type(gauss) not in (float, type(None)):
        raise ValueError("a float or null is expected")
    state = (int_in(version, 3, 3), tuple(int_in(word, 0, (1 << 32) - 1) for word in words), gauss)
    int_in(position, 0, _RANDOM_WORDS - 1)
    found = Random(0)
    found.setstate(state)
    return found


# ---- subclasses of plain values -----------------------------------------------------------------------------------


def _write_subclass(value: Any, write: Write) -> Any:
    plain = plain_of(value)
    return {"$subclass": [*named(type(value)), write(plain, HERE)]}


def _read_subclass(content: Any, read: Read) -> Any:
    module, name, plain = list_in(content, 3)
    plain = read(plain)
    if type(plain) not in BASES:
        raise ValueError("a plain value is expected")
    return made_of_plain(text_in(module), text_in(name), plain)


# ---- all of them --------------------------------------------------------------------------------------------------

_WRITERS: dict[type, Callable[[Any, Write], Any]] = {
    Decimal: _write_decimal,
    Fraction: _write_fraction,
    range: _write_range,
    slice: _write_slice,
    bytearray: _write_bytearray,
    date: _write_date,
    datetime: _write_clock,
    time_of_day: _write_clock,
    timedelta: _write_timedelta,
    timezone: _write_timezone,
    Random: _write_random,
}

READERS: dict[str, Callable[[Any, Read], Any]] = {
    "$Decimal": _read_decimal,
    "$Fraction": _read_fraction,
    "$range": _read_range,
    "$slice": _read_slice,
    "$bytearray": _read_bytearray,
    "$date": _read_date,
    "$datetime": _read_datetime,
    "$time": _read_time,
    "$timedelta": _read_timedelta,
    "$timezone": _read_timezone,
    "$Random": _read_random,
    "$path": _read_path,
    "$subclass": _read_subclass,
}


def write_standard(value: Any, write: Write) -> Any:
    """The typed form of ``value``; None if it is not one of these."""
    kind = type(value)
    writer = _WRITERS.get(kind)
    if writer is not None:
        return writer(value, write)
    if form_of(kind) == "subclass" and not is_container(value):
        return _write_subclass(value, write)
    return _write_path(value) if _is_path(kind) else None
