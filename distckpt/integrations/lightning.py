"""Checkpoints for the Trainer of Lightning.

callback = DistckptCallback("/shared/run-7", save_steps=100, max_to_keep=5)
trainer = Trainer(max_epochs=3, callbacks=[callback])
trainer.fit(module, loader)  # again after a restart: goes on where the newest good checkpoint was saved
"""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

from distckpt.checkpoint import Checkpoint, PerRank, RandomState
from distckpt.format.json.log import CheckpointRecord
from distckpt.format.json.report import MAX_METRICS
from distckpt.format.names import checkpoint_folder, parse_checkpoint
from distckpt.integrations.carrying import CarriedRun, Saving, best_record, metric_numbers, storable
from distckpt.keep import BestN, LatestN
from distckpt.reader import latest_checkpoint
from distckpt.storage import canonical, join, placed_among
from distckpt.training.hooks import CheckpointSaverListener

try:
    from lightning.fabric.utilities.data import _set_sampler_epoch
    from lightning.pytorch import Callback
    from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint
except ImportError as missing:
    raise ImportError("distckpt.integrations.lightning needs Lightning: pip install 'distckpt[lightning]'") from missing


logger = logging.getLogger(__name__)


class DistckptCallback(LightningCheckpoint):
    """Saves all that a Trainer's ``fit`` is made of while it trains, and resumes there on any number of ranks.

    Saved and restored: the module's state, all optimizers and learning rate schedulers, the precision plugin's state
    (gradient scaler), the loops' position, the states of other callbacks and of the datamodule, and the random
    numbers of each rank, if the number of ranks is the same. A callback's state that cannot be stored without pickle
    is left out, and the log says so. ``on_save_checkpoint`` is not called, and the log names the classes that have one:
    keep what it would add in buffers, in ``get_extra_state``, or in a callback's ``state_dict``. A checkpoint's number is
    Lightning's ``global_step``.

    Resumed within an epoch, a loader with ``state_dict`` and ``load_state_dict`` is told where it was; any other is
    read again from the beginning of the epoch, in the same order if the number of ranks is the same, and the batches
    that were seen are dropped. The position is counted in batches, so keep the global batch when that number changes.

    On one of ``stop_signals`` on any rank, all ranks save and stop after the same step, whatever ``min_epochs`` says;
    Lightning then validates once more. For one process, DDP, and ModelParallelStrategy, whose parameters are DTensors;
    not for FSDPStrategy, whose parameters are flattened. It takes ModelCheckpoint's place, and saves what the other
    callbacks have done in the same step.

    ``ckpt_path`` of ``fit``, ``validate``, ``test`` and ``predict`` may be a checkpoint of any directory, or "best". Given to
    ``fit`` it is where training begins, instead of at the newest of ``directory``.

    Args:
        directory, and further keywords: as for CheckpointManager.
        save_steps, save_secs: how often, in steps or in seconds; one of them. ``every_n_train_steps`` and
            ``train_time_interval``, a timedelta, are ModelCheckpoint's names for them.
        every_n_epochs: at the end of every so many epochs, which is 1 where nothing says how often.
        monitor, mode: the metric that is to be small ("min") or great ("max"). Checkpoints are committed with the metrics
            that were logged for their very step, those of a validation included that came before the save.
        save_top_k: so many of the best by ``monitor`` stay, and the newest; -1 keeps all. Not beside options that say
            what to keep.
        listeners: called around every save.
        stop_signals: what asks for save-and-stop; () for none. Caught in the main thread only.

    Raises:
        ValueError, TypeError: wrong arguments. ValueError in ``fit`` beside another of these callbacks.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        save_steps: int | None = None,
        save_secs: float | None = None,
        *,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int | None = None,
        listeners: Sequence[CheckpointSaverListener] = (),
        stop_signals: Sequence[signal.Signals] = (signal.SIGTERM,),
        **manager_options: Any,
    ) -> None:
        steps = _one("save_steps", save_steps, "every_n_train_steps", every_n_train_steps)
        interval = None if train_time_interval is None else train_time_interval.total_seconds()
        seconds = _one("save_secs", save_secs, "train_time_interval", interval)
        self._best = None if monitor is None else BestN(1, monitor, mode)
        options = _keeping(manager_options, self._best, save_top_k)
        self._saving = Saving(directory, steps, seconds, listeners, stop_signals, options)
        if self._saving.has_schedule and every_n_epochs is not None:
            raise ValueError("every_n_epochs is instead of steps and seconds, not beside them")
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, not {every_n_epochs!r}")
        self._every_n_epochs = every_n_epochs or 1
        self._wanted: str | None = None
        self._validated: tuple[int, frozenset[str]] = (-1, frozenset())
        self._before_validation: Mapping[str, Any] = {}
        self._run: CarriedRun | None = None
        self._place: _Place | None = None
        self._steps = 0
        self._in_step = False
        self._stopping = False

    # ---- what users of ModelCheckpoint ask it ------------------------------------------------------------------

    @property
    def best_model_path(self) -> str:
        """The path of the checkpoint that is best by ``monitor``, read from storage; "" if there is none."""
        record = self._best_record()
        return "" if record is None else self._path(record)

    @property
    def best_model_score(self) -> float | None:
        """The value of ``monitor`` of that checkpoint."""
        record = self._best_record()
        return None if record is None or self._best is None else record.metrics[self._best.metric]

    @property
    def last_model_path(self) -> str:
        """The path of the newest checkpoint, read from storage; "" if there is none."""
        return latest_checkpoint(self._saving.directory, storage_options=placed_among(self._saving.options)) or ""

    def _best_record(self) -> CheckpointRecord | None:
        if self._best is None:
            return None
        return best_record(self._saving.directory, self._saving.options, self._best)

    def _path(self, record: CheckpointRecord) -> str:
        return join(canonical(self._saving.directory), checkpoint_folder(record.name, record.number))

    # ---- what Lightning calls ----------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Paths of our checkpoints are for us to restore, not for Lightning. ValueError beside another of this class."""
        if sum(isinstance(each, DistckptCallback) for each in trainer.callbacks) > 1:
            raise ValueError(
                "two DistckptCallbacks in one Trainer: each would resume training from a directory of its own. Give one, and "
                "say by keep= all that is to be kept, as BestN(...) | EveryNumbers(...)"
            )
        connector, self._wanted = trainer._checkpoint_connector, None
        resume_start = connector.resume_start

        def resume(checkpoint_path: Any = None, *others: Any, **named: Any) -> None:  # 2.5 has no weights_only
            del connector.resume_start
            if checkpoint_path and _is_ours(checkpoint_path):
                self._wanted, checkpoint_path = os.fspath(checkpoint_path), None
                if self._run is not None and self._place is not None:  # some strategies have this after the fit's start
                    self._run.restore_from(self._wanted)
                    self._place.random, self._wanted = RandomState().state_dict(), None
            resume_start(checkpoint_path, *others, **named)

        connector.resume_start = resume

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Restore the model if that was asked for; while training, look what validation finds out."""
        self._before_validation = dict(trainer.callback_metrics)
        self._restore_model(trainer, pl_module)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Restore the model if that was asked for."""
        self._restore_model(trainer, pl_module)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Restore the model if that was asked for."""
        self._restore_model(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """What was found out is of this step. One within an epoch is saved here if validations say when."""
        if self._run is None or trainer.sanity_checking:
            return
        before = self._before_validation
        now = {name for name, value in trainer.callback_metrics.items() if before.get(name) is not value}
        self._validated = trainer.global_step, frozenset(now)
        if not self._saving.has_schedule and not trainer.is_last_batch and self._is_an_epoch_to_save(trainer):
            self._run.save()

    def _restore_model(self, trainer: Any, module: Any) -> None:
        if self._wanted is not None and self._run is None:
            wanted, self._wanted = self._wanted, None
            options = placed_among(self._saving.options)
            Checkpoint(model=module).restore(wanted, options, partial=not module.strict_loading, select="model")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the run and restore the newest good checkpoint."""
        if not trainer.fast_dev_run:
            self._place = place = _Place(trainer, [each for each in trainer.callbacks if each is not self])
            checkpoint = _checkpoint(trainer, pl_module, place)
            for kind in _with_own_hooks(trainer, pl_module):
                logger.warning(
                    "what %s.on_save_checkpoint would add is not saved: keep it in buffers or state_dict", kind
                )
            wanted, self._wanted = self._wanted, None
            self._run = CarriedRun(
                self._saving,
                checkpoint,
                lambda: int(trainer.global_step),
                lambda: self._metrics(trainer),
                wanted=wanted,
            )
            place.random = RandomState().state_dict()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the place in the data; training begins."""
        if self._run is not None and self._place is not None:
            self._place.find()
            self._steps, self._in_step, self._stopping = trainer.global_step, False, False
            self._run.begin()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Remember the random numbers that the order of the epoch's data comes from."""
        if self._run is not None and self._place is not None:
            self._place.begin_epoch()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A step begins with the first of the batches that it accumulates."""
        if self._run is not None and not self._in_step:
            self._run.before_step()
            self._in_step = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """If the batch ended a step, the ranks agree: save it, or not; stop, or not."""
        if self._run is None or trainer.global_step == self._steps:
            return
        self._steps, self._in_step = trainer.global_step, False
        self._run.decide()
        if self._run.should_stop():
            trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
            self._stopping = trainer.should_stop = True
        if not trainer.is_last_batch:
            self._settle(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """The last step of an epoch is saved here, from where Lightning's loops know how to go on."""
        if self._run is not None and trainer.is_last_batch:
            is_over = self._stopping or trainer.global_step == trainer.max_steps
            if not self._saving.has_schedule and self._is_an_epoch_to_save(trainer) and not is_over:
                self._run.save()
            self._settle(trainer)

    def _is_an_epoch_to_save(self, trainer: Any) -> bool:
        return int(trainer.current_epoch + 1) % self._every_n_epochs == 0

    def _metrics(self, trainer: Any) -> dict[str, float]:
        """What was logged for this very step."""
        step, of_validation = self._validated
        stale = frozenset() if step == trainer.global_step else of_validation
        found = metric_numbers({name: each for name, each in trainer.callback_metrics.items() if name not in stale})
        monitored = self._best.metric if self._best is not None else ""
        return dict(sorted(found.items(), key=lambda one: one[0] != monitored)[:MAX_METRICS])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the last step and leave."""
        self._finish()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave, if there was nothing to train."""
        self._finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Save nothing more and leave."""
        run, self._run = self._run, None
        if run is not None:
            run.close()

    def _settle(self, trainer: Any) -> None:
        # A last step within an epoch is saved now: on leaving it, Lightning's loops take the epoch for finished.
        if self._stopping or trainer.global_step == trainer.max_steps:
            self._finish()
        elif self._run is not None:
            self._run.settle()

    def _finish(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish()


def _one(name: str, value: Any, other: str, same: Any) -> Any:
    """What is said by one of two names."""
    if value is not None and same is not None:
        raise ValueError(f"{other} is {name} by another name: give one of them")
    return same if value is None else value


def _keeping(options: Mapping[str, Any], best: BestN | None, top: int | None) -> Mapping[str, Any]:
    """The options, with what ``save_top_k`` says."""
    said = {"max_to_keep", "keep_checkpoint_every_n_hours", "keep"} & options.keys()
    if top is not None and said:
        raise ValueError(f"save_top_k says what to keep, and so does {', '.join(sorted(said))}: give one of them")
    if top is not None and top != -1 and best is None:
        raise ValueError("save_top_k needs a monitor, by which some are better than others")
    if said or (best is None and top is None):
        return options
    if top == -1:
        return {**options, "max_to_keep": None}
    assert best is not None
    return {**options, "keep": BestN(1 if top is None else top, best.metric, best.mode) | LatestN(1)}


def _is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether a path is of a checkpoint of ours, and not of a file or folder of Lightning's."""
    theirs = os.path.isfile(path) or any(os.path.exists(os.path.join(path, each)) for each in ("meta.pt", ".metadata"))
    return not theirs and parse_checkpoint(canonical(path).rpartition("/")[2]) is not None


