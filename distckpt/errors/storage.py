"""Errors about what is on storage."""

from __future__ import annotations

from collections.abc import Sequence

from distckpt.errors.base import DistckptError, some


class StorageError(DistckptError):
    """A store refused or failed an operation on the object at ``path``."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


class AlreadyExistsError(StorageError):
    """Put-if-absent found the name taken; nothing was written."""

    def __init__(self, path: str, message: str = "exists already; nothing was written") -> None:
        super().__init__(path, message)


class BlockedError(StorageError):
    """What no store puts there is in the way of ``path``: a link, a pipe, a folder. Nothing was written, nor will be."""


class AccessDeniedError(BlockedError):
    """The store does not let this process do that to ``path``: it lacks the right, or nobody has it. Nothing was done."""


class ObjectNotFoundError(StorageError, FileNotFoundError):
    """There is no object at ``path``."""

    def __init__(self, path: str, message: str = "there is no such object") -> None:
        super().__init__(path, message)


class StorageFullError(StorageError):
    """The store has no room left for ``path``; what was written of it will be collected later."""


class StoreOutcomeUnknownError(StorageError):
    """The store answered neither yes nor no: the write to ``path`` may have happened or may still happen."""


class StoreUnsuitableError(StorageError):
    """The probe found that this store cannot keep the promises that a commit rests on."""


class DamagedError(DistckptError):
    """The bytes at ``path`` are not what was written. ``key`` names the tensor or value, if it is known."""

    def __init__(self, path: str, reason: str, key: str | None = None) -> None:
        where = f"{path}, key {key!r}" if key is not None else path
        super().__init__(f"{where}: {reason}")
        self.path, self.key, self.reason = path, key, reason


class UnsupportedFormatError(DamagedError):
    """``path`` has a format version that this release does not read; a newer distckpt may."""


class LogMissingError(DamagedError):
    """``directory`` has checkpoint ``folders`` but no log, so nobody knows which count. Nothing in it was changed."""

    def __init__(self, directory: str, folders: Sequence[str]) -> None:
        super().__init__(
            directory,
            f"it has no log, but checkpoints: {some(folders)}. They were copied here, or _log was deleted. "
            f"Nothing was changed. Run `distckpt adopt {directory}`, which checks them and writes a log for those "
            f"that are whole; or restore one by its own path, such as {directory}/{folders[-1]}",
        )
        self.directory, self.folders = directory, tuple(folders)


class StateFileError(DamagedError, ValueError):
    """The state file at ``path`` names no newest checkpoint: it is empty, say. No checkpoint is lost by that."""

    def __init__(self, path: str) -> None:
        super().__init__(
            path,
            "names no newest checkpoint (model_checkpoint_path), as if it were empty. The checkpoints are in the log, which "
            "latest_checkpoint reads: delete this file, and the next save writes it anew",
        )


class CheckpointNotFoundError(DistckptError, FileNotFoundError):
    """No committed checkpoint answers to ``path``."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path
        self.message = message


class DataElsewhereError(DistckptError):
    """The shards of a checkpoint lie in another place than the directory, and not where they were looked for."""
