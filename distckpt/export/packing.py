"""Orders and recipes on their way between this program's own processes: the one place where anything is pickled.

What a user's script defines, such as the function that builds a module, is in no module that another process could
import. So it travels as Ray sends functions to its tasks, by value. Nothing that was read from storage comes here.
"""

from __future__ import annotations

from typing import Any


def pack(thing: object) -> bytes:
    """``thing`` for another process of the same user and program. TypeError for what cannot be sent."""
    try:
        data: bytes = _cloudpickle().dumps(thing)
    except Exception as error:
        raise TypeError(f"this cannot be sent to the process that makes exports: {error}") from error
    return data


def unpack(data: bytes) -> Any:
    """What ``pack`` of the parent process was given. Whatever unpickling raises, as for a module that is not here."""
    return _cloudpickle().loads(data)


def _cloudpickle() -> Any:
    from distckpt.coordinator.ray.process import process_kept

    with process_kept():
        from ray import cloudpickle
    return cloudpickle
