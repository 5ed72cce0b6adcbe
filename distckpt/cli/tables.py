"""Tables that fit: on a terminal their least important columns go first, in a pipe nothing is cut or folded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

GAP = 2
"""Columns of the terminal between two of a table."""

LEAST_FOLDED = 20
"""A column that may fold is not made narrower than this: sooner another one goes."""


@dataclass(frozen=True, slots=True)
class Twig:
    """A line of a tree: ``guide`` leads to ``label``, and ``below`` to what follows of it where it must be folded."""

    guide: str
    below: str
    label: str

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        guide, label = cell_len(self.guide), cell_len(self.label)
        return Measurement(guide + min(label, LEAST_FOLDED), guide + label)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.max_width - cell_len(self.guide)
        if cell_len(self.label) > room:
            room = max(1, options.max_width - max(cell_len(self.guide), cell_len(self.below)))
        first, *rest = folded(self.label, room)
        yield Text("\n".join([self.guide + first, *(self.below + part for part in rest)]))


Cell: TypeAlias = str | Text | Twig


def folded(label: str, room: int) -> list[str]:
    """A name cut into pieces of at most ``room`` characters, after a separator where there is one."""
    pieces = []
    while len(label) > room:
        at = max(label.rfind(mark, 0, room) for mark in "./_-@ ") + 1
        at = at if at > room // 3 else room
        pieces.append(label[:at])
        label = label[at:]
    return [*pieces, label]


@dataclass(slots=True)
class Table:
    """Rows below ``columns``; those named in ``right`` are aligned to the right, those in ``folds`` fold where they must.

    Where it is too wide, columns go in the order of ``least``, then from the last; the first one stays and folds at the
    worst. A line below says which have gone.
    """

    columns: Sequence[str]
    right: Sequence[str] = ()
    least: Sequence[str] = ()
    folds: Sequence[str] = ()
    rows: list[tuple[tuple[Cell, ...], str]] = field(default_factory=list)

    def add_row(self, *cells: Cell, style: str = "") -> None:
        """One more, with a cell for each column."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append((cells, style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        sizes = {name: self._sizes(at, console, options) for at, name in enumerate(self.columns)}
        kept = self._kept({name: least for name, (least, _) in sizes.items()}, options.max_width)
        yield self._made(kept, {name: least for name, (least, _) in sizes.items()})
        gone = [name or "what came of it" for name in self.columns if name not in kept]
        if gone:
            yield Text(f"too narrow for: {', '.join(gone)}", style="dim")

    def _kept(self, least: dict[str, int], room: int) -> list[str]:
        kept = list(self.columns)
        going = [
            *(name for name in self.least if name in kept),
            *(name for name in reversed(self.columns[1:]) if name not in self.least),
        ]
        for name in going:
            if sum(least[each] for each in kept) + GAP * (len(kept) - 1) <= room:
                break
            kept.remove(name)
        return kept

    def _sizes(self, at: int, console: Console, options: ConsoleOptions) -> tuple[int, int]:
        """How wide a column is at least, and if nothing folds."""
        name = self.columns[at]
        measured = [_measured(cells[at], console, options) for cells, _ in self.rows]
        most = max([cell_len(name), *(size for _, size in measured)])
        if name in self.folds:
            return min(most, max(LEAST_FOLDED, cell_len(name))), most
        return max([cell_len(name), *(size for size, _ in measured)]), most

    def _made(self, kept: Sequence[str], least: dict[str, int]) -> RichTable:
        made = RichTable(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            show_edge=False,
            padding=(0, 1),
            collapse_padding=True,
            header_style="bold",
        )
        for name in kept:
            may_fold = name == self.columns[0] or name in self.folds
            made.add_column(
                name,
                justify="right" if name in self.right else "left",
                overflow="fold",
                no_wrap=not may_fold,
                min_width=least[name] if len(kept) > 1 else None,
            )
        places = [at for at, name in enumerate(self.columns) if name in kept]
        for cells, style in self.rows:
            made.add_row(*(cells[at] for at in places), style=style or None)
        return made


def _measured(cell: Cell, console: Console, options: ConsoleOptions) -> tuple[int, int]:
    if isinstance(cell, Twig):
        size = cell.__rich_measure__(console, options)
        return size.minimum, size.maximum
    width = max(map(cell_len, (cell.plain if isinstance(cell, Text) else cell).split("\n")))
    return width, width
