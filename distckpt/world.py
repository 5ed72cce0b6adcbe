"""Which rank this process is, how many there are, and how ranks tell each other something before Ray is up."""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

from distckpt.errors import AbsentRanksError, CoordinatorUnavailableError, LaunchError

SHARE_SECONDS = 300.0
MOST_OF_RUN_ID = 200
ANSWER_SECONDS = 1.0
"""How much longer than rank 0 the others wait, so that they hear from it who has not come."""
PAUSES = (0.001, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
"""How long a rank sleeps between two looks; the last one again and again. To wait in torch's store would keep other
threads of the process from using it."""
PAUSE_BEHIND = 0.2
"""How long a thread behind training sleeps between two looks."""


class Share(Protocol):
    """Returns rank 0's text on every rank; a collective. AbsentRanksError after ``timeout`` seconds (None: a default)."""

    def __call__(self, text: str, timeout: float | None = None) -> str:
        """See the class."""


Decide = Callable[[Sequence[str]], str]
"""Makes, on rank 0, one answer for all of what all ranks said, in the order of the ranks. Raises nothing."""


class Council(Protocol):
    """What ranks can do together before a coordinator is there, and without one. All of it is collective.

    AbsentRanksError names ranks that neither came nor gave a sign for ``timeout`` seconds; CoordinatorUnavailableError if
    the store through which they talk has gone.
    """

    def consult(self, text: str, decide: Decide, timeout: float | None = None) -> str:
        """Rank 0's answer to what all ranks say, on every rank. ``text`` is not empty."""

    def refuse(self, reason: str) -> None:
        """Until its next consultation this rank does not come: others that wait for it, or will, get a Refusal, once."""

    def sign(self) -> None:
        """This rank lives, though it may be a while until it comes. From any thread."""

    def apart(self, name: str, behind: bool = False) -> Council:
        """The same ranks for another conversation, which may go on in another thread; ``behind`` training."""


class Refusal(Exception):
    """``rank`` does not come to a consultation, for ``reason``."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank}: {reason}")
        self.rank = rank
        self.reason = reason


def _alone(text: str, timeout: float | None = None) -> str:
    return text


@dataclass(frozen=True, slots=True)
class World:
    """One process among ``size``. ``share`` returns rank 0's text on every rank; a collective where size > 1.

    ``council`` is there where the ranks can do more than that by themselves. ``token`` names this incarnation of the job
    where the environment gives it a name, else it is None and rank 0 invents one.
    """

    rank: int
    size: int
    share: Share | None = field(default=_alone, repr=False)
    token: str | None = None
    host: str = field(default_factory=socket.gethostname)
    council: Council | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not among {self.size} ranks")


@dataclass(frozen=True, slots=True)
class _Launcher:
    """Something that starts many processes, and the variables in which it tells each of them who it is."""

    name: str
    rank: str
    sizes: tuple[str, ...]

    def told(self) -> tuple[int | None, int | None]:
        """Rank and number of ranks, as far as they are told."""
        sizes = (_number(name) for name in self.sizes)
        return _number(self.rank), next((size for size in sizes if size is not None), None)


_LAUNCHERS = (
    _Launcher("The environment", "RANK", ("WORLD_SIZE",)),
    _Launcher("Open MPI", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",)),
    _Launcher("MVAPICH", "MV2_COMM_WORLD_RANK", ("MV2_COMM_WORLD_SIZE",)),
    _Launcher("jsrun", "JSM_NAMESPACE_RANK", ("JSM_NAMESPACE_SIZE",)),
    _Launcher("MPI", "PMI_RANK", ("PMI_SIZE",)),
    # The first is of this step alone, the others may be of a whole allocation.
    _Launcher("Slurm", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")),
    _Launcher("PMIx", "PMIX_RANK", ()),
)
"""The first that tells how many ranks there are is right: who asks for one within the other comes first."""


def find_world(
    rank: int | None = None, world_size: int | None = None, run_id: str | None = None, timeout: float = SHARE_SECONDS
) -> World:
    """The world that was given, else torch.distributed's, Ray Train's, torchrun's variables', or a world of one.

    With ``rank`` and ``world_size`` given for more than one rank and no torch.distributed, ``run_id`` must name the
    incarnation of the job: the same text on every rank, another one after every restart. With it, what Slurm or MPI say
    of the ranks is taken too. ``timeout`` is how many seconds ranks wait for each other when they share something.

    Raises ValueError for one of rank and world_size alone, and for a ``run_id`` that the log has no room for.
    LaunchError where there are more ranks than this one, and they have no way to find each other, or nothing that tells
    them from those of an earlier start.
    """
    if run_id is not None and not 0 < len(run_id) <= MOST_OF_RUN_ID:
        raise ValueError(f"run_id must be a text of 1 to {MOST_OF_RUN_ID} characters, not {run_id!r:.80}")
    if (rank is None) != (world_size is None):
        raise ValueError("give both rank and world_size, or neither")
    if rank is not None and world_size is not None:
        return _given_world(rank, world_size, run_id, timeout)
    return _torch_world(timeout) or _ray_train_world() or _torchrun_world(run_id, timeout) or _launched_world(run_id)


def find_rank() -> tuple[int, int]:
    """Which rank this process is among how many, as far as it is told; for what it does without the others."""
    world = _torch_world(SHARE_SECONDS) or _ray_train_world()
    if world is not None:
        return world.rank, world.size
    _, rank, size = _launcher()
    return (rank, size) if size else (0, 1)


def new_token() -> str:
    """A name for an incarnation of the job that nobody has used before."""
    return uuid.uuid4().hex


def _given_world(rank: int, world_size: int, run_id: str | None, timeout: float) -> World:
    if world_size == 1:
        return World(rank, 1, token=run_id)
    found = _torch_world(timeout)
    if found is not None and found.size == world_size:
        return World(rank, world_size, found.share, run_id, council=found.council)
    if run_id is None:
        raise LaunchError(
            f"rank {rank} and world_size {world_size} were given without torch.distributed: give run_id too, the same text "
            "on every rank and another one after every restart of the job, so that older processes can be told from newer"
        )
    return World(rank, world_size, None, run_id)


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else None


def _torch_world(timeout: float) -> World | None:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    if dist.get_world_size() == 1:
        return World(0, 1)
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # public, but not in its __all__
    from torch.distributed.distributed_c10d import _get_default_store

    rank, size = dist.get_rank(), dist.get_world_size()
    return _together(StoreCouncil(PrefixStore("distckpt", _get_default_store()), rank, size, timeout), None)


def _ray_train_world() -> World | None:
    # A Ray Train worker has imported ray.train; anybody else need not pay for the import.
    train: Any = sys.modules.get("ray.train")
    if train is None:
        return None
    try:
        context = train.get_context()
        rank, size = context.get_world_rank(), context.get_world_size()
    except (RuntimeError, AttributeError):
        return None  # not inside a training function
    if rank is None or size is None:
        return None
    if size == 1:
        return World(0, 1)
    from ray.train.collective import broadcast_from_rank_zero

    def share(text: str, timeout: float | None = None) -> str:
        try:
            return str(broadcast_from_rank_zero(text))
        except Exception as error:
            raise CoordinatorUnavailableError(
                f"rank {rank} of {size}: Ray Train's workers could not share what they need to find each other: {error}. "
                "Every worker must make the manager; nothing was changed, and the job may be started again"
            ) from error

    return World(rank, size, share)


def _torchrun_world(run_id: str | None, timeout: float) -> World | None:
    """That of torchrun, whose own store ranks can use without torch.distributed."""
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if rank is None or size is None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    if size == 1:
        return World(0, 1, token=run_id)
    with _answering(rank):
        store = _agent_store(timeout)
    return _together(StoreCouncil(store, rank, size, timeout), run_id)


def _launched_world(run_id: str | None) -> World:
    """A world of one, unless a launcher says that there are more."""
    launcher, rank, size = _launcher()
    if launcher is None or size == 1:
        return World(0, 1, token=run_id)
    if size and run_id is not None:
        return World(rank, size, None, run_id)
    told = ", ".join(f"{name}={os.environ[name]}" for name in (launcher.rank, *launcher.sizes) if name in os.environ)
    raise LaunchError(
        f"{launcher.name} says that this is rank {rank} of {size or 'several'} ({told}), and the ranks have no way to find "
        "each other. Call torch.distributed.init_process_group first; or join all of them to one Ray cluster and give rank, "
        "world_size and run_id, the same text on every rank and another one after every restart of the job; or, where this "
        f"process saves by itself, give rank=0 and world_size=1, or take {launcher.rank} out of its environment"
    )


def _launcher() -> tuple[_Launcher | None, int, int]:
    """Who has started this process as which rank of how many; 0 where the number is not told, though it is not 1."""
    unsized: tuple[_Launcher | None, int, int] = (None, 0, 1)
    for launcher in _LAUNCHERS:
        rank, size = launcher.told()
        if size is not None and rank is not None and rank < size:
            return launcher, rank, size
        if rank:
            unsized = launcher, rank, 0
    return unsized


def _agent_store(timeout: float) -> Any:
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout))
    return PrefixStore(f"distckpt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _together(exchange: StoreCouncil, run_id: str | None) -> World:
    return World(exchange.rank, exchange.size, exchange.share, run_id, council=exchange)


@contextmanager
def _answering(rank: int) -> Iterator[None]:
    """Errors of a torch store become ours."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed raises nothing more particular
        raise CoordinatorUnavailableError(
            f"rank {rank}: the store through which the ranks of torch.distributed find each other does not answer: "
            f"{_first_line(error)}. The process that keeps it, rank 0 or torchrun, has ended or cannot be reached; what was "
            "committed is on storage, and the job may be started again"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


class StoreCouncil:
    """A Council by a torch store. Each call of each rank has keys of its own, which no other call ever uses.

    A rank that calls counts its calls in the store and waits for rank 0's answer to this one. Rank 0 answers once every
    rank waits, and tells those that do who has not come. A call that was given up is marked, and rank 0 passes it over:
    so ranks of which some once called alone find together again.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float, behind: bool = False) -> None:
        self.rank = rank
        self.size = size
        self._store = store
        self._timeout = timeout
        self._behind = behind
        self._refuses = False
        self._refusals: dict[int, str] = {}

    def share(self, text: str, timeout: float | None = None) -> str:
        """See Share."""
        return self.consult(text or "-", lambda _: text, timeout)

    def consult(self, text: str, decide: Decide, timeout: float | None = None) -> str:
        """See Council.consult."""
        seconds = self._timeout if timeout is None else timeout
        with _answering(self.rank):
            if self._refuses:
                self._refuses = False
                self._store.add("refusals", -1)
                # Not deleted: who looks at it just now would wait for it to come again.
                self._store.set(f"refusal/{self.rank}", "")
            return self._lead(text, decide, seconds) if self.rank == 0 else self._follow(text, seconds)

    def refuse(self, reason: str) -> None:
        """See Council.refuse."""
        with _answering(self.rank):
            self._store.set(f"refusal/{self.rank}", f"{uuid.uuid4().hex} {reason}")
            if not self._refuses:
                self._refuses = True
                self._store.add("refusals", 1)

    def sign(self) -> None:
        """See Council.sign."""
        with _answering(self.rank):
            self._store.add(f"signs/{self.rank}", 1)

    def apart(self, name: str, behind: bool = False) -> StoreCouncil:
        """See Council.apart."""
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # public, but not in its __all__

        return StoreCouncil(PrefixStore(name, self._store), self.rank, self.size, self._timeout, behind)

    def _lead(self, text: str, decide: Decide, seconds: float) -> str:
        patience = _Patience(self._store, seconds)
        calls = {rank: self._await_call(rank, patience) for rank in range(1, self.size)}
        absent = [rank for rank, call in calls.items() if not call]
        said = "" if absent else decide([text, *(self._taken(f"call/{rank}/{call}") for rank, call in calls.items())])
        answer = json.dumps({"text": said, "absent": absent})
        for rank, call in calls.items():
            if call:
                self._store.set(f"answer/{rank}/{call}", answer)
        if absent:
            raise AbsentRanksError(absent, seconds)
        return said

    def _await_call(self, rank: int, patience: _Patience) -> int:
        """Which call of that rank waits for an answer, 0 if none does."""
        call = self._store.add(f"passed/{rank}", 0) + 1
        while self._comes(f"call/{rank}/{call}", rank, patience):
            self._store.add(f"passed/{rank}", 1)
            if not self._store.check([f"gone/{rank}/{call}"]):
                return int(call)
            call += 1
        return 0

    def _follow(self, text: str, seconds: float) -> str:
        call = self._store.add(f"calls/{self.rank}", 1)
        mine = f"{self.rank}/{call}"
        self._store.set(f"call/{mine}", text)
        answered = False
        try:
            answered = self._comes(f"answer/{mine}", 0, _Patience(self._store, seconds + ANSWER_SECONDS))
        finally:  # Ctrl-C too
            if not answered:
                self._store.set(f"gone/{mine}", "")
        if not answered:
            raise AbsentRanksError([0], seconds)
        answer = json.loads(self._taken(f"answer/{mine}"))
        if answer["absent"]:
            raise AbsentRanksError(answer["absent"], seconds)
        return str(answer["text"])

    def _taken(self, key: str) -> str:
        """The value, which is wanted no more."""
        value = self._store.get(key).decode()
        self._store.delete_key(key)
        return str(value)

    def _comes(self, key: str, sender: int, patience: _Patience) -> bool:
        """Whether there is a value for ``key`` before the patience with its sender is at an end."""
        looks = 0
        while not self._store.check([key]):
            self._look_for_refusals()
            left = patience.left(sender)
            if left <= 0:
                return False
            time.sleep(min(left, PAUSE_BEHIND if self._behind else PAUSES[min(looks, len(PAUSES) - 1)]))
            looks += 1
        return True

    def _look_for_refusals(self) -> None:
        """Raises Refusal, once for each."""
        if self._store.add("refusals", 0) > 0:
            for rank in range(self.size):
                if rank != self.rank and self._store.check([f"refusal/{rank}"]):
                    name, _, reason = self._store.get(f"refusal/{rank}").decode().partition(" ")
                    if name and self._refusals.get(rank) != name:
                        self._refusals[rank] = name
                        raise Refusal(rank, reason)


class _Patience:
    """How long ranks are waited for: ``seconds``, and as long again from each time at which a rank gave a sign."""

    def __init__(self, store: Any, seconds: float) -> None:
        self._store = store
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._signs: dict[int, int] = {}
        self._heard: dict[int, float] = {}

    def left(self, rank: int) -> float:
        """How many seconds are left for this rank."""
        left = self._deadline - time.monotonic()
        if left > 0 and rank in self._signs:
            return left
        signs = self._store.add(f"signs/{rank}", 0)
        if signs != self._signs.setdefault(rank, signs):
            self._signs[rank] = signs
            self._heard[rank] = time.monotonic()
        return max(left, self._heard.get(rank, -math.inf) + self._seconds - time.monotonic())
