"""Checkpoints for the Trainer of Hugging Face Transformers.

callback = DistckptCallback("/shared/run-7")
trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])  # args say when to save, and what to keep
callback.train(trainer)  # instead of trainer.train()
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from distckpt.checkpoint import Checkpoint, PerRank, RandomState
from distckpt.errors import DistckptError
from distckpt.export.manager import ExportCheckpointManager
from distckpt.format.json.report import MAX_METRICS
from distckpt.format.names import checkpoint_folder
from distckpt.integrations.carrying import CarriedRun, Saving, first_rank, metric_numbers, number_or_none
from distckpt.keep import BestN, LatestN, Rule
from distckpt.reader import latest_checkpoint, load
from distckpt.storage import canonical, join, placed_among, scratch_folder
from distckpt.training.hooks import CheckpointSaverListener
from distckpt.world import find_world

try:
    from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerState
    from transformers.trainer_utils import SaveStrategy
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

    With neither ``save_steps`` nor ``save_secs`` the TrainingArguments count: Trainer saves when it would, by
    ``save_strategy`` and ``save_steps``, but through this callback; ``save_total_limit`` says how many stay, if no
    option says what to keep, one of them for the best model; ``load_best_model_at_end`` restores that in the end, and
    ``state.best_model_checkpoint`` has its path.
    With one of them set ``save_strategy="no"``, else Trainer saves as well.

    A step is saved once Trainer has logged and evaluated it, with the metrics of that evaluation, for ``BestN``. Then,
    while it is being written, the ``on_save`` of the other callbacks is called. On one of ``stop_signals`` on any rank,
    all ranks save and stop after the same step, and ``train`` returns.

    ``train`` begins and resumes; Trainer's own ``train`` can begin, but a callback cannot move it: it raises
    RuntimeError if the directory has a checkpoint of another step. For one process, DDP, and what has DTensors for
    parameters, as FSDP2 does; DeepSpeed, which owns its state, is refused.

    Args:
        directory, and further keywords: as for CheckpointManager.
        save_steps, save_secs: how often, in steps or in seconds; one of them, or none.
        listeners: called around every save.
        stop_signals: what asks for save-and-stop; () for none. Caught in the main thread only.
        export: make of each checkpoint, beside the training, a folder that ``from_pretrained`` takes:
            ``AutoModel.from_pretrained(f"{distckpt.latest_export(directory)}/model")``.

    Raises:
        ValueError, TypeError: wrong arguments. ImportError: to export needs safetensors.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        save_steps: int | None = None,
        save_secs: float | None = None,
        *,
        listeners: Sequence[CheckpointSaverListener] = (),
        stop_signals: Sequence[signal.Signals] = (signal.SIGTERM,),
        export: bool = False,
        **manager_options: Any,
    ) -> None:
        self._saving = Saving(directory, save_steps, save_secs, listeners, stop_signals, manager_options)
        self._export = export
        self._trainer: Any = None
        self._best: str | None = None
        self._known: tuple[int, dict[str, float]] = (0, {})
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
        if self not in trainer.callback_handler.callbacks:
            raise ValueError("this callback is not among the trainer's: give it to Trainer(callbacks=[...])")
        state = self._saved_state(None)
        self._trainer = trainer
        try:
            with _replaced(trainer, _load_best_model=self._load_best, **self._own_saves(trainer)):
                while True:
                    try:
                        return _train_from(trainer, self._without_best(state), arguments)
                    except _ElsewhereError as elsewhere:
                        state = self._saved_state(elsewhere.path)
        finally:
            self._trainer = None
            self._abandon()

    def _without_best(self, state: dict[str, Any] | None) -> dict[str, Any] | None:
        """Trainer looks for the best model among local folders, so it is told of it when that is over."""
        if state is None or self._saving.has_schedule:
            return state
        self._best = state["best_model_checkpoint"]
        return {**state, "best_model_checkpoint": None}

    def _own_saves(self, trainer: Any) -> dict[str, Callable[..., object]]:
        """What saves in Trainer's place, where the TrainingArguments say when."""
        if self._saving.has_schedule:
            return {}
        if trainer.args.save_strategy == SaveStrategy.NO:
            raise ValueError(
                "nothing says when to save: give save_steps or save_secs to the callback, or another save_strategy than "
                '"no" to TrainingArguments'
            )
        return {"_save_checkpoint": self._save}

    def _save(self, model: Any, trial: Any) -> None:
        """Trainer saves."""
        if self._run is not None:
            state = self._trainer.state
            if state.best_global_step == state.global_step:
                state.best_model_checkpoint = self._path(state.global_step)
            self._run.save()

    def _path(self, step: int) -> str:
        name = self._saving.options.get("checkpoint_name", "ckpt")
        return join(canonical(self._saving.directory), checkpoint_folder(name, step))

    def _load_best(self) -> None:
        """Trainer wants the best model, and nothing that comes after is saved."""
        state, trainer = self._trainer.state, self._trainer
        if self._saving.has_schedule:  # it is one of Trainer's own checkpoints
            self._finish()
            type(trainer)._load_best_model(trainer)
        else:
            state.best_model_checkpoint = self._finish(_best(trainer.args)) or state.best_model_checkpoint
            logger.info("the model is that of %s, which is best", state.best_model_checkpoint)

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
        if self._trainer is None and not self._saving.has_schedule:
            raise ValueError(
                "where TrainingArguments say when to save, call callback.train(trainer), not trainer.train()"
            )
        callbacks = () if self._trainer is None else self._trainer.callback_handler.callbacks
        kept, self._known = _KeptState(state, callbacks, args.process_index), (0, {})

        def metrics() -> dict[str, float]:
            step, known = self._known
            return known if step == state.global_step else {}

        self._run = run = CarriedRun(
            _exporting(_saving(self._saving, args), kwargs["model"] if self._export else None),
            _checkpoint(kept, **kwargs),
            lambda: int(state.global_step),
            metrics,
            lambda: self._tell_others(args, state, control),
        )
        if run.restored is not None:
            if kept.step != state.global_step:
                elsewhere = _ElsewhereError(run.restored, kept.step, state.global_step)
                self._abandon()
                raise elsewhere
            self._rewind = _Rewind(in_epoch=state.epoch % 1 != 0)
            state.best_model_checkpoint = self._best or state.best_model_checkpoint
        run.begin()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What was found out about this step goes with it if it is saved."""
        step, known = self._known
        best = {args.metric_for_best_model, f"eval_{args.metric_for_best_model}"}
        found = {**(known if step == state.global_step else {}), **metric_numbers(kwargs["metrics"])}
        found = dict(sorted(found.items(), key=lambda one: one[0] not in best))
        self._known = state.global_step, dict(itertools.islice(found.items(), MAX_METRICS))

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
                control.should_save |= not self._saving.has_schedule and args.save_strategy != SaveStrategy.EPOCH
        return control

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save, and leave, if this is the last log before a stop."""
        if self._stopping and self._saving.has_schedule:
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

    def _finish(self, best: BestN | None = None) -> str | None:
        run, self._run, self._stopping = self._run, None, False
        return None if run is None else run.finish(best)

    def _tell_others(self, args: Any, state: Any, control: Any) -> None:
        """Trainer itself does so where it says when to save."""
        if self._trainer is not None and self._saving.has_schedule:
            self._trainer.callback_handler.on_save(args, state, control)

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
        return json.dumps({**dataclasses.asdict(self._state), "stateful_callbacks": states}, default=number_or_none)


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


