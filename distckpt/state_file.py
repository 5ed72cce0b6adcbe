"""The ``checkpoint`` text file: TensorFlow's CheckpointState, for people and for tools that know that format.

The file is derived from the log. Nothing in distckpt takes it for the truth.
"""

from __future__ import annotations

import logging
import math
import os
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_encoding, text_format
from google.protobuf.message import Message

from distckpt.errors import DamagedError, ObjectNotFoundError, StateFileError
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.storage import PathLike, open_store

logger = logging.getLogger(__name__)

MAX_STATE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """TensorFlow's CheckpointState: the newest checkpoint, and all of them in save order, oldest first.

    Timestamps are epoch seconds. Of the paths the last is ``model_checkpoint_path``; they may be relative to the
    directory that the state file is in. An empty ``model_checkpoint_path`` means that there is no checkpoint. What was
    given as another sequence becomes a list, which is what TensorFlow's users compare with.
    """

    model_checkpoint_path: str
    all_model_checkpoint_paths: Sequence[str] = ()
    all_model_checkpoint_timestamps: Sequence[float] = ()
    last_preserved_timestamp: float = 0.0

    def __post_init__(self) -> None:
        for name in ("all_model_checkpoint_paths", "all_model_checkpoint_timestamps"):
            object.__setattr__(self, name, list(getattr(self, name)))


def render(state: CheckpointState) -> str:
    """The text of a state file, byte for byte as TensorFlow writes it: one ``key: value`` a line.

    ValueError if it is too long for any reader. Written by hand: protobuf takes 50 ms for 3,000 checkpoints.
    """
    paths = b"".join(map(line_of_path, state.all_model_checkpoint_paths))
    times = b"".join(map(line_of_time, state.all_model_checkpoint_timestamps))
    return encoded(state.model_checkpoint_path, paths, times, state.last_preserved_timestamp).decode()


def encoded(newest: str, path_lines: bytes, time_lines: bytes, last_preserved: float) -> bytes:
    """A state file whose lines in the middle are these. ValueError if it is too long for any reader."""
    last = float(last_preserved)
    head = f'model_checkpoint_path: "{_escaped(newest)}"\n' if newest else ""
    foot = f"last_preserved_timestamp: {last}\n" if last or math.copysign(1.0, last) < 0 else ""
    data = b"".join((head.encode(), path_lines, time_lines, foot.encode()))
    if len(data) > MAX_STATE_BYTES:
        raise ValueError(f"a state file of {len(data)} bytes is too long to be read: {MAX_STATE_BYTES} are the most")
    return data


def line_of_path(path: str) -> bytes:
    """The line for one of all paths."""
    return f'all_model_checkpoint_paths: "{_escaped(path)}"\n'.encode()


def line_of_time(time: float) -> bytes:
    """The line for one of all timestamps."""
    return f"all_model_checkpoint_timestamps: {float(time)}\n".encode()


def parse(text: str) -> CheckpointState:
    """The state that a text says, fields in any order. ValueError if it is not the text of a CheckpointState."""
    message: Any = _MESSAGE()
    try:
        text_format.Merge(text, message)
    except text_format.ParseError as error:
        raise ValueError(f"not a checkpoint state: {error}") from error
    return CheckpointState(
        model_checkpoint_path=message.model_checkpoint_path,
        all_model_checkpoint_paths=message.all_model_checkpoint_paths,
        all_model_checkpoint_timestamps=message.all_model_checkpoint_timestamps,
        last_preserved_timestamp=message.last_preserved_timestamp,
    )


def from_log_state(state: State) -> CheckpointState:
    """What the log knows, as a CheckpointState with paths like ``ckpt-42``, relative to the directory.

    Preserved checkpoints are left out, as TensorFlow leaves them out, unless there is no other.
    """
    records = listed(state)
    paths = [names.checkpoint_folder(record.name, record.number) for record in records]
    return CheckpointState(
        model_checkpoint_path=paths[-1] if paths else "",
        all_model_checkpoint_paths=paths,
        all_model_checkpoint_timestamps=[record.time for record in records],
        last_preserved_timestamp=state.last_preserved_timestamp,
    )


