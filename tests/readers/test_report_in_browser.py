"""What a person sees of the page that ``distckpt report`` writes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from click.testing import CliRunner

from distckpt.cli.app import main
from tests.support import browser
from tests.support.damage import flip
from tests.support.small_runs import attempt_folder, followed_run, run
from tests.support.told import tell

PICTURES = {"wide": (1200, False), "narrow": (400, False), "dark": (1200, True)}

OVERLAPPING = """[...document.querySelectorAll('svg')].flatMap(svg => {
  const all = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
  const outside = ([words, box]) => box.left < all.left - 1 || box.right > all.right + 1 || box.bottom > all.bottom + 1;
  const over = ([, one], [, two]) =>
    one.left < two.right && two.left < one.right && one.top + 3 < two.bottom && two.top + 3 < one.bottom;
  return [...texts.filter(outside).map(([words]) => words + ' is cut'),
    ...texts.flatMap((one, at) => texts.slice(at + 1).filter(two => over(one, two)).map(two => one[0] + ' on ' + two[0]))];
})"""
SMALLEST = "Math.min(...[...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height))"


@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.timeout(180)
def test_a_browser_shows_all_of_it_in_a_wide_a_narrow_and_a_dark_window(tmp_path: Path) -> None:
    followed_run(tmp_path / "run")
    run(tmp_path / "run", 4, 5)
    saves = [(4, 1.0, 0.5, 2.0, 1, 0.25), (5, 9.0, 0.1, 2.0, 0, 0.5)]
    tell(tmp_path / "run", 2, recent=saves, saves=2, stall=(2, 0.6, 0.5), seconds=1e4)
    flip(attempt_folder(tmp_path / "run", 5) / "manifest.json", 40)
    written = CliRunner().invoke(main, ["report", str(tmp_path / "run"), "-o", str(tmp_path / "page.html")])
    assert written.exit_code == 1
    asyncio.run(see(tmp_path))


async def see(folder: Path) -> None:
    url = (folder / "page.html").as_uri()
    papers = {}
    async with browser.browsing(folder / "profile") as tab:
        await tab.show(url)
        for name, (width, dark) in PICTURES.items():
            await tab.look(width, dark, folder / f"{name}.png")
            assert await tab.value("document.documentElement.scrollWidth") <= width, "it goes beyond the window"
            assert await tab.value(OVERLAPPING) == []
            assert await tab.value(SMALLEST) >= 8, "letters that nobody can read"
            papers[name] = await tab.value("getComputedStyle(document.body).backgroundColor")
        headings = await tab.value("[...document.querySelectorAll('h2')].map(each => each.textContent)")
        pictures = await tab.value("document.querySelectorAll('svg').length")
        tables = await tab.value("[...document.querySelectorAll('table')].map(each => each.rows.length)")
    assert tab.requests == [url]
    assert tab.errors == []
    assert papers["wide"] == papers["narrow"] != papers["dark"]
    assert headings == [
        "What is wrong",
        "Runs",
        "Checkpoints",
        "Metrics",
        "What saving costs",
        "What saves and restores took in run 2, on rank 0",
        "Whose shards landed last, in the last 2 saves of run 2",
        "Retention",
        "All checkpoints",
        "Groups of readers",
        "What groups have, and what failed",
        "Leases and pins",
        "Runs",
    ]
    assert pictures == 8
    assert min(tables) >= 2
