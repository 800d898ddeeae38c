"""A headless Chromium that is driven over its DevTools pipe: no driver program and no package are needed for it."""

import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars"),
    "--remote-debugging-pipe",
)


def find_chromium() -> str | None:
    """The program, None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page of a browser with a fresh profile in `folder`; a context.

    `events` holds what DevTools said, in order; messages of the console and requests are among them.
    """

    def __init__(self, folder: Path, timeout: float = 60):
        self._timeout, self.events, self._last, self._rest = timeout, [], 0, b""
        ours, theirs = self._pipes()
        self._to, self._from = ours

        def place():  # the browser reads from descriptor 3 and writes to 4
            os.dup2(theirs[0], 3)
            os.dup2(theirs[1], 4)

        self._process = subprocess.Popen(
            [find_chromium(), *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=place,
        )
        for descriptor in theirs:
            os.close(descriptor)
        self._session = None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    @staticmethod
    def _pipes():
        """((to, from), (read, write)): our ends and the browser's, at numbers that 3 and 4 do not meet."""
        theirs_read, ours_write = os.pipe()
        ours_read, theirs_write = os.pipe()
        ends = []
        for number, inherited in ((ours_write, False), (ours_read, False), (theirs_read, True), (theirs_write, True)):
            ends.append(fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 10))
            os.set_inheritable(ends[-1], inherited)
            os.close(number)
        os.set_blocking(ends[1], False)
        return ends[:2], ends[2:]

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        self._session = None
        try:
            self.call("Browser.close")
            self._process.wait(20)
        except (OSError, TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **parameters) -> dict:
        """A command of the protocol and its result."""
        self._last += 1
        number, message = self._last, {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict:
        end = time.monotonic() + self._timeout
        while b"\0" not in self._rest:
            if time.monotonic() > end:
                raise TimeoutError(f"the browser said nothing for {self._timeout} s")
            try:
                self._rest += os.read(self._from, 1 << 20)
            except BlockingIOError:
                time.sleep(0.005)
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, address: str, width: int, dark: bool = False, scripts: bool = True) -> None:
        """Load a page in a window of that width and wait until it is there."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.events.clear()
        self.call("Page.navigate", url=address)
        end = time.monotonic() + self._timeout
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            if time.monotonic() > end:
                raise TimeoutError(f"{address} did not load in {self._timeout} s")
            self.events.append(self._next())

    def value(self, expression: str):
        """What a JavaScript expression gives, as plain data."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and requests for anything but the page itself."""
        self.value("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
        found = []
        for event in self.events:
            about = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(f"exception: {about['exceptionDetails'].get('exception', about['exceptionDetails'])}")
            elif event.get("method") == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
                found.append(f"console: {about['args']}")
            elif event.get("method") == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
                found.append(f"log: {about['entry']['text']}")
            elif event.get("method") == "Network.requestWillBeSent" and about["type"] != "Document":
                found.append(f"request: {about['request']['url']}")
        return found
