"""A real browser: JupyterLab opens a notebook, runs it, and moving a slider or pressing a button
changes the picture.

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
from nbformat.reader import NotJSONError

from realsr_r1.course import notebooks as course

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no chromium on this machine", allow_module_level=True)
playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
)


@pytest.fixture
def lab(tmp_path, request):
    """A JupyterLab server on a notebook, whole or cut after its first cell tagged "widget"; yields
    the notebook's address."""
    name, whole = request.param
    nb = course.read(course.NOTEBOOKS / f"{name}.ipynb")
    at = [i for i, c in enumerate(nb.cells) if "widget" in c.metadata.get("tags", [])]
    nb.cells = nb.cells if whole else nb.cells[: at[0] + 1]
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


@pytest.fixture
def page(lab):
    """A page of the browser on the notebook, all its cells running."""
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
            yield page
        finally:
            browser.close()


def pictures(page):
    """The widgets' pictures, once there are some."""
    found = page.locator(".jp-OutputArea .widget-image")
    found.first.wait_for(state="attached", timeout=400_000)
    return found


def until_it_changes(page, picture, act) -> None:
    """Do `act` and wait for another picture."""
    before = picture.get_attribute("src")
    act()
    page.wait_for_function("([e, old]) => e.src !== old", arg=[picture.element_handle(), before])


@pytest.mark.slow
@pytest.mark.parametrize("lab", [("00_start_here", False)], indirect=True)
def test_the_slider_moves_the_picture(page):
    picture = pictures(page).first
    picture.scroll_into_view_if_needed()
    seen = picture.screenshot()
    handle = page.locator(".jp-OutputArea .widget-slider .noUi-handle").first
    handle.focus()
    until_it_changes(page, picture, lambda: [handle.press("ArrowRight") for _ in range(10)])
    page.wait_for_timeout(1500)
    assert picture.screenshot() != seen
    assert page.locator(".widget-slider .widget-readout").first.inner_text() == "60"


@pytest.mark.slow
@pytest.mark.parametrize("lab", [("playground", True)], indirect=True)
def test_the_playground_is_played_with(page):
    """Damage, write, other words, blind choice, save."""
    shown = pictures(page)
    handle = page.locator(".jp-OutputArea .widget-slider .noUi-handle").nth(1)
    handle.focus()
    until_it_changes(page, shown.nth(0), lambda: handle.press("ArrowRight"))
    press = lambda name: page.get_by_role("button", name=name, exact=True).click()  # noqa: E731
    until_it_changes(page, shown.nth(4), lambda: press("write the chain"))
    words = page.locator(".jp-OutputArea .widget-text input[type=text]").nth(1)
    page.get_by_text("LPIPS to the truth").wait_for()
    assert words.input_value()
    words.fill("a yellow dandelion on grass")
    words.press("Tab")
    until_it_changes(page, shown.nth(4), lambda: press("draw again under these words"))
    page.get_by_text("to the picture before").wait_for()
    press("compare blind")
    page.get_by_text("which is better?").wait_for()
    press("A is better")
    page.get_by_text("so far: ").wait_for()
    press("save")
    page.get_by_text("saved as ").wait_for()


@pytest.mark.slow
@pytest.mark.parametrize("lab", [("06_evaluation", True)], indirect=True)
def test_blind_pairs_are_judged(page):
    """Each press answers a pair and shows the next; after six the share is told."""
    shown = pictures(page).first
    shown.scroll_into_view_if_needed()
    for name in ("left", "right", "same"):
        button = page.get_by_role("button", name=name, exact=True)
        until_it_changes(page, shown, button.click)
    for _ in range(3):
        page.get_by_role("button", name="right", exact=True).click()
        page.wait_for_timeout(500)
    told = page.locator(".widget-label", has_text="preferred to")
    told.wait_for()
    assert "6 of 6 pairs answered" in told.inner_text()


@pytest.mark.slow
@pytest.mark.parametrize("lab", [("07_scaling_up", True)], indirect=True)
def test_more_gpus_need_less_memory_each(page):
    told = page.locator(".jp-OutputArea .widget-html-content", has_text=" GB: ").first
    told.wait_for(state="attached", timeout=400_000)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=400_000)
    told.scroll_into_view_if_needed()
    before = told.text_content()
    handle = page.locator(".jp-OutputArea .widget-slider .noUi-handle").first
    handle.focus()
    for _ in range(8):
        handle.press("ArrowRight")
    for _ in range(40):  # the cell may be drawn anew, so its text is looked up each time
        if told.text_content() != before:
            break
        page.wait_for_timeout(500)
    gigabytes = [int(x.split(" GB")[0]) for x in (told.text_content(), before)]
    assert gigabytes[0] < gigabytes[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "lab", [(p.stem, True) for p in course.notebooks()], indirect=True, ids=lambda x: x[0][:2]
)
def test_a_lesson_from_top_to_bottom(page, tmp_path):
    """Every cell runs without an error in JupyterLab itself."""
    path, cells, failed = tmp_path / "course" / "start.ipynb", [], []
    for _ in range(200):
        page.wait_for_timeout(3000)
        page.keyboard.press("Control+s")
        try:
            cells = [c for c in course.read(path).cells if c.cell_type == "code"]
        except NotJSONError:  # it is just being written
            continue
        failed = [c.source[:80] for c in cells for o in c.outputs if o.output_type == "error"]
        if failed or all(c.execution_count for c in cells):
            break
    assert not failed and all(c.execution_count for c in cells)
