"""``distckpt report`` and ``distckpt serve``."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import distckpt
from distckpt.cli.app import main
from distckpt.format.json.stats import SaveTook
from tests.support.checkpoints import commit_bare, write_checkpoint
from tests.support.small_runs import followed_run
from tests.support.told import tell
from tests.support.warm import ROOT

HOSTILE = "<script>alert(1)</script>&\"'"


class Page(HTMLParser):
    """What a browser makes of it: the words, the tags, and what is not closed in its place."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.awry: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.awry += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.awry.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def report(directory: Path, output: Path) -> Result:
    return CliRunner().invoke(main, ["report", str(directory), "-o", str(output)])


def test_a_page_shows_a_run_and_needs_nothing_else(tmp_path: Path) -> None:
    followed_run(tmp_path / "run")
    assert report(tmp_path / "run", tmp_path / "page.html").exit_code == 0
    source = (tmp_path / "page.html").read_text()
    page = Page(source)
    assert page.awry == []
    assert {"ckpt-3", "newest", "1.25", "loss, by number", "eval", "at alice <1>", "closed"} <= {*page.words}
    assert not {"script", "link", "img", "iframe"} & {*page.tags}
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in source
    assert re.findall(r"(?:src|href)=|url\(|@import", source) == []


def test_what_others_have_written_is_words_and_nothing_else(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    with next(distckpt.watch(tmp_path, group="eval", mode="all", timeout=0, max_attempts=1)) as checkpoint:
        checkpoint.report({"loss": 1.0})
        checkpoint.reject(HOSTILE)
    assert report(tmp_path, tmp_path / "page.html").exit_code == 0
    page = Page((tmp_path / "page.html").read_text())
    assert HOSTILE in page.words
    assert "script" not in page.tags
    assert page.awry == []


@pytest.mark.parametrize("values", [(-1.7e308, 1.7e308), (2.0**60,) * 2, (5e-324, 0.0), (-1.7e308,)])
def test_whatever_was_measured_has_its_place_on_the_page(tmp_path: Path, values: tuple[float, ...]) -> None:
    for number, value in enumerate(values, 1):
        with distckpt.open(write_checkpoint(tmp_path, number, {"step": number})) as checkpoint:
            checkpoint.report({"loss": value})
    tell(tmp_path, 1, began=2.0**37, seconds=1e-9, recent=(SaveTook(1, 1.0, 1.0, 1.0, 0, 0.0),) * 2)
    assert report(tmp_path, tmp_path / "page.html").exit_code == 0
    source = (tmp_path / "page.html").read_text()
    assert "loss, by number" in Page(source).words
    assert re.findall(r'="(?:-?inf|nan)', source) == []


def test_what_is_wrong_is_named_and_is_the_exit_status(tmp_path: Path) -> None:
    followed_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "ckpt-1")
    found = report(tmp_path / "run", tmp_path / "page.html")
    assert (found.exit_code, found.stderr) == (1, "ckpt-1 is in the log, and not on storage\n")
    words = Page((tmp_path / "page.html").read_text()).words
    assert "What is wrong" in words
    assert "ckpt-1 is in the log, and not on storage" in words
    nothing = report(tmp_path / "nowhere", tmp_path / "other.html")
    assert (nothing.exit_code, "nowhere" in nothing.stderr) == (2, True)
    assert not (tmp_path / "other.html").exists()


@pytest.mark.timeout(60)
def test_a_browser_gets_the_page_as_it_is_now(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    command = [sys.executable, "-u", "-m", "distckpt.cli", "serve", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout is not None
        (address,) = re.findall(r"http://127\.0\.0\.1:\d+/", serving.stdout.readline())
        assert "ckpt-1" in get(address)
        commit_bare(tmp_path, 2)
        assert "ckpt-2" in get(address)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"{address}../etc/passwd")
        serving.send_signal(signal.SIGINT)
    assert serving.returncode == 0


@pytest.mark.parametrize(("host", "reason"), [("127.0.0.1", "in use"), ("203.0.113.7", "Cannot assign")])
def test_a_place_where_it_cannot_listen_is_one_sentence_and_status_2(tmp_path: Path, host: str, reason: str) -> None:
    commit_bare(tmp_path, 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["serve", str(tmp_path), "--host", host, "--port", port])
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert result.stderr.startswith(f"Error: {host} port {port}: cannot listen there: ")
    assert reason in result.stderr
    assert "--port" in result.stderr


def get(address: str) -> str:
    with urllib.request.urlopen(address, timeout=30) as answer:
        content: str = answer.read().decode()
        return content
