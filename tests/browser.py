"""A page in Chromium, driven by real keys and a real mouse; `python -m tests.browser PAGE.html OUT.png [METHOD]`."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import sys
import tempfile
import time
from pathlib import Path
from subprocess import DEVNULL, Popen

CHROMIUM = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking".split()
FLAGS += "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe".split()
KEYS = {"Tab": 9, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40}
ALT, CONTROL, META, SHIFT = 1, 2, 4, 8  # modifiers of a key


class Browser:
    """One tab. DevTools messages go through the file descriptors 3 and 4 of the browser, ended by NUL."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        shell = ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash", CHROMIUM, *FLAGS]
        shell.append(f"--user-data-dir={self.folder.name}")
        self.process = Popen(shell, pass_fds=(commands, answers), stdout=DEVNULL, stderr=DEVNULL)
        os.close(commands)
        os.close(answers)
        self._number, self._bytes, self._session, self.events = 0, b"", {}, []
        target = self.send("Target.createTarget", url="about:blank")
        self._session = self.send("Target.attachToTarget", flatten=True, **target)
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_) -> None:
        os.close(self._write)  # it ends itself when nobody can write to it
        self.process.wait(30)
        os.close(self._read)
        self.folder.cleanup()

    def _message(self, seconds: float = 60) -> dict:
        end = time.monotonic() + seconds
        while b"\0" not in self._bytes:
            if not select.select([self._read], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError(f"the browser said nothing in {seconds} s")
            if not (more := os.read(self._read, 1 << 20)):
                raise ConnectionError("the browser has ended")
            self._bytes += more
        line, self._bytes = self._bytes.split(b"\0", 1)
        return json.loads(line)

    def send(self, method: str, **params) -> dict:
        """The result of a DevTools command; what else comes before it is kept as events."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, page: Path, width: int = 1000, height: int = 900, scale: float = 1, dark: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.send("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def errors(self) -> list[str]:
        """What went wrong since the page was opened: exceptions, and what the console was told."""
        self.js("0")  # what was said before this has then come
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in bad]

    def js(self, expression: str):
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def key(self, name: str, modifiers: int = 0, times: int = 1) -> None:
        key = {"key": name, "code": name, "windowsVirtualKeyCode": KEYS[name], "modifiers": modifiers}
        for kind in ("rawKeyDown", "keyUp") * times:
            self.send("Input.dispatchKeyEvent", type=kind, **key)

    def mouse(self, selector: str, click: bool = False) -> None:
        """Moves to the middle of the first line of an element, which has to be in view, and perhaps clicks there."""
        box = f"document.querySelector({selector!r}).getClientRects()[0]"
        x, y = self.js(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({box})")
        button = {"button": "left", "clickCount": 1}
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") * click:
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


if __name__ == "__main__":  # the method is the first one if none is named
    page, out, *method = sys.argv[1:]
    with Browser() as browser:
        browser.open(Path(page), width=1080, scale=1.5)
        browser.js(f"[...$('runs').children].find(e => {method}.includes(e.textContent))?.click()")
        browser.js("[...document.querySelectorAll('.drop')].find(e => /[a-z]/.test(e.textContent)).focus()")
        browser.picture(Path(out))
