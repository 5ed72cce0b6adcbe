"""Every system call of a run that restores, saves, deletes and reads fails: one of them, or all from one on.

A case is a failure in one run. It may refuse with errors of distckpt's, and must do nothing else: not hang, not lose or
change what was committed, not restore something older. One failed call costs one save at the most, and nothing if it
only looks. A later run finds all in order.
"""

from __future__ import annotations

import errno
import faulthandler
import itertools
import os
import random
import shutil
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import distckpt
from distckpt.errors import DistckptError
from distckpt.storage import room
from distckpt.testing.system_calls import Failure, How, Kind, SystemCalls
from tests.soak.attack import Broken, Outcome
from tests.soak.subject import Subject, found_later, impatience, judge, read, save
from tests.support.crashing import Crashing, Say, run
from tests.support.preload import library

KEEP = 2
BEFORE = (1, 2)
"""What the run finds."""

SAVES = (3, 4)
"""What it saves, so that it deletes what it has found."""

ELEMENTS = 3000
"""Of 8 bytes, so that some of it is written round the page cache."""

PATIENT, IMPATIENT = 30.0, 4.0
"""Seconds until a save gives up: when one call fails, which no save waits for, and when all do from one on."""

HANGS = 90.0
"""Seconds after which a run counts as hanging. Opening, restoring, two saves and closing may each give up once."""

TROUBLE: Sequence[tuple[How, int]] = [("before", errno.EIO), ("before", errno.ESTALE), ("before", errno.EINTR)]
FULL: Sequence[tuple[How, int]] = [("before", errno.ENOSPC), ("before", errno.EDQUOT)]
LOST: Sequence[tuple[How, int]] = [("after", errno.EIO), ("after", errno.ETIMEDOUT)]
SHORT: Sequence[tuple[How, int]] = [("short", errno.EIO)]  # it does not fail

ONE: Mapping[Kind, Sequence[tuple[How, int]]] = {
    "open": [*TROUBLE, ("before", errno.EMFILE)],
    "create": [*TROUBLE, *FULL, *LOST, ("before", errno.EMFILE), ("before", errno.EROFS)],
    "read": [*TROUBLE, *SHORT, ("before", errno.ETIMEDOUT)],
    "write": [*TROUBLE, *FULL, *SHORT, ("before", errno.EFBIG), ("before", errno.EINVAL)],
    "sync": [*TROUBLE, *FULL],
    "link": [*TROUBLE, *FULL, *LOST, ("after", errno.EEXIST)],
    "unlink": [*TROUBLE, *LOST, ("before", errno.EBUSY), ("after", errno.ENOENT)],
    "rename": [*TROUBLE, *FULL, *LOST],
    "mkdir": [*TROUBLE, *FULL, *LOST, ("after", errno.EEXIST)],
    "rmdir": [*TROUBLE, ("before", errno.EBUSY)],
    "list": [*TROUBLE, ("before", errno.EMFILE), ("before", errno.ENOMEM)],
    "entry": [*TROUBLE],
    "stat": [*TROUBLE, ("before", errno.ETIMEDOUT)],
    "close": [("after", errno.EIO), ("after", errno.ENOSPC)],
    "flags": [("before", errno.EINVAL)],
}
"""How each kind of call may fail once; with EEXIST and ENOENT where NFS repeats what it has done already."""

LOOKS: Sequence[Kind] = ("read", "list", "entry")
"""They are tried again, so one that fails costs nothing."""

WRITING = {"open", *(f"save {number}" for number in SAVES), "close"}
"""What a run does that may fail when one call does."""

LASTING: Sequence[tuple[tuple[Kind, ...], int]] = [
    (("create", "write", "mkdir", "link"), errno.ENOSPC),
    (("open", "create", "list"), errno.EMFILE),
    (tuple(ONE), errno.EIO),
    (tuple(ONE), errno.ESTALE),
]
"""What, once it has begun, lasts as long as the process."""


