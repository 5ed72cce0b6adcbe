"""At every request of a run that restores, saves, deletes and reads, the network or the server does what it must not.

A run in a bucket goes through a proxy; a case is one of its requests, and what becomes of it, or several such, with a plus
sign between them. What passes by itself must cost nothing, not even a save. Whatever it was: the previous checkpoint
loads, nothing that was acknowledged is lost, and what is listed is whole, as other programs see the bucket too; the
next save works, and a sweep leaves nothing hidden.
"""

from __future__ import annotations

import atexit
import faulthandler
import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.soak.attack import Broken, Outcome
from tests.soak.disturbed import Told, be_brief, begin, drive, left, left_outside
from tests.support.crashing import Crashing, Say
from tests.support.places import PROTOCOLS, Place, Protocols
from tests.support.proxy import Answer, Cut, Fault, Flip, Late, Proxy, Reset, Seen, Stall, Twice
from tests.support.small_runs import until

STORM_SECONDS = 1.0
OUTAGE: Mapping[str, Any] = {"patience": 0.5, "timeout": 10}
OUTAGE_SECONDS = 4.0
"""How impatient a run is where nothing gets better before it ends."""

LATE = 0.3
TOGETHER, ALONE = 14, 1
"""In a sample: how many requests of one run, and how many of each trouble that a run need not survive."""

HANGS = 400.0
UP, DOWN = "sent", "received"


@dataclass(frozen=True)
class Sizes:
    """Of the bodies of a request and of its answer."""

    sent: int
    received: int


@dataclass(frozen=True)
class Trouble:
    """What becomes of a request, made from the sizes of its bodies and the share of them after which it happens.

    ``passes``: it costs nothing but time. ``carries`` is what the request needs, for it to be cut or flipped. ``lasts``
    is for how many seconds all requests from that one on fare like it; 0 is that one alone.
    """

    make: Callable[[Sizes, float], Fault]
    passes: bool = True
    carries: str = ""
    lasts: float = 0.0


def always(fault: Fault, **more: Any) -> Trouble:
    """That fault, whatever the request."""
    return Trouble(lambda sizes, share: fault, **more)


EXPIRED = b'{"error": {"code": 401, "message": "Invalid Credentials", "errors": [{"reason": "authError"}]}}'

TROUBLES: Mapping[str, Trouble] = {
    "reset": always(Reset()),
    "reset-early": always(Reset(early=True)),
    "lost-answer": always(Reset(applied=True)),
    "stall": always(Stall()),
    "stalled-answer": always(Stall(applied=True)),
    "late": always(Late(LATE)),
    "twice": always(Twice()),
    "cut-up": Trouble(lambda sizes, share: Cut(int(sizes.sent * share), upload=True), carries=UP),
    "cut-down": Trouble(lambda sizes, share: Cut(int(sizes.received * share)), carries=DOWN),
    "flipped-up": Trouble(lambda sizes, share: Flip(int(sizes.sent * share), upload=True), carries=UP),
    "flipped-down": Trouble(lambda sizes, share: Flip(int(sizes.received * share)), carries=DOWN),
    "409": always(Answer(409)),
    "409-done": always(Answer(409, applied=True)),
    "412": always(Answer(412), passes=False),
    "412-done": always(Answer(412, applied=True), passes=False),
    "429": always(Answer(429)),
    "503": always(Answer(503)),
    "503-done": always(Answer(503, applied=True)),
    "401": always(Answer(401, EXPIRED), passes=False),
    "storm": always(Answer(503), lasts=STORM_SECONDS),
    "outage": always(Answer(503), passes=False, lasts=HANGS),
}


class Struck:
    """Which requests fare ill: the ``nth`` that is ``wanted``, and all that come while the trouble ``name`` lasts."""

    def __init__(self, kind: Callable[[Seen], str], wanted: str, nth: int, name: str) -> None:
        self.wanted, self.name = wanted, name
        self.first: Seen | None = None
        self._kind, self._nth = kind, nth
        self._passed = 0
        self._end = 0.0

    def __call__(self, seen: Seen) -> bool:
        """Whether this one does; asked for each, in the order in which they come."""
        if self.first is not None:
            return time.monotonic() < self._end
        if self._kind(seen) != self.wanted:
            return False
        self._passed += 1
        if self._passed <= self._nth:
            return False
        self.first, self._end = seen, time.monotonic() + TROUBLES[self.name].lasts
        return True