def listed(state: State) -> tuple[CheckpointRecord, ...]:
    """The checkpoints that a state file has, in its order: all active ones that are in no page of the log."""
    return state.active or state.newest_first()[:1]


def generate_checkpoint_state_proto(
    save_dir: PathLike,
    model_checkpoint_path: PathLike,
    all_model_checkpoint_paths: Sequence[PathLike] | None = None,
    all_model_checkpoint_timestamps: Sequence[float] | None = None,
    last_preserved_timestamp: float | None = None,
) -> CheckpointState:
    """A CheckpointState whose last path is ``model_checkpoint_path``, which is added at the end if it is not there.

    With a relative ``save_dir``, relative paths are rewritten to be relative to it. URLs below a ``save_dir`` that is
    a URL become relative too; all other URLs, and absolute paths, stay as they are. (TensorFlow takes URLs for relative
    paths, and changes the caller's list.) Timestamps are epoch seconds; ValueError unless there are as many as paths in
    the result (or none).
    """
    directory, newest = os.fspath(save_dir), os.fspath(model_checkpoint_path)
    paths = [os.fspath(path) for path in all_model_checkpoint_paths or ()]
    if not paths or paths[-1] != newest:
        if paths:
            logger.info("%s is not the last of all checkpoint paths: it is added to them", newest)
        paths.append(newest)
    timestamps = [float(timestamp) for timestamp in all_model_checkpoint_timestamps or ()]
    if timestamps and len(timestamps) != len(paths):
        raise ValueError(f"{len(timestamps)} timestamps for {len(paths)} checkpoint paths: {timestamps} and {paths}")
    return CheckpointState(
        model_checkpoint_path=_relative(newest, directory),
        all_model_checkpoint_paths=[_relative(path, directory) for path in paths],
        all_model_checkpoint_timestamps=timestamps,
        last_preserved_timestamp=0.0 if last_preserved_timestamp is None else float(last_preserved_timestamp),
    )


