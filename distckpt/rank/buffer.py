"""Memory for one save at a time."""

from __future__ import annotations

from concurrent.futures import wait

from distckpt.rank.layout import Layout
from distckpt.rank.pending import PendingSave, progress_of
from distckpt.state.collector import Holding
from distckpt.transfer.staging import Staging


class Buffer:
    """A rank's part of one save in memory, and the save that uses it. Made when it is needed, kept for the next save."""

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._staging: Staging | None = None
        self._pending: PendingSave | None = None

    @property
    def number(self) -> int:
        """Of the checkpoint that used it last; -1 if none did."""
        return self._pending.number if self._pending is not None else -1

    def is_free(self) -> bool:
        """Whether no save uses it."""
        return self._pending is None or self._pending.done()

    def lend(self, pending: PendingSave) -> None:
        """It belongs to ``pending`` until that has ended."""
        self._pending = pending

    def settle(self, timeout: float | None = None) -> bool:
        """Return once it is free, however its save ended, or after so many seconds; whether it is."""
        if self._pending is not None:
            wait([progress_of(self._pending).ended], timeout)
        return self.is_free()

    def fit(self, layout: Layout, holding: Holding) -> Staging:
        """The memory, made anew if the layout is another one or a value has outgrown its slot. Only when it is free."""
        values = layout.values(holding)
        if self._staging is not None and self._layout == layout and self._staging.fits(values):
            return self._staging
        self.close()
        staging = self._staging = Staging(layout.chunks(holding), values)
        self._layout = layout
        return staging

    def close(self) -> None:
        """Let the memory go. Closing twice does no harm."""
        if self._staging is not None:
            self._staging.close()
            self._staging = None
