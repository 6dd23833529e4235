"""A real browser without a screen: what a page says on its console, and what it asks the network for."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import List, NamedTuple

import pytest

_NOBODY = "not an origin"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Visit(NamedTuple):
    """What happened while a page was open."""

    dom: str
    console: List[str]    #: messages
    requests: List[str]   #: addresses other than that of the page


def visit(path, folder) -> Visit:
    """Open a page of this machine."""
    browser = next((found for found in map(shutil.which, NAMES) if found), None)
    if browser is None:
        pytest.skip("no browser is installed: apt-get install chromium (.ci/run does)")
    log, address = folder / "net.json", path.resolve().as_uri()
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-component-update", "--no-first-run", "--user-data-dir=%s" % (folder / "profile"),
         "--enable-logging=stderr", "--log-net-log=%s" % log, "--virtual-time-budget=2000", "--dump-dom", address],
        capture_output=True, timeout=120, check=True)
    console = re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr.decode("utf-8", "replace"))
    return Visit(done.stdout.decode("utf-8"), console, [url for url in _addresses(log) if url != address])


def _addresses(log) -> List[str]:
    text = log.read_text(encoding="utf-8")
    try:
        events = json.loads(text)["events"]
    except ValueError:  # the browser ended before it closed the list
        events = json.loads(text.rstrip().rstrip(",") + "]}")["events"]
    # a browser asks for things of its own, whatever the page; those have no origin that began them
    began = [event.get("params", {}) for event in events]
    found = [each.get("url", "") for each in began if each.get("initiator", _NOBODY) != _NOBODY]
    return [url for url in found if url]
