"""A real browser: JupyterLab opens the first notebook, runs it up to its slider, and moving the
slider changes the picture.

Runs where `chromium` and the Python package `playwright` are installed, and is skipped elsewhere.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from realsr_r1.course import notebooks as course

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no chromium on this machine", allow_module_level=True)
playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
)


@pytest.fixture
def lab(tmp_path):
    """A JupyterLab server on the first notebook, cut after its widget; yields the notebook's
    address."""
    nb = course.read(course.NOTEBOOKS / "00_start_here.ipynb")
    at = next(i for i, c in enumerate(nb.cells) if "widget" in c.metadata.get("tags", []))
    nb.cells = nb.cells[: at + 1]
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    course.write(nb, tmp_path / "course" / "start.ipynb")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token, home = secrets.token_hex(8), tmp_path / "home"
    options = [
        f"--ServerApp.port={port}",
        f"--IdentityProvider.token={token}",
        "--ServerApp.allow_root=True",
        "--no-browser",
        f"--ServerApp.root_dir={tmp_path / 'course'}",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    env = os.environ | {
        "PYTHONPATH": str(course.ROOT),
        "QUICK": "1",
        "JUPYTER_CONFIG_DIR": str(home),
        "JUPYTER_RUNTIME_DIR": str(home),
    }
    log = (tmp_path / "lab.log").open("w", encoding="utf-8")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log
    )
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{base}/api?token={token}", timeout=2)
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "lab.log").read_text(encoding="utf-8")[
                    -2000:
                ]
                time.sleep(0.5)
        yield f"{base}/lab/tree/start.ipynb?token={token}"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
        log.close()


def test_the_slider_moves_the_picture(lab):
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
        )
        try:
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            page.set_default_timeout(120_000)
            page.goto(lab)
            page.locator(".jp-Notebook h1").first.wait_for()
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_text("Run All Cells", exact=True).click()
            picture = page.locator(".jp-OutputArea .widget-image").first
            picture.wait_for(state="attached", timeout=400_000)
            picture.scroll_into_view_if_needed()
            before, seen = picture.get_attribute("src"), picture.screenshot()
            handle = page.locator(".jp-OutputArea .widget-slider .noUi-handle").first
            handle.focus()
            for _ in range(10):
                handle.press("ArrowRight")
            page.wait_for_function(
                "([e, old]) => e.src !== old", arg=[picture.element_handle(), before]
            )
            page.wait_for_timeout(1500)
            assert picture.screenshot() != seen
            assert page.locator(".widget-slider .widget-readout").first.inner_text() == "60"
        finally:
            browser.close()
