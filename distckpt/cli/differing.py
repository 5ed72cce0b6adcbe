"""``distckpt diff``: what differs between two checkpoints. Reads indexes, and of tensors what their CRCs leave open."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import click

from distckpt import reader
from distckpt.cli import options, text
from distckpt.cli.tables import Table
from distckpt.directory.compare import Comparison, Layout, compare
from distckpt.directory.locate import locate, read_index
from distckpt.errors import DamagedError
from distckpt.format.arrow.dtypes import VALUE
from distckpt.reader import CheckpointReader
from distckpt.terminal.bar import bar
from distckpt.terminal.sizes import counted

MOST_KEYS = 50
"""Of each kind that are shown to people; --json shows all."""


class _Trouble(click.ClickException):
    exit_code = 2


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two tensors are apart: norms of the difference and of the first, the largest element, how many differ."""

    norm: float
    of: float
    largest: float
    elements: int


@dataclass(frozen=True, slots=True)
class Found:
    """All that differs; with the ``values`` of tensors compared, if that was asked for. Keys that were read are in ``read``."""

    what: Comparison
    same: tuple[str, ...]
    differing: tuple[str, ...]
    read: tuple[str, ...]
    values: Mapping[str, Difference]

    @property
    def is_same(self) -> bool:
        """Whether there is no difference at all."""
        return not (self.what.removed or self.what.added or self.what.changed or self.differing)


@click.command("diff")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--values", is_flag=True, help="Read what differs, and show norms of the differences.")
@options.as_json
@options.storage_options
@click.pass_context
def compare_checkpoints(
    ctx: click.Context, first: str, second: str, values: bool, as_json: bool, storage_options: Mapping[str, Any]
) -> None:
    """Show what changed from checkpoint A to B: keys, shapes, types, and which tensors and values are other ones.

    Bytes are compared by the CRCs that were made when they were saved, without reading them; where the two are cut in ways
    that cannot be compared so, by reading. Exit status 0 if they are the same, 1 if they differ, 2 for trouble.
    """
    try:
        paths, found = _found(first, second, values, storage_options)
    except DamagedError as error:
        raise _Trouble(str(error)) from error
    if as_json:
        text.print_json({"first": paths[0], "second": paths[1], **_as_json(found)})
    else:
        _print(paths, found)
    if not found.is_same:
        ctx.exit(1)


def _found(first: str, second: str, values: bool, storage_options: Mapping[str, Any]) -> tuple[tuple[str, str], Found]:
    one, other = locate(first, storage_options), locate(second, storage_options)
    index, index_of_other = read_index(one), read_index(other)
    what = compare(index, index_of_other)
    tensors = {key for key in what.differing if index.layout(key)[0] != VALUE} if values else set()
    unlike: dict[str, bool] = {}
    apart: dict[str, Difference] = {}
    wanted = [key for key in index.names if key in tensors or key in what.unknown]
    if wanted:
        sizes = {key: index.info(key).nbytes for key in wanted}
        total, done = sum(sizes.values()), 0
        with (
            reader.open(one.path, storage_options) as mine,
            reader.open(other.path, storage_options) as its,
            bar("comparing") as update,
        ):
            for key in wanted:
                unlike[key], difference = _read(mine, its, key, values)
                if difference is not None:
                    apart[key] = difference
                done += sizes[key]
                update(done, total)
    differing = tuple(key for key in index.names if unlike.get(key, False) or key in what.differing)
    same = (*what.same, *(key for key in what.unknown if not unlike[key]))
    return (one.path, other.path), Found(what, same, differing, tuple(wanted), apart)


def _read(one: CheckpointReader, other: CheckpointReader, key: str, values: bool) -> tuple[bool, Difference | None]:
    """Whether the bytes of a tensor differ, and how far it is apart. One at a time is in memory, twice."""
    import torch  # who compares no tensors does not wait for it

    mine, its = one.tensor(key), other.tensor(key)
    if torch.equal(mine.reshape(-1).view(torch.uint8), its.reshape(-1).view(torch.uint8)):
        return False, None
    if not values:
        return True, None
    kind = torch.complex128 if mine.is_complex() else torch.float64
    before, after = mine.to(kind), its.to(kind)
    apart = after - before
    unlike = (before != after) & ~(before.isnan() & after.isnan())
    largest = float(apart.abs().max()) if apart.numel() else 0.0
    norm, of = (float(torch.linalg.vector_norm(each)) for each in (apart, before))
    return True, Difference(norm, of, largest, int(unlike.sum()))


# ---- for people and programs ----------------------------------------------------------------------------------------


def _as_json(found: Found) -> dict[str, Any]:
    return {
        "same": found.is_same,
        "removed": found.what.removed,
        "added": found.what.added,
        "changed": {key: asdict(layout) for key, layout in found.what.changed.items()},
        "differing": found.differing,
        "equal": found.same,
        "read": found.read,
        "values": {key: _numbers(difference) for key, difference in found.values.items()},
    }


def _numbers(difference: Difference) -> dict[str, float | None]:
    return {name: number if math.isfinite(number) else None for name, number in asdict(difference).items()}


def _print(paths: tuple[str, str], found: Found) -> None:
    console = text.console()
    for sign, path in zip("-+", paths, strict=True):
        console.print(f"{sign} {path}", style="bold", soft_wrap=True)
    lines = list(_lines(found))
    for line in lines:
        console.print(line, soft_wrap=True)
    if found.values:
        console.print()
        console.print(_norms(found))
    console.print(
        f"{counted(len(found.same), 'key')} the same, {len(found.differing):,} with other values", soft_wrap=True
    )


def _lines(found: Found) -> Iterator[str]:
    yield from _some("-", found.what.removed)
    yield from _some("+", found.what.added)
    yield from _some("!", [f"{key}  {_layout(layout)}" for key, layout in found.what.changed.items()])
    yield from _some("~", [key for key in found.differing if key not in found.values])


def _some(sign: str, told: tuple[str, ...] | list[str]) -> Iterator[str]:
    for one in told[:MOST_KEYS]:
        yield f"{sign} {''.join(character if character.isprintable() else '?' for character in one)}"
    if len(told) > MOST_KEYS:
        yield f"{sign} and {len(told) - MOST_KEYS:,} more; --json shows them all"


def _layout(layout: Layout) -> str:
    sides = zip(layout.dtypes, layout.shapes, strict=True)
    return " -> ".join("value" if dtype == VALUE else f"{dtype} {list(shape)}" for dtype, shape in sides)


def _norms(found: Found) -> Table:
    table = Table(
        ["key", "norm of difference", "relative", "largest", "elements"],
        right=["norm of difference", "relative", "largest", "elements"],
        least=["elements", "largest", "norm of difference"],
    )
    largest = sorted(found.values.items(), key=lambda one: -one[1].norm)
    for key, one in largest[:MOST_KEYS]:
        relative = f"{one.norm / one.of:.3g}" if one.of else ""
        table.add_row(key, f"{one.norm:.3g}", relative, f"{one.largest:.3g}", f"{one.elements:,}")
    return table
