"""A trainer keeps one checkpoint, and slow readers follow it that are killed, or stand still, at moments nobody has chosen.

A case is such a run: so many commits, a group that wants each, a group that wants the newest, and readers of no group. What
anybody reads is what was saved, all of it; in the group that wants each every commit is acknowledged, and counts once.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import random
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import distckpt
from distckpt.directory.groups import read_groups
from distckpt.directory.leases import Leases
from distckpt.directory.log import read_tail
from distckpt.errors import (
    CheckpointNotFoundError,
    ClaimLostError,
    LeaseLostError,
    StorageError,
    StoreOutcomeUnknownError,
)
from distckpt.storage import MemoryStore, Store, open_store
from tests.soak.attack import Broken, Outcome
from tests.soak.subject import PATIENCE, Options, Subject, number_of, stamp_of
from tests.support.crashing import Crashing, Say
from tests.support.places import PROTOCOLS, Place
from tests.support.small_runs import mount, mounting, records, until

EACH, NEWEST, ALONE, OPENED = "each", "newest", "alone", "opened"
READERS = (EACH, EACH, NEWEST, ALONE, OPENED)
"""Two workers of the group that wants each, one of the group that wants the newest, and two of no group: one that follows,
and one that opens what is there."""

Write = Callable[[str, Any], None]
"""Writes down what happened, and with what."""

ELEMENTS = 3000
LEASE_SECONDS = 1.5
LAGS = {"hold": 4, "skip": 2, "block": 8}
"""What becomes of what the group that wants each has not come to, and of how many not."""

PAUSE = 2.0
"""Seconds, at the longest, until somebody else is killed or suspended."""

HANGS = 600.0
"""Seconds without a commit, or in the end without an acknowledgement, after which a run counts as hanging."""


@dataclass
class Evaluation:
    """The attack: runs of so many ``commits``. ``protocol`` is that by which directories are reached; '' for folders here,

    "memory" for the memory of one process, in which readers are threads: one that is killed reaches the store no more.
    """

    protocol: str = ""
    commits: int = 1000
    at_once: int = 1
    _port: int = 0

    @property
    def name(self) -> str:
        """See Attack."""
        return f"{self.protocol}-evaluation".removeprefix("-")

    def prepare(self, folder: Path) -> None:
        """A server, if there must be one, for as long as this process lives."""
        if self.protocol in PROTOCOLS:
            servers = ExitStack()
            atexit.register(servers.close)
            self._port = servers.enter_context(PROTOCOLS[self.protocol].serving()).port

    def cases(self, dice: random.Random) -> Iterator[str]:
        """How many commits, what becomes of those that lag, and a seed."""
        for on_lag in itertools.cycle(LAGS):
            yield f"{self.commits} {on_lag} {dice.randrange(1 << 32)}"

    def play(self, case: str, folder: Path) -> Outcome:
        """One run, to its end."""
        text, on_lag, seed = case.split()
        commits = int(text)
        if self.protocol == "memory":
            ended = Crashing(play_in_memory, folder=str(folder), on_lag=on_lag, commits=commits, seed=seed).end()
            broken = [*map(str, ended.said), *([f"it died of signal {ended.signal}"] if ended.signal else [])]
        else:
            broken = list(played(Scene(folder, *self._place(folder)), on_lag, commits, random.Random(seed)))
        happened = happenings(folder)
        outcome = Outcome()
        for what, detail in happened:
            if what == "broken":
                broken.append(detail)
            elif what in ("killed", "suspended"):
                outcome.tried[f"a reader {what}"] += 1
            else:
                outcome.seen[what] += 1
        outcome.broken += [Broken(self.name, case, "a reader killed", f"{what}\n(in {folder})") for what in broken]
        return outcome

    def _place(self, folder: Path) -> tuple[str, Options]:
        if not self.protocol:
            return str(folder / "run"), None
        place = Place.new(PROTOCOLS[self.protocol], self._port)
        return place.url, {**place.options(), "timeout": 30, "patience": 60}


# ---- the play ----------------------------------------------------------------------------------------------------------


class Part(Protocol):
    """Somebody who takes part."""

    def kill(self) -> None:
        """It does nothing more, at once."""

    def suspend(self) -> None:
        """It does nothing until ``resume``."""

    def resume(self) -> None:
        """It goes on as if nothing had happened."""

    def join(self, seconds: float) -> bool:
        """Wait, at most so long; whether it has come to its end."""


@dataclass(frozen=True)
class Scene:
    """Where a run takes place. Who takes part is a process, and writes down in ``folder`` what happens to it."""

    folder: Path
    directory: str
    options: Options

    def train(self, commits: int) -> Part:
        """Begin to save."""
        return self._process("trainer", train, commits=commits)

    def follow(self, name: str, role: str, on_lag: str, seed: int) -> Part:
        """Begin to read."""
        return self._process(name, follow, name=name, role=role, on_lag=on_lag, seed=seed)

    def _process(self, diary: str, function: Callable[..., object], **arguments: Any) -> Part:
        where = {"directory": self.directory, "options": self.options, "diary": str(self.folder / f"{diary}.diary")}
        return _Process(function, **where, **arguments)


def played(scene: Scene, on_lag: str, commits: int, dice: random.Random) -> Iterator[str]:
    """What was wrong with a run, but for what is written down."""
    with _watch(scene.directory, EACH, on_lag, scene.options, timeout=0):
        pass  # the group is there before the first save
    write = writer(scene.folder / "attacker.diary")
    readers: dict[str, tuple[str, Part]] = {}
    names = (f"reader-{number}" for number in itertools.count())

    def start(role: str) -> None:
        name = next(names)
        readers[name] = role, scene.follow(name, role, on_lag, dice.randrange(1 << 32))

    for role in READERS:
        start(role)
    trainer = scene.train(commits)
    asleep: list[tuple[float, Part]] = []
    progress = _Progress(scene.folder / "trainer.diary")
    while not trainer.join(dice.uniform(0.0, PAUSE)):
        if progress.is_stuck():
            yield f"nothing was committed for {HANGS:.0f} s"
            trainer.kill()
        name = dice.choice(list(readers))
        role, reader = readers[name]
        if dice.random() < 0.2:
            reader.suspend()
            asleep.append((time.monotonic() + dice.uniform(0.0, 3 * LEASE_SECONDS), reader))
            write("suspended", name)
        else:
            reader.kill()
            del readers[name]
            write("killed", name)
            start(role)
        for when, sleeper in [each for each in asleep if each[0] < time.monotonic()]:
            sleeper.resume()
            asleep.remove((when, sleeper))
    for _, sleeper in asleep:
        sleeper.resume()
    end = time.monotonic() + HANGS
    for name, (role, reader) in readers.items():
        if not reader.join(max(0.0, end - time.monotonic())):
            yield f"{name} ({role}) does not come to its end"
            reader.kill()
    yield from wrong(open_store(scene.directory, scene.options), happenings(scene.folder), commits)
    yield from _wrong_later(scene, commits)


class _Progress:
    """Whether a file grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = (0, time.monotonic())

    def is_stuck(self) -> bool:
        size = self._path.stat().st_size if self._path.exists() else 0
        if size != self._seen[0]:
            self._seen = size, time.monotonic()
        return time.monotonic() > self._seen[1] + HANGS