def _train_from(trainer: Any, state: dict[str, Any] | None, arguments: dict[str, Any]) -> Any:
    """Have Trainer train from a state, which it takes from nowhere but a folder."""
    if state is None:
        return trainer.train(**arguments)
    # Trainer insists on weights in the folder; ours are restored when training begins, with the optimizer's state.
    with scratch_folder() as folder, _replaced(trainer, _load_from_checkpoint=lambda *_, **__: None):
        # Trainer's own saves want all that export a state to be there, and some may be new.
        known = {**_exported([*trainer.callback_handler.callbacks, trainer.control]), **state["stateful_callbacks"]}
        saved = TrainerState(**{**state, "stateful_callbacks": known})
        saved.train_batch_size = trainer.args.train_batch_size  # of this run, whose number of ranks may be another
        saved.save_to_json(f"{folder}/trainer_state.json")
        return trainer.train(resume_from_checkpoint=folder, **arguments)


def _saving(saving: Saving, args: Any) -> Saving:
    """With what the TrainingArguments say to keep, where nothing else does."""
    limit = args.save_total_limit
    if saving.has_schedule or {"max_to_keep", "keep_checkpoint_every_n_hours", "keep"} & saving.options.keys():
        return saving
    if limit is None or limit <= 0:
        return dataclasses.replace(saving, options={**saving.options, "max_to_keep": None})
    keep: Rule = LatestN(limit)
    if args.load_best_model_at_end:  # the best and the latest, never more than the limit unless that is 1
        keep = LatestN(max(1, limit - 1)) | _best(args)
    return dataclasses.replace(saving, options={**saving.options, "keep": keep})


def _exporting(saving: Saving, model: Any) -> Saving:
    """With a manager that exports the model, if there is one to export."""
    if model is None:
        return saving
    manager = functools.partial(ExportCheckpointManager, modules_to_export={"model": model})
    return dataclasses.replace(saving, manager=manager)


def _best(args: Any) -> BestN:
    """The rule that keeps what Trainer calls the best model."""
    metric = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    return BestN(1, metric, "max" if args.greater_is_better else "min")


@contextmanager
def _replaced(trainer: Any, **methods: Callable[..., object]) -> Iterator[None]:
    """Inside, Trainer calls these."""
    for name, method in methods.items():
        setattr(trainer, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(trainer, name)
