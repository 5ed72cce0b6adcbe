"""Stopping after so many steps, or at a step: TensorFlow's hook."""

from __future__ import annotations

from typing import Any

from distckpt.training.hooks import Session, SessionRunContext, SessionRunHook, current_session


class StopAtStepHook(SessionRunHook):
    """Stops all ranks after ``num_steps`` more steps, or when the global step has come to ``last_step``.

    ``num_steps`` is counted from the global step at which training begins, after a restore; a recovery does not count
    anew. As in TensorFlow a session that begins at or beyond the last step makes one more step. Ranks stop after the
    same step, and it costs no message of its own.

    ValueError unless exactly one of the two is given.
    """

    def __init__(self, num_steps: int | None = None, last_step: int | None = None) -> None:
        if num_steps is None and last_step is None:
            raise ValueError("give num_steps or last_step")
        if num_steps is not None and last_step is not None:
            raise ValueError("give num_steps or last_step, not both")
        self._num_steps = num_steps
        self._last_step = last_step

    def begin(self) -> None:
        """RuntimeError if the session has no global step."""
        _ = current_session().global_step

    def after_create_session(self, session: Session, coord: Any) -> None:
        """The first time, count from here."""
        if self._last_step is None:
            self._last_step = session.global_step + (self._num_steps or 0)

    def wishes(self, run_context: SessionRunContext) -> tuple[bool, ...]:
        """Ask for the stop, if it is time; the ranks agree on stops in any case."""
        if self._last_step is not None and run_context.session.global_step >= self._last_step:
            run_context.request_stop()
        return ()
