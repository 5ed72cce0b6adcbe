"""The bar that shows how far something has come: on a terminal, if it is wanted, for as long as it takes."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch

import distckpt
from distckpt.terminal import bar as bars
from distckpt.terminal.bar import bar, pulse


class Screen(io.StringIO):
    """A terminal that remembers everything."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setenv("TERM", "xterm")


def test_several_are_shown_below_each_other_and_nothing_is_left_of_them() -> None:
    with redirect_stderr(Screen()) as screen:
        with bar("one") as first, bar("two") as second:
            first(1, 10)
            second(5, 10)
        with pulse("three"):
            pass
    for title in ("one", "two", "three"):
        assert title in screen.getvalue()
    assert bars._screen._progress is None


def test_what_is_not_wanted_or_over_soon_or_not_seen_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with redirect_stderr(Screen()) as screen:
        with bar("one", shown=False) as update:
            update(1, 10)
        monkeypatch.setattr(bars, "PATIENCE_SECONDS", 1000.0)
        with bar("two") as update:
            update(1, 10)
        with redirect_stderr(io.StringIO()) as file, pulse("three"):
            pass
    assert screen.getvalue() == file.getvalue() == ""


def test_a_manager_shows_its_first_save_and_restores_if_it_is_told_to(tmp_path: Path) -> None:
    checkpoint = distckpt.Checkpoint(weights=torch.ones(1000))
    for progress in (False, True):
        with (
            redirect_stderr(Screen()) as screen,
            distckpt.CheckpointManager(checkpoint, tmp_path, progress=progress) as manager,
        ):
            for number in (1, 2):
                manager.save(number)
            manager.restore()
        assert ("saving ckpt-1" in screen.getvalue()) == progress
        assert ("restoring ckpt-2" in screen.getvalue()) == progress
        assert "ckpt-2" not in screen.getvalue().replace("restoring ckpt-2", "")


def test_a_checkpoint_shows_what_it_restores_if_it_is_told_to(tmp_path: Path) -> None:
    checkpoint = distckpt.Checkpoint(weights=torch.ones(1000))
    with distckpt.CheckpointManager(checkpoint, tmp_path) as manager:
        manager.save(1)
    with redirect_stderr(Screen()) as screen:
        checkpoint.restore(tmp_path)
        assert screen.getvalue() == ""
        checkpoint.restore(tmp_path, partial=True, progress=True)
    assert "checking ckpt-1" in screen.getvalue()
    assert "restoring ckpt-1" in screen.getvalue()


def test_sizes_are_shown_as_everywhere_and_only_of_what_has_some() -> None:
    with redirect_stderr(Screen()) as screen, bar("bytes") as update:
        update(3 << 19, 3 << 20)
    assert " of 3.0 MiB" in screen.getvalue()
    with redirect_stderr(Screen()) as screen, bar("seconds", sized=False) as update:
        update(5, 10)
    assert "seconds" in screen.getvalue()
    assert " of " not in screen.getvalue()