@dataclass
class Requests:
    """The attack, on directories that are reached by that ``protocol``. ``counted`` are the requests of a run, by kind."""

    protocol: str
    at_once: int = 2 * (os.cpu_count() or 2)  # some of them wait
    counted: dict[str, list[Sizes]] = field(default_factory=dict)
    _begin: Path = Path()
    _port: int = 0

    @property
    def name(self) -> str:
        """See Attack."""
        return f"{self.protocol}-requests"

    def prepare(self, folder: Path) -> None:
        """A server, for as long as this process lives; and a run in which nothing fails counts the requests."""
        servers = ExitStack()
        atexit.register(servers.close)
        known = PROTOCOLS[self.protocol]
        self._port = servers.enter_context(known.serving()).port
        self._begin = folder / "run"
        begin(self._begin, known.elements)
        told = self._suffer(folder).end(HANGS).said
        assert told[-1:] == ["end"], told
        for kind, sent, received in told[0]:
            self.counted.setdefault(kind, []).append(Sizes(sent, received))

    def cases(self, dice: random.Random) -> Iterator[str]:
        """Every trouble at every request: each request once, with the next trouble; then again, with the one after."""
        requests = [(kind, nth) for kind, many in self.counted.items() for nth in range(len(many))]
        requests, troubles = dice.sample(requests, len(requests)), dice.sample(list(TROUBLES), len(TROUBLES))
        for turn in range(len(troubles)):
            for at, request in enumerate(requests):
                if self._is_possible(request, troubles[(at + turn) % len(troubles)]):
                    yield _case(request, troubles[(at + turn) % len(troubles)], dice)

    def sample(self, dice: random.Random) -> Iterator[str]:
        """Every request once, several to a run, with the troubles that pass in turn; and some of each that does not."""
        requests = [(kind, nth) for kind, many in self.counted.items() for nth in range(len(many))]
        alone = [name for name, trouble in TROUBLES.items() if not trouble.passes or trouble.lasts]
        others = [name for name in TROUBLES if name not in alone]
        used = Counter(dict.fromkeys(dice.sample(others, len(others)), 0))
        cases = []
        for request in dice.sample(requests, len(requests)):
            name = min((name for name in used if self._is_possible(request, name)), key=lambda name: used[name])
            used[name] += 1
            cases.append(_case(request, name, dice))
        yield from ("+".join(cases[first : first + TOGETHER]) for first in range(0, len(cases), TOGETHER))
        early = [(kind, nth) for kind, nth in requests if nth < 2]  # they come, whatever has gone wrong before
        for name in alone:
            yield from (_case(request, name, dice) for request in dice.sample(early, ALONE))

    def _is_possible(self, request: tuple[str, int], name: str) -> bool:
        if name == "flipped-up" and PROTOCOLS[self.protocol].damaged == "kept":
            return False  # nobody could know
        carries = TROUBLES[name].carries
        return not carries or bool(getattr(self.counted[request[0]][request[1]], carries))

    def play(self, case: str, folder: Path) -> Outcome:
        """A run with this trouble in a process of its own, which looks at what is left of it too."""
        with (folder / "stderr").open("w") as stderr:
            ended = self._suffer(folder, case, stderr.fileno()).end(HANGS)
        said = [pair for pair in ended.said if pair != "end"]
        broken = [text for what, text in said if what == "broken"]
        if ended.said[-1:] != ["end"]:
            does = "hangs" if ended.late else "dies"
            broken.append(f"a run {does} after {ended.said[-1:]}: {(folder / 'stderr').read_text()[-3000:]}")
        outcome = Outcome(Counter(text for what, text in said if what == "tried"))
        struck = [text for what, text in said if what == "struck"]
        tried = next(iter(outcome.tried), "nothing came")
        outcome.broken = [Broken(self.name, case, tried, f"{one}\n(it struck {struck})") for one in broken]
        outcome.seen["requests that did not come"] = case.count("+") + 1 - len(struck)
        outcome.seen["saves refused"] = sum(what == "refused" for what, _ in said)
        return outcome

    def _suffer(self, folder: Path, case: str = "", stderr: int = 2) -> Crashing:
        sizes = []
        for kind, nth, *_ in (one.split(" ") for one in case.split("+") if one):
            sizes.append((self.counted[kind][int(nth)].sent, self.counted[kind][int(nth)].received))
        told: dict[str, Any] = {"protocol": self.protocol, "port": self._port, "found": str(self._begin), "case": case}
        return Crashing(suffer, stderr=stderr, folder=str(folder), sizes=sizes, **told)


