"""A real browser without a screen, for tests: a Chromium that is installed, else the one that comes with QtWebEngine.

Both have the methods of browser_qt.Browser. Neither is in this process: what it does to itself, it does alone.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT = 30.0  # seconds


class NoBrowser(Exception):
    """And why."""


@contextlib.contextmanager
def browser(folder: Path, width: int = 1100, height: int = 700) -> Iterator[Any]:
    """The first one that starts; NoBrowser where none does. ``folder``: for what it writes."""
    reasons = []
    for kind in (InstalledChromium, QtWebEngine):
        try:
            found = kind(folder, width, height)
        except NoBrowser as error:
            reasons.append(str(error))
            continue
        try:
            yield found
        finally:
            found.close()
        return
    raise NoBrowser("; ".join(reasons))


class QtWebEngine:
    """Chromium as a library, from PyPI."""

    def __init__(self, folder: Path, width: int, height: int) -> None:
        script = Path(__file__).with_name("browser_qt.py")
        self._process = subprocess.Popen(
            [sys.executable, script, str(width), str(height)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "browser.log").open("w"),
            text=True,
        )
        if not self._answer():
            self.close()
            lines = (folder / "browser.log").read_text().splitlines() or ["it says nothing"]
            raise NoBrowser(f"QtWebEngine does not start: {lines[-1]}")

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self._process.stdin.write(json.dumps([name, *arguments], default=float) + "\n")
            self._process.stdin.flush()
            answer = self._answer()
            assert answer, f"the browser died at {name}"
            return json.loads(answer)

        return call

    def _answer(self) -> str:
        """A line, "" where there is none."""
        ready, _, _ = select.select([self._process.stdout], [], [], TIMEOUT)
        return self._process.stdout.readline() if ready else ""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class InstalledChromium:
    """Driven by the DevTools protocol through a pair of pipes: messages are JSON, with a zero byte behind each."""

    def __init__(self, folder: Path, width: int, height: int) -> None:
        path = next(filter(None, map(shutil.which, CHROMIUM)), None)
        if path is None:
            raise NoBrowser("no Chromium is installed")
        (inner_in, self._out), (self._in, inner_out) = os.pipe(), os.pipe()
        given = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (inner_in, inner_out)]
        log = os.open(folder / "browser.log", os.O_WRONLY | os.O_CREAT)
        switches = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe",
                    f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]  # fmt: skip
        actions = [
            (os.POSIX_SPAWN_DUP2, end, number) for end, number in ((given[0], 3), (given[1], 4), (log, 1), (log, 2))
        ]
        self._process = os.posix_spawn(path, [path, *switches, "about:blank"], dict(os.environ), file_actions=actions)
        for end in (inner_in, inner_out, log, *given):
            os.close(end)
        self._buffer, self._number, self._session = b"", 0, None
        self._loaded, self._said, self._requests = 0, [], {}
        try:
            target = self._ask("Target.createTarget", url="about:blank")["targetId"]
            self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self._ask(f"{domain}.enable")
            self._ask(
                "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
            )
        except (OSError, EOFError, TimeoutError, KeyError) as error:
            self.close()
            raise NoBrowser(f"{path} does not start: {error!r}") from None

    def load(self, path: str) -> bool:
        before = self._loaded
        self._ask("Page.navigate", url=Path(path).as_uri())
        end = time.monotonic() + TIMEOUT
        while self._loaded == before and time.monotonic() < end:
            self._receive(end)
        return self._loaded > before

    def run(self, script: str) -> Any:
        return self._ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def move(self, x: float, y: float) -> None:
        self._ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.pause(150)

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.pause(150)

    def key(self, name: str) -> None:
        code = {"Tab": 9, "Enter": 13, "Escape": 27}.get(name, 0)
        text = {"text": name} if len(name) == 1 else {}
        self._ask("Input.dispatchKeyEvent", type="keyDown", key=name, windowsVirtualKeyCode=code, **text)
        self._ask("Input.dispatchKeyEvent", type="keyUp", key=name, windowsVirtualKeyCode=code)
        self.pause(150)

    def shot(self, path: str) -> None:
        self.pause(200)
        Path(path).write_bytes(base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"]))

    def seen(self) -> dict[str, list[str]]:
        self.pause(50)
        return {"console": self._said, "requests": list(self._requests.values())}

    def pause(self, milliseconds: int) -> None:
        end = time.monotonic() + milliseconds / 1000
        with contextlib.suppress(TimeoutError):
            while True:
                self._receive(end)

    def close(self) -> None:
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            self._session = None
            self._ask("Browser.close")
        for end in (self._in, self._out):
            os.close(end)
        os.waitpid(self._process, 0)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {} if self._session is None else {"sessionId": self._session}
        os.write(self._out, json.dumps(message, default=float).encode() + b"\0")
        end = time.monotonic() + TIMEOUT
        while True:
            answer = self._receive(end)
            if answer.get("id") == self._number:
                return answer["result"]

    def _receive(self, end: float) -> dict[str, Any]:
        """The next message; TimeoutError at ``end``, EOFError where there will be none."""
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError
            data = os.read(self._in, 1 << 16)
            if not data:
                raise EOFError
            self._buffer += data
        text, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(text)
        about = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded += 1
            case "Runtime.consoleAPICalled":
                self._said.append(f"{about['type']}: {[each.get('value') for each in about['args']]}")
            case "Runtime.exceptionThrown":
                self._said.append(about["exceptionDetails"].get("exception", {}).get("description", "exception"))
            case "Log.entryAdded":
                self._said.append(about["entry"]["text"])
            case "Network.requestWillBeSent":
                self._requests[about["requestId"]] = about["request"]["url"]
            case "Network.loadingFailed" if about.get("blockedReason"):
                self._requests.pop(about["requestId"], None)  # refused by the page itself: it was never sent
        return message
