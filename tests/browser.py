"""A real headless Chromium, driven by its DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

REMEDY = "no Chromium on PATH: the report's test needs one (Debian, Ubuntu: apt install chromium)"
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--remote-debugging-pipe",
]
DEADLINE_S = 60.0


class Browser:
    """One page of a browser of its own.

    Attributes:
        complaints: console messages, uncaught exceptions and log entries since the start.
        requests: addresses the page asked for since the start.
    """

    def __init__(self, profile: Path):
        program = shutil.which("chromium") or shutil.which("google-chrome")
        assert program, REMEDY
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # DevTools reads commands from descriptor 3 and answers on 4.
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._log = (profile.parent / "chromium.log").open("w")
        self._process = subprocess.Popen(
            ["bash", "-c", script, "chromium", program, *OPTIONS, f"--user-data-dir={profile}"],
            pass_fds=(theirs_in, theirs_out),
            stdout=self._log,
            stderr=self._log,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._buffer, self._session = 0, b"", None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        """One command's result; events on the way are taken down."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read(method)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _read(self, what: str) -> dict:
        deadline = time.monotonic() + DEADLINE_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"Chromium did not answer {what} within {DEADLINE_S:.0f} s"
            chunk = os.read(self._in, 2**20)
            assert chunk, f"Chromium ended during {what}: see {self._log.name}"
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method"), message.get("params"))
        return message

    def _note(self, event: str | None, about: dict) -> None:
        if event == "Runtime.consoleAPICalled":
            self.complaints.append(f"console.{about['type']}: {about['args']}")
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(f"exception: {about['exceptionDetails']}")
        elif event == "Log.entryAdded":
            self.complaints.append(f"log: {about['entry']['text']}")
        elif event == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])

    def open(self, path: Path) -> None:
        """Load a file and wait for its end."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + DEADLINE_S
        while self.evaluate("location.protocol + document.readyState") != "file:complete":
            assert time.monotonic() < deadline, f"{path} did not load within {DEADLINE_S:.0f} s"
            time.sleep(0.02)

    def evaluate(self, expression: str):
        """The JSON value of an expression in the page; its exception is a complaint and None."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def resize(self, width: int, height: int, *, mobile: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )

    def scheme(self, name: str) -> None:
        """Of colours: "light" or "dark"."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def point(self, x: float, y: float) -> None:
        """Move the pointer there, in pixels of the viewport."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, *, whole: bool = False) -> bytes:
        """PNG of the viewport or of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(shot["data"])

    def close(self) -> None:
        os.close(self._out)
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=20)
        os.close(self._in)
        self._log.close()
