"""A headless Chromium that reports the requests, errors and layout of a page.

It uses the DevTools protocol over two pipes, so no driver is needed.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip
SECONDS = 60.0


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """A browser with one page; a context manager."""

    def __enter__(self) -> "Chromium":
        program = find_chromium()
        assert program is not None
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()

        def use_descriptors_3_and_4() -> None:  # Chromium expects its pipes there
            os.dup2(os.dup(to_read), 3)
            os.dup2(to_write, 4)

        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={self._profile.name}"],
            close_fds=False, preexec_fn=use_descriptors_3_and_4, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._rest, self._number, self.events = b"", 0, []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(Exception):
            self._call("Browser.close")
        self._process.terminate()
        self._process.wait(10)
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    def open(self, path: Path, width: int, height: int, *, dark: bool = False) -> None:
        """Open a file in a window of this size (CSS pixels) and wait until it is loaded."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._wait_for("Page.loadEventFired")
        self.evaluate("document.fonts.ready.then(() => true)")

    def evaluate(self, expression: str) -> Any:
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        return answer["result"].get("value")

    def requests(self) -> list[str]:
        """Return the URLs requested since `open`, without data URLs."""
        sent = [e["params"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        addresses = [params["request"]["url"] for params in sent]
        return [address for address in addresses if not address.startswith("data:")]

    def errors(self) -> list[str]:
        """Return the errors logged since `open`."""
        names = ("Log.entryAdded", "Runtime.exceptionThrown", "Network.loadingFailed")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in names]

    def pdf(self, path: Path) -> None:
        options = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": False}
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", **options)["data"]))

    def call(self, method: str, **params: object) -> dict[str, Any]:
        """Call a protocol method on the page."""
        return self._call(method, self._session, **params)

    def _call(self, method: str, session: str | None = None, **params: object) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _wait_for(self, event: str) -> None:
        until = time.monotonic() + SECONDS
        while not any(e.get("method") == event for e in self.events):
            assert time.monotonic() < until, f"no {event} in {SECONDS} s"
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._from, 1 << 20)
            assert part, "Chromium ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
