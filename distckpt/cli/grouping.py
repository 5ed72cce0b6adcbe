"""``distckpt groups``: who of which group has what, how far they lag, and what failed; and putting that back."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import click
import msgspec

from distckpt.cli import options, text
from distckpt.cli.tables import Table
from distckpt.directory import sharing
from distckpt.directory.groups import Group, group_names
from distckpt.directory.strays import read_run
from distckpt.errors import CheckpointNotFoundError, DamagedError, GroupNotFoundError
from distckpt.format import names
from distckpt.format.json.group import Claim, GroupEntry, GroupState, Item, SetAside
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.storage import Store, open_store
from distckpt.terminal.sizes import counted

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Standing:
    """A group, and what of the run is waiting for it: those that it has not seen, of them the newest if it wants no other."""

    name: str
    entry: GroupEntry
    unseen: tuple[CheckpointRecord, ...]

    @property
    def state(self) -> GroupState:
        """What it knows."""
        return self.entry.state


class _Groups(click.Group):
    """``groups DIR`` shows them, ``groups retry ...`` is the one command beside it."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands:
            return "show", self.commands["show"], args
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["retry"]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # An option before DIR is that of the command that shows them.
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["show", *args]
        return super().parse_args(ctx, args)


@click.group("groups", cls=_Groups, subcommand_metavar="DIR | retry DIR GROUP NUMBER")
def groups() -> None:
    """Show the groups of workers that follow a directory: who has what, what waits, what was given up on and why.

    `distckpt groups retry DIR GROUP NUMBER` puts back what was set aside. A directory with the name of a command is ./retry.
    """


@groups.command("show", hidden=True)
@click.argument("directory", metavar="DIR")
@options.as_json
@options.storage_options
def show_groups(directory: str, as_json: bool, storage_options: Mapping[str, Any]) -> None:
    """See groups."""
    store = open_store(directory, storage_options)
    found = list(standings(store))
    if not found and read_run(store).entry is None:
        raise CheckpointNotFoundError(store.url, "no run has saved here")
    if as_json:
        text.print_json({"directory": store.url, "groups": [_as_json(store, one) for one in found]})
    elif not found:
        text.console().print(f"{store.url}: no group follows this directory", soft_wrap=True)
    else:
        _print(store, found)


@groups.command("retry")
@click.argument("directory", metavar="DIR")
@click.argument("group", metavar="GROUP")
@click.argument("numbers", metavar="NUMBER...", nargs=-1, type=int, required=True)
@options.storage_options
def retry(directory: str, group: str, numbers: tuple[int, ...], storage_options: Mapping[str, Any]) -> None:
    """Have the workers of GROUP try again what was set aside: the checkpoints of these numbers."""
    store = open_store(directory, storage_options)
    this = Group(store, group, "distckpt groups retry")
    state = this.read()
    if state is None:
        raise GroupNotFoundError(store.url, group)
    alive = read_run(store).state.alive()
    found = [item for item in state.set_aside if item.number in numbers]
    unknown = sorted(set(numbers) - {item.number for item in found})
    if unknown:
        raise ValueError(f"{store.url}: the group {group!r} has not set aside {', '.join(map(str, unknown))}")
    there = [item for item in found if item.attempt in alive]
    # A number that was saved again may be there twice: what matters is whether one of its attempts is.
    gone = sorted({_folder(item) for item in found} - {_folder(item) for item in there})
    if gone:
        raise ValueError(f"{store.url}: {', '.join(gone)} cannot be tried again: retention has deleted it")
    this.change("retry", lambda now: sharing.retried(now, {item.attempt for item in there}))
    text.console().print(f"{', '.join(map(_folder, there))} will be tried again", soft_wrap=True)


def standings(store: Store) -> Iterator[Standing]:
    """Every group there is, in the order of their names."""
    entries = [(name, Group(store, name, "").newest()) for name in group_names(store)]
    log = _log_of(store, [entry.state for _, entry in entries if entry is not None]) if entries else State()
    for name, entry in entries:
        if entry is not None:
            state = sharing.moved(entry.state, log)
            coming = sharing.unseen(state, log)
            unseen = coming[-1:] if state.mode == "latest" else coming
            yield Standing(name, msgspec.structs.replace(entry, state=state), tuple(unseen))


