"""Scripts that serve a page, started as users start them, and a headless Chromium that looks at it."""

import importlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 300  # of a busy machine
SOFTWARE = ("--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def served(*command, **variables):
    """Yields the address that a script of the project serves; SIGTERM must then end it quietly."""
    environment, port = os.environ | {"OMP_NUM_THREADS": "1"} | variables, free_port()
    command = [sys.executable, *map(str, command), "--port", str(port)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}" in line, line + process.stderr.read()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0 and not out and not err, (process.returncode, out, err)


@contextmanager
def browsing(library: str, address_of, **options):
    """Yields a page of Chromium, and the addresses beyond this machine that it asked for; skips without either."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on the PATH (apt-get install chromium)")
    for name in (library, "playwright.sync_api"):
        pytest.importorskip(name, reason=f"{name} is not installed (requirements-extra.txt)")
    with address_of as address, importlib.import_module("playwright.sync_api").sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=SOFTWARE)
        page, foreign = browser.new_page(**options), []
        page.set_default_timeout(1000 * PATIENCE_S)
        page.route(
            lambda url: not url.startswith((address, "data:", "blob:")),
            lambda route: (foreign.append(route.request.url), route.abort()),
        )
        page.goto(address)
        yield page, foreign
        browser.close()


def pixels(page) -> np.ndarray:
    """What the page looks like, [h, w, 3]."""
    return np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(int)


def until(condition, what: str):
    """Waits for a condition to hold, and returns its value."""
    end = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.2)
    return value