# ---- what must be so in the end ----------------------------------------------------------------------------------------


def wrong(store: Store, happened: Sequence[tuple[str, Any]], commits: int) -> Iterator[str]:
    """What of it must not be."""
    count = Counter((what, detail) for what, detail in happened if what in ("saved", "acknowledged"))
    for number in range(1, commits + 1):
        if count["saved", number] != 1:
            yield f"{number} was saved {count['saved', number]} times"
        if count["acknowledged", number] > 1:
            yield f"{number} was acknowledged {count['acknowledged', number]} times"
    groups = read_groups(store)
    each, newest = groups[EACH], groups[NEWEST]
    skipped = each.skipped if each.on_lag == "skip" else 0
    if (each.acknowledged + skipped, each.missed, each.skipped) != (commits, 0, skipped):
        yield f"{each.acknowledged} of {commits} were acknowledged, {each.missed} missed, {each.skipped} skipped"
    for left in (*each.claims, *each.returned, *each.set_aside):
        yield f"{left.number} is left in the group: {left}"
    if newest.last_acknowledged is None or newest.last_acknowledged.number != commits:
        yield f"who wants the newest had at last {newest.last_acknowledged}, and not {commits}"


def _wrong_later(scene: Scene, commits: int) -> Iterator[str]:
    """What is wrong with what a later run finds, and leaves: nothing is held for who is dead or has had it."""
    try:
        with Subject(scene.directory, ELEMENTS, max_to_keep=1, storage_options=scene.options) as subject:
            restored = subject.restore()
            if restored != commits:
                yield f"{restored} was restored, and {commits} was saved last"
            subject.save(commits + 1).result(PATIENCE)
            time.sleep(2 * LEASE_SECONDS)
            subject.save(commits + 2).result(PATIENCE)
            # Retention follows a commit; and the group that wants each has had neither of the two.
            if not until(lambda: _needless(scene) == [commits + 1, commits + 2]):
                yield f"in the end there are {_needless(scene)}"
    except Exception:  # noqa: BLE001 - whatever it is, it is what was looked for
        yield traceback.format_exc()


