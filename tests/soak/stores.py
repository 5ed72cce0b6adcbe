"""Every call that a run makes to a store goes wrong, in every way, whatever the store is made of.

A case is a call and a fault, on one kind of store. It may refuse with errors of distckpt's; it must not lose or change
what was acknowledged, nor keep the next run from anything.
"""

from __future__ import annotations

import atexit
import faulthandler
import itertools
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec

from distckpt.storage import MemoryStore, Store, open_store
from distckpt.testing.faulty import Fault, FaultyStore, faults_of
from tests.soak.attack import Broken, Outcome
from tests.soak.disturbed import Told, be_brief, begin, drive, left
from tests.soak.subject import Options, impatience
from tests.support.calls import FaultAtPlace
from tests.support.calls import Place as At
from tests.support.crashing import Crashing, Say
from tests.support.honest import Honest
from tests.support.places import PROTOCOLS, Place
from tests.support.small_runs import mount, mounting

ELEMENTS = 3000
HANGS = 400.0
GONE_SECONDS = 0.5
"""How long a save waits where nothing works any more."""

COSTS_NOTHING = (Fault.DELAYED, Fault.SHORT, Fault.FLIPPED)
LOOKS = ("read", "open", "read_into", "stat", "list", "folders")


@dataclass
class Stores:
    """The attack, on each of ``kinds``. ``counted`` are the calls of a run, by kind of store."""

    kinds: tuple[str, ...] = ("local", "memory", "gs", "s3", "generic")
    name: str = "stores"
    at_once: int = 4
    counted: dict[str, list[At]] = field(default_factory=dict)
    _begin: Path = Path()
    _ports: dict[str, int] = field(default_factory=dict)

    def prepare(self, folder: Path) -> None:
        """Servers, for as long as this process lives; and runs in which nothing fails, which count the calls."""
        servers = ExitStack()
        atexit.register(servers.close)
        self._begin = folder / "run"
        begin(self._begin, ELEMENTS)
        for kind in self.kinds:
            if kind in PROTOCOLS:
                self._ports[kind] = servers.enter_context(PROTOCOLS[kind].serving()).port
            (folder / kind).mkdir()
            said = self._suffer(folder / kind, kind).end(HANGS).said
            assert said[-1:] == ["end"], said
            self.counted[kind] = [At(operation, path, nth) for operation, path, nth in said[0]]

    def cases(self, dice: random.Random) -> Iterator[str]:
        """Every fault at every call: of each operation on each kind of store in turn."""
        piles: dict[tuple[str, str], list[str]] = {}
        for kind, calls in self.counted.items():
            for call in calls:
                for fault in (*faults_of(call.operation), Fault.NO_MEMORY):
                    case = f"{kind} {call.operation} {call.path or '/'} {call.nth} {fault.name}"
                    piles.setdefault((kind, call.operation), []).append(case)
        shuffled = [dice.sample(pile, len(pile)) for pile in piles.values()]
        for in_turn in itertools.zip_longest(*shuffled):
            yield from (case for case in in_turn if case is not None)

    def play(self, case: str, folder: Path) -> Outcome:
        """A run in which this call goes wrong, in a process of its own, which looks at what is left of it too."""
        kind, operation, *_, fault = case.split(" ")
        tried = f"{kind}, {operation}: {fault.lower().replace('_', ' ')}"
        with (folder / "stderr").open("w") as stderr:
            ended = self._suffer(folder, kind, case, stderr.fileno()).end(HANGS)
        said = [pair for pair in ended.said if pair != "end"]
        broken = [text for what, text in said if what == "broken"]
        if ended.said[-1:] != ["end"]:
            does = "hangs" if ended.late else "dies"
            broken.append(f"a run {does} after {ended.said[-1:]}: {(folder / 'stderr').read_text()[-3000:]}")
        outcome = Outcome(
            Counter({tried: 1}), [Broken(self.name, case, tried, f"{one}\n(in {folder})") for one in broken]
        )
        outcome.seen["calls that did not come"] = sum(what == "missed" for what, _ in said)
        outcome.seen["saves refused"] = sum(what == "refused" for what, _ in said)
        return outcome

    def _suffer(self, folder: Path, kind: str, case: str = "", stderr: int = 2) -> Crashing:
        told: dict[str, Any] = {"kind": kind, "port": self._ports.get(kind, 0), "case": case}
        return Crashing(suffer, stderr=stderr, folder=str(folder), found=str(self._begin), **told)