@dataclass
class Calls:
    """The attack. ``counted`` says how many calls of each kind a run makes when none fails."""

    name: str = "calls"
    at_once: int = 4 * (os.cpu_count() or 2)  # many wait until somebody loses patience
    counted: Mapping[Kind, int] = field(default_factory=dict)
    _begin: Path = Path()

    def prepare(self, folder: Path) -> None:
        """A directory with two checkpoints; a run in which nothing fails counts the calls."""
        self._begin = folder / "run"
        ended = run(save, directory=str(self._begin), numbers=BEFORE, keep=KEEP, elements=ELEMENTS)
        assert not ended.said, ended.said
        (folder / "quiet").mkdir()
        life = self._live(None, folder / "quiet")
        assert not life.broken, life.broken
        self.counted = life.told["counted"][0]  # type: ignore[assignment]

    def cases(self, dice: random.Random) -> Iterator[str]:
        """Every failure at every call: of each kind of call in turn, since there are many more of some than of others."""
        kinds = [
            [Failure((kind,), nth, how, error) for how, error in failures for nth in range(self.counted[kind])]
            for kind, failures in ONE.items()
        ]
        kinds += [
            [Failure(of, nth, "before", error, None) for nth in range(sum(self.counted[kind] for kind in of))]
            for of, error in LASTING
        ]
        shuffled = [dice.sample(failures, len(failures)) for failures in kinds]
        for in_turn in itertools.zip_longest(*shuffled):
            yield from (str(failure) for failure in in_turn if failure is not None)

    def play(self, case: str, folder: Path) -> Outcome:
        """A run with this failure, and a later one with none."""
        failure = Failure.parse(case)
        kind = (
            f"one {failure.kinds[0]} fails" if failure.times else f"{errno.errorcode[failure.error]} from one call on"
        )
        life = self._live(failure, folder)
        broken = [Broken(self.name, case, kind, f"{what}\n(it failed at: {life.struck})") for what in life.broken]
        return Outcome(Counter({kind: 1}), broken)

    def _live(self, failure: Failure | None, folder: Path) -> Life:
        directory = str(shutil.copytree(self._begin, folder / "run"))
        with (folder / "stderr").open("w") as stderr:
            process = Crashing(
                suffer, preload=library(), stderr=stderr.fileno(), directory=directory, failure=failure and str(failure)
            )
            ended = process.end(HANGS)
        life = Life({phase: rest for phase, *rest in ended.said})
        life.judge(failure)
        if "counted" not in life.told:
            what = "it hangs" if ended.late else f"it dies of {ended.signal}"
            life.broken.append(f"{what} after {ended.said[-1:]}: {(folder / 'stderr').read_text()[-4000:]}")
        told = {"acknowledged": life.acknowledged, "keep": KEEP, "elements": ELEMENTS}
        life.broken += [f"later: {complaint}" for complaint in found_later(judge, directory=directory, **told)]
        return life


@dataclass
class Life:
    """What a run told of each of its phases: "done" and what came of it, an error, or "foreign" and a traceback."""

    told: Mapping[str, Sequence[object]]
    broken: list[str] = field(default_factory=list)

    @property
    def acknowledged(self) -> list[int]:
        """The numbers that are committed, as far as the run knows."""
        return [*BEFORE, *(number for number in SAVES if self._is_done(f"save {number}"))]

    @property
    def struck(self) -> object:
        """The first call that failed."""
        return self.told.get("struck", ["?"])[0]

    def judge(self, failure: Failure | None) -> None:
        """Whether the run itself met what it must not meet."""
        for phase, (what, *details) in self.told.items():
            if what == "foreign":
                self.broken.append(f"{phase}: {details[0]}")
        if self._is_done("restore") and self.told["restore"][1] != BEFORE[-1]:
            self.broken.append(f"{self.told['restore'][1]} was restored, and {BEFORE[-1]} is in order")
        if failure is not None and failure.times is None:
            return
        told = {phase: rest for phase, rest in self.told.items() if phase not in ("struck", "counted")}
        refused = [phase for phase in told if not self._is_done(phase)]
        allowed = 0 if failure is None or failure.kinds[0] in LOOKS else 1
        if len(refused) > allowed or not WRITING.issuperset(refused):
            self.broken.append(f"one call failed, and so did {' and '.join(refused)}: {told}")

    def _is_done(self, phase: str) -> bool:
        return self.told.get(phase, [""])[0] == "done"


# ---- in the process ---------------------------------------------------------------------------------------------------


def suffer(say: Say, directory: str, failure: str | None) -> None:
    """Open, restore, save, read and close, with a failure among the calls; say what came of each, and which call it was."""
    faulthandler.dump_traceback_later(HANGS - 5)
    threading.excepthook = lambda args: say([f"{args.thread}", "foreign", _text(args.exc_value)])
    room.SHARE = 1 << 60  # as on a host that has no memory to spare: files go round the page cache, by more calls
    with impatience():
        calls = SystemCalls(directory)
        failing = None if failure is None else Failure.parse(failure)
        if failing is not None:
            calls.fail(failing)
        _run(say, directory, IMPATIENT if failing is not None and failing.times is None else PATIENT)
        say(["struck", calls.struck])
        say(["counted", calls.counted])
        calls.stop()


def _run(say: Say, directory: str, save_timeout: float) -> None:
    def attempt(phase: str, act: Callable[..., object], *arguments: object) -> None:
        try:
            result = act(*arguments)
        except DistckptError as error:
            say([phase, type(error).__name__, str(error)])
        except BaseException as error:  # noqa: BLE001 - it is told as what it is: none of ours
            say([phase, "foreign", _text(error)])
        else:
            say([phase, "done", result])

    subjects: list[Subject] = []
    attempt("open", lambda: subjects.append(Subject(directory, ELEMENTS, max_to_keep=KEEP, save_timeout=save_timeout)))
    for subject in subjects:
        attempt("restore", subject.restore)
        for number in SAVES:
            attempt(f"save {number}", _save, subject, number)
    attempt("latest", distckpt.latest_checkpoint, directory)
    attempt("read", read, directory)
    attempt("verify", lambda: distckpt.open(directory).verify().good)
    attempt("follow", lambda: next(distckpt.checkpoints_iterator(directory, timeout=0), None))
    for subject in subjects:
        attempt("close", subject.manager.close)


def _save(subject: Subject, number: int) -> str:
    return subject.save(number).result(HANGS)


def _text(error: BaseException | None) -> str:
    return "".join(traceback.format_exception(error))
