"""A real Chromium for tests, spoken to over its DevTools pipe: sizes, schemes, screenshots, and every request it makes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NEEDS_CHROMIUM = "ONECURVE_NEEDS_CHROMIUM"
_SECONDS = 120.0


def find_chromium() -> str:
    """The browser; without one the test is skipped, or fails where it has to be there."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        reason = "needs a browser: apt-get install chromium"
        if os.environ.get(NEEDS_CHROMIUM):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


class Page:
    """One page of a browser.

    Attributes:
        requests: the addresses of all that it has asked for.
    """

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer, self._rest, self._number = reader, writer, b"", 0
        self.requests: list[str] = []
        self._events: list[str] = []
        self._session: str | None = None
        [target] = [each for each in self.send("Target.getTargets")["targetInfos"] if each["type"] == "page"]
        attached = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """Call a method of the DevTools protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self) -> Any:
        until = time.monotonic() + _SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reader], [], [], max(0.0, until - time.monotonic()))
            chunk = os.read(self._reader, 1 << 20) if ready else b""
            assert chunk, "the browser has ended, or does not answer"
            self._rest += chunk
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        self._events.append(message.get("method", ""))
        return message

    def open(self, address: str) -> None:
        """Go to an address and wait until it and all that it loads is there."""
        self._events.clear()
        self.requests.clear()
        self.send("Page.navigate", url=address)
        while "Page.loadEventFired" not in self._events:
            self._receive()

    def show(self, width: int, scheme: str) -> None:
        """Be this wide, in CSS pixels, and "light" or "dark"."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def evaluate(self, script: str) -> Any:
        """What a script finds in the page. The page's own policy does not concern the browser's tools."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def take_screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        taken = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Page]:
    """A browser with one page, whose profile lies in a folder."""
    chromium = find_chromium()
    (from_us, to_it), (from_it, to_us) = os.pipe(), os.pipe()
    words = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe",
             "--no-first-run", f"--user-data-dir={folder}", "about:blank"]  # fmt: skip
    # Chromium reads from 3 and writes to 4.
    script = f'exec 3<&{from_us} 4>&{to_us}; exec "$@"'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", *words], pass_fds=(from_us, to_us), stderr=subprocess.DEVNULL
    )
    os.close(from_us)
    os.close(to_us)
    try:
        yield Page(from_it, to_it)
    finally:
        process.terminate()
        process.wait()
        os.close(from_it)
        os.close(to_it)
