"""Checkpoints for the training function of a Ray Train job.

def train(config):
    checkpoint = distckpt.Checkpoint(model=model, optimizer=optimizer)
    with training_session(checkpoint, "/shared/run-7", save_steps=100, max_to_keep=5) as session:
        while session.global_step < config["steps"] and not session.should_stop():
            session.run(step)

TorchTrainer(train, ..., run_config=RunConfig(failure_config=FailureConfig(max_failures=3))).fit()
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from distckpt.checkpoint import Checkpoint
from distckpt.format import names
from distckpt.integrations.carrying import Saving, metric_numbers
from distckpt.rank.pending import PendingSave
from distckpt.reader import open as open_checkpoint
from distckpt.storage import canonical, join, open_store, placed_among, scratch_folder
from distckpt.training.hooks import CheckpointSaverListener
from distckpt.training.session import TrainingSession

try:
    import ray.train
except ImportError as missing:
    raise ImportError("distckpt.integrations.ray_train needs Ray Train: pip install 'distckpt[train]'") from missing

_Result = TypeVar("_Result")

_MARK = "+"
"""Between a checkpoint's name and its attempt: folders of Ray Train must differ, also where a number is saved again."""


def training_session(
    checkpoint: Checkpoint,
    directory: str | os.PathLike[str],
    save_steps: int | None = None,
    save_secs: float | None = None,
    *,
    listeners: Sequence[CheckpointSaverListener] = (),
    **manager_options: Any,
) -> RayTrainSession:
    """A session for the training function of Ray Train workers, to be used in a with statement, on all of them alike.

    On entering it restores the newest good checkpoint, whatever number of workers wrote it. When Ray Train replaces
    workers that died, the function begins anew, and so goes on from there. The directory is storage that all nodes
    share, apart from Ray Train's own ``storage_path``.

    Args:
        checkpoint: what to save.
        directory, and further keywords: as for CheckpointManager.
        save_steps, save_secs: how often, in steps or in seconds; exactly one of them.
        listeners: called around every save.

    Raises:
        ValueError, TypeError: wrong arguments.
    """
    saving = Saving(directory, save_steps, save_secs, listeners, (), manager_options)
    if not saving.has_schedule:
        raise ValueError("nothing says when to save: give save_steps or save_secs")
    return RayTrainSession(saving, checkpoint)


class RayTrainSession(TrainingSession):
    """Runs steps, counts them, saves and restores. A checkpoint's number is the number of steps behind it.

    Ray runs training functions beside the main thread, where no signal can be caught: ``request_stop`` on any worker
    ends the loop of all of them after the same step.
    """

    def __init__(self, saving: Saving, checkpoint: Checkpoint) -> None:
        self._count = 0
        self._options = placed_among(saving.options)
        self._told: PendingSave | None = None
        self._hook = hook = saving.hook()

        def restore() -> None:
            path = hook.get_saver(self).restore_or_initialize()
            self._count = 0 if path is None else _number(path)

        super().__init__([hook], lambda: self._count, checkpoint=checkpoint, stop_signals=(), restore=restore)

    def run(self, step: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        """Run one step, save it if it is time, and return what it returns."""

        def counted(*given: Any, **named: Any) -> _Result:
            result = step(*given, **named)
            self._count += 1
            return result

        return super().run(counted, *args, **kwargs)

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Give metrics to ``ray.train.report``, with ``global_step``. All workers together: Ray Train waits for all.

        If the session has saved this step, it is committed on return, and rank 0's metrics are reported of it, for ``keep``
        to judge it by. Ray Train gets a folder that stands for it, which ``CheckpointConfig`` scores and ``Result`` has:
        ``path_of`` says which checkpoint that is. Not at every step: Ray Train collects reports every two seconds, and a
        worker that is earlier waits for that. Raises what ``ray.train.report`` raises, and why the save failed.
        """
        reported = {"global_step": self.global_step, **metrics}
        pending = self._hook.saved_at(self.global_step)
        if pending is not None:
            pending.result()
        if pending is None or pending is self._told or self.rank:
            ray.train.report(reported)
            return
        self._told = pending  # once: each of Ray Train's folders has a name of its own
        with open_checkpoint(pending.path, storage_options=self._options) as reader, scratch_folder() as folder:
            of = reader.manifest
            reader.report(metric_numbers(reported))
            name = f"{names.checkpoint_folder(of.name, of.number)}{_MARK}{of.attempt}"
            about = json.dumps({"path": reader.path, "attempt": of.attempt})
            open_store(folder).put_if_absent("checkpoint.json", f"{about}\n".encode())
            ray.train.report(reported, ray.train.Checkpoint.from_directory(folder), checkpoint_dir_name=name)


def path_of(checkpoint: ray.train.Checkpoint, directory: str | os.PathLike[str]) -> str:
    """The path of the checkpoint in ``directory`` that a folder in Ray Train's storage stands for: of ``Result.checkpoint``.

    It goes by the folder's name. ValueError if that is none that ``RayTrainSession.report`` gives.
    """
    folder, mark, attempt = os.path.basename(checkpoint.path.rstrip("/")).partition(_MARK)
    if not mark or names.parse_checkpoint(folder) is None or not names.is_attempt(attempt):
        raise ValueError(f"{checkpoint.path} does not stand for a checkpoint of distckpt")
    return join(canonical(directory), folder)


def to_ray_checkpoint(path: str | os.PathLike[str]) -> ray.train.Checkpoint:
    """A committed checkpoint as Ray's Checkpoint: a reference to where it is; nothing is read or copied.

    Its ``to_directory`` and ``as_directory`` copy it to a folder that ``distckpt.load`` opens. Retention knows
    nothing of it. Given to ``ray.train.report`` it would be copied as a whole into Ray Train's own storage, which
    resuming does not need.
    """
    return ray.train.Checkpoint(os.fspath(path))


def _number(path: str) -> int:
    parsed = names.parse_checkpoint(path.rpartition("/")[2])
    if parsed is None:
        raise ValueError(f"{path} is not the path of a checkpoint")
    return parsed[1]
