"""Memory runs out, or Ctrl-C comes, at any line of ranks and their coordinator: nobody waits, the next save works."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from distckpt.directory.log import read_tail
from distckpt.errors import DistckptError
from distckpt.storage import MemoryStore
from tests.support.pressure import Pressure
from tests.support.small_runs import Trainer, mount, mounting

CHOSEN = 30
PATIENCE = 20.0
LAST_LINES = ("_run_timer", "_work")
"""The loops that catch what everything else raises."""


@pytest.fixture(autouse=True)
def mounted(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.CRITICAL)
    with mounting():
        yield


@dataclass
class Story:
    """What became of a run: which saves were acknowledged, and what was raised."""

    pressure: Pressure
    saved: list[int] = field(default_factory=list)
    raised: list[str] = field(default_factory=list)


def play(at: int | None) -> Story:
    """Open, save, restore and save on, with a MemoryError at that line; then save without, close, and look."""
    store = MemoryStore()
    url = mount(store)
    with Pressure(("coordinator", "rank"), at, but=LAST_LINES) as pressure:
        story = Story(pressure)
        trainer = opened(url, story)
        for number in (1, 2, 3, 4):
            save(trainer, number, story)
            if number == 2:
                restore(trainer, story)
    assert trainer.save(9).exception(PATIENCE) is None, pressure.struck
    assert closes(trainer), pressure.struck
    active = [record.number for record in read_tail(store).state.active]
    assert active[-1] == 9, pressure.struck
    assert all(number in active or number < active[0] for number in story.saved), pressure.struck
    return story


def opened(url: str, story: Story) -> Trainer:
    """A manager; another one if the first could not be made."""
    try:
        return Trainer(url, max_to_keep=2, save_timeout=2)
    except (MemoryError, DistckptError) as error:
        story.raised.append(repr(error))
        return Trainer(url, max_to_keep=2, save_timeout=2)


def save(trainer: Trainer, number: int, story: Story) -> None:
    """Save, and wait until it is known what became of it."""
    try:
        error = trainer.save(number).exception(PATIENCE)
    except (MemoryError, DistckptError) as raised:
        error = raised
    except TimeoutError as hung:
        raise AssertionError(story.pressure.struck) from hung
    if error is None:
        story.saved.append(number)
    else:
        story.raised.append(repr(error))


def restore(trainer: Trainer, story: Story) -> None:
    """Restore, or not."""
    try:
        trainer.manager.restore()
    except (MemoryError, DistckptError) as error:
        story.raised.append(repr(error))


def closes(trainer: Trainer) -> bool:
    """Whether closing comes to its end, however."""
    over = threading.Event()

    def close() -> None:
        with contextlib.suppress(MemoryError, DistckptError):  # of a save of which nobody has been told that it failed
            trainer.manager.close()
        over.set()

    threading.Thread(target=close, daemon=True).start()
    return over.wait(PATIENCE)


@pytest.mark.timeout(240)
def test_memory_may_run_out_at_any_line(seed: int) -> None:
    quiet = play(None)
    assert quiet.saved == [1, 2, 3, 4]
    assert quiet.raised == []
    lines = quiet.pressure.lines
    assert lines > 5000
    stories = [play(at) for at in random.Random(seed).sample(range(1, lines), CHOSEN)]
    struck = [story.pressure.struck for story in stories]
    assert sum(map(bool, struck)) > 0.6 * CHOSEN, "what threads do may take more or fewer lines"
    assert len({place.partition(":")[0] for place in struck}) > 8


def interrupted(at: int | None) -> Pressure:
    """Save cold and warm, prepare and restore, with Ctrl-C at that line; the saves that follow work at once."""
    with Trainer(mount(MemoryStore()), save_timeout=600, buffers=2) as trainer:
        trainer.saved(1)
        with Pressure(("coordinator", "rank"), at, error=KeyboardInterrupt) as pressure:
            try:
                trainer.manager.prepare()
                trainer.checkpoint.state["new"] = 1
                trainer.manager.save(2)
                trainer.manager.save(3)
                trainer.manager.restore()
            except KeyboardInterrupt:
                assert pressure.struck
        for number in (4, 5):
            assert trainer.save(number).exception(PATIENCE) is None, pressure.struck
        with contextlib.suppress(DistckptError):  # of the save that was interrupted
            trainer.manager.wait()
    return pressure


@pytest.mark.timeout(240)
def test_ctrl_c_may_come_at_any_line(seed: int) -> None:
    lines = interrupted(None).lines
    assert lines > 1000
    struck = [interrupted(at).struck for at in random.Random(seed).sample(range(1, lines), CHOSEN)]
    assert sum(map(bool, struck)) > 0.6 * CHOSEN
    assert len({place.partition(":")[0] for place in struck}) > 8