def _log_of(store: Store, groups: list[GroupState]) -> State:
    """The state of the log with everything at hand that these may want."""
    tail = read_run(store)
    return tail.having(lambda page: any(sharing.may_want(group, tail.head, page) for group in groups))


def in_words(store: Store) -> dict[str, list[str]]:
    """What groups have to do with a checkpoint, in words, by its attempt: ``eval: at worker-3``. Those that can be read."""
    said: dict[str, list[str]] = {}
    try:
        found = list(standings(store))
    except DamagedError as error:
        logger.warning("left out is what groups have to do with checkpoints, for it cannot be read: %s", error)
        return said
    for one in found:
        stands: list[tuple[Item, str]] = [(claim, f"at {claim.worker}") for claim in one.state.claims]
        stands += [(item, "given back") for item in one.state.returned]
        stands += [(item, "set aside") for item in one.state.set_aside]
        stands += [(sharing.item_of(record), "waiting") for record in one.unseen]
        for item, how in stands:
            said.setdefault(item.attempt, []).append(f"{one.name}: {how}")
    return said


# ---- for people ---------------------------------------------------------------------------------------------------


def _print(store: Store, found: list[Standing]) -> None:
    numbers = ["done", "working", "waiting", "given back", "set aside", "skipped", "missed"]
    table = Table(
        ["group", "mode", *numbers, "newest done", "last sign"],
        right=numbers,
        least=["missed", "skipped", "last sign", "mode", "given back", "newest done", "done", "working", "set aside"],
    )
    for one in found:
        state = one.state
        counts = [state.acknowledged, len(state.claims), len(one.unseen), len(state.returned)]
        counts += [len(state.set_aside) + state.forgotten, state.skipped, state.missed]
        newest = "" if state.last_acknowledged is None else _folder(state.last_acknowledged)
        table.add_row(one.name, state.mode, *map(str, counts), newest, text.local_time(one.entry.time))
    text.console().print(table)
    if any(True for one in found for _ in one.state.items()):
        text.console().print()
        text.console().print(_details(store, found))


def _details(store: Store, found: list[Standing]) -> Table:
    table = Table(
        ["checkpoint", "group", "how it stands", "deliveries", "error"],
        right=["deliveries"],
        least=["deliveries", "error", "group"],
        folds=["error"],
    )
    for one in found:
        for claim in one.state.claims:
            lease = "" if _has_lease(store, claim) else ", whose lease is gone"
            table.add_row(_folder(claim), one.name, f"at {claim.worker}{lease}", str(claim.delivery), "")
        for back in one.state.returned:
            failed = f", {counted(back.failures, 'failure')}" if back.failures else ""
            table.add_row(_folder(back), one.name, f"given back{failed}", str(back.deliveries), back.error)
        for aside in one.state.set_aside:
            table.add_row(_folder(aside), one.name, _since(aside), str(aside.deliveries), aside.error)
        if one.state.forgotten:
            table.add_row(f"{one.state.forgotten} before", one.name, "set aside", "", "")
    return table


def _since(aside: SetAside) -> str:
    return f"set aside {text.local_time(aside.time)}"


def _has_lease(store: Store, claim: Claim) -> bool:
    return store.stat(names.lease_path(claim.lease)) is not None


def _folder(item: Item) -> str:
    return names.checkpoint_folder(item.name, item.number)


# ---- for programs -------------------------------------------------------------------------------------------------


def _as_json(store: Store, one: Standing) -> dict[str, Any]:
    state: dict[str, Any] = msgspec.to_builtins(one.state)
    for told, claim in zip(state["claims"], one.state.claims, strict=True):
        told["has_lease"] = _has_lease(store, claim)
    return {"group": one.name, "unseen": len(one.unseen), "last_sign": one.entry.time, "by": one.entry.by, **state}
