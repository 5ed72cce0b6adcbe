"""Checkpoints for the Trainer of Hugging Face Transformers.

callback = DistckptCallback("/shared/run-7", save_steps=100, max_to_keep=5)
trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])  # args: save_strategy="no"
callback.train(trainer)  # instead of trainer.train()
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from distckpt.checkpoint import Checkpoint, PerRank, RandomState
from distckpt.errors import DistckptError
from distckpt.integrations.carrying import CarriedRun, Saving, first_rank
from distckpt.reader import latest_checkpoint, load
from distckpt.storage import placed_among, scratch_folder
from distckpt.training.hooks import CheckpointSaverListener
from distckpt.world import find_world

try:
    from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerState
except ImportError as missing:
    raise ImportError(
        "distckpt.integrations.transformers needs Transformers: pip install 'distckpt[transformers]'"
    ) from missing

logger = logging.getLogger(__name__)

NO_STATE = "null"


class DistckptCallback(TrainerCallback):
    """Saves a Trainer's whole state while it trains, stops all ranks together, and resumes on any number of ranks.

    Saved and restored: the model's and the optimizer's state (the same keys with DDP and without), the learning rate
    scheduler's, a gradient scaler's, Trainer's own state (step, epoch, log history, best metric, the states of
    callbacks that export one), and the random numbers of each rank, if the number of ranks is the same. Data that the
    model has seen is skipped as Trainer skips it (``ignore_data_skip``). Its position is counted in steps, so keep the
    global batch the same when the number of ranks changes. A checkpoint's number is the global step.

    A step is saved once Trainer has logged and evaluated it. On one of ``stop_signals`` on any rank, all ranks save
    and stop after the same step, and ``train`` returns. Set ``save_strategy="no"``, else Trainer saves as well.

    ``train`` begins and resumes; Trainer's own ``train`` can begin, but a callback cannot move it: it raises
    RuntimeError if the directory has a checkpoint of another step. For one process, DDP, and what has DTensors for
    parameters, as FSDP2 does; DeepSpeed, which owns its state, is refused.

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
        self._callbacks: Sequence[Any] = ()
        self._run: CarriedRun | None = None
        self._rewind: _Rewind | None = None
        self._stopping = False

    def train(self, trainer: Any, **arguments: Any) -> Any:
        """Train from where the newest good checkpoint was saved, or from the beginning if there is none.

        ``arguments`` go to ``trainer.train``, whose result is returned. Collective. ValueError if the trainer does
        not have this callback, TypeError for ``resume_from_checkpoint``, which is what this is instead of; else raises
        what ``trainer.train`` and CheckpointManager raise.
        """
        if "resume_from_checkpoint" in arguments:
            raise TypeError("what to resume from is found in the callback's directory")
        self._callbacks = trainer.callback_handler.callbacks
        if self not in self._callbacks:
            raise ValueError("this callback is not among the trainer's: give it to Trainer(callbacks=[...])")
        state = self._saved_state(None)
        try:
            while True:
                try:
                    return _train_from(trainer, state, arguments)
                except _ElsewhereError as elsewhere:
                    state = self._saved_state(elsewhere.path)
        finally:
            self._abandon()

    def _saved_state(self, path: str | None) -> dict[str, Any] | None:
        """Trainer's state as rank 0 reads it, on every rank; None if there is none to read."""
        world = find_world()
        text = self._read_state(path) if world.rank == 0 else NO_STATE
        state: dict[str, Any] | None = json.loads(text if world.share is None else world.share(text))
        return state

    def _read_state(self, path: str | None) -> str:
        options = placed_among(self._saving.options)
        try:
            path = path or latest_checkpoint(self._saving.directory, storage_options=options)
            return str(load(path, "trainer@0.state", options)) if path is not None else NO_STATE
        except (DistckptError, KeyError) as error:
            logger.warning("Trainer's state cannot be read before training begins: %s", error)
            return NO_STATE

    # ---- what Trainer calls ------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the run and restore the newest good checkpoint."""
        self._abandon()  # of a train that failed
        if getattr(args, "deepspeed", None):
            raise ValueError("DeepSpeed keeps the training state to itself: save with its own checkpoints")
        kept = _KeptState(state, self._callbacks, args.process_index)
        self._run = run = CarriedRun(self._saving, _checkpoint(kept, **kwargs), lambda: int(state.global_step))
        if run.restored is not None:
            if kept.step != state.global_step:
                elsewhere = _ElsewhereError(run.restored, kept.step, state.global_step)
                self._abandon()
                raise elsewhere
            self._rewind = _Rewind(in_epoch=state.epoch % 1 != 0)
        run.begin()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last epoch is done with."""
        self._settle()
        self._back(in_epoch=False)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last step has been logged and evaluated, so it can be saved; the next one begins."""
        self._settle()
        self._back(in_epoch=True)
        if self._run is not None:
            self._run.before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """The ranks agree. If they stop, Trainer logs what it has not logged yet, and the step is saved with that."""
        if self._run is not None:
            self._run.decide()
            if self._run.should_stop():
                self._stopping = control.should_training_stop = control.should_log = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save, and leave, if this is the last log before a stop."""
        if self._stopping:
            self._finish()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the last step and leave."""
        self._finish()

    def _settle(self) -> None:
        if self._run is not None:
            self._run.settle()

    def _back(self, in_epoch: bool) -> None:
        if self._rewind is not None and self._rewind.in_epoch == in_epoch:
            self._rewind.back()
            self._rewind = None

    def _finish(self) -> None:
        run, self._run, self._stopping = self._run, None, False
        if run is not None:
            run.finish()

    def _abandon(self) -> None:
        run, self._run, self._stopping, self._rewind = self._run, None, False, None
        if run is not None:
            run.close()


