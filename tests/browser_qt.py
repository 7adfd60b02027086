"""A browser in a process of its own: Chromium as QtWebEngine, on no screen. One JSON command a line, one JSON answer."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["QTWEBENGINE_DISABLE_SANDBOX"] = "1"  # which does not run as root; nothing but our own page is opened
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--disable-gpu"

from PyQt6.QtCore import QEventLoop, QPointF, Qt, QTimer, QUrl
from PyQt6.QtGui import QKeyEvent, QMouseEvent
from PyQt6.QtWebEngineCore import QWebEnginePage, QWebEngineProfile, QWebEngineUrlRequestInterceptor
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

TIMEOUT_MS = 20_000
KEYS = {"Tab": Qt.Key.Key_Tab, "Enter": Qt.Key.Key_Return, "Escape": Qt.Key.Key_Escape, "End": Qt.Key.Key_End,
        "Home": Qt.Key.Key_Home, "ArrowUp": Qt.Key.Key_Up, "ArrowDown": Qt.Key.Key_Down,
        "ArrowLeft": Qt.Key.Key_Left, "ArrowRight": Qt.Key.Key_Right}  # fmt: skip


class Requests(QWebEngineUrlRequestInterceptor):
    """Everything that the page asks for; nothing but files is let through."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def interceptRequest(self, info) -> None:
        self.urls.append(info.requestUrl().toString())
        info.block(info.requestUrl().scheme() not in ("file", "blob", "data"))


class Page(QWebEnginePage):
    """Keeps what is said on the console."""

    def __init__(self, profile: QWebEngineProfile) -> None:
        super().__init__(profile)
        self.said: list[str] = []

    def javaScriptConsoleMessage(self, level, message, line, source) -> None:
        self.said.append(f"{level.name}: {message} ({line})")


class Browser:
    def __init__(self, width: int, height: int) -> None:
        self.profile = QWebEngineProfile()  # without a name it leaves nothing on the disk
        self.requests = Requests()
        self.profile.setUrlRequestInterceptor(self.requests)
        self.page = Page(self.profile)
        self.view = QWebEngineView()
        self.view.setPage(self.page)
        self.view.resize(width, height)
        self.view.show()

    def load(self, path: str) -> bool:
        """Whether it was loaded."""
        return self._wait(lambda done: (self.page.loadFinished.connect(done), self.page.load(QUrl.fromLocalFile(path))))

    def run(self, script: str) -> object:
        """Its value; what is no JSON is null."""
        return self._wait(lambda done: self.page.runJavaScript(script, done))

    def move(self, x: float, y: float) -> None:
        self._mouse(QMouseEvent.Type.MouseMove, x, y, Qt.MouseButton.NoButton)

    def click(self, x: float, y: float) -> None:
        for kind in (QMouseEvent.Type.MouseButtonPress, QMouseEvent.Type.MouseButtonRelease):
            self._mouse(kind, x, y, Qt.MouseButton.LeftButton)

    def _mouse(self, kind, x: float, y: float, button) -> None:
        place = QPointF(x, y)
        held = button if kind == QMouseEvent.Type.MouseButtonPress else Qt.MouseButton.NoButton
        event = QMouseEvent(kind, place, place, button, held, Qt.KeyboardModifier.NoModifier)
        QApplication.sendEvent(self.view.focusProxy(), event)
        self.pause(150)

    def key(self, name: str) -> None:
        code = KEYS[name] if name in KEYS else Qt.Key(ord(name.upper()))
        text = "" if name in KEYS else name
        for kind in (QKeyEvent.Type.KeyPress, QKeyEvent.Type.KeyRelease):
            QApplication.sendEvent(self.view.focusProxy(), QKeyEvent(kind, code, Qt.KeyboardModifier.NoModifier, text))
        self.pause(150)

    def shot(self, path: str) -> None:
        """What is to be seen, as PNG."""
        self.pause(200)
        self.view.grab().save(path)

    def seen(self) -> dict[str, list[str]]:
        return {"console": self.page.said, "requests": self.requests.urls}

    def pause(self, milliseconds: int) -> None:
        loop = QEventLoop()
        QTimer.singleShot(milliseconds, loop.quit)
        loop.exec()

    def _wait(self, begin: Callable) -> object:
        loop, found = QEventLoop(), []
        QTimer.singleShot(TIMEOUT_MS, loop.quit)
        begin(lambda value=None: (found.append(value), loop.quit()))
        if not found:
            loop.exec()
        return found[0] if found else "no answer"


def main() -> None:
    app = QApplication(sys.argv[:1])
    browser = Browser(int(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(browser, name)(*arguments)), flush=True)
    # In this order: a page that outlives its profile is complained about.
    browser.view.deleteLater()
    browser.page.deleteLater()
    browser.pause(50)
    app.quit()


main()