def _needless(scene: Scene) -> list[int]:
    """What is kept without a lease. One of a reader of no group counts for longer than this takes, though it is dead."""
    leased = Leases(open_store(scene.directory, scene.options)).look()[0].attempts
    return [record.number for record in records(scene.directory, scene.options) if record.attempt not in leased]


# ---- what they do ------------------------------------------------------------------------------------------------------


def train(say: Say, directory: str, diary: str, commits: int, options: Options = None) -> None:
    """Save so often, and say that training is over."""
    _train(writer(Path(diary)), directory, commits, options)


def _train(write: Write, directory: str, commits: int, options: Options) -> None:
    try:
        with Subject(directory, ELEMENTS, max_to_keep=1, storage_options=options) as subject:
            for number in range(1, commits + 1):
                subject.save(number).result(HANGS)
                write("saved", number)
            subject.manager.close(final=True)
    except BaseException:  # noqa: BLE001 - it is told as what it is
        write("broken", traceback.format_exc())


def follow(
    say: Say, directory: str, diary: str, name: str, role: str, on_lag: str, seed: int, options: Options = None
) -> None:
    """Read what comes until training is over, or death comes."""
    _follow(writer(Path(diary)), directory, name, role, on_lag, random.Random(seed), options)


def _follow(
    write: Write, directory: str, name: str, role: str, on_lag: str, dice: random.Random, options: Options
) -> None:
    try:
        if role == OPENED:
            _open_and_read(write, directory, dice, options)
            return
        for checkpoint in _watch(directory, role, on_lag, options, worker=name):
            try:
                with checkpoint:
                    _dawdle(role, dice)
                    _check(checkpoint.load(), checkpoint.number)
            except (ClaimLostError, LeaseLostError):
                write("lost", checkpoint.number)
            except StoreOutcomeUnknownError:  # it stood still while it acknowledged, and others went on far
                write("unknown", checkpoint.number)
            else:
                write("acknowledged" if role == EACH else "read", checkpoint.number)
    except BaseException:  # noqa: BLE001 - it is told as what it is
        write("broken", f"{name} ({role}): {traceback.format_exc()}")


def _watch(directory: str, role: str, on_lag: str, options: Options, **more: Any) -> distckpt.Watch:
    settings: dict[str, dict[str, Any]] = {
        EACH: {"group": EACH, "mode": "all", "on_lag": on_lag, "max_backlog": LAGS[on_lag]},
        NEWEST: {"group": NEWEST, "mode": "latest"},
        ALONE: {},
    }
    every: dict[str, Any] = {"lease_seconds": LEASE_SECONDS, "backoff": 0.1, "storage_options": options}
    return distckpt.watch(directory, **every, **settings[role], **more)


def _open_and_read(write: Write, directory: str, dice: random.Random, options: Options) -> None:
    store = open_store(directory, options)
    while not read_tail(store).state.ended:
        with contextlib.suppress(CheckpointNotFoundError):  # there is none yet
            try:
                with distckpt.open(directory, options, lease=True) as reader:
                    _dawdle(OPENED, dice)
                    _check(reader.load(), reader.manifest.number)
                write("read", reader.manifest.number)
            except LeaseLostError:
                write("lost", None)
        time.sleep(dice.uniform(0.0, 0.2))