class _ElsewhereError(RuntimeError):
    """What was restored is not of the step at which Trainer begins."""

    def __init__(self, path: str, saved: int, here: int) -> None:
        super().__init__(
            f"{path} was saved at step {saved}, and Trainer begins at step {here}, where a callback cannot move it: "
            "call callback.train(trainer) instead of trainer.train()"
        )
        self.path = path


class _KeptState:
    """Trainer's state, as part of a checkpoint: all of it on rank 0, whose logs count; of the others the step."""

    def __init__(self, state: Any, callbacks: Sequence[Any], rank: int) -> None:
        self._state = state
        self._callbacks = callbacks
        self._rank = rank
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._state.global_step, "state": self._text() if self._rank == 0 else NO_STATE}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.step = saved["step"]

    def _text(self) -> str:
        # One text, not a tree: the log history grows, and a tree that changes would be planned anew at every save.
        states = {**self._state.stateful_callbacks, **_exported(self._callbacks)}
        return json.dumps({**dataclasses.asdict(self._state), "stateful_callbacks": states}, default=_number)


def _exported(objects: Iterable[Any]) -> dict[str, Any]:
    """The states of those that export one, as Trainer has them in its own."""
    exporting: list[Any] = [each for each in objects if isinstance(each, ExportableState)]
    states: Any = TrainerState(stateful_callbacks=exporting).stateful_callbacks
    return dict(states)


class _Rewind:
    """Random numbers as they were saved. Trainer draws some while it finds its place, so they are put back there."""

    def __init__(self, in_epoch: bool) -> None:
        self.in_epoch = in_epoch
        self._state = RandomState().state_dict()

    def back(self) -> None:
        RandomState().load_state_dict(self._state)


def _checkpoint(kept: _KeptState, model: Any, optimizer: Any, lr_scheduler: Any, **_: Any) -> Checkpoint:
    scaler = getattr(optimizer, "scaler", None)
    return Checkpoint(
        model=model,
        optimizer=getattr(optimizer, "optimizer", optimizer),  # out of Accelerate's wrapper
        lr_scheduler=lr_scheduler,
        trainer=PerRank(kept, on_resize=first_rank),
        random=PerRank(RandomState(), on_resize="drop"),
        **({} if scaler is None else {"scaler": scaler}),
    )


def _number(value: object) -> float | None:
    """A number of NumPy's or torch's, as Python has it; anything else that JSON does not know is left out."""
    try:
        return float(value)  # type: ignore[arg-type] # what float does not take is what the next line is for
    except (TypeError, ValueError, RuntimeError):
        return None


def _train_from(trainer: Any, state: dict[str, Any] | None, arguments: dict[str, Any]) -> Any:
    """Have Trainer train from a state, which it takes from nowhere but a folder."""
    if state is None:
        return trainer.train(**arguments)
    with scratch_folder() as folder, _weights_elsewhere(trainer):
        # Trainer's own saves want all that export a state to be there, and some may be new.
        known = {**_exported([*trainer.callback_handler.callbacks, trainer.control]), **state["stateful_callbacks"]}
        saved = TrainerState(**{**state, "stateful_callbacks": known})
        saved.train_batch_size = trainer.args.train_batch_size  # of this run, whose number of ranks may be another
        saved.save_to_json(f"{folder}/trainer_state.json")
        return trainer.train(resume_from_checkpoint=folder, **arguments)


@contextmanager
def _weights_elsewhere(trainer: Any) -> Iterator[None]:
    """Trainer insists on weights in the folder; ours are restored when training begins, with the optimizer's state."""
    trainer._load_from_checkpoint = lambda *_, **__: None
    try:
        yield
    finally:
        del trainer._load_from_checkpoint
