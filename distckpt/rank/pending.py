"""PendingSave: what a save leaves in the caller's hands."""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from distckpt.format.json.log import CheckpointRecord
from distckpt.transfer.staging import StagedCopy


class PendingSave:
    """A save under way. ``str()`` and ``os.fspath()`` give the path that it will have once it is committed."""

    def __init__(self, path: str, number: int) -> None:
        self.path = path
        self.number = number
        self._future: Future[CheckpointRecord] = Future()
        self._staged: StagedCopy | None = None
        self._collected = False

    def result(self, timeout: float | None = None) -> str:
        """The path, once the checkpoint is committed: durable and visible to everyone.

        Raises what went wrong, naming ranks: a SaveError, StorageError, CoordinatorError ...; TimeoutError if it is
        not decided within ``timeout`` seconds, which does not count as having been told of a failure.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self.path

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What went wrong, or None once the checkpoint is committed. TimeoutError as in ``result``."""
        try:
            error = self._future.exception(timeout)
        except FutureTimeoutError:
            raise TimeoutError(f"{self.path} is not decided after {timeout:g} s") from None
        self._collected = True
        return error

    def done(self) -> bool:
        """Whether the save has been committed or has failed."""
        return self._future.done()

    def wait_staged(self) -> None:
        """Return once the state has been copied: from then on training may change it. On CPU that is at once."""
        if self._staged is not None:
            self._staged.wait()

    def _settle(self) -> None:
        self._future.exception()

    def _uncollected_error(self) -> BaseException | None:
        if self._collected or not self._future.done():
            return None
        return self.exception()

    def __str__(self) -> str:
        return self.path

    def __fspath__(self) -> str:
        return self.path

    def __repr__(self) -> str:
        state = "under way" if not self.done() else "failed" if self._future.exception() else "committed"
        return f"PendingSave({self.path!r}, {state})"
