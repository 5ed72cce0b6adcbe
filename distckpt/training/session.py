"""Training loops that drive hooks: one for loops that somebody else runs, and one that runs the steps itself."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any, TypeVar

from distckpt.checkpoint import Checkpoint
from distckpt.errors import AgreementError
from distckpt.threads.coordinator import CLEAN_STOPS, Coordinator
from distckpt.training.agreement import Agreement
from distckpt.training.hooks import (
    CheckpointSaverHook,
    SessionRunArgs,
    SessionRunContext,
    SessionRunHook,
    SessionRunValues,
    beginning,
)

logger = logging.getLogger(__name__)

_AFTER_STEP, _LATE, _ASKED, _END = range(4)
_Result = TypeVar("_Result")


class HookedLoop:
    """Drives hooks through a training loop that somebody else runs; every rank alike.

    The loop calls, on every rank: ``begin``; around every step ``before_step`` and ``after_step``, and then it asks
    ``should_stop``; ``end`` if all went well; ``close`` whatever happened.

    To stop, and to save by the clock, are decisions of all ranks, taken in ``after_step`` by one all-reduce of 40 bytes
    between the hosts' CPUs: 0.4 to 1.3 ms on two ranks over gloo on one host of two cores, nearly all of it gloo's
    all-reduce by itself (``benchmarks/run.py --only agreeing``). A wish of any rank to stop (``request_stop``, a hook's, a
    listener's, ``coord``'s, a signal) stops all ranks after the same step; rank 0's clock says when a save is due. A
    second all-reduce follows only in steps in which listeners with an ``after_save`` were called, or if hooks other than
    CheckpointSaverHook have an ``after_run``, so that what they wish is heard in the same step too. A world of one
    sends nothing.

    When a rank dies, closes its loop, or runs another step than the others, their next agreement raises AgreementError.
    What happens in collectives of the training itself is up to torch.distributed.

    Hooks that save write into the log, when their manager is closed after a clean ``end``, that training is over; not if
    a stop signal, or ``interrupt``, has ended the loop. Whoever follows the checkpoints comes to an end by that.

    Args:
        hooks: the same on every rank, in the same order.
        global_step: how many steps the training has behind it: a callable, a tensor (better not on a GPU, which would
            be waited for at every step), or an object that ``int()`` takes. None: the loop has no global step.
        checkpoint: what hooks save that have no saver of their own.
        coord: given to ``after_create_session``; its stop is a wish of this rank to stop. Without one the loop has its
            own, and ``close`` joins its threads and raises what they raised.
        stop_signals: from ``begin`` to ``close`` these signals make this rank wish to stop, and do nothing else; only
            in the main thread. The last checkpoint is saved by ``end``, within the time that the sender gives.
        stop_grace_period_secs: how long ``close`` waits for the threads of the loop's own ``coord``.

    Raises:
        TypeError: a global step that is a plain int.
    """

    def __init__(
        self,
        hooks: Sequence[SessionRunHook],
        global_step: Any,
        *,
        checkpoint: Checkpoint | None = None,
        coord: Coordinator | None = None,
        stop_signals: Sequence[signal.Signals] = (),
        stop_grace_period_secs: float = 120.0,
    ) -> None:
        if isinstance(global_step, int):
            raise TypeError("a plain int never changes: give a callable, a tensor, or an object that int() takes")
        self._hooks = tuple(hooks)
        self._global_step = global_step
        self._checkpoint = checkpoint
        self._own_coord = coord is None
        self._coord = coord if coord is not None else Coordinator()
        self._grace = stop_grace_period_secs
        self._signals = _StopSignals(stop_signals)
        self._agreement: Agreement | None = None
        self._context: SessionRunContext | None = None
        self._asked: list[SessionRunArgs | None] = []
        self._answers: list[tuple[bool, ...]] = []
        self._step_before = 0
        self._stop_wish = False
        self._interrupted = False
        self._end_agreed = False
        self._stop = False
        self._input_ended = False
        self._closed = False

    # ---- what hooks see ----------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This process among the ranks; 0 before ``begin``."""
        return self._agreement.rank if self._agreement is not None else 0

    @property
    def world_size(self) -> int:
        """How many ranks there are; 1 before ``begin``."""
        return self._agreement.world_size if self._agreement is not None else 1

    @property
    def global_step(self) -> int:
        """How many steps the training has behind it. RuntimeError if the loop was given no global step."""
        step = self._global_step
        if step is None:
            raise RuntimeError("this session has no global step: give it one, so that hooks know the step")
        return int(step() if callable(step) else step)

    @property
    def checkpoint(self) -> Checkpoint | None:
        """What is to be saved, if it was given."""
        return self._checkpoint

    def should_stop(self) -> bool:
        """Whether the loop is to end now; the same answer on all ranks. Always once it is closed."""
        self._stop = self._stop or self._closed or (self.world_size == 1 and self._wants_stop())
        return self._stop

    def request_stop(self) -> None:
        """Have all ranks stop after the same step: the one that runs now, or the next one if none does."""
        self._stop_wish = True

    def interrupt(self) -> None:
        """As ``request_stop``, but a later run goes on: as for a stop signal, the log does not say that training is over."""
        self._interrupted = True
        self.request_stop()

    @property
    def interrupted(self) -> bool:
        """Whether a stop signal, or ``interrupt``, ends the loop. In hooks' ``end`` the same on all ranks."""
        return self._interrupted or (self._signals.caught and not self._end_agreed)

    def any(self, *wishes: bool) -> tuple[bool, ...]:
        """For each wish: does any rank have it. Collective, and one more all-reduce."""
        return self._any(*wishes, place=self._place(_ASKED))

    # ---- what the loop calls -----------------------------------------------------------------------------------

    def begin(self) -> None:
        """``begin`` of every hook, then ``after_create_session``."""
        self._begin_hooks()
        self.recreated()

    def recreated(self) -> None:
        """``after_create_session`` of every hook, again after every recovery."""
        for hook in self._hooks:
            hook.after_create_session(self, self._coord)

    def before_step(self) -> None:
        """``before_run`` of every hook."""
        if self._before_run(SessionRunArgs()):
            raise RuntimeError("a hook feeds arguments to the step, but this loop does not run the steps itself")

    def after_step(self, results: object = None) -> None:
        """The ranks agree, then ``after_run`` of every hook; ``results`` is what the step returned."""
        self._agree()
        self._after_run(results)

    def end(self) -> None:
        """A clean end: ``end`` of every hook. Not to be called after an error.

        Raises the error that has stopped ``coord``, if one has; AgreementError if ranks are at different steps.
        """
        self._coord.raise_requested_exception()
        self._agree_on_the_end()
        for hook in self._hooks:
            hook.end(self)

    def close(self) -> None:
        """Let everything go; to be called whatever happened. Ranks that still step get an AgreementError."""
        self._closed = True
        with ExitStack() as last_first:
            last_first.callback(self._signals.restore)
            if self._own_coord:
                last_first.callback(self._stop_threads)
            for hook in self._hooks:
                last_first.callback(hook.close)
            if self._agreement is not None:
                last_first.callback(self._agreement.close)

    def _agree_on_the_end(self) -> None:
        try:
            self._interrupted = self._any(self.interrupted, place=self._place(_END))[0]
            self._end_agreed = True
        except AgreementError as error:
            if not self._input_ended:
                raise
            raise AgreementError(
                f"the input has come to its end on some ranks only, in the step after {self._step_before}, so there is "
                "no state of all ranks to save. Let the ranks agree before each step: session.any(batch is None)"
            ) from error

    # ---- one step ----------------------------------------------------------------------------------------------

    def _begin_hooks(self) -> None:
        self._agreement = Agreement()
        self._signals.catch()
        with beginning(self):
            for hook in self._hooks:
                hook.begin()

    def _before_run(self, original: SessionRunArgs) -> dict[str, Any]:
        """``before_run`` of every hook; the arguments that they feed to the step."""
        self._check_open()
        self._step_before = self._step_or_0()
        self._context = context = SessionRunContext(self, original)
        self._asked = [hook.before_run(context) for hook in self._hooks]
        feeds: dict[str, Any] = {}
        for asked in self._asked:
            for name, value in (asked.feed_dict if asked is not None and asked.feed_dict else {}).items():
                if name in feeds or name in (original.feed_dict or {}):
                    raise RuntimeError(f"{name!r} is fed to the step twice")
                feeds[name] = value
        return feeds

    def _agree(self, ended: bool = False, failed: bool = False) -> tuple[bool, bool]:
        """All that is to be decided about this step, in one message; whether it ended, or failed, on any rank."""
        context = self._running()
        wishes = [hook.wishes(context) for hook in self._hooks]
        stop, ended, failed, *answers = self._any(
            self._wants_stop(), ended, failed, *(wish for each in wishes for wish in each),
            place=self._step_before << 2 | _AFTER_STEP,
        )  # fmt: skip
        self._stop = self._stop or stop or ended
        self._input_ended = ended
        rest = iter(answers)
        self._answers = [tuple(next(rest) for _ in each) for each in wishes]
        return ended, failed

    def _after_run(self, results: object) -> None:
        context = self._running()
        for hook, asked, answers in zip(self._hooks, self._asked, self._answers, strict=True):
            context.agreed = answers
            context.late |= _may_ask_to_stop(hook)
            fetches = asked.fetches if asked is not None else None
            hook.after_run(context, SessionRunValues(results if fetches is None else _fetch(fetches)))
        if context.late and not self._stop:
            self._stop = self._any(self._wants_stop(), place=self._place(_LATE))[0]
        self._context = None

    def _check_open(self) -> None:
        if self._agreement is None or self._closed:
            raise RuntimeError("this session has not begun" if self._agreement is None else "this session is closed")

    def _running(self) -> SessionRunContext:
        if self._context is None:
            raise RuntimeError("after_step comes once after each before_step")
        return self._context

    def _wants_stop(self) -> bool:
        return self._stop_wish or self._signals.caught or self._coord.should_stop()

    def _any(self, *wishes: bool, place: int) -> tuple[bool, ...]:
        if self._agreement is None:
            raise RuntimeError("this session has not begun")
        return self._agreement.any(*wishes, place=place)

    def _place(self, kind: int) -> int:
        return self._step_or_0() << 2 | kind

    def _step_or_0(self) -> int:
        return 0 if self._global_step is None else self.global_step

    def _stop_threads(self) -> None:
        self._coord.request_stop()
        self._coord.join(stop_grace_period_secs=self._grace, ignore_live_threads=True)


