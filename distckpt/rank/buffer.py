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
        self._order = 0

    @property
    def order(self) -> int:
        """The place, among all saves of this rank, of the one that used it last; 0 if none did."""
        return self._order

    def is_free(self) -> bool:
        """Whether no save uses it."""
        return self._pending is None or self._pending.done()

    def lend(self, pending: PendingSave, order: int) -> None:
        """It belongs to ``pending``, the rank's save of that ``order``, until that has ended."""
        self._pending, self._order = pending, order

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