class _Place:
    """Where training is: Lightning's loops and the states of callbacks and datamodule; how to get there again."""

    def __init__(self, trainer: Any, callbacks: Sequence[Callback]) -> None:
        self.random: Mapping[str, Any] = RandomState().state_dict()
        """The random numbers of the step that was restored."""
        self._trainer = trainer
        self._callbacks = {each.state_key: each for each in callbacks}
        self._left_out: set[str] = set()
        self._drawing: dict[str, Any] = {"random": self.random, "iterates": False}
        self._seen_in_epoch: int | None = None
        self._loaders_told = False

    def state_dict(self) -> dict[str, Any]:
        data = self._trainer.datamodule
        return {
            "loops": self._trainer.fit_loop.state_dict(),
            "callbacks": self._callback_states(),
            "data": {} if data is None else data.state_dict(),
            "drawing": self._drawing,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._load_loops(saved["loops"])
        self._drawing = saved["drawing"]
        for key in self._callbacks.keys() & saved["callbacks"].keys():
            self._callbacks[key].load_state_dict(saved["callbacks"][key])
        if saved["data"]:
            self._trainer.datamodule.load_state_dict(saved["data"])

    def _callback_states(self) -> dict[str, Any]:
        asked = {key: each for key, each in self._callbacks.items() if key not in self._left_out}
        states = {key: state for key, each in asked.items() if (state := each.state_dict())}
        kept = storable(states)
        self._left_out |= states.keys() - kept.keys()  # told once, and not asked again
        return kept

    def _load_loops(self, saved: dict[str, Any]) -> None:
        loop, epochs = self._trainer.fit_loop, saved["epoch_progress"]["current"]
        loop.load_state_dict(saved)
        if epochs["processed"] < epochs["ready"]:
            self._loaders_told = "combined_loader" in saved["state_dict"]
            self._seen_in_epoch = loop.epoch_loop.batch_progress.current.ready
        else:
            # No epoch is to be restarted; with max_steps Lightning would think so, and count the last one twice.
            loop._restarting = loop.epoch_loop.restarting = False

    def begin_epoch(self) -> None:
        """An epoch begins. The first after a start has its iterator already; others make theirs after this."""
        loop = self._trainer.fit_loop
        has_iterator = getattr(loop, "is_resuming", False) or loop.epoch_loop.restarting
        iterates = self._trainer.current_epoch > 0 and not has_iterator
        self._drawing = {"random": RandomState().state_dict(), "iterates": iterates}

    def find(self) -> None:
        """Drop the batches that were seen of an unfinished epoch, unless the loaders have been told where they were."""
        if self._seen_in_epoch is not None:
            if not self._loaders_told:
                self._drop(self._trainer.fit_loop._data_fetcher, self._seen_in_epoch)
            RandomState().load_state_dict(self.random)

    def _drop(self, fetcher: Any, batches: int) -> None:
        for loader in fetcher.combined_loader.flattened:
            _set_sampler_epoch(loader, self._trainer.current_epoch)
        if self._drawing["random"]:
            RandomState().load_state_dict(self._drawing["random"])
        if self._drawing["iterates"]:
            iter(fetcher)
        for _ in range(batches):
            next(fetcher)
        fetcher.fetched -= batches  # Lightning adds those seen itself
        _reset_quietly(self._trainer.fit_loop.epoch_loop)


def _reset_quietly(loop: Any) -> None:
    """Lightning's next reset of ``loop`` does not warn that a loader was not told its place, which was made up for."""
    reset = loop.reset

    def quietly() -> None:
        del loop.reset
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*your dataloader is not resumable")
            reset()

    loop.reset = quietly


def _resized(values: list[Any], rank: int, world_size: int) -> Any:
    """Rank 0's place, without what only ranks of the old world can use: random numbers and the loaders' own places."""
    place = values[0]
    place["loops"]["state_dict"].pop("combined_loader", None)
    place["drawing"]["random"] = None
    return place


def _with_own_hooks(trainer: Any, module: Any) -> list[str]:
    """The classes that would add to a checkpoint of Lightning's by ``on_save_checkpoint``, which is not called."""
    others = [each for each in trainer.callbacks if not isinstance(each, LightningCheckpoint)]
    hooks = {type(each): getattr(each, "on_save_checkpoint", None) for each in (module, trainer.datamodule, *others)}
    return [kind.__name__ for kind, hook in hooks.items() if hook and not hook.__module__.startswith(_IDLE)]


_IDLE = ("lightning.pytorch.core.", "lightning.pytorch.callbacks.callback")
"""Where Lightning has such hooks that do nothing."""


def _checkpoint(trainer: Any, module: Any, place: _Place) -> Checkpoint:
    precision = trainer.precision_plugin
    return Checkpoint(
        model=module,
        **_numbered("optimizer", trainer.optimizers),
        **_numbered("lr_scheduler", [each.scheduler for each in trainer.lr_scheduler_configs]),
        **({"precision": precision} if precision.state_dict() else {}),
        trainer=PerRank(place, on_resize=_resized),
        random=PerRank(RandomState(), on_resize="drop"),
    )


def _numbered(name: str, objects: Sequence[Any]) -> dict[str, Any]:
    """One is called by the name alone."""
    if len(objects) == 1:
        return {name: objects[0]}
    return {f"{name}_{at}": each for at, each in enumerate(objects)}
