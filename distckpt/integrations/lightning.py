"""Checkpoints for the Trainer of Lightning.

callback = DistckptCallback("/shared/run-7", save_steps=100, max_to_keep=5)
trainer = Trainer(max_epochs=3, callbacks=[callback], enable_checkpointing=False)
trainer.fit(module, loader)  # again after a restart: goes on where the newest good checkpoint was saved
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from distckpt.checkpoint import Checkpoint, PerRank, RandomState
from distckpt.integrations.carrying import CarriedRun, Saving, storable
from distckpt.training.hooks import CheckpointSaverListener

try:
    from lightning.fabric.utilities.data import _set_sampler_epoch
    from lightning.pytorch import Callback
except ImportError as missing:
    raise ImportError("distckpt.integrations.lightning needs Lightning: pip install 'distckpt[lightning]'") from missing


class DistckptCallback(Callback):
    """Saves all that a Trainer's ``fit`` is made of while it trains, and resumes there on any number of ranks.

    Saved and restored: the module's state, all optimizers and learning rate schedulers, the precision plugin's state
    (gradient scaler), the loops' position, the states of other callbacks and of the datamodule, and the random
    numbers of each rank, if the number of ranks is the same. A callback's state that cannot be stored without pickle
    is left out, and the log says so. ``on_save_checkpoint`` is not called: keep what it would add in buffers or in
    ``get_extra_state``. A checkpoint's number is Lightning's ``global_step``.

    Resumed within an epoch, a loader with ``state_dict`` and ``load_state_dict`` is told where it was; any other is
    read again from the beginning of the epoch, in the same order if the number of ranks is the same, and the batches
    that were seen are dropped. The position is counted in batches, so keep the global batch when that number changes.

    On one of ``stop_signals`` on any rank, all ranks save and stop after the same step, whatever ``min_epochs`` says;
    Lightning then validates once more. For one process, DDP, and ModelParallelStrategy, whose parameters are DTensors;
    not for FSDPStrategy, whose parameters are flattened. Put this callback last, so that it saves what the others
    have done in the same step.

    Args:
        directory, and further keywords: as for CheckpointManager.
        save_steps, save_secs: how often, in steps or in seconds; exactly one of them.
        listeners: called around every save.
        stop_signals: what asks for save-and-stop; () for none. Caught in the main thread only.

    Raises:
        ValueError, TypeError: wrong arguments.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        save_steps: int | None = None,
        save_secs: float | None = None,
        *,
        listeners: Sequence[CheckpointSaverListener] = (),
        stop_signals: Sequence[signal.Signals] = (signal.SIGTERM,),
        **manager_options: Any,
    ) -> None:
        self._saving = Saving(directory, save_steps, save_secs, listeners, stop_signals, manager_options)
        self._run: CarriedRun | None = None
        self._place: _Place | None = None
        self._steps = 0
        self._in_step = False
        self._stopping = False

    # ---- what Lightning calls ----------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the run and restore the newest good checkpoint."""
        if not trainer.fast_dev_run:
            self._place = place = _Place(trainer, [each for each in trainer.callbacks if each is not self])
            checkpoint = _checkpoint(trainer, pl_module, place)
            self._run = CarriedRun(self._saving, checkpoint, lambda: int(trainer.global_step))
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
            self._settle(trainer)

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
