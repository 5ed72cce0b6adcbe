"""Coordinator and LooperThread in one process: what TensorFlow's do, and where these do better."""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import distckpt
from distckpt import Coordinator, LooperThread
from distckpt.errors import OutOfRangeError
from distckpt.threads import coordinator as threads
from tests.support import opcodes

SOON = 20.0
"""Seconds within which something happens that takes milliseconds, however busy the machine is."""


class EndOfFileError(OutOfRangeError):
    """A subclass of a clean type."""


@contextlib.contextmanager
def holding() -> Iterator[Callable[[str], threading.Thread]]:
    """Starts threads that run until the block ends."""
    over = threading.Event()

    def start(name: str) -> threading.Thread:
        thread = threading.Thread(target=over.wait, args=(60,), name=name, daemon=True)
        thread.start()
        return thread

    yield start
    over.set()


def seconds_of(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def raised(error: BaseException) -> BaseException:
    """The error as it is when it has been raised and caught."""
    with contextlib.suppress(type(error)):
        raise error
    return error


# ---- a stop -------------------------------------------------------------------------------------------------------------


def test_the_public_names() -> None:
    assert distckpt.Coordinator.__module__ == "distckpt.threads.coordinator"
    assert distckpt.LooperThread is LooperThread


def test_a_stop_is_seen_by_everyone() -> None:
    coord = Coordinator()
    assert not coord.should_stop()
    assert not coord.wait_for_stop(0)
    assert not coord.wait_for_stop(-5.0)
    assert not coord.wait_for_stop(0.001)
    woken: list[bool] = []
    waiter = threading.Thread(target=lambda: woken.append(coord.wait_for_stop()))
    waiter.start()
    coord.request_stop()
    waiter.join(SOON)
    assert woken == [True]
    assert coord.should_stop()
    assert coord.wait_for_stop(-1)
    assert coord.wait_for_stop(1e300)
    coord.raise_requested_exception()
    coord.join([])


def test_an_error_is_recorded_and_join_raises_that_very_one() -> None:
    coord = Coordinator()
    error = raised(ValueError("first"))
    coord.request_stop(error)
    assert coord.should_stop()
    for again in (coord.raise_requested_exception, coord.join, coord.join, coord.raise_requested_exception):
        with pytest.raises(ValueError, match="first") as caught:
            again()
        assert caught.value is error
        assert [entry.name for entry in caught.traceback].count("raised") == 1
        assert len(caught.traceback) < 6, "the traceback grows from one time to the next"
    assert coord.joined


def test_an_error_in_three_parts() -> None:
    coord = Coordinator()
    error = raised(KeyError("in parts"))
    parts = (KeyError, error, error.__traceback__)
    coord.request_stop(parts)
    with pytest.raises(KeyError, match="in parts") as caught:
        coord.join()
    assert caught.value is error


def test_an_exception_that_is_not_being_handled_is_recorded_as_itself() -> None:
    coord = Coordinator()
    error = OSError("never raised")
    coord.request_stop(error)
    with pytest.raises(OSError, match="never raised") as caught:
        coord.join()
    assert caught.value is error


@pytest.mark.parametrize("nonsense", [(1, 2), (None, None, None), "text", (ValueError, ValueError), (1, "x", None)])
def test_what_is_no_error_is_recorded_as_a_value_error(nonsense: Any) -> None:
    coord = Coordinator()
    coord.request_stop(nonsense)
    assert coord.should_stop()
    with pytest.raises(ValueError, match="request_stop takes an exception"):
        coord.join()


def test_the_first_request_wins_and_later_errors_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    coord = Coordinator()
    first = ValueError("first")
    coord.request_stop(first)
    coord.request_stop(first)
    assert caplog.records == []
    coord.request_stop(RuntimeError("second"))
    coord.request_stop()
    with pytest.raises(ValueError, match="first"):
        coord.join()
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "RuntimeError: second" in caplog.text


def test_a_plain_request_before_an_error_makes_the_stop_clean(caplog: pytest.LogCaptureFixture) -> None:
    coord = Coordinator()
    coord.request_stop()
    coord.request_stop(raised(RuntimeError("too late")))
    coord.join()
    coord.raise_requested_exception()
    assert "RuntimeError: too late" in caplog.text
    assert "in raised" in caplog.text, "its traceback is there too"


@pytest.mark.parametrize(
    ("types", "error", "clean"),
    [
        (None, OutOfRangeError("over"), True),
        (None, EndOfFileError("over"), True),
        (None, StopIteration(), True),
        (None, ValueError("x"), False),
        ([ValueError], ValueError("x"), True),
        ({ValueError, KeyError}, KeyError("x"), True),
        ((LookupError,), KeyError("x"), True),
        ((KeyError,), LookupError("x"), False),
        ([ValueError], OutOfRangeError("over"), False),
        ([], OutOfRangeError("over"), False),
        ((), StopIteration(), False),
    ],
)
@pytest.mark.parametrize("in_parts", [False, True])
def test_clean_types_stop_without_an_error(types: Any, error: Exception, clean: bool, in_parts: bool) -> None:
    coord = Coordinator(types)
    coord.request_stop((type(error), error, None) if in_parts else error)
    assert coord.should_stop()
    if clean:
        coord.join()
    else:
        with pytest.raises(type(error)):
            coord.join()


def test_clean_types_may_come_from_any_iterable() -> None:
    coord = Coordinator(kind for kind in (KeyError, ValueError))
    for error in (ValueError("x"), KeyError("x")):
        coord.request_stop(error)
        assert coord.should_stop()
        coord.join()
        coord.clear_stop()


def test_when_all_are_joined_an_error_comes_out_where_it_is_reported() -> None:
    coord = Coordinator()
    coord.join([])
    assert coord.joined
    with pytest.raises(ValueError, match="nobody"):
        coord.request_stop(ValueError("nobody would hear of it"))
    with pytest.raises(KeyError):
        coord.request_stop((KeyError, KeyError("x"), None))
    assert not coord.should_stop()
    coord.request_stop(OutOfRangeError("clean"))
    assert coord.should_stop()
    coord.join()


def test_clear_stop_starts_anew() -> None:
    coord = Coordinator()
    with holding() as start:
        coord.register_thread(start("left over"))
        coord.request_stop(ValueError("x"))
        coord.clear_stop()
        assert not coord.should_stop()
        coord.raise_requested_exception()
        coord.request_stop()
        with pytest.raises(RuntimeError, match="left over"):
            coord.join(stop_grace_period_secs=0)
    assert coord.joined
    coord.clear_stop()
    assert not coord.joined
    coord.request_stop(KeyError("new"))
    with pytest.raises(KeyError, match="new"):
        coord.join()


# ---- signal handlers ----------------------------------------------------------------------------------------------------


HANDLERS = """
import faulthandler, signal, sys, threading
from distckpt import Coordinator

faulthandler.dump_traceback_later(20, exit=True)
how = sys.argv[1]
forever = threading.Thread(target=threading.Event().wait, daemon=True)
forever.start()
for number in range(500):
    coord = Coordinator()
    signal.signal(signal.SIGALRM, lambda *_: coord.request_stop())
    signal.setitimer(signal.ITIMER_REAL, 0.0002 + number % 10 * 0.00005)
    if how == "wait":
        while not coord.wait_for_stop(0.00002):
            pass
    elif how == "look":
        while not coord.should_stop():
            coord.wait_for_stop(0)
    else:
        coord.join([forever], stop_grace_period_secs=0, ignore_live_threads=True)
    assert coord.should_stop()
"""


@pytest.mark.parametrize("how", ["wait", "look", "join"])
def test_a_signal_handler_may_request_a_stop_whatever_it_interrupts(how: str) -> None:
    command = [sys.executable, "-c", HANDLERS, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def stopped_by_handler_at(step: int, call: Callable[[Coordinator], object]) -> tuple[Coordinator, bool]:
    """``call`` with a Coordinator, on which an error is requested just before the given step of the code."""
    coord, error, left = Coordinator(), KeyError("handler"), step

    def handler(*_: object) -> None:
        coord.request_stop(error)
        assert coord.should_stop()
        assert coord.wait_for_stop()

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != threads.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                sys.settrace(None)
                signal.raise_signal(signal.SIGALRM)
        return trace

    before, tracing = signal.signal(signal.SIGALRM, handler), sys.gettrace()
    opcodes.settrace(trace)
    try:
        call(coord)
    finally:
        sys.settrace(tracing)
        signal.signal(signal.SIGALRM, before)
    return coord, left <= 0


def test_a_handler_that_comes_between_any_two_steps_of_a_request_leaves_one_error() -> None:
    own, step, reached, winners = ValueError("own"), 0, True, set()
    while reached:
        step += 1
        coord, reached = stopped_by_handler_at(step, lambda coord: coord.request_stop(own))
        for _ in range(2):
            with pytest.raises((ValueError, KeyError)) as caught:
                coord.join()
            winners.add(caught.type)
    assert step > 20
    assert winners == {ValueError, KeyError}


def test_a_handler_that_comes_between_any_two_steps_of_waiting_ends_it() -> None:
    step, reached = 0, True
    while reached:
        step += 1
        coord, reached = stopped_by_handler_at(step, lambda coord: coord.wait_for_stop(0.05))
        with pytest.raises(KeyError) if reached else contextlib.nullcontext():
            coord.join()
    assert step > 10


# ---- stop_on_exception --------------------------------------------------------------------------------------------------


def test_stop_on_exception_reports_and_goes_on() -> None:
    coord = Coordinator()
    after = []
    with coord.stop_on_exception():
        pass
    assert not coord.should_stop()
    with coord.stop_on_exception():
        raise ValueError("inside")
    after.append("reached")
    assert coord.should_stop()
    with pytest.raises(ValueError, match="inside"):
        coord.join()
    assert after == ["reached"]


def test_stop_on_exception_and_a_clean_type() -> None:
    coord = Coordinator()
    with coord.stop_on_exception():
        next(iter(()))
    assert coord.should_stop()
    coord.join()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), SystemExit("text")])
