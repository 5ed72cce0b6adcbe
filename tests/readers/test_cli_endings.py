"""How the command line ends: 1 is for damage and for differences, and for nothing else."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from distckpt.cli import main
from distckpt.directory.lease import hold
from distckpt.directory.log import read_tail
from distckpt.storage import open_store
from tests.support.checkpoints import write_checkpoint
from tests.support.warm import ROOT

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def run(*args: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": None}).invoke(main, list(map(str, args)))


def program(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "distckpt.cli", *map(str, args)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for number in (1, 2):
        write_checkpoint(tmp_path / "run", number, {"step": number})
    return tmp_path / "run"


def ended(stdout: int, *args: str | Path, unbuffered: bool) -> tuple[int, str]:
    """The exit status of a program that prints there, and its errors."""
    environment = BUFFERED | ({"PYTHONUNBUFFERED": "1"} if unbuffered else {})
    done = subprocess.run(
        program(*args), stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", ["verify", "diff", "ls --json"])
@pytest.mark.parametrize("unbuffered", [True, False], ids=["unbuffered", "buffered"])
def test_a_pipe_that_nobody_reads_any_more_is_status_141_and_no_damage(
    directory: Path, command: str, unbuffered: bool
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        paths = [directory / "ckpt-1"] * 2 if command == "diff" else [directory]
        assert ended(writer, *command.split(), *paths, unbuffered=unbuffered) == (141, "")
    finally:
        os.close(writer)


def test_an_error_that_nobody_hears_keeps_its_exit_status(directory: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(program("ls", directory / "nowhere"), stderr=writer, cwd=ROOT, env=BUFFERED, check=False)
    finally:
        os.close(writer)
    assert done.returncode == 2


@pytest.mark.parametrize("command", ["ls", "ls --json"])
@pytest.mark.parametrize("unbuffered", [True, False], ids=["unbuffered", "buffered"])
def test_what_cannot_be_printed_is_one_sentence_and_status_2(directory: Path, command: str, unbuffered: bool) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        status, said = ended(full, *command.split(), directory, unbuffered=unbuffered)
    finally:
        os.close(full)
    assert (status, said) == (2, "Error: what it prints cannot be written: No space left on device\n")


@contextmanager
def at_a_terminal(*args: str | Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A program whose input and errors are a terminal, and our end of it."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(program(*args), stdin=theirs, stderr=theirs, cwd=ROOT, env=BUFFERED) as process:
        os.close(theirs)
        try:
            yield process, ours
        finally:
            process.kill()
            os.close(ours)


def read_until(terminal: int, words: bytes) -> bytes:
    said = b""
    while words not in said:
        said += os.read(terminal, 1024)
    return said


@pytest.mark.timeout(60)
def test_ctrl_c_is_status_130_and_no_damage(directory: Path) -> None:
    store = open_store(directory)
    with (
        hold(store, read_tail(store).state.active[0].attempt, "a reader"),
        at_a_terminal("rm", directory / "ckpt-1", "--wait", "-y") as (process, terminal),
    ):
        read_until(terminal, b"waiting for readers")
        process.send_signal(signal.SIGINT)
        read_until(terminal, b"Aborted!")
        assert process.wait() == 130
    assert (directory / "ckpt-1").exists()


@pytest.mark.timeout(60)
def test_who_is_asked_and_says_no_gets_status_130(directory: Path) -> None:
    with at_a_terminal("rm", directory / "ckpt-1", "--force") as (process, terminal):
        read_until(terminal, b"[y/N]")
        os.write(terminal, b"n\n")
        read_until(terminal, b"Aborted!")
        assert process.wait() == 130
    assert (directory / "ckpt-1").exists()


# ---- files to write --------------------------------------------------------------------------------------------------


def test_a_report_into_a_folder_that_is_not_there_is_one_sentence_and_status_2(directory: Path, tmp_path: Path) -> None:
    output = tmp_path / "nowhere" / "page.html"
    result = run("report", directory, "-o", output)
    assert (result.exit_code, result.stderr) == (2, f"Error: {output}: there is no folder {output.parent}\n")


def test_a_report_into_a_pipe_is_written_to_it_and_leaves_it_there(directory: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text(encoding="utf-8")), daemon=True)
    reader.start()
    assert run("report", directory, "-o", pipe).exit_code == 0
    assert pipe.is_fifo()
    reader.join(10)
    assert "ckpt-2" in got[0]


def test_a_report_replaces_the_file_behind_a_link_with_one_of_the_same_rights(directory: Path, tmp_path: Path) -> None:
    page, link = tmp_path / "page.html", tmp_path / "link.html"
    page.write_text("old")
    page.chmod(0o640)
    link.symlink_to(page)
    assert run("report", directory, "-o", link).exit_code == 0
    assert link.is_symlink()
    assert "ckpt-2" in page.read_text(encoding="utf-8")
    assert page.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ["link.html", "page.html", "run"]


def test_a_report_for_which_there_is_no_room_leaves_the_one_that_was_there(directory: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    limited = ["bash", "-c", 'ulimit -f 1; exec "$@"', "-", *program("report", directory, "-o", page)]
    environment = BUFFERED | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(limited, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert str(page) in done.stderr
    assert page.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["page.html", "run"]


def test_a_report_may_have_a_hidden_name(directory: Path, tmp_path: Path) -> None:
    assert run("report", directory, "-o", tmp_path / ".page.html").exit_code == 0
    assert "ckpt-2" in (tmp_path / ".page.html").read_text(encoding="utf-8")