def _case(request: tuple[str, int], name: str, dice: random.Random) -> str:
    return f"{request[0]} {request[1]} {name} {dice.randrange(100)}"


# ---- in the process ---------------------------------------------------------------------------------------------------


def suffer(
    say: Say, protocol: str, port: int, found: str, folder: str, case: str, sizes: Sequence[tuple[int, int]]
) -> None:
    """Play a case, and say pairs: "tried", "struck", "refused", "broken" and what; "end" is the last word.

    With no case say which requests there are.
    """
    faulthandler.dump_traceback_later(HANGS - 5)
    be_brief()
    place = Place.new(PROTOCOLS[protocol], port)
    elements = place.protocol.elements
    place.fill(Path(found))
    with Proxy(port) as proxy:
        if not case:
            told = drive(place.url, elements, place.options(proxy.url))
            assert told.is_undisturbed, told
            say([[place.protocol.kind(seen), seen.sent, seen.received] for seen in proxy.seen])
            say("end")
            return
        planned = [_plan(proxy, place, one, Sizes(*size)) for one, size in zip(case.split("+"), sizes, strict=True)]
        if " outage " in case:
            options = {**place.options(proxy.url), **OUTAGE}
            told = drive(place.url, elements, options, OUTAGE_SECONDS)
        else:
            renewable = {"token": _renewable()} if " 401 " in case and protocol == "gs" else {}
            told = drive(place.url, elements, {**place.options(proxy.url), **renewable})
        for struck in planned:
            if struck.first is not None:
                _say_struck(say, struck, struck.first)
    for text in told.refused:
        say(["refused", text])
    must = all(_passes(struck, place.protocol) for struck in planned)
    if must and not told.is_undisturbed:
        say(["broken", f"{told.restored} was restored, {told.saved} saved, and this refused: {told.refused}"])
    for text in itertools.chain(told.broken, _left(place, told, Path(folder))):
        say(["broken", text])
    say("end")


def _left(place: Place, told: Told, folder: Path) -> Iterator[str]:
    """What is wrong with what the run has left, and with the next one."""
    place.copy_to(folder / "outside")
    for what in left_outside(str(folder / "outside"), told):
        yield f"seen from outside: {what}"
    yield from left(place.url, told, place.protocol.elements, place.options(), place.left_hidden)


def _passes(struck: Struck, protocol: Protocols) -> bool:
    if struck.name == "401":
        return protocol.scheme == "gs"  # where the credentials of this test can be renewed
    if struck.name == "flipped-down" and struck.wanted == "begin":
        return False  # the name of an upload that nobody knows
    if struck.name == "flipped-up" and protocol.damaged != "refused":
        return False
    return TROUBLES[struck.name].passes


def _plan(proxy: Proxy, place: Place, case: str, sizes: Sizes) -> Struck:
    kind, nth, name, percent = case.split(" ")
    struck = Struck(place.protocol.kind, kind, int(nth), name)
    times = 1 << 16 if TROUBLES[name].lasts else 1
    proxy.fail(TROUBLES[name].make(sizes, int(percent) / 100), when=struck, times=times)
    return struck


def _say_struck(say: Say, struck: Struck, seen: Seen) -> None:
    say(["tried", f"{struck.wanted}, {struck.name}"])
    say(["struck", f"{seen.method} {seen.target}"])
    if struck.name == "late":
        until(lambda: seen.served is not None)


def _renewable() -> Any:
    """Credentials that are too old, until they are renewed."""
    from google.oauth2.credentials import Credentials

    later, counted = datetime(2100, 1, 1), itertools.count()
    return Credentials(
        "first",
        expiry=later,  # type: ignore[no-untyped-call]
        refresh_handler=lambda *_, **__: (f"next-{next(counted)}", later),
    )
