"""A person at a screen: drives Debian's Chromium over its DevTools protocol, with real mouse and keyboard events.

https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import itertools
import json
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from websockets.sync.client import connect
from websockets.sync.connection import Connection

CHROMIUM = "chromium"
QUIET = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0",
]  # fmt: skip
PATIENCE = 120.0
"""Seconds until something that ought to appear is given up; no measure of speed."""


class Page:
    """One tab."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol; its result."""
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            answer = json.loads(self._connection.recv())
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])

    def open(self, address: str) -> None:
        """Goes to a page, afresh even where only the part behind # differs."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, condition: str, what: str = "") -> Any:
        """Until a JavaScript expression is truthy; its value, or true for an element."""
        until = time.monotonic() + PATIENCE
        script = f"(() => {{ const v = document.body && ({condition}); return v instanceof Node || v; }})()"
        while not (value := self.evaluate(script)):
            assert time.monotonic() < until, f"did not appear: {what or condition}\n{self.text()[:3000]}"
            time.sleep(0.3)
        return value

    def wait_for_text(self, text: str) -> None:
        """Until it is to be read on the page."""
        self.wait_for(f"document.body.innerText.includes({json.dumps(text)})", text)

    def text(self) -> str:
        """What is to be read on the page."""
        return str(self.evaluate("document.body ? document.body.innerText : ''"))

    def click(self, element: str) -> None:
        """A mouse click in the middle of what a JavaScript expression gives."""
        # Looked up anew until it stays where it is: pages move while they load.
        where: Any = None
        before: Any = True
        while where != before:
            before = where
            where = self.wait_for(
                f"(() => {{ const e = {element}; if (!e) return null; e.scrollIntoView({{block: 'center'}});"
                " const r = e.getBoundingClientRect();"
                " return r.width ? [r.x + r.width / 2, r.y + r.height / 2] : null; })()",
                element,
            )
            time.sleep(0.2)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Into whatever has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """A key by name, such as Enter."""
        code = {"Enter": 13, "Escape": 27, "Backspace": 8}[key]
        extra = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **extra)

    def screenshot(self, path: Path) -> None:
        """The window as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser(width: int = 1800, height: int = 1400) -> Iterator[Page]:
    """A fresh Chromium with one tab; it is gone with the block."""
    with tempfile.TemporaryDirectory() as profile:
        command = [CHROMIUM, *QUIET, f"--window-size={width},{height}", f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with connect(_first_tab(Path(profile, "DevToolsActivePort")), max_size=None, proxy=None) as connection:
                yield Page(connection)
        finally:
            process.terminate()
            process.wait()
            time.sleep(0.5)  # its children write into the profile to the last


def _first_tab(ports: Path) -> str:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with suppress(OSError, ValueError, StopIteration):
            port = ports.read_text().split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
                return str(next(tab for tab in json.load(answer) if tab["type"] == "page")["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise AssertionError(f"{CHROMIUM} did not open its DevTools port")