def test_what_is_to_end_the_program_is_reported_and_goes_on_up(error: BaseException) -> None:
    coord = Coordinator()
    with pytest.raises(type(error)), coord.stop_on_exception():
        raise error
    assert coord.should_stop()
    with pytest.raises(type(error)) as caught:
        coord.join()
    assert caught.value is error


@pytest.mark.parametrize("code", [None, 0])
def test_an_exit_without_an_error_is_a_plain_stop(code: int | None) -> None:
    coord = Coordinator([])
    with pytest.raises(SystemExit), coord.stop_on_exception():
        sys.exit(code)
    assert coord.should_stop()
    coord.join()


def test_a_generator_that_is_closed_stops_nothing() -> None:
    coord = Coordinator()

    def reading() -> Iterator[int]:
        with coord.stop_on_exception():
            yield 1
        yield 2

    rows = reading()
    assert next(rows) == 1
    rows.close()
    assert not coord.should_stop()


@pytest.mark.parametrize("kind", [ValueError, StopIteration])
def test_stop_on_exception_when_all_are_joined(kind: type[Exception]) -> None:
    coord = Coordinator([])
    coord.join([])
    with pytest.raises(kind, match="comes out"), coord.stop_on_exception():
        raise kind("comes out")


# ---- join ---------------------------------------------------------------------------------------------------------------


