"""Headless Chromium, told by its DevTools what to show."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
         "--hide-scrollbars", "--remote-debugging-port=0")  # fmt: skip
START_SECONDS = 60


@dataclass
class Tab:
    """A page in the browser. ``requests`` are the URLs that it asked for, ``errors`` what it complained about."""

    socket: Any
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    _ids: Any = field(default_factory=itertools.count)

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol."""
        number = next(self._ids)
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        answer = await self._until(lambda message: message.get("id") == number)
        result: dict[str, Any] = answer["result"]
        return result

    async def show(self, url: str) -> None:
        """Load it, to the end."""
        for domain in ("Page", "Network", "Runtime", "Log"):
            await self.ask(f"{domain}.enable")
        await self.ask("Page.navigate", url=url)
        await self._until(lambda message: message.get("method") == "Page.loadEventFired")

    async def look(self, width: int, dark: bool, picture: Path) -> None:
        """See it in a window of that width, and take a picture of all of it."""
        await self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.ask("Emulation.setEmulatedMedia", features=[scheme])
        taken = await self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        picture.write_bytes(base64.b64decode(taken["data"]))

    async def value(self, expression: str) -> Any:
        """What JavaScript makes of it."""
        answer = await self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def _until(self, met: Any) -> dict[str, Any]:
        while True:
            message: dict[str, Any] = await self.socket.receive_json(timeout=60)
            method, told = message.get("method"), message.get("params", {})
            if method == "Network.requestWillBeSent":
                self.requests.append(told["request"]["url"])
            elif method == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(told["exceptionDetails"]))
            elif method == "Log.entryAdded" and told["entry"]["level"] in ("warning", "error"):
                self.errors.append(told["entry"]["text"])
            if met(message):
                assert "error" not in message, message
                return message


@asynccontextmanager
async def browsing(folder: Path) -> AsyncIterator[Tab]:
    """A browser with a profile of its own in ``folder``, which is gone afterwards."""
    with _started(folder):
        port = await _port(folder / "DevToolsActivePort")
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                tabs = json.loads(await answer.text())
            address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            async with session.ws_connect(address, max_msg_size=0) as socket:
                yield Tab(socket)


@contextmanager
def _started(folder: Path) -> Iterator[None]:
    assert CHROMIUM is not None
    command = [CHROMIUM, *QUIET, f"--user-data-dir={folder}", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
        try:
            yield
        finally:
            browser.terminate()


async def _port(said: Path) -> int:
    deadline = time.monotonic() + START_SECONDS
    while not (said.exists() and said.read_text().strip()):
        assert time.monotonic() < deadline, "Chromium has not come up"
        await asyncio.sleep(0.05)
    return int(said.read_text().split()[0])
