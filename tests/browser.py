"""Chromium for tests of pages: what it asks for, what it complains of, how wide a page is."""

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--remote-debugging-pipe",
]  # fmt: skip
PATIENCE = 60.0


class Browser:
    """Chromium without a window, spoken to over two pipes: no port is opened. events: of the page last opened."""

    def __init__(self, home: Path) -> None:
        theirs, self.out = os.pipe()
        self.into, answers = os.pipe()
        command = ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{answers}', "bash", CHROMIUM, *FLAGS]
        self.process = subprocess.Popen(
            [*command, f"--user-data-dir={home}"], pass_fds=(theirs, answers), env=os.environ | {"HOME": str(home)},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(answers)
        self.waiting, self.asked, self.session, self.events = b"", 0, None, []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.ask(f"{domain}.enable")

    def hear(self):
        until = time.monotonic() + PATIENCE
        while b"\0" not in self.waiting:
            assert select.select([self.into], [], [], until - time.monotonic())[0], "the browser does not answer"
            more = os.read(self.into, 1 << 16)
            assert more, "the browser has ended"
            self.waiting += more
        message, _, self.waiting = self.waiting.partition(b"\0")
        return json.loads(message)

    def ask(self, method, **params):
        self.asked += 1
        of_page = {"sessionId": self.session} if self.session else {}
        os.write(
            self.out, json.dumps({"id": self.asked, "method": method, "params": params} | of_page).encode() + b"\0"
        )
        while (message := self.hear()).get("id") != self.asked:
            self.events.append(message)
        return message["result"]

    def open(self, path, width, scheme):
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("Page.navigate", url=path.as_uri())
        while "Page.loadEventFired" not in [event.get("method") for event in self.events]:
            self.events.append(self.hear())

    def value(self, expression):
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def said(self, *methods):
        return [event["params"] for event in self.events if event.get("method") in methods]

    def close(self):
        self.ask("Browser.close")
        self.process.wait(timeout=PATIENCE)
        os.close(self.out)
        os.close(self.into)