def test_threads_that_end_by_themselves_are_no_stop() -> None:
    coord = Coordinator()
    go = threading.Event()
    threads = [threading.Thread(target=go.wait) for _ in range(3)]
    coord.register_thread(threads[0])
    coord.register_thread(threads[0])
    for thread in threads:
        thread.start()
    joined = threading.Thread(target=coord.join, args=(threads[1:],))
    joined.start()
    joined.join(0.05)
    assert joined.is_alive()
    assert not coord.joined
    go.set()
    joined.join(SOON)
    assert not joined.is_alive()
    assert coord.joined
    assert not coord.should_stop()


def test_the_end_of_threads_is_noticed_at_once() -> None:
    """TensorFlow looks once a second before a stop, and after one at ever longer intervals."""
    began = time.monotonic()
    for number in range(30):
        coord = Coordinator()
        threads = [threading.Thread(target=time.sleep, args=(0.01,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        if number % 2:
            coord.request_stop()
        coord.join(threads)
        assert not any(thread.is_alive() for thread in threads)
    assert time.monotonic() - began < 15, "half a second for each, on a machine that has little time"


def test_join_waits_for_no_stop_that_never_comes_but_for_the_threads() -> None:
    coord = Coordinator()
    with holding() as start:
        thread = start("long")
        joined = threading.Thread(target=lambda: coord.join([thread], stop_grace_period_secs=0.01), daemon=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading, "excepthook", lambda _: None)
            joined.start()
            joined.join(0.2)
            assert joined.is_alive(), "the grace period begins with the stop"
            coord.request_stop(OSError())
            joined.join(SOON)
            assert not joined.is_alive()


def test_nothing_to_wait_for() -> None:
    coord = Coordinator()
    unstarted = threading.Thread(target=int)
    coord.register_thread(unstarted)
    assert seconds_of(coord.join) < SOON
    assert seconds_of(lambda: coord.join([])) < SOON
    coord.register_thread(threading.current_thread())
    assert seconds_of(coord.join) < SOON


@pytest.mark.parametrize("grace", [0.2, 1e-10, 0, -3])
def test_stragglers_are_named_after_the_grace_period(grace: float) -> None:
    coord = Coordinator()
    with holding() as start:
        coord.register_thread(start("reader"))
        coord.request_stop()
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=r"Coordinator stopped with threads still running: reader writer$"):
            coord.join([start("writer")], stop_grace_period_secs=grace)
        assert max(0.0, grace) <= time.monotonic() - began < SOON
    assert coord.joined


def test_stragglers_may_be_ignored_but_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    coord = Coordinator()
    with holding() as start:
        coord.request_stop()
        coord.join([start("reader")], stop_grace_period_secs=0, ignore_live_threads=True)
    assert "threads still running: reader" in caplog.text


def test_the_error_comes_before_the_stragglers(caplog: pytest.LogCaptureFixture) -> None:
    coord = Coordinator()
    with holding() as start:
        coord.request_stop(ValueError("the reason"))
        with pytest.raises(ValueError, match="the reason"):
            coord.join([start("reader")], stop_grace_period_secs=0)
    assert "threads still running: reader" in caplog.text


def test_what_join_has_waited_for_is_forgotten_and_what_came_later_is_not() -> None:
    coord = Coordinator()
    with holding() as start:
        coord.register_thread(start("early"))
        coord.request_stop()
        with pytest.raises(RuntimeError, match=r"early$"):
            coord.join(stop_grace_period_secs=0)
        coord.join(stop_grace_period_secs=0)
        coord.clear_stop()
        first, second = (threading.Thread(target=lambda: coord.wait_for_stop()) for _ in range(2))
        first.start()
        coord.register_thread(first)
        joined = threading.Thread(target=coord.join)
        joined.start()
        while not any(thread.name == "distckpt-join" for thread in threading.enumerate()):
            time.sleep(0.001)
        coord.register_thread(start("late"))
        coord.request_stop()
        joined.join(SOON)
        assert not joined.is_alive()
        with pytest.raises(RuntimeError, match=r"running: late$"):
            coord.join([second], stop_grace_period_secs=0)


def test_the_first_of_many_errors_at_once_wins_for_all() -> None:
    coord = Coordinator()
    ready = threading.Barrier(8)
    errors = [ValueError(f"error {number}") for number in range(8)]

    def fail(error: Exception) -> None:
        with coord.stop_on_exception():
            ready.wait(SOON)
            raise error

    threads = [threading.Thread(target=fail, args=(error,)) for error in errors]
    for thread in threads:
        thread.start()
    found = []
    for _ in range(3):
        with pytest.raises(ValueError) as caught:
            coord.join(threads)
        found.append(caught.value)
    assert found[0] in errors
    assert found == [found[0]] * 3


# ---- LooperThread -------------------------------------------------------------------------------------------------------


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="coord must be a Coordinator"):
        LooperThread("coord", 1.0)  # type: ignore[arg-type]
    for wrong in ({"args": (1,)}, {"kwargs": {"a": 1}}):
        with pytest.raises(ValueError, match="for a target"):
            LooperThread(Coordinator(), 1.0, **wrong)  # type: ignore[arg-type]
    assert LooperThread(Coordinator(), None, args=(), kwargs={}).daemon
    with pytest.raises(ValueError, match="silence_timeout"):
        Coordinator(silence_timeout=0)


def test_a_looper_is_a_daemon_thread_that_registers_itself() -> None:
    class Kind(Coordinator):
        """A subclass is a Coordinator too."""

    coord = Kind()
    looper = LooperThread(coord, 0.01, target=int, name="ticker")
    assert looper.daemon
    assert looper.name == "ticker"
    assert looper.ident is None
    assert not looper.is_alive()
    coord.join()
    looper = LooperThread(coord, None, target=time.sleep, args=(0.001,), name="ticker")
    looper.start()
    assert looper.is_alive()
    assert looper.ident
    with pytest.raises(RuntimeError):
        looper.start()
    with pytest.raises(RuntimeError):
        looper.daemon = False
    looper.join(0.01)
    assert looper.is_alive()
    coord.request_stop()
    coord.join()
    assert not looper.is_alive()


def test_loop_builds_starts_and_returns_it() -> None:
    coord = Coordinator()
    calls: list[Any] = []

    def target(*args: object, **kwargs: object) -> None:
        calls.append((args, kwargs))
        if len(calls) == 3:
            coord.request_stop()

    looper = LooperThread.loop(coord, 0.001, target, args=(1, "two"), kwargs={"three": 3})
    assert isinstance(looper, LooperThread)
    coord.join([looper])
    assert calls == [((1, "two"), {"three": 3})] * 3


@pytest.mark.parametrize("interval", [None, 0.001, 0, -1.0])
def test_the_parts_of_a_loop_are_called_in_order(interval: float | None) -> None:
    coord = Coordinator()
    calls = []

    class Looper(LooperThread):
        def start_loop(self) -> None:
            calls.append("start")

        def run_loop(self) -> None:
            calls.append("run")
            if calls.count("run") == 4:
                coord.request_stop()

        def stop_loop(self) -> None:
            calls.append("stop")

    Looper(coord, interval).start()
    coord.join()
    assert calls == ["start", "run", "run", "run", "run", "stop"]
    calls.clear()
    Looper(coord, interval).start()
    coord.join()
    assert calls == ["start", "stop"], "a stop that came before the thread"


@pytest.mark.parametrize("where", ["start", "run", "stop"])
def test_what_a_loop_raises_stops_everyone(where: str) -> None:
    coord = Coordinator()
    calls = []

    class Looper(LooperThread):
        def _did(self, what: str) -> None:
            calls.append(what)
            if what == where:
                raise ValueError(f"in {what}")

        def start_loop(self) -> None:
            self._did("start")

        def run_loop(self) -> None:
            self._did("run")
            coord.request_stop()

        def stop_loop(self) -> None:
            self._did("stop")

    other = LooperThread.loop(coord, None, coord.wait_for_stop, args=(0.01,))
    Looper(coord, None).start()
    if where == "stop":
        coord.join()  # the stop was requested, without an error, before stop_loop failed
    else:
        with pytest.raises(ValueError, match=f"in {where}"):
            coord.join()
    assert not other.is_alive()
    assert calls == {"start": ["start"], "run": ["start", "run"], "stop": ["start", "run", "stop"]}[where]


def test_a_clean_end_of_the_input_stops_everyone_without_an_error() -> None:
    coord = Coordinator()
    rows = iter(range(5))
    seen: list[int] = []
    LooperThread.loop(coord, None, lambda: seen.append(next(rows)))
    coord.join()
    assert coord.should_stop()
    assert seen == [0, 1, 2, 3, 4]


def test_a_stop_ends_the_waiting_at_once_and_interrupts_no_run() -> None:
    coord = Coordinator()
    began, go, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        go.wait(SOON)
        ended.set()

    LooperThread.loop(coord, 1000.0, work, name="working")
    called = threading.Event()
    LooperThread.loop(coord, 1000.0, called.set)
    assert began.wait(SOON), "the first call comes at once"
    assert called.wait(SOON)
    coord.request_stop()
    with pytest.raises(RuntimeError, match=r"running: working$"):
        coord.join(stop_grace_period_secs=0.2)
    go.set()
    assert ended.wait(SOON)


def test_a_looper_with_nothing_to_do_does_not_spin() -> None:
    coord = Coordinator()
    looper = LooperThread(coord, None)
    before = time.process_time()
    looper.start()
    looper.join(0.2)
    assert time.process_time() - before < 0.1
    assert looper.is_alive()
    coord.request_stop()
    coord.join()


class Clocked(Coordinator):
    """Waiting takes simulated time. Stops after ``most`` waits."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.now, self.most, self.waits = 100.0, most, 0

    def wait_for_stop(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.now += max(0.0, timeout)
        self.waits += 1
        return self.waits > self.most


def called_at(monkeypatch: pytest.MonkeyPatch, durations: list[float], interval: float, **how: Any) -> list[float]:
    """When a looper's runs begin, in simulated seconds since its start, if they take so long."""
    coord = Clocked(len(durations))
    monkeypatch.setattr("distckpt.threads.looper.time", SimpleNamespace(monotonic=lambda: coord.now))
    times = []

    def work() -> None:
        times.append(round(coord.now - 100.0, 6))
        coord.now += durations[len(times) - 1]

    LooperThread(coord, interval, work, **how).run()
    return times


def test_times_do_not_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    assert called_at(monkeypatch, [0.3, 0.9, 0.1, 0.0, 0.5], 1.0) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_missed_times_are_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = [3.5, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert called_at(monkeypatch, durations, 1.0) == [0.0, 3.5, 3.6, 3.7, 4.0, 5.0]


def test_missed_times_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = [3.5, 0.1, 1.0, 0.1, 2.0, 0.1]
    assert called_at(monkeypatch, durations, 1.0, skip_missed=True) == [0.0, 4.0, 5.0, 6.0, 7.0, 9.0]
    assert called_at(monkeypatch, [0.5, 0.5], 0, skip_missed=True) == [0.0, 0.5]


def test_the_clock_on_the_wall_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    coord = Coordinator()
    ticks = []
    monkeypatch.setattr(time, "time", lambda: 1e9 - 1e6 * len(ticks))
    LooperThread.loop(coord, 0.01, lambda: ticks.append(1) if len(ticks) < 5 else coord.request_stop())
    assert coord.wait_for_stop(SOON)
    coord.join()


def test_a_dropped_coordinator_is_collected() -> None:
    import gc
    import weakref

    coord = Coordinator()
    LooperThread.loop(coord, 0.001, int)
    coord.request_stop()
    coord.join()
    dropped = weakref.ref(coord)
    del coord
    gc.collect()
    assert dropped() is None


def test_a_looper_has_the_names_of_older_pythons() -> None:
    coordinator = Coordinator()
    looper = LooperThread.loop(coordinator, None, lambda: coordinator.wait_for_stop())
    assert looper.isAlive()
    coordinator.request_stop()
    coordinator.join()
    assert not looper.isAlive()
