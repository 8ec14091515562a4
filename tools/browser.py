"""The stepper in a real JupyterLab in a real browser: `python tools/browser.py [folder for screenshots]`.

Opens the tutorial, shows the live stepper, steps, runs, pauses, moves a slider, changes method and task, and looks at what
the page shows. Needs playwright (from PyPI) and a Chromium or Chrome of the system (apt install chromium); where one of them
is missing it says so and skips. `tools/checks.py` calls `stepper_in_browser`.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "tutorials" / "02_step_through_training.ipynb"
LIVE_CELL = "stepper"  # the source of the cell that shows the widget
TOKEN = "test"
SECONDS = 90  # for each thing to happen: two busy cores are slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


def missing():
    "What this computer lacks for the test, or an empty text."
    if os.name == "nt":
        return "it is written for Linux and macOS"
    for module in ("playwright", "jupyterlab", "ipywidgets"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    return "" if browser() else f"none of {', '.join(BROWSERS)} is installed"


def browser():
    "A browser of this system, or None."
    return next(filter(None, map(shutil.which, BROWSERS)), None)


# --- JupyterLab ----------------------------------------------------------------------------------


def free_port():
    "A port that nobody listens on."
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def lab_environment(home):
    "Its own home: no settings of the user, and no trace left."
    folders = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython", "MPLCONFIGDIR": "mpl"}
    own = {name: str(home / folder) for name, folder in folders.items()}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **own, **quiet, "HOME": str(home), "PATH": path, "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def jupyterlab(notebook):
    "A server with a copy of the notebook; gives the notebook's address."
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        home, port = Path(folder).resolve(), free_port()
        (home / "work").mkdir()
        shutil.copy2(notebook, home / "work")
        options = ["--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}",
                   f"--ServerApp.root_dir={home / 'work'}", "--LabApp.news_url=None", "--expose-app-in-browser"]  # fmt: skip
        with open(home / "log", "w") as log:
            command = [sys.executable, "-m", "jupyterlab", *options]
            server = subprocess.Popen(command, env=lab_environment(home), cwd=home, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            wait_for_server(server, port, home / "log")
            yield f"http://127.0.0.1:{port}/lab/tree/{notebook.name}?reset&token={TOKEN}"
        finally:
            stop(server)


def wait_for_server(server, port, log):
    "Until it answers."
    for _ in range(2 * SECONDS):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={TOKEN}", timeout=5).close()
            return
        if server.poll() is not None:
            break
        time.sleep(0.5)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-1500:]}")


def stop(server):
    "End the server; it ends its kernels."
    server.terminate()
    try:
        server.wait(15)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


# --- the page ------------------------------------------------------------------------------------

IDLE = """() => { const s = window.jupyterapp?.shell?.currentWidget?.sessionContext;
  return s && s.isReady && s.session?.kernel?.connectionStatus === 'connected' && s.session.kernel.status === 'idle' }"""

# run every cell down to the live one
RUN_TO_LIVE = """async (source) => {
  const panel = window.jupyterapp.shell.currentWidget, notebook = panel.content;
  const at = notebook.widgets.findIndex(cell => cell.model.type === 'code' && cell.model.sharedModel.source.trim() === source);
  if (at < 0) throw new Error(`no cell with the source: ${source}`);
  notebook.activeCellIndex = at;
  await window.jupyterapp.commands.execute('notebook:run-all-above');
  notebook.activeCellIndex = at;
  await window.jupyterapp.commands.execute('notebook:run-cell');
  await notebook.scrollToItem(at, 'start');
  return at }"""

# code in the notebook's kernel, beside its cells
EXECUTE = """async (code) => {
  const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  const future = kernel.requestExecute({code, store_history: false}), told = [];
  future.onIOPub = message => { if (message.header.msg_type === 'stream') told.push(message.content.text);
                                if (message.header.msg_type === 'error') told.push(`${message.content.ename}: ${message.content.evalue}`) };
  await future.done;
  return told.join('') }"""

ERRORS = """() => { const cells = window.jupyterapp.shell.currentWidget.content.model.cells, found = [];
  for (let i = 0; i < cells.length; i++) { const outputs = cells.get(i).outputs;
    for (let j = 0; outputs && j < outputs.length; j++) if (outputs.get(j).type === 'error') found.push(`cell ${i} has an error output`) }
  return found }"""

# a short mark for each picture, from its bytes
PICTURES = """async () => Promise.all([...document.querySelectorAll('img.widget-image')].map(async image => {
  const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
  let mark = 0; for (const byte of bytes) mark = (31 * mark + byte) >>> 0;
  return image.naturalWidth > 0 && image.getBoundingClientRect().width > 100 ? mark : 0 }))"""


class Page:
    "The notebook in the browser, and what can be done with its stepper."

    def __init__(self, page, address):
        self.page, self.console = page, []
        page.set_default_timeout(1000 * SECONDS)
        page.on("pageerror", lambda error: self.console.append(str(error)))
        page.goto(address)
        self.until_idle()

    def until_idle(self):
        "The kernel is there and has nothing to do."
        self.page.wait_for_function(IDLE, timeout=1000 * SECONDS)

    def words(self):
        "The line of numbers below the buttons."
        return self.page.locator(".widget-html", has_text=re.compile(r"update \d+ of")).first.inner_text().replace("\xa0", " ")

    def update(self):
        "The number of updates that it shows."
        return int(re.search(r"update (\d+) of", self.words())[1])

    def until(self, what, true, seconds=SECONDS):
        "Wait until something can be seen."
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                raise AssertionError(f"{what}: not within {seconds} seconds; the page says {self.words()!r}")
            time.sleep(0.2)

    def pictures(self):
        "A mark for each picture; 0 for one that is not shown. A picture may be replaced while we look."
        for _ in range(10):
            with contextlib.suppress(Exception):
                return self.page.evaluate(PICTURES)
            time.sleep(0.2)
        raise AssertionError("the pictures cannot be read")

    def click(self, name):
        "A button."
        self.page.locator("button.jupyter-button", has_text=re.compile(rf"^\s*{name}\s*$")).click()

    def choose(self, name, value):
        "An entry of a menu."
        label = self.page.locator("label.widget-label", has_text=re.compile(rf"^{name}$"))
        self.page.locator(".widget-dropdown", has=label).locator("select").select_option(value)

    def slider(self, name):
        "A slider's handle and the number beside it."
        label = self.page.locator("label.widget-label", has_text=re.compile(rf"^{name}$"))
        slider = self.page.locator(".widget-slider", has=label)
        return slider.locator(".noUi-handle"), slider.locator(".widget-readout")

    def execute(self, code):
        "Something in the kernel, and what it printed."
        return self.page.evaluate(EXECUTE, code).strip()

    def must_be(self, what, true):
        "A thing that has to be so now."
        if not true:
            raise AssertionError(f"{what}; the page says {self.words()!r}")


# --- the story -----------------------------------------------------------------------------------


def show(page):
    "The live cell runs: controls, and four pictures."
    page.page.evaluate(RUN_TO_LIVE, LIVE_CELL)
    page.until_idle()
    page.page.locator("img.widget-image").nth(3).wait_for()
    page.until("the stepper is ready", lambda: page.words().startswith("ready") and all(page.pictures()))


def step(page):
    "One update, and every picture changes."
    before = page.pictures()
    page.click("step")
    page.until("a step", lambda: page.update() == 1 and page.words().startswith("paused"))
    page.until("all pictures change", lambda: all(a != b for a, b in zip(before, page.pictures(), strict=True)))


def run_and_pause(page):
    "It runs while the kernel answers, pauses and stays."
    before = page.pictures()
    page.click("run")
    page.until("it runs", lambda: page.words().startswith("running") and page.update() >= 4)
    start = time.monotonic()
    first, second = (int(page.execute('print(stepper.state["step"])')) for _ in range(2))
    took = time.monotonic() - start
    page.must_be(f"the kernel answers while it runs (took {took:.1f} s, updates {first}, {second})", took < 20)
    page.until("it goes on", lambda: page.update() > second)
    page.until("the models are asked again", lambda: "after update 20" in page.page.locator(".widget-html", has_text="validation pictures").inner_text())
    page.click("pause")
    page.until("it pauses", lambda: page.words().startswith("paused"))
    number = page.update()
    page.until("pictures change while it runs", lambda: all(a != b for a, b in zip(before, page.pictures(), strict=True)))
    time.sleep(1.5)
    page.must_be("a paused training stays", page.update() == number == int(page.execute('print(stepper.state["step"])')))
    return f"{number} updates, the kernel answered twice in {took:.1f} s"


def move_slider(page):
    "A slider starts over with another number."
    handle, readout = page.slider("FCA weight")
    before = readout.inner_text()
    handle.focus()
    for _ in range(3):
        handle.press("ArrowRight")
    page.until("a new training", lambda: page.words().startswith("ready") and page.update() == 0)
    page.must_be("the slider shows another number", readout.inner_text() != before)
    seen = lambda: float(page.execute('print(stepper.settings["fca"])'))
    page.until("Python sees what the slider shows", lambda: abs(seen() - float(readout.inner_text())) < 1e-6)
    page.until("the new training is ready", lambda: page.words().startswith("ready") and page.update() == 0)
    lr = page.execute('print(stepper.settings["lr"])')
    return f"FCA weight {before} -> {readout.inner_text()}, lr {lr}"


def change_method(page):
    "Another method brings its recipe."
    page.choose("method", "VP")
    page.until("VP's learning rate", lambda: float(page.slider("learning rate")[1].inner_text()) == 4)
    page.must_be("no FCA for VP", float(page.slider("FCA weight")[1].inner_text()) == 0)
    page.click("step")
    page.until("a step of VP", lambda: page.update() == 1)
    told = page.execute('print(stepper.settings["method"], stepper.settings["lr"])')
    page.must_be(f"Python sees VP with its own rate ({told})", told == "VP 4.0")


def change_task(page):
    "Another task: other pictures, other answers."
    before = page.pictures()
    page.choose("task", "digits")
    page.until("another task", lambda: page.words().startswith("ready") and page.update() == 0)
    page.click("step")
    page.until("a step", lambda: page.update() == 1 and page.words().startswith("paused"))
    page.until("all pictures change", lambda: all(a != b for a, b in zip(before, page.pictures(), strict=True)))
    page.must_be("it is about digits", page.execute("print(stepper.training.task.name)") == "digits")


def no_errors(page):
    "No error output in any cell, none in the browser's console."
    found = page.page.evaluate(ERRORS) + page.console
    page.must_be(f"no errors: {found}", not found)


STORY = (show, step, run_and_pause, move_slider, change_method, change_task, no_errors)


def tell(address, shots, report):
    "Each part of the story, with a screenshot after it; returns problems."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        window = play.chromium.launch(executable_path=browser(), args=FLAGS).new_page(viewport={"width": 1360, "height": 1060})
        page = Page(window, address)
        for number, part in enumerate(STORY):
            start = time.monotonic()
            try:
                told = part(page)
            except Exception as error:
                window.screenshot(path=shots / f"{number}_{part.__name__}_failed.png")
                return [f"{part.__name__}: {error}"]
            report(f"        {time.monotonic() - start:5.1f} s  {part.__doc__}{f' ({told})' if told else ''}")
            window.screenshot(path=shots / f"{number}_{part.__name__}.png")
        return []


def stepper_in_browser(shots=None, notebook=NOTEBOOK, report=print):
    "The stepper works in JupyterLab, in a real browser."
    if missing():
        report(f"        skipped: {missing()}")
        return []
    with tempfile.TemporaryDirectory() as folder, jupyterlab(Path(notebook)) as address:
        shots = Path(shots or folder)
        shots.mkdir(parents=True, exist_ok=True)
        return tell(address, shots, report)


if __name__ == "__main__":
    begin = time.monotonic()
    problems = stepper_in_browser(*sys.argv[1:])
    print(*problems, f"{time.monotonic() - begin:.0f} s, {'FAILED' if problems else 'passed'}", sep="\n")
    sys.exit(bool(problems))
