"""One run of a trainer that somebody else wrote: its manager, its hook and its loop, opened and closed together."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from distckpt.checkpoint import Checkpoint
from distckpt.directory.log import read_tail
from distckpt.errors import EncodeError
from distckpt.format.json.log import CheckpointRecord
from distckpt.format.tree.tree import DictStep, flatten
from distckpt.format.tree.values import encode_value
from distckpt.keep import BestN, Pending
from distckpt.manager import CheckpointManager
from distckpt.rank.arguments import retention_of
from distckpt.rank.pending import PendingSave
from distckpt.state.objects import is_array
from distckpt.storage import canonical, open_store, placed_among
from distckpt.training.hooks import CheckpointSaverHook, CheckpointSaverListener, SecondOrStepTimer, Session
from distckpt.training.session import HookedLoop

logger = logging.getLogger(__name__)

Metrics: TypeAlias = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Saving:
    """Where and when a trainer's runs are saved, as the user said it: with neither steps nor seconds when ``save`` is called.

    ``options`` go to the CheckpointManager of each run. ValueError if both ``save_steps`` and ``save_secs`` are given,
    TypeError for an option that a CheckpointManager does not have, and either for what it would not keep checkpoints by.
    """

    directory: str | os.PathLike[str]
    save_steps: int | None
    save_secs: float | None
    listeners: Sequence[CheckpointSaverListener]
    stop_signals: Sequence[signal.Signals]
    options: Mapping[str, Any]
    manager: Callable[..., CheckpointManager] = CheckpointManager

    def __post_init__(self) -> None:
        if self.has_schedule:
            SecondOrStepTimer(self.save_secs, self.save_steps)
        given = inspect.signature(CheckpointManager).bind(None, self.directory, **self.options)
        given.apply_defaults()
        asked = given.arguments
        retention_of(asked["max_to_keep"], asked["keep_checkpoint_every_n_hours"], asked["keep"])

    def hook(self, metrics: Callable[[], Metrics] = dict, saved: Callable[[], object] = bool) -> RunHook:
        """The hook that restores and saves, with a CheckpointManager of its own for what its session has to save."""
        return RunHook(self, metrics, saved)

    @property
    def has_schedule(self) -> bool:
        """Whether it is said when to save."""
        return self.save_steps is not None or self.save_secs is not None


class RunHook(CheckpointSaverHook):
    """Makes its manager as the user said, and saves nothing at the beginning: that is untrained, or just restored."""

    def __init__(self, saving: Saving, metrics: Callable[[], Metrics], saved: Callable[[], object]) -> None:
        steps = saving.save_steps if saving.has_schedule else sys.maxsize
        super().__init__(saving.directory, saving.save_secs, steps, listeners=saving.listeners)
        self._options = saving.options
        self._manager = saving.manager
        self._metrics = metrics
        self._saved = saved

    def metrics(self, session: Session, step: int) -> Metrics:
        """What the trainer knows of the step."""
        return self._metrics()

    def saved_at(self, step: int) -> PendingSave | None:
        """The save of this step, if it was the last that was saved."""
        return self._last if self._last is not None and self._last.number == step else None

    def save(self, session: Session) -> None:
        """Save the step that there is now."""
        self._save(session, session.global_step)

    def restore_from(self, session: Session, path: str) -> str:
        """Restore this checkpoint, of whatever directory; its path."""
        saver, path = self.get_saver(session), canonical(path)
        if path.rpartition("/")[0] == saver.directory:
            return saver.restore(path)
        assert session.checkpoint is not None
        session.checkpoint.restore(path, placed_among(self._options))
        return path

    def restore_best(self, session: Session, rule: BestN) -> str | None:
        """Restore the model of the checkpoint that is best; its path, or None if none has the metric."""
        found = best_record(self._directory, self._options, rule)
        return None if found is None else self.get_saver(session).restore(found.number, select="model")

    def _save(self, session: Session, step: int) -> bool:
        before = self._last
        stops = super()._save(session, step)
        if self._last is not before:
            self._saved()
        return stops

    def get_saver(self, session: Session) -> CheckpointManager:
        """The manager, made when it is first asked for; closed with the hook."""
        if self._made is None:
            if session.checkpoint is None:
                raise RuntimeError("nothing to save: the session has no checkpoint")
            self._made = self._manager(session.checkpoint, self._directory, **self._options)
        return self._made

    def after_create_session(self, session: Session, coord: Any) -> None:
        """Count steps and seconds from here."""
        self._timer.update_last_triggered_step(session.global_step)


class CarriedRun(HookedLoop):
    """A loop that has restored its checkpoint; ``restored`` is the path of the one it found, or None.

    ``metrics`` says what is known of the step that is being saved, and ``saved`` is called when a save has begun.
    ``wanted`` is the path of the checkpoint to restore, of whatever directory; without one it is the newest good one.

    A step is carried in three parts, since trainers go on working on a step after they have counted it:
    ``before_step``; ``decide``, after which ``should_stop`` answers for this step; and ``settle``, which saves it.
    """

    def __init__(
        self,
        saving: Saving,
        checkpoint: Checkpoint,
        global_step: Callable[[], int],
        metrics: Callable[[], Metrics] = dict,
        saved: Callable[[], object] = bool,
        wanted: str | None = None,
    ) -> None:
        hook = saving.hook(metrics, saved)
        super().__init__([hook], global_step, checkpoint=checkpoint, stop_signals=saving.stop_signals)
        self._saver_hook = hook
        self._began_at: int | None = None
        self._decided = False
        try:
            self.restored = hook.restore(self) if wanted is None else hook.restore_from(self, wanted)
        except BaseException:
            self.close()
            raise

    def restore_from(self, path: str) -> None:
        """Restore this checkpoint, of whatever directory, instead of the one that was found."""
        self.restored = self._saver_hook.restore_from(self, path)

    def begin(self) -> None:
        """Training begins, at the step that was restored."""
        self._began_at = self.global_step
        super().begin()

    def decide(self) -> None:
        """A step has been counted: the ranks agree whether to save it, and whether to stop."""
        self._agree()
        self._decided = True

    def settle(self) -> None:
        """All that belongs to the step is done: save it if that was decided. Nothing to do if there was no step."""
        if self._decided:
            self._decided = False
            self._after_run(None)

    def save(self) -> None:
        """Save the step that there is now, on all ranks alike; what goes wrong later comes out at the next step."""
        self._saver_hook.save(self)

    def finish(self, best: BestN | None = None) -> str | None:
        """A clean end: the last step is saved and committed, then everything is let go.

        Before that ``model`` is restored from the ``best`` checkpoint that there is, whose path is returned.
        """
        try:
            self.settle()
            if self._began_at is not None and self.global_step > self._began_at:
                self.end()
            elif self._began_at is not None:  # what was restored is the end already
                self._agree_on_the_end()
                self._saver_hook.conclude(self)
            return None if best is None else self._saver_hook.restore_best(self, best)
        finally:
            self.close()


def best_record(directory: str | os.PathLike[str], options: Mapping[str, Any], rule: BestN) -> CheckpointRecord | None:
    """The checkpoint that the rule calls best; None if none has the metric, or there is none."""
    records = read_tail(open_store(directory, placed_among(options))).state.active
    best = rule.keeps(records, Pending())
    return next((record for record in records if record.attempt in best), None)


def metric_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those of a trainer's metrics that are one number."""
    found = {name: number_or_none(value) for name, value in metrics.items()}
    return {name: number for name, number in found.items() if number is not None}


def number_or_none(value: object) -> float | None:
    """A number of NumPy's or torch's, as Python has it; None for anything else."""
    try:
        return float(value)  # type: ignore[arg-type] # what float does not take is what the next line is for
    except (TypeError, ValueError, RuntimeError):
        return None


def first_rank(values: list[Any], rank: int, world_size: int) -> Any:
    """What rank 0 saved, for every rank of a world of another size."""
    return values[0]


def storable(states: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the states that can be saved without pickle. Others are left out, and the log says which and why."""
    found = {}
    for name, state in states.items():
        try:
            for leaf in flatten(state, is_array, (DictStep(name),)):
                if not is_array(leaf.value):
                    encode_value(leaf.value, leaf.key)
        except EncodeError as error:
            logger.warning("the state of %s is not saved: %s cannot be stored without pickle", name, error.key)
        else:
            found[name] = state
    return found
