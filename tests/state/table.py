"""The table of what a checkpoint carries and what it refuses, made from the zoo.

``python -m tests.state.table`` prints it; with ``--write`` it goes into its page, between the two marks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "what-is-saved.md"
FIRST = "<!-- From here on made from the zoo, by: python -m tests.state.table --write -->\n\n"
LAST = "\n<!-- The end of what is made. -->\n"

HEAD = "| kind | what happens to it | shown by |\n|---|---|---|"

TITLES = {
    "optimizers": "Optimizers",
    "schedulers": "Learning rate schedulers",
    "modules": "Modules",
    "wrappers": "Wrapping optimizers, averages, objects of your own",
    "packages": "Other packages",
    "tensors": "Tensors and arrays",
    "values": "Plain values and containers",
    "checkpoint": "The checkpoint itself",
    "ranks": "On many ranks",
}


def rows() -> dict[str, dict[str, list[tuple[str, bool]]]]:
    """By section and kind: the entries that show it, and whether each is carried."""
    from tests.state.zoo import ENTRIES
    from tests.state.zoo.ranks import RANK_ENTRIES

    found: dict[str, dict[str, list[tuple[str, bool]]]] = {}
    for entry in ENTRIES.values():
        name = entry.name.split("/")[1]
        found.setdefault(entry.section, {}).setdefault(entry.kind, []).append((name, entry.refused is None))
    for one in RANK_ENTRIES.values():
        found.setdefault("ranks", {}).setdefault(one.kind, []).append((one.name, not one.refused))
    return found


def table() -> str:
    """The whole of it as markdown."""
    lines = []
    sections = rows()
    for section, title in TITLES.items():
        lines += [f"### {title}", "", HEAD]
        for kind, shown in sections.get(section, {}).items():
            lines.append(f"| {kind} | {_outcome(shown)} | {_names(name for name, _ in shown)} |")
        lines.append("")
    entries = [one for kinds in sections.values() for shown in kinds.values() for one in shown]
    refused = sum(1 for _, carried in entries if not carried)
    kinds = sum(len(one) for one in sections.values())
    lines.append(f"{len(entries)} entries of {kinds} kinds; {len(entries) - refused} carried, {refused} refused.")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with this ``text``, and the table that there is now in it."""
    before, _, rest = text.partition(FIRST)
    _, last, after = rest.partition(LAST)
    if not last:
        raise ValueError(f"{PAGE.name} has lost the marks between which the table stands: {FIRST!r}, {LAST!r}")
    return before + FIRST + table() + LAST + after


def _outcome(shown: list[tuple[str, bool]]) -> str:
    outcomes = {carried for _, carried in shown}
    if len(outcomes) > 1:
        raise ValueError(f"one kind is carried and refused; make it two: {shown}")
    return "carried" if outcomes == {True} else "refused by `prepare` and the first `save`, by key"


def _names(names: Iterable[str], most: int = 6) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(f"`{name}`" for name in listed[:most]) + more


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(PAGE.read_text()))
    else:
        sys.stdout.write(table())
