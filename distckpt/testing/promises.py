"""Whether the promises of the design held throughout a simulation.

Every check reads the whole history and returns what was broken, in words; an empty list means that the promise held.
"Newest" always means the entry with the highest number ever written: what any reader finds that lists the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from distckpt.format.json.log import CheckpointRecord, Entry
from distckpt.testing.group_promises import g10_acknowledged_once, g11_none_is_lost
from distckpt.testing.history import (
    INDEX,
    MANIFEST,
    Agreed,
    CameBack,
    Content,
    Erased,
    Filled,
    Finished,
    Happening,
    Held,
    History,
    LetGo,
    Logged,
    LostPage,
    Matched,
    Piece,
    Promised,
    ReadWhole,
    Returned,
    Whole,
    Wrote,
)


def newest_entries(happenings: Iterable[Happening]) -> Iterator[tuple[Happening, Entry | None, Entry | None]]:
    """Each happening with the newest entry before it and, if it logged a newer one, that entry."""
    newest: Entry | None = None
    for happening in happenings:
        if isinstance(happening, Logged) and happening.entry.seq > (newest.seq if newest else 0):
            yield happening, newest, happening.entry
            newest = happening.entry
        else:
            yield happening, newest, None


def g1_committed_is_whole(history: History) -> list[str]:
    """A committed checkpoint has every shard with its digest until it is retired, and every entry in the log its pages."""
    broken: list[str] = []
    objects: dict[str, dict[str, Content]] = {}
    for happening, before, logged in newest_entries(history.happenings):
        if isinstance(happening, Wrote):
            objects.setdefault(happening.attempt, {})[happening.name] = happening.content
        elif isinstance(happening, Erased):
            objects.get(happening.attempt, {}).pop(happening.name, None)
            if before is not None and happening.attempt in before.state.alive():
                broken.append(f"{happening.who} deleted {happening.name} of {happening.attempt}, which is not retired")
        elif isinstance(happening, LostPage):
            broken.append(f"{happening.who} misses page {happening.page}, to which an entry of the log refers")
        elif logged is not None:
            known = before.state.alive() if before is not None else {}
            for attempt, record in logged.state.alive().items():
                if attempt not in known:
                    broken += _holes(record, objects.get(attempt, {}))
    return broken


def _holes(record: CheckpointRecord, objects: Mapping[str, Content]) -> list[str]:
    whole, index = objects.get(MANIFEST), objects.get(INDEX)
    if not isinstance(whole, Whole) or whole != index:
        return [f"{record.attempt} was committed without manifest and index"]
    pieces = [objects.get(str(rank)) for rank in range(record.world_size)]
    if any(not isinstance(piece, Piece) for piece in pieces):
        return [f"{record.attempt} was committed without all of its shards"]
    if any(isinstance(piece, Piece) and piece.rows != whole.rows.get(piece.rank) for piece in pieces):
        return [f"{record.attempt} was committed with a shard that holds other chunks than its index says"]
    if any(isinstance(piece, Piece) and piece.chunks != whole.chunks for piece in pieces):
        return [f"{record.attempt} was committed under a plan for another structure"]
    chunks = sorted(row for rows in whole.rows.values() for row in memoryview(rows).cast("i"))
    if chunks != list(range(whole.chunks)):
        return [f"{record.attempt} was committed with chunks missing or twice"]
    return []


def g2_log_is_contiguous(history: History) -> list[str]:
    """The log is contiguous, one writer a sequence number; who writes below the newest number never writes again."""
    broken: list[str] = []
    below: dict[str, str] = {}
    for happening, before, logged in newest_entries(history.happenings):
        if not isinstance(happening, Logged):
            continue
        if logged is not None and logged.seq != (before.seq if before else 0) + 1:
            broken.append(f"entry {logged.seq} does not follow {before.seq if before else 0}")
        if happening.overwrote:
            broken.append(f"{happening.who} wrote entry {happening.entry.seq} over another")
        # The same entry again is a repeat after an answer that never came.
        if happening.heard and below.get(happening.who, happening.entry.commit_id) != happening.entry.commit_id:
            broken.append(f"{happening.who} went on after it had written below the newest number")
        # Whoever has claimed nothing yet, and finds its number taken and pruned, claims again.
        if happening.heard and logged is None and happening.entry.kind != "claim":
            below.setdefault(happening.who, happening.entry.commit_id)
    return broken


def g3_acknowledged_is_durable(history: History) -> list[str]:
    """An acknowledged save is in the log that every later reader finds, until it has retired."""
    broken: list[str] = []
    committed: set[str] = set()
    for happening, before, logged in newest_entries(history.happenings):
        if isinstance(happening, Promised) and happening.record.attempt not in committed:
            broken.append(f"{happening.who} acknowledged {happening.record.attempt}, which is not in the log")
        if logged is None:
            continue
        committed |= set(logged.state.alive())
        committed |= {record.attempt for record in logged.state.retiring if record.manifest_size}
        if before is not None:
            broken += _vanished(before, logged)
    return broken


def _vanished(before: Entry, after: Entry) -> list[str]:
    retiring = {record.attempt for record in before.state.retiring}
    kept = after.state.known()
    lost = set(before.state.alive()) - kept
    back = set(after.state.alive()) & retiring
    return [f"entry {after.seq} lost {attempt} without retiring it" for attempt in sorted(lost)] + [
        f"entry {after.seq} brought {attempt} back from retiring" for attempt in sorted(back)
    ]


def g4_nothing_is_overwritten(history: History) -> list[str]:
    """No shard, index, manifest or log entry is ever overwritten."""
    broken: list[str] = []
    for happening in history.happenings:
        if isinstance(happening, Wrote) and happening.overwrote:
            broken.append(f"{happening.name} of {happening.attempt} was written twice")
        if isinstance(happening, Logged) and happening.overwrote:
            broken.append(f"entry {happening.entry.seq} was written twice")
    return broken


def g5_epochs_only_grow(history: History) -> list[str]:
    """After epoch E+1 is logged, no entry of an epoch up to E follows, nor a save of an older run or an older save."""
    broken: list[str] = []
    owner: dict[int, str] = {}
    saves: dict[str, dict[int, tuple[int, int]]] = {}
    acknowledged: set[str] = set()
    for happening, before, logged in newest_entries(history.happenings):
        if isinstance(happening, Wrote) and isinstance(happening.content, Piece):
            piece = happening.content
            saves.setdefault(happening.attempt, {})[piece.rank] = (piece.run, piece.order)
        if logged is None or not isinstance(happening, Logged):
            continue
        if before is not None and logged.epoch < before.epoch:
            broken.append(f"entry {logged.seq} of epoch {logged.epoch} follows epoch {before.epoch}")
        if owner.setdefault(logged.epoch, happening.who) != happening.who:
            broken.append(f"{happening.who} and {owner[logged.epoch]} both wrote in epoch {logged.epoch}")
        if logged.kind == "commit" and logged.state.active:
            newest = logged.state.active[-1].attempt
            acknowledged.add(newest)
            for run, _ in saves.get(newest, {}).values():
                if run != logged.state.run:
                    broken.append(f"entry {logged.seq} commits a save of run {run} in run {logged.state.run}")
        if logged.kind in ("commit", "claim"):
            # The log does not say which save of its run a rolled forward one was, so an older one may still follow it.
            old = set(before.state.alive()) - acknowledged if before is not None else set()
            attempts = [record.attempt for record in logged.state.active if record.attempt not in old]
            broken += _older_last(logged.seq, [saves[attempt] for attempt in attempts if attempt in saves])
    return broken


def _older_last(seq: int, saves: list[dict[int, tuple[int, int]]]) -> list[str]:
    """Each rank counts its own saves: the last of them must be the latest for every rank that took part in it."""
    last = saves[-1] if saves else {}
    latest = {rank: max(save[rank] for save in saves if rank in save) for rank in last}
    return [
        f"entry {seq} makes an older save of rank {rank} the newest: {last[rank]} after {latest[rank]}"
        for rank in last
        if last[rank] < latest[rank]
    ]


def g6_readers_get_one_attempt(history: History) -> list[str]:
    """No reader returns bytes of two attempts; all ranks restore the same, and for the newest run; they fill only what all
    have matched, and hand their objects only what all have read."""
    broken: list[str] = []
    objects: dict[str, dict[str, Content]] = {}
    agreed: dict[tuple[int, str], str | None] = {}
    matched: dict[tuple[int, str, str], set[int]] = {}
    read: dict[tuple[int, str, str], set[int]] = {}
    newest_run: dict[tuple[int, str], int] = {}
    for happening, before, _ in newest_entries(history.happenings):
        if isinstance(happening, Wrote):
            objects.setdefault(happening.attempt, {})[happening.name] = happening.content
        elif isinstance(happening, Returned):
            broken += _mixed(happening, objects.get(happening.record.attempt, {}))
        elif isinstance(happening, Matched):
            matched.setdefault((happening.run, happening.round, happening.attempt), set()).add(happening.rank)
        elif isinstance(happening, Filled):
            ready = matched.get((happening.run, happening.round, happening.attempt), set())
            if len(ready) < happening.world_size:
                broken.append(f"rank {happening.rank} filled from {happening.attempt}, which only {ready} had matched")
        elif isinstance(happening, ReadWhole):
            read.setdefault((happening.run, happening.round, happening.attempt), set()).add(happening.rank)
        elif isinstance(happening, Finished):
            ready = read.get((happening.run, happening.round, happening.attempt), set())
            if len(ready) < happening.world_size:
                broken.append(f"rank {happening.rank} took over {happening.attempt}, which only {ready} had read")
            newest_run[happening.run, happening.round] = before.state.run if before is not None else 0
        elif isinstance(happening, Agreed):
            attempt = happening.record.attempt if happening.record is not None else None
            newer = newest_run.get((happening.run, happening.round), 0)
            if (happening.run, happening.round) not in agreed and newer > happening.run:
                broken.append(f"run {happening.run} has restored {attempt}, and run {newer} had begun before that")
            if agreed.setdefault((happening.run, happening.round), attempt) != attempt:
                broken.append(f"ranks of run {happening.run} restored different checkpoints in round {happening.round}")
    return broken


def _mixed(returned: Returned, written: Mapping[str, Content]) -> list[str]:
    record = returned.record
    pieces = [piece for piece in returned.shards.values() if isinstance(piece, Piece)]
    if len(pieces) != record.world_size or any(written.get(name) != piece for name, piece in returned.shards.items()):
        return [f"{returned.reader} returned shards that are not those of {record.attempt}"]
    if len({(piece.run, piece.number) for piece in pieces}) > 1 or pieces[0].number != record.number:
        return [f"{returned.reader} returned shards of different saves as {record.attempt}"]
    return []


def g7_retention_spares(history: History) -> list[str]:
    """Retention never removes the newest, a leased, a pinned or a preserved checkpoint."""
    broken: list[str] = []
    leases: dict[str, str] = {}
    for happening, before, logged in newest_entries(history.happenings):
        if isinstance(happening, Held):
            leases[happening.reader] = happening.attempt
        elif isinstance(happening, LetGo):
            leases.pop(happening.reader, None)
        elif isinstance(happening, Erased) and happening.attempt in leases.values():
            broken.append(f"{happening.who} deleted {happening.name} of {happening.attempt}, which is leased")
        elif logged is not None and before is not None:
            broken += _unspared(before, logged)
    return broken


def _unspared(before: Entry, after: Entry) -> list[str]:
    gone = set(before.state.alive()) - set(after.state.alive())
    newer = bool(set(after.state.alive()) - set(before.state.alive()))
    preserved = {record.attempt for record in before.state.preserved}
    reasons = []
    for record in before.state.alive().values():
        if record.attempt not in gone:
            continue
        if record.pinned or record.attempt in preserved:
            reasons.append(f"entry {after.seq} removed {record.attempt}, which is pinned or preserved")
        newest = record is before.state.active[-1] if before.state.active else False
        if newest and not newer:
            reasons.append(f"entry {after.seq} removed {record.attempt}, the newest, and brought no newer one")
    return reasons


def g8_next_job_comes_back(history: History) -> list[str]:
    """After all crashes the newest checkpoint loads and the next saves succeed, with no repair by hand."""
    broken: list[str] = []
    begun: Entry | None = None
    ends = 0
    for happening, before, logged in newest_entries(history.happenings):
        if logged is not None and logged.kind == "run":
            begun = logged
        if not isinstance(happening, CameBack) or before is None or begun is None:
            continue
        ends += 1
        if happening.lost:
            broken.append(happening.lost)
        elif (
            happening.saved and before.state.active[-1:] != happening.saved[-1:]
        ):  # who skips saves may have skipped all
            broken.append(f"{happening.saved[-1:]} was saved last, but the log lists {before.state.active[-1:]}")
        newest = begun.state.newest()
        if happening.restored != newest:
            broken.append(f"{happening.restored} was restored, but the newest was {newest}")
    return broken if ends == 1 else [*broken, "the simulation did not come to its end"]


PROMISES: dict[str, Callable[[History], list[str]]] = {
    "G1": g1_committed_is_whole,
    "G2": g2_log_is_contiguous,
    "G3": g3_acknowledged_is_durable,
    "G4": g4_nothing_is_overwritten,
    "G5": g5_epochs_only_grow,
    "G6": g6_readers_get_one_attempt,
    "G7": g7_retention_spares,
    "G8": g8_next_job_comes_back,
    "G10": g10_acknowledged_once,
    "G11": g11_none_is_lost,
}


def broken_promises(history: History) -> list[str]:
    """Every breach of every promise, each with the promise's name and the seed that shows it again."""
    return [f"{name} (seed {history.seed}): {breach}" for name, check in PROMISES.items() for breach in check(history)]