def _dawdle(role: str, dice: random.Random) -> None:
    if dice.random() < (0.005 if role == EACH else 0.05):
        time.sleep(2 * LEASE_SECONDS)
    else:
        time.sleep(dice.expovariate(200.0 if role == EACH else 4.0))


def _check(loaded: Mapping[str, Any], number: int) -> None:
    found = number_of(stamp_of(loaded["state"], loaded["large"]))
    assert found == number, f"{number} holds {found}"


# ---- what happened -----------------------------------------------------------------------------------------------------


def writer(path: Path) -> Write:
    """Writes lines at the end of a file, each whole or not at all."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(what: str, detail: Any) -> None:
        os.write(file, json.dumps([what, detail]).encode() + b"\n")

    return write


def happenings(folder: Path) -> list[tuple[str, Any]]:
    """What was written down by all, in no order."""
    found = []
    for path in folder.glob("*.diary"):
        lines = path.read_text().splitlines(keepends=True)
        found += [tuple(json.loads(line)) for line in lines if line.endswith("\n")]
    return found


# ---- processes ---------------------------------------------------------------------------------------------------------


class _Process:
    """See Part."""

    def __init__(self, function: Callable[..., object], **arguments: Any) -> None:
        self._process = Crashing(function, **arguments)

    def kill(self) -> None:
        self._process.kill()
        self.join(HANGS)

    def suspend(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def join(self, seconds: float) -> bool:
        if not self._process.has_ended(seconds):
            return False
        self._process.end()
        return True


# ---- threads, for what only one process can reach ----------------------------------------------------------------------


def play_in_memory(say: Say, folder: str, on_lag: str, commits: int, seed: str) -> None:
    """A run in this process; say what was wrong with it, but for what is written down."""
    store = MemoryStore()
    with mounting():
        scene = InMemory(Path(folder), mount(store), None, store)
        for what in played(scene, on_lag, commits, random.Random(seed)):
            say(what)


@dataclass(frozen=True)
class InMemory(Scene):
    """As a Scene, but who takes part is a thread, which is killed by cutting it off from the store."""

    store: Store

    def train(self, commits: int) -> Part:
        return _Thread(
            self.store, self.folder / "trainer.diary", lambda write, directory: _train(write, directory, commits, None)
        )

    def follow(self, name: str, role: str, on_lag: str, seed: int) -> Part:
        more = name, role, on_lag, random.Random(seed), None
        return _Thread(
            self.store, self.folder / f"{name}.diary", lambda write, directory: _follow(write, directory, *more)
        )


class _Thread:
    """See Part. ``does`` gets what writes down for it, and the URL by which it reaches the store."""

    def __init__(self, store: Store, diary: Path, does: Callable[[Write, str], None]) -> None:
        self._gate = _Gate()
        write = writer(diary)

        def write_alive(what: str, detail: Any) -> None:
            self._gate.pass_through()
            write(what, detail)

        def live() -> None:
            with contextlib.suppress(_DeadError):
                does(write_alive, mount(_Gated(store, self._gate)))

        self._thread = threading.Thread(target=live, daemon=True)
        self._thread.start()

    def kill(self) -> None:
        self._gate.is_dead = True
        self._gate.open.set()

    def suspend(self) -> None:
        self._gate.open.clear()

    def resume(self) -> None:
        self._gate.open.set()

    def join(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()


class _DeadError(StorageError):
    """Nothing is heard any more of who gets this."""


class _Gate:
    """Who wants to do anything that others see comes through here."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.is_dead = False

    def pass_through(self) -> None:
        """Wait while it is closed."""
        self.open.wait()
        if self.is_dead:
            raise _DeadError("", "killed")


class _Gated:
    """A store as one thread reaches it."""

    def __init__(self, store: Store, gate: _Gate) -> None:
        self._store = store
        self._gate = gate

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            self._gate.pass_through()
            return found(*arguments, **options)

        return call
