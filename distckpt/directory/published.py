"""The ``checkpoint`` file of a directory as the log has it; a file that somebody else wrote there is not lost."""

from __future__ import annotations

import contextlib
import hashlib
import logging

from distckpt.directory.log import read_entry, sequence_numbers
from distckpt.errors import AlreadyExistsError, DamagedError, ObjectNotFoundError
from distckpt.format import names
from distckpt.format.json.following import FollowingText
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.state_file import (
    MAX_STATE_BYTES,
    encoded,
    from_log_state,
    line_of_path,
    line_of_time,
    listed,
    render,
)
from distckpt.storage import Store, join

logger = logging.getLogger(__name__)


class PublishedState:
    """Writes the state file of one directory, again and again. Not safe to use from several threads.

    What it finds there is replaced if an entry of the log says the same: then it was written here. Anything else is
    TensorFlow's, or a person's: it is kept under another name first, with a warning.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._written: bytes | None = None
        self._paths = FollowingText[CheckpointRecord](lambda record: line_of_path(_folder(record)))
        self._times = FollowingText[CheckpointRecord](lambda record: line_of_time(record.time))

    def publish(self, state: State) -> None:
        """Have the state file say what ``state`` says.

        StorageError if the store fails; DamagedError if there is one that is not ours, and too long to be kept.
        """
        data = self._content(state)
        found = self._found()
        if found != data:
            if found not in (None, b"", self._written) and not self._is_ours(found):
                self._keep(found)
            self._store.replace(names.STATE_FILE, data)
        self._written = data

    def _content(self, state: State) -> bytes:
        records = listed(state)
        self._paths.follow(records)
        self._times.follow(records)
        newest = _folder(records[-1]) if records else ""
        return encoded(newest, self._paths.text, self._times.text, state.last_preserved_timestamp)

    def _found(self) -> bytes | None:
        with contextlib.suppress(ObjectNotFoundError):
            return self._store.read(names.STATE_FILE, MAX_STATE_BYTES)
        return None

    def _is_ours(self, found: bytes) -> bool:
        """Whether it was written here, perhaps by another coordinator and some commits ago."""
        for seq in reversed(sequence_numbers(self._store)):
            with contextlib.suppress(DamagedError, ObjectNotFoundError):
                if render(from_log_state(read_entry(self._store, seq).state)).encode() == found:
                    return True
        return False

    def _keep(self, found: bytes) -> None:
        name = names.kept_state_file(hashlib.sha256(found).hexdigest())
        with contextlib.suppress(AlreadyExistsError):  # the very same, found here before
            self._store.put_if_absent(name, found)
        logger.warning(
            "%s says what no entry of the log here says: it is TensorFlow's, a person's, or of a log that is gone; it is kept "
            "as %s, where TensorFlow finds it with latest_filename=%r, and makes room for the state of this directory's "
            "checkpoints",
            join(self._store.url, names.STATE_FILE),
            join(self._store.url, name),
            name,
        )


def _folder(record: CheckpointRecord) -> str:
    return names.checkpoint_folder(record.name, record.number)