def update_checkpoint_state(
    save_dir: PathLike,
    model_checkpoint_path: PathLike,
    all_model_checkpoint_paths: Sequence[PathLike] | None = None,
    latest_filename: str | None = None,
    all_model_checkpoint_timestamps: Sequence[float] | None = None,
    last_preserved_timestamp: float | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Write the state file of ``save_dir``, whole: a reader sees the old text or the new one, never a part.

    Arguments are those of ``generate_checkpoint_state_proto``. The checkpoints need not exist, and this commits none:
    managers follow the log. RuntimeError if ``model_checkpoint_path`` is the state file itself, however it is spelled;
    ValueError if it is empty, if ``latest_filename`` has a path in it, or for more than a reader would take.
    """
    directory = os.fspath(save_dir)
    filename = _filename(latest_filename)
    if not os.fspath(model_checkpoint_path):
        raise ValueError("model_checkpoint_path is empty: nobody could read a state file that names no checkpoint")
    state = generate_checkpoint_state_proto(
        directory,
        model_checkpoint_path,
        all_model_checkpoint_paths,
        all_model_checkpoint_timestamps,
        last_preserved_timestamp,
    )
    if _canonical(_joined(state.model_checkpoint_path, directory)) == _canonical(_joined(filename, directory)):
        raise RuntimeError(f"{model_checkpoint_path} is the checkpoint state file itself: save to another path")
    open_store(directory, storage_options).replace(filename, render(state).encode())


def get_checkpoint_state(
    checkpoint_dir: PathLike,
    latest_filename: str | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> CheckpointState | None:
    """What the state file of ``checkpoint_dir`` says, with relative paths joined to that directory.

    None if there is no such file. DamagedError if there is one that is not the text of a checkpoint state, StorageError
    if it cannot be read (TensorFlow returns None for both, and raises UnicodeDecodeError for what is not UTF-8).
    StateFileError, a ValueError, if it can, but names no newest checkpoint (an empty file, for one); ValueError if
    ``latest_filename`` has a path in it. Whether the checkpoints exist is not looked at.
    """
    directory = os.fspath(checkpoint_dir)
    filename = _filename(latest_filename)
    state = _read(directory, filename, storage_options)
    if state is None:
        return None
    if not state.model_checkpoint_path:
        raise StateFileError(_joined(filename, directory))
    return CheckpointState(
        model_checkpoint_path=_joined(state.model_checkpoint_path, directory),
        all_model_checkpoint_paths=[_joined(path, directory) for path in state.all_model_checkpoint_paths],
        all_model_checkpoint_timestamps=state.all_model_checkpoint_timestamps,
        last_preserved_timestamp=state.last_preserved_timestamp,
    )


def _read(directory: str, filename: str, storage_options: Mapping[str, Any] | None) -> CheckpointState | None:
    try:
        data = open_store(directory, storage_options).read(filename, MAX_STATE_BYTES)
    except ObjectNotFoundError:
        return None
    try:
        return parse(data.decode())
    except ValueError as error:
        raise DamagedError(_joined(filename, directory), str(error)) from error


def _filename(latest_filename: str | None) -> str:
    filename = names.STATE_FILE if latest_filename is None else latest_filename
    if not filename or "/" in filename or filename in (".", ".."):
        raise ValueError(f"latest_filename must be the name of a file, without a path: {filename!r}")
    return filename


def _is_url(path: str) -> bool:
    return "://" in path


def _is_absolute(path: str) -> bool:
    return _is_url(path) or os.path.isabs(path)


def _relative(path: str, directory: str) -> str:
    """``path`` as the state file of ``directory`` records it."""
    if _is_url(directory):
        return path.removeprefix(directory.rstrip("/") + "/")
    if _is_absolute(directory) or _is_absolute(path):
        return path
    return os.path.relpath(path, directory)


def _joined(path: str, directory: str) -> str:
    """``path``, if it is relative, below ``directory``; neither is normalized."""
    return path if _is_absolute(path) else posixpath.join(directory, path)


def _canonical(path: str) -> str:
    return path.rstrip("/") if _is_url(path) else os.path.abspath(path)


def _escaped(path: str) -> str:
    return path if _PLAIN.fullmatch(path) else text_encoding.CEscape(path, as_utf8=True)


def _message_type() -> type[Message]:
    """CheckpointState with TensorFlow's field names and numbers, in a pool of its own: TensorFlow may be loaded too."""
    file = descriptor_pb2.FileDescriptorProto(
        name="distckpt/checkpoint_state.proto", package="distckpt", syntax="proto3"
    )
    fields = file.message_type.add(name="CheckpointState").field
    kind = descriptor_pb2.FieldDescriptorProto
    for number, (name, label, scalar) in enumerate(
        (
            ("model_checkpoint_path", kind.LABEL_OPTIONAL, kind.TYPE_STRING),
            ("all_model_checkpoint_paths", kind.LABEL_REPEATED, kind.TYPE_STRING),
            ("all_model_checkpoint_timestamps", kind.LABEL_REPEATED, kind.TYPE_DOUBLE),
            ("last_preserved_timestamp", kind.LABEL_OPTIONAL, kind.TYPE_DOUBLE),
        ),
        start=1,
    ):
        fields.add(name=name, number=number, label=label, type=scalar)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    message_type: type[Message] = message_factory.GetMessageClass(
        pool.FindMessageTypeByName("distckpt.CheckpointState")
    )
    return message_type


_MESSAGE = _message_type()
_PLAIN = re.compile(r"[A-Za-z0-9._/-]*")
