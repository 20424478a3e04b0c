"""A real JupyterLab in a real browser: the first notebook is run, its slider moved, a photograph uploaded, run again.

Screenshots go to $SFUMATO_SCREENSHOTS where it is set; those in docs/ were made so.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import nbformat
import numpy as np
import pytest

for needed in ("jupyterlab", "ipywidgets", "playwright"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install -e .[dev]")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium here: apt-get install chromium", allow_module_level=True)

VIEW: "ViewportSize" = {"width": 1360, "height": 1080}

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page, ViewportSize

ROOT = Path(__file__).parents[1]
NOTEBOOK = "01-face-detection.ipynb"
TOKEN = "of-this-test"
PATIENCE = 180  # seconds: the whole notebook on one busy core takes twenty
OUTPUT = ".jp-OutputArea-output"
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is in the page, also those out of sight
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
}


class Lab(NamedTuple):
    """A running JupyterLab: where it is, and the folder it shows."""

    url: str
    folder: Path


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    root = tmp_path_factory.mktemp("lab")
    folder = root / "home"
    folder.mkdir()
    notebook = nbformat.read(ROOT / "notebooks" / NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    notebook.cells[1].source = notebook.cells[1].source.replace("COUNT = None, 40", "COUNT = None, 20")
    nbformat.write(notebook, folder / NOTEBOOK)  # type: ignore[no-untyped-call]
    for name, values in SETTINGS.items():
        place = root / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        place.parent.mkdir(parents=True)
        place.write_text(json.dumps(values))
    own = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}
    own |= {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    environment = {**os.environ, **{name: str(root / place) for name, place in own.items()}, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    command += [f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}", "--ServerApp.port=0"]
    with (root / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            yield Lab(_address(server, root), folder)
        finally:
            server.terminate()
            server.wait(30)


def _address(server: "subprocess.Popen[bytes]", root: Path) -> str:
    """Where the server listens, from the file that it writes for others to find it."""
    for _ in range(600):
        for place in (root / "runtime").glob("jpserver-*.json"):
            try:
                return str(json.loads(place.read_text())["url"])
            except (ValueError, KeyError):
                continue  # half written
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise AssertionError((root / "log").read_text()[-2000:])


@pytest.fixture
def page(lab: Lab) -> Iterator["Page"]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport=VIEW)
        page.goto(f"{lab.url}lab/tree/{NOTEBOOK}?token={TOKEN}")
        page.locator(".jp-Notebook .jp-CodeCell").last.wait_for(timeout=60_000)
        page.get_by_text("Kernel status: Idle").first.wait_for(state="attached", timeout=60_000)
        yield page
        browser.close()


def shoot(page: "Page", where: Path, name: str) -> None:
    folder = Path(os.environ.get("SFUMATO_SCREENSHOTS") or where)
    folder.mkdir(parents=True, exist_ok=True)
    shown = folder / f"{name}.png"
    page.screenshot(path=shown)
    picture = cv2.imread(str(shown))
    assert picture is not None and picture.std() > 10, "an empty page"


def wait(page: "Page", done: Callable[[], bool]) -> None:
    for _ in range(4 * PATIENCE):
        if done():
            return
        page.wait_for_timeout(250)
    raise AssertionError(f"not done after {PATIENCE} seconds")


def run_all(page: "Page") -> dict[str, Any]:
    """Run every cell by the menu; the last one's figures."""
    prompts, failed = page.locator(".jp-CodeCell .jp-InputPrompt"), page.locator(f"{OUTPUT}[data-mime-type*='error']")
    before = prompts.last.inner_text()
    asked = page.locator(".jp-Dialog button", has_text="Select")
    item = page.locator(".lm-Menu-item[data-command='runmenu:run-all']")

    def start() -> float:
        page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
        item.hover()
        page.wait_for_timeout(500)  # a menu takes no click in the moment it opens
        item.click()
        return time.monotonic()

    started = start()

    def done() -> bool:
        nonlocal started
        shown = prompts.all_inner_texts()
        if shown[-1] == before and not any("*" in prompt for prompt in shown):
            # While a page still looks for its kernel it asks which one is meant, and drops what it was to run.
            if asked.count():
                asked.last.click()
                started = time.monotonic() - 8
            elif time.monotonic() - started > 10:
                started = start()
        return bool(failed.count()) or (shown[-1] != before and not any("*" in prompt for prompt in shown))

    wait(page, done)
    assert failed.all_inner_texts() == []
    figures = page.locator(".jp-CodeCell").last.locator(OUTPUT).inner_text()
    return dict(eval(figures, {"__builtins__": {}}, {"inf": float("inf")}))


def moved(page: "Page", key: str, until: str) -> tuple[str, str]:
    """(the picture before, and after) the slider was moved by a key and the text below it said so."""
    widget = page.locator(OUTPUT, has=page.locator(".sfumato-alpha"))
    picture: Locator = widget.locator("img.widget-image")
    before = picture.get_attribute("src")
    widget.locator(".noUi-handle").focus()
    page.keyboard.press(key)
    widget.get_by_text(until).wait_for(timeout=20_000)
    wait(page, lambda: picture.get_attribute("src") != before)
    return str(before), str(picture.get_attribute("src"))


@pytest.mark.timeout(600)
def test_the_first_notebook_from_upload_to_slider(
    lab: Lab, page: "Page", astronaut: np.ndarray, tmp_path: Path
) -> None:
    figures = run_all(page)
    assert figures["size"] == [512, 512] and len(figures["faces"]) == 1
    page.locator(".jp-Notebook h1").scroll_into_view_if_needed()
    page.set_viewport_size({"width": 1360, "height": 4700})
    shoot(page, tmp_path, "notebook")
    page.set_viewport_size(VIEW)

    slider = page.locator(".sfumato-alpha")
    slider.scroll_into_view_if_needed()
    before, after = moved(page, "ArrowRight", "alpha 0.85: at most 9.6 bits a site")
    assert before != after
    moved(page, "ArrowLeft", "alpha 0.8: at most 12.8 bits a site")
    assert page.get_by_text("AP measured on 20 photographs").count() == 1
    shoot(page, tmp_path, "widget")

    mine = tmp_path / "mine.png"
    cv2.imwrite(str(mine), astronaut[:300, 50:400])
    with page.expect_file_chooser() as chooser:
        page.locator("[title^='Upload Files']").first.click()
    chooser.value.set_files(mine)
    page.locator(".jp-DirListing-itemText", has_text="mine.png").wait_for(timeout=20_000)
    assert (lab.folder / "mine.png").read_bytes() == mine.read_bytes()
    shoot(page, tmp_path, "uploaded")
    page.locator(".lm-TabBar-tabLabel", has_text=NOTEBOOK).click()  # an uploaded photograph is opened

    cell = page.locator(".jp-CodeCell").first.locator(".cm-content")
    cell.click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text('PHOTOGRAPH = "mine.png"\nALPHA = 0.9\nDATASET, COUNT = None, 20')
    figures = run_all(page)
    assert figures["size"] == [300, 350] and len(figures["faces"]) == 1
    assert figures["bits"] == pytest.approx(0.1 * 64 * 32 * 32, rel=1e-4)
    page.get_by_text("alpha 0.9: at most 6.4 bits a site").wait_for()
    shoot(page, tmp_path, "again")
