"""Evaluation on a Ray cluster: workers that share the checkpoints of a run, and are replaced when they die."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distckpt.coordinator.ray.process import process_kept
from distckpt.directory.groups import read_groups
from distckpt.errors import ClaimLostError, StorageError
from distckpt.evaluation.watch import watch
from distckpt.evaluation.watched import WatchedCheckpoint
from distckpt.format.json.group import SetAside
from distckpt.storage import PathLike, canonical, open_store, placed_among

with process_kept():
    import ray
    import ray.exceptions

logger = logging.getLogger(__name__)

MOST_DEATHS = 8
"""How many workers may die in a row, without any of them having come to an end with a checkpoint between."""

FIRST_PAUSE = 0.5
LAST_PAUSE = 30.0
"""Seconds before the next one is started."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A checkpoint that a worker of this call has acknowledged, and what the function has returned for it."""

    path: str
    number: int
    attempt: str
    delivery: int
    result: Any


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came of it: what was acknowledged, in the order in which that came, and what the group has set aside so far."""

    acknowledged: tuple[Evaluated, ...]
    set_aside: tuple[SetAside, ...]


def evaluate(
    fn: Callable[[WatchedCheckpoint], Any] | type,
    directory: PathLike,
    *,
    group: str,
    num_workers: int = 1,
    ray_remote_args: Mapping[str, Any] | None = None,
    **watching: Any,
) -> Evaluation:
    """Call ``fn`` with each checkpoint that the group is to get, on ``num_workers`` workers of this Ray cluster.

    ::

        def loss(checkpoint):
            model.load_state_dict(checkpoint.load("model"))
            checkpoint.report({"loss": held_out_loss(model)})

        distckpt.ray.evaluate(loss, "/shared/run-7", group="eval", num_workers=2, mode="all", ray_remote_args={"num_gpus": 1})

    Each worker is an actor that follows ``distckpt.watch(directory, group=group, ...)``. What ``fn`` returns for is
    acknowledged; where it raises the checkpoint is rejected, and the worker goes on with the next. Returns when training has
    said that it has ended and nothing is left for the group, or when the workers' ``timeout`` is over. A worker that dies is
    started again; the checkpoint that it had goes to whoever takes over its claim, so ``fn`` must bear being called twice.

    Args:
        fn: a function, or a class: then each worker makes an instance of it, once, and calls that. What it returns comes
            back here, so it is small.
        ray_remote_args: of a worker, as for ``ray.remote``: ``num_gpus``, ``resources``, ``runtime_env`` ...
        watching: as for ``distckpt.watch``.

    Raises what ``distckpt.watch`` raises at once; TypeError for an ``fn`` that cannot be called, ValueError for
    ``num_workers`` below 1. ray.exceptions.RayError, with its text, for what making an instance of ``fn`` raises, and if
    workers die again and again. When this process ends the workers do, and what they had is taken over in time.
    """
    if not _can_be_called(fn):
        raise TypeError(f"fn must be a function, or a class whose instances can be called, not {fn!r:.200}")
    if num_workers < 1:
        raise ValueError(f"num_workers is at least 1, not {num_workers}")
    where = canonical(directory)
    watch(where, group=group, **watching).close()  # raises here, as itself, what would be the end of each worker
    pool = _Pool(fn, where, {**watching, "group": group}, dict(ray_remote_args or {}))
    try:
        acknowledged = tuple(pool.run(num_workers))
    finally:
        pool.close()
    state = read_groups(open_store(where, placed_among(watching))).get(group)
    return Evaluation(acknowledged, state.set_aside if state is not None else ())


def _can_be_called(fn: object) -> bool:
    """Whether it can, or for a class, its instances: a class itself always can."""
    if isinstance(fn, type):
        return any("__call__" in vars(base) for base in fn.__mro__)
    return callable(fn)


class _Worker:
    """Runs in the actor. ``step`` gets the next checkpoint and has it evaluated; None when there are no more."""

    def __init__(self, fn: Callable[[WatchedCheckpoint], Any] | type, directory: str, watching: dict[str, Any]) -> None:
        self._call: Callable[[WatchedCheckpoint], Any] = fn() if isinstance(fn, type) else fn
        self._watch = watch(directory, **watching)

    def step(self) -> Evaluated | str | None:
        """What came of it; a text if it was not acknowledged."""
        checkpoint = next(self._watch, None)
        if checkpoint is None:
            return None
        try:
            with checkpoint:
                result = self._call(checkpoint)
                _check_sendable(result)  # before it is acknowledged: nobody would get it again
        except ClaimLostError as error:
            return f"{error}"
        except Exception as error:
            # It has been given back, and told whoever asks; the next one is another one.
            logger.warning("%s", checkpoint.path, exc_info=True)
            return f"{checkpoint.path}, delivery {checkpoint.delivery}, failed: {type(error).__name__}: {error}"
        return Evaluated(checkpoint.path, checkpoint.number, checkpoint.attempt, checkpoint.delivery, result)


def _check_sendable(result: object) -> None:
    """TypeError if Ray could not send it to who waits for it."""
    try:  # as Ray does it, without copying what is large
        ray.cloudpickle.dumps(result, protocol=5, buffer_callback=lambda buffer: None)  # type: ignore[no-untyped-call]
    except Exception as error:
        kind = type(result).__name__
        raise TypeError(f"fn returned a {kind}, which cannot be sent to the caller: {error}") from error


class _Pool:
    """The workers, as the caller sees them: each is asked for its next step as soon as it has told of the last."""

    def __init__(
        self,
        fn: Callable[[WatchedCheckpoint], Any] | type,
        directory: str,
        watching: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        self._actor: Any = ray.remote(_Worker).options(**{"max_restarts": 0, **options})
        self._arguments = (ray.put(fn), directory, watching)
        self._steps: dict[ray.ObjectRef[Evaluated | str | None], Any] = {}
        self._deaths = 0

    def run(self, num_workers: int) -> Iterator[Evaluated]:
        """What is acknowledged, until no worker gets anything any more."""
        for _ in range(num_workers):
            self._start()
        while self._steps:
            (done,), _ = ray.wait(list(self._steps))
            worker = self._steps.pop(done)
            try:
                found = ray.get(done)
            except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
                self._replace(worker, error)
                continue
            self._deaths = 0
            if found is None:
                ray.kill(worker)
                continue
            if isinstance(found, Evaluated):
                yield found
            else:
                logger.warning("%s", found)
            self._ask(worker)

    def close(self) -> None:
        """End those that still work."""
        for worker in self._steps.values():
            ray.kill(worker)
        self._steps.clear()

    def _start(self) -> None:
        self._ask(self._actor.remote(*self._arguments))

    def _ask(self, worker: Any) -> None:
        self._steps[worker.step.remote()] = worker

    def _replace(self, worker: Any, error: ray.exceptions.RayError) -> None:
        """Start another one in the place of one that has died, or can reach neither us nor the store."""
        self._deaths += 1
        if not _may_pass(error) or self._deaths > MOST_DEATHS:
            raise error
        logger.warning("a worker is replaced: %s", str(error).strip().rpartition("\n")[2])
        ray.kill(worker)
        time.sleep(min(FIRST_PAUSE * 2 ** (self._deaths - 1), LAST_PAUSE))
        self._start()


def _may_pass(error: ray.exceptions.RayError) -> bool:
    """Whether another worker may fare better."""
    if isinstance(error, ray.exceptions.RayTaskError):
        return isinstance(error.cause, StorageError)
    return not (isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed)
