"""A headless Chromium that tests can drive, over its own debugging protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


class Browser:
    """One tab. `with Browser(folder) as tab: tab.open(file); tab.js("document.title")`."""

    def __init__(self, profile: Path):
        self._profile = profile

    def __enter__(self) -> Browser:
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self._profile}", "--remote-debugging-port=0", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            noted, until = self._profile / "DevToolsActivePort", time.monotonic() + 60
            while not (noted.exists() and (lines := noted.read_text().splitlines())):
                assert self._process.poll() is None, "Chromium ended"
                assert time.monotonic() < until, "Chromium opens no port"
                time.sleep(0.1)
            while not (page := self._page(lines[0])):
                assert time.monotonic() < until, "Chromium opens no page"
                time.sleep(0.1)
            self._socket, self._sent = connect(page["webSocketDebuggerUrl"], max_size=None, proxy=None), 0
        except BaseException:
            self._process.kill()
            raise
        return self

    @staticmethod
    def _page(port: str) -> dict[str, Any] | None:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://127.0.0.1:{port}/json", timeout=30) as answer:
            return next((target for target in json.load(answer) if target["type"] == "page"), None)

    def __exit__(self, *_: Any) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""
        self._sent += 1
        self._socket.send(json.dumps({"id": self._sent, "method": method, "params": parameters}))
        while (answer := json.loads(self._socket.recv(timeout=60))).get("id") != self._sent:
            pass
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, file: Path, *, width: int = 1280, dark: bool = False, wait: float = 30) -> None:
        """Open a page in a window of that width; returns once it is drawn as a report is, or after `wait` seconds."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=file.as_uri())
        ready = "document.documentElement?.dataset.ready && document.readyState === 'complete'"
        until = time.monotonic() + wait
        while time.monotonic() < until and not self.js(ready):
            time.sleep(0.05)

    def picture(self, file: Path) -> None:
        """The whole page as PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))