class TrainingSession(HookedLoop):
    """Runs training steps with hooks around them, as TensorFlow's MonitoredSession does.

    ::

        with TrainingSession(hooks, global_step, checkpoint=checkpoint) as session:
            while not session.should_stop():
                session.run(train_step, batch)

    The with-statement begins the hooks, restores the newest good checkpoint, then creates the session
    (``after_create_session``). It ends cleanly, with ``end`` of every hook and so with a last checkpoint, when its body
    comes to its end, or by StopIteration or OutOfRangeError: an input that has come to its end. Any other error leaves
    it without ``end``, as it is. Everything else of HookedLoop holds here too.

    When the input ends on one rank, all ranks stop after that step and call no ``after_run`` for it. If the others have
    counted a step then, there is no state of all ranks to save, and all of them get an AgreementError; if steps contain
    collectives of their own, they wait in them for the rank that has no input. So where inputs may end at different
    steps, agree before each: ``if session.any(batch is None)[0]: break``.

    Recovery. An error of a ``recoverable`` type out of a step (not out of a hook) is a decision of all ranks: at the
    end of every step they agree, in the same message, on whether it failed on any of them. If so, all of them restore
    the newest checkpoint, call ``after_create_session`` again, and run the step again with the same arguments. That
    works where the other ranks can still come to the end of their step: if one fails by itself before a collective of
    the step, the others are left waiting in that, and the failed rank for them, until the collective times out. Errors
    of another type, and dead ranks, are for what restarts the job. A step that always fails is run again for ever.

    Args:
        hooks, global_step, checkpoint, coord, stop_signals, stop_grace_period_secs: as for HookedLoop; SIGTERM stops by
            default.
        restore: called to restore the newest checkpoint, on all ranks, when the session begins and when it recovers;
            by default the first CheckpointSaverHook's manager does it. ``lambda: None`` restores nothing.
        recoverable: types of errors after which the newest checkpoint is restored and training goes on; none by default.

    Raises:
        ValueError: something is recoverable, but there is nothing to restore from.
    """

    def __init__(
        self,
        hooks: Sequence[SessionRunHook],
        global_step: Any,
        *,
        checkpoint: Checkpoint | None = None,
        coord: Coordinator | None = None,
        stop_signals: Sequence[signal.Signals] = (signal.SIGTERM,),
        restore: Callable[[], object] | None = None,
        recoverable: Sequence[type[Exception]] = (),
        stop_grace_period_secs: float = 120.0,
    ) -> None:
        super().__init__(
            hooks,
            global_step,
            checkpoint=checkpoint,
            coord=coord,
            stop_signals=stop_signals,
            stop_grace_period_secs=stop_grace_period_secs,
        )
        self._restore = restore
        self._savers = [hook for hook in self._hooks if isinstance(hook, CheckpointSaverHook)]
        self._recoverable: tuple[type[Exception], ...] = tuple(recoverable)
        self._expected: tuple[type[Exception], ...] = (*self._recoverable, *CLEAN_STOPS)
        if self._recoverable and restore is None and not self._savers:
            raise ValueError("recovery needs something to restore from: give a CheckpointSaverHook or restore")

    def begin(self) -> None:
        """``begin`` of every hook, restore the newest checkpoint, then ``after_create_session``."""
        self._begin_hooks()
        self._restore_newest(recovering=False)
        self.recreated()

    def run(self, step: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        """Run one step with the hooks around it and return what it returns.

        Raises what the step or a hook raises; RuntimeError if the session is to stop; AgreementError if another rank
        has died, left, or runs another step.
        """
        self._check_open()
        if self._stop:  # a request that came since the loop has asked lets this step run, as it does on many ranks
            raise RuntimeError("the session is to stop: no further step may run")
        while True:
            feeds = self._before_run(SessionRunArgs(step, kwargs))
            error: Exception | None = None
            result: Any = None
            try:
                result = step(*args, **kwargs, **feeds)
            except self._expected as raised:
                error = raised
            recoverable = isinstance(error, self._recoverable)
            ended, failed = self._agree(error is not None and not recoverable, recoverable)
            if failed:
                self._recover(error)
                continue
            if error is not None:
                raise error
            if not ended:
                self._after_run(result)
            return result  # type: ignore[no-any-return]

    def __enter__(self) -> TrainingSession:
        try:
            self.begin()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        clean = error is None or isinstance(error, CLEAN_STOPS)
        try:
            if clean:
                self.end()
        finally:
            self.close()
        return clean

    def _recover(self, error: Exception | None) -> None:
        reason = f"{type(error).__name__}: {error}" if error is not None else "another rank failed"
        logger.warning(
            "step after %d failed and is run again from the newest checkpoint: %s", self._step_before, reason
        )
        for hook in self._savers:
            hook.settle()
        self._restore_newest(recovering=True)
        self.recreated()

    def _restore_newest(self, recovering: bool) -> None:
        if self._restore is not None:
            self._restore()
        elif self._savers:
            self._savers[0].restore(self, recovering)


class _StopSignals:
    """Remembers that one of some signals has come, in place of what the process did with them before."""

    def __init__(self, signals: Sequence[signal.Signals]) -> None:
        self._signals = tuple(signals)
        self._before: dict[signal.Signals, Any] = {}
        self.caught = False

    def catch(self) -> None:
        if self._signals and threading.current_thread() is not threading.main_thread():
            logger.warning("signals can be caught in the main thread only, so %s will not stop it", self._signals)
            return
        for each in self._signals:
            self._before[each] = signal.signal(each, self._remember)

    def restore(self) -> None:
        for each, before in self._before.items():
            signal.signal(each, before if before is not None else signal.SIG_DFL)
        self._before = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.caught = True


def _may_ask_to_stop(hook: SessionRunHook) -> bool:
    """Whether ``after_run`` may ask for a stop without saying so by ``run_context.late``."""
    function = getattr(hook.after_run, "__func__", None)
    return function not in (SessionRunHook.after_run, CheckpointSaverHook.after_run)


def _fetch(fetches: Any) -> Any:
    if callable(fetches):
        return fetches()
    if isinstance(fetches, Mapping):
        return {name: _fetch(each) for name, each in fetches.items()}
    if isinstance(fetches, Sequence):
        return type(fetches)(_fetch(each) for each in fetches)  # type: ignore[call-arg]
    raise TypeError(f"fetches are callables, or lists, tuples and mappings of them, not {fetches!r}")