# ---- in the process ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A directory of one kind that has what the run finds: its store, and how the next run gets to it."""

    store: Store
    url: str
    options: Options = None
    hidden: Callable[[], Iterable[str]] = tuple


def _local(found: Path, folder: Path, port: int) -> Held:
    shutil.copytree(found, folder / "run")
    return Held(open_store(folder / "run"), str(folder / "run"))


def _memory(found: Path, folder: Path, port: int) -> Held:
    store = MemoryStore.named("attacked")
    for file in filter(Path.is_file, found.rglob("*")):
        store.put_if_absent(file.relative_to(found).as_posix(), file.read_bytes())
    return Held(store, store.url)


def _generic(found: Path, folder: Path, port: int) -> Held:
    fsspec.register_implementation("honest", Honest)
    shutil.copytree(found, folder / "base" / "run")
    options = {"base": str(folder / "base"), "patience": 5}
    return Held(open_store("honest://run", options), "honest://run", options)


def _in_bucket(scheme: str) -> Callable[[Path, Path, int], Held]:
    def held(found: Path, folder: Path, port: int) -> Held:
        place = Place.new(PROTOCOLS[scheme], port)
        place.fill(found)
        return Held(open_store(place.url, place.options()), place.url, place.options(), place.left_hidden)

    return held


KINDS: Mapping[str, Callable[[Path, Path, int], Held]] = {
    "local": _local,
    "memory": _memory,
    "gs": _in_bucket("gs"),
    "s3": _in_bucket("s3"),
    "generic": _generic,
}


def suffer(say: Say, kind: str, port: int, found: str, folder: str, case: str) -> None:
    """Play a case, and say pairs: "missed", "refused", "broken" and what; "end" is the last word.

    With no case say which calls there are.
    """
    faulthandler.dump_traceback_later(HANGS - 5)
    be_brief()
    held = KINDS[kind](Path(found), Path(folder), port)
    script = FaultAtPlace()
    fault = None
    if case:
        _, operation, path, nth, name = case.split(" ")
        fault = Fault[name]
        script = FaultAtPlace(At(operation, "" if path == "/" else path, int(nth)), fault)  # type: ignore[arg-type]
    with impatience(), mounting():
        store = FaultyStore(held.store, script)
        told = drive(mount(store), ELEMENTS, None, *([GONE_SECONDS] if fault is Fault.GONE else []))
        store.heal()
        if fault is None:
            assert told.is_undisturbed, told
            say([[call.operation, call.path, call.nth] for call in script.passed])
        if fault is not None and not script.hit:
            say(["missed", case])
        for text in told.refused:
            say(["refused", text])
        for text in itertools.chain(
            _unexpected(told, script), left(held.url, told, ELEMENTS, held.options, held.hidden)
        ):
            say(["broken", text])
    say("end")


def _unexpected(told: Told, script: FaultAtPlace) -> Iterator[str]:
    """What must not come of such a fault."""
    for text in told.broken:
        if script.kind is not Fault.NO_MEMORY or "MemoryError: scripted" not in text:
            yield text
    passes = script.kind in COSTS_NOTHING or (
        script.kind is Fault.BEFORE and script.place is not None and script.place.operation in LOOKS
    )
    is_probe = script.place is not None and script.place.path.startswith("_probe")
    if passes and not is_probe and not told.is_undisturbed:
        yield f"{told.restored} was restored, {told.saved} saved, and this refused: {told.refused}"
