"""A real Chromium, driven by its DevTools protocol over a pair of pipes: no port, no driver, no further package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

#: Seconds; against a browser that hangs.
_LIMIT = 60.0

_QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars"),
)


#: Chromium reads its commands at 3 and answers at 4.
_AT_3_AND_4 = """
import fcntl, os, sys
ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in ({from_us}, {to_us})]
for end, place in zip(ends, (3, 4)):
    os.dup2(end, place)
os.execv(sys.argv[1], sys.argv[1:])
"""


def executable() -> str | None:
    """Chromium's, if there is one."""
    return next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )


class Browser:
    """One headless Chromium with a profile of its own, for the length of a ``with``.

    Attributes:
        problems: what pages wrote to the console as errors, and exceptions they did not catch.
        requested: the addresses pages asked for.
    """

    def __init__(self, profile: Path) -> None:
        found = executable()
        assert found is not None
        self.problems: list[str] = []
        self.requested: list[str] = []
        self._rest, self._answers, self._next = b"", dict[int, dict[str, Any]](), 0
        from_us, self._to = os.pipe()
        self._from, to_us = os.pipe()
        command = [found, *_QUIET, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        script = _AT_3_AND_4.format(from_us=from_us, to_us=to_us)
        self._process = subprocess.Popen(
            [sys.executable, "-c", script, *command],
            pass_fds=(from_us, to_us),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us)
        os.close(to_us)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def page(self, width: int, height: int, *, phone: bool = False, dark: bool = False) -> Page:
        """A new page of that size, as a desktop or a phone with fingers shows it."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            page.send(f"{domain}.enable")
        page.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1 + phone, mobile=phone
        )
        page.send("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.send("Emulation.setEmulatedMedia", features=[scheme])
        return page

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command and its answer."""
        self._next += 1
        message = {"id": self._next, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + _LIMIT
        while self._next not in self._answers:
            self._read(end - time.monotonic())
        answer = self._answers.pop(self._next)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self, seconds: float) -> None:
        assert seconds > 0 and select.select([self._from], [], [], seconds)[0], "Chromium does not answer"
        piece = os.read(self._from, 1 << 16)
        assert piece, "Chromium has ended"
        *messages, self._rest = (self._rest + piece).split(b"\0")
        for raw in messages:
            message = json.loads(raw)
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self._note(message["method"], message.get("params", {}))

    def _note(self, method: str, about: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requested.append(about["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(about["exceptionDetails"]))
        elif method == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.problems.append(about["entry"]["text"])


class Page:
    """One page of a ``Browser``."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.send(method, self._session, **parameters)

    def goto(self, address: str) -> None:
        self.send("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def js(self, expression: str) -> Any:
        """The value of an expression; a promise is waited for."""
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, condition: str, seconds: float = _LIMIT) -> None:
        """Wait until ``condition`` holds."""
        end = time.monotonic() + seconds
        while not self.js(f"!!({condition})"):
            assert time.monotonic() < end, f"never came true: {condition}; {self._browser.problems}"
            time.sleep(0.05)

    def choose_file(self, selector: str, path: Path) -> None:
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def drag(self, points: Sequence[tuple[float, float]]) -> None:
        """The mouse, its button held, along ``points``."""
        for index, (x, y) in enumerate(points):
            kind = "mousePressed" if index == 0 else "mouseMoved"
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)
        x, y = points[-1]
        self.send("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, button="left", clickCount=1)

    def swipe(self, points: Sequence[tuple[float, float]]) -> None:
        """A finger along ``points``."""
        for index, (x, y) in enumerate(points):
            kind = "touchStart" if index == 0 else "touchMove"
            self.send("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def click(self, selector: str) -> None:
        self.js(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, selector: str, text: str) -> None:
        """Focus a field and write into it."""
        self.js(f"document.querySelector({json.dumps(selector)}).focus()")
        self.send("Input.insertText", text=text)

    def box(self, selector: str) -> dict[str, float]:
        """Where an element is in the window, scrolled into view: x, y, width, height."""
        place = json.dumps(selector)
        found: dict[str, float] = self.js(
            f"(e => (e.scrollIntoView({{block: 'center'}}), e.getBoundingClientRect().toJSON()))"
            f"(document.querySelector({place}))"
        )
        return found

    def picture(self, *, whole: bool = False) -> bytes:
        """What the page looks like, as PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])
