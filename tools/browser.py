"""The widgets in a real JupyterLab in a real browser: `python tools/browser.py [folder for screenshots]`.

Opens the tutorial, shows the live stepper, steps, runs, pauses, moves a slider, changes method and
task, lets an update fail, then clicks on a cell of the transfer matrix; and looks at what the page
shows. Needs playwright (from PyPI) and a Chromium or Chrome of the system (apt install chromium);
where one of them is missing it says so and skips. `tools/checks.py` calls `stepper_in_browser`.
Written for JupyterLab 4 with ipywidgets 8; it also passes on JupyterLab 3 with ipywidgets 7.7,
which is what Colab has.
"""

import contextlib
import importlib.util
import json
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
# what takes longer hangs: each thing happens within a minute, on two busy cores too
SECONDS = 10 * 60
LIMIT = 30 * 60  # seconds for all of it
VIEWPORT = {"width": 1360, "height": 1200}
NO_NEWS = {"fetchNews": "false", "checkForUpdates": False}  # no question in a corner of the page

# Behind the tutorial's cells: a transfer matrix that is quick to make (the tutorial's own takes
# three runs).
EXPLORER_CELLS = (
    """quick = tvp.make_learner("EVP", zoo, "tiny-minigpt4", task)
for _, record in zip(range(20), quick.steps()): pass
found = tvp.evaluate_transfer(quick.prompt, task, zoo, split="valid", limit=60)
quick_explorer = TransferExplorer(found, quick.prompt, task=task, split="valid")""",
    "quick_explorer",
)
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
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
        "MPLCONFIGDIR": "mpl",
    }
    own = {name: str(home / folder) for name, folder in folders.items()}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {
        **os.environ,
        **own,
        **quiet,
        "HOME": str(home),
        "PATH": path,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tools" / "strict"), str(ROOT)]),
    }


def copy_notebook(notebook, folder):
    "The notebook, with the explorer's cells behind its own."
    book = json.loads(notebook.read_text(encoding="utf-8"))
    fresh = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    book["cells"] += [
        {**fresh, "id": f"explorer-{i}", "source": source}
        for i, source in enumerate(EXPLORER_CELLS)
    ]
    (folder / notebook.name).write_text(json.dumps(book), encoding="utf-8")


@contextlib.contextmanager
def jupyterlab(notebook):
    "A server with a copy of the notebook; gives the notebook's address."
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        home = Path(folder).resolve()
        port = free_port()
        settings = home / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
        for path in (home / "work", settings):
            path.mkdir(parents=True)
        (settings / "notification.jupyterlab-settings").write_text(json.dumps(NO_NEWS))
        copy_notebook(notebook, home / "work")
        options = [
            "--allow-root",
            "--no-browser",
            "--ip=127.0.0.1",
            f"--port={port}",
            "--ServerApp.port_retries=0",
            f"--IdentityProvider.token={TOKEN}",
            # fmt: skip
            f"--ServerApp.root_dir={home / 'work'}",
            "--LabApp.news_url=None",
            "--expose-app-in-browser",
        ]
        with open(home / "log", "w") as log:
            command = [sys.executable, "-m", "jupyterlab", *options]
            server = subprocess.Popen(
                command,
                env=lab_environment(home),
                cwd=home,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait_for_server(server, port, home / "log")
            yield f"http://127.0.0.1:{port}/lab/tree/{notebook.name}?reset&token={TOKEN}"
        finally:
            stop(server)


def wait_for_server(server, port, log):
    "Until it answers."
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={TOKEN}", timeout=5).close()
            return
        if server.poll() is not None:
            break
        time.sleep(0.2)
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

# run one cell, after all cells above it where they are wanted
RUN = """async ({source, above}) => {
  const notebook = window.jupyterapp.shell.currentWidget.content, commands = window.jupyterapp.commands;
  const at = notebook.widgets.findIndex(cell => cell.model.type === 'code' && cell.model.sharedModel.getSource().trim() === source);
  if (at < 0) throw new Error(`no cell with the source: ${source}`);
  notebook.activeCellIndex = at;
  if (above) await commands.execute('notebook:run-all-above');
  notebook.activeCellIndex = at;
  await commands.execute('notebook:run-cell');
  if (notebook.scrollToItem) await notebook.scrollToItem(at, 'start');
  notebook.widgets[at].node.scrollIntoView() }"""

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
    for (let j = 0; outputs && j < outputs.length; j++) { const data = outputs.get(j).toJSON();
      if (data.output_type === 'error') found.push(`cell ${i}: ${data.ename}: ${data.evalue}`);
      if (data.name === 'stderr' && /^Traceback/m.test(data.text)) found.push(`cell ${i} has a traceback on stderr: ${String(data.text).slice(-300)}`) } }
  return found }"""

# a short mark for each image of a widget, from its bytes
PICTURES = """async (cell) => Promise.all([...cell.querySelectorAll('img.widget-image')].map(async image => {
  const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
  let mark = 0; for (const byte of bytes) mark = (31 * mark + byte) >>> 0;
  return image.naturalWidth > 0 && image.getBoundingClientRect().width > 100 ? mark : 0 }))"""

# a promise of the page, but not for ever
IN_TIME = (
    "(given) => Promise.race([(%s)(given), new Promise((_, no) => setTimeout(() => no(new "
    "Error('not "
    "within %d ms')), %d))])"
)


class Page:
    "The notebook in the browser, and what can be done with its widgets."

    def __init__(self, page, address, end):
        self.page = page
        self.address = address
        self.console = []
        self.end = end
        page.on("pageerror", lambda error: self.console.append(str(error)))
        self.stepper = page.locator(
            ".jp-CodeCell",
            has=page.locator("button.jupyter-button", has_text=re.compile(r"^\s*reset\s*$")),
        )
        self.explorer = page.locator(
            ".jp-CodeCell", has=page.locator(".widget-html", has_text="plugged into →")
        )

    def left(self):
        "Milliseconds for the next thing to happen."
        left = min(SECONDS, self.end - time.monotonic())
        if left <= 0:
            raise AssertionError(f"hung: ended after {LIMIT // 60} minutes")
        self.page.set_default_timeout(1000 * left)
        return 1000 * left

    def until_idle(self):
        "The kernel is there and has nothing to do."
        self.page.wait_for_function(IDLE, timeout=self.left())

    def until(self, what, true):
        "Wait until something can be seen."
        end = time.monotonic() + self.left() / 1000
        while not true():
            if time.monotonic() > end:
                raise AssertionError(f"{what}: does not happen; {self.says()}")
            self.page.wait_for_timeout(100)

    def must_be(self, what, true):
        "A thing that has to be so now."
        if not true:
            raise AssertionError(f"{what}: is not so; {self.says()}")

    def evaluate(self, script, given=None):
        "JavaScript in the page."
        left = int(self.left())
        return self.page.evaluate(IN_TIME % (script, left, left), given)

    def execute(self, code):
        "Something in the kernel, and what it printed."
        return self.evaluate(EXECUTE, code).strip()

    def run(self, source, above=False):
        "A cell of the notebook."
        self.evaluate(RUN, {"source": source, "above": above})
        self.until_idle()

    # what can be seen

    def words(self, of=None):
        "The line of numbers below the stepper's buttons, or the explorer's sentence."
        told = (of or self.stepper).locator(
            ".widget-html", has_text=re.compile(r"update \d+ of|images fixed")
        )
        return re.sub(r"\s+", " ", told.first.inner_text()).strip()

    def says(self):
        "The stepper's line, for a message; at once, whatever is the matter."
        with contextlib.suppress(Exception):
            self.page.set_default_timeout(500)
            return f"the stepper says {self.words()!r}"
        return "there is no stepper"

    def update(self):
        "The number of updates that it shows."
        return int(re.search(r"update (\d+) of", self.words())[1])

    def is_at(self, status, update):
        "Does it show this status and this update, and nothing of an older training?"
        return self.words().startswith(status) and self.update() == update

    def pictures(self, of=None):
        """A mark for each image; 0 for one that is not shown. An image may be replaced while we
        look."""
        for _ in range(10):
            with contextlib.suppress(Exception):
                return (of or self.stepper).evaluate(PICTURES)
            self.page.wait_for_timeout(100)
        raise AssertionError("the pictures cannot be read")

    def until_new(self, before, of=None):
        "Every image is another one, and can be seen."

        def changed(now):
            return len(now) == len(before) and all(
                a != b and b for a, b in zip(before, now, strict=True)
            )

        self.until("all pictures change", lambda: changed(self.pictures(of)))

    # what can be done

    def click(self, name):
        "A button of the stepper."
        self.stepper.locator(
            "button.jupyter-button", has_text=re.compile(rf"^\s*{name}\s*$")
        ).click()

    def choose(self, name, value):
        "An entry of a menu."
        label = self.page.locator("label.widget-label", has_text=re.compile(rf"^{name}$"))
        self.stepper.locator(".widget-dropdown", has=label).locator("select").select_option(value)

    def slider(self, name):
        "A slider's handle and the number beside it."
        label = self.page.locator("label.widget-label", has_text=re.compile(rf"^{name}$"))
        slider = self.stepper.locator(".widget-slider", has=label)
        return slider.locator(".noUi-handle, .ui-slider-handle"), slider.locator(".widget-readout")


# --- the story -----------------------------------------------------------------------------------


def open_notebook(page):
    "JupyterLab with the notebook, and its kernel."
    page.page.goto(page.address, timeout=page.left())
    page.until_idle()


def show(page):
    "The live cell runs: controls, and four images."
    page.run(LIVE_CELL, above=True)
    page.stepper.locator("img.widget-image").nth(3).wait_for()
    page.until("the stepper is ready", lambda: page.is_at("ready", 0) and all(page.pictures()))
    page.must_be("four pictures", len(page.pictures()) == 4)


def step(page):
    "One update, and every image changes; three quick clicks are three updates."
    before = page.pictures()
    page.click("step")
    page.until("a step", lambda: page.is_at("paused", 1))
    page.until_new(before)
    for _ in range(3):
        page.click("step")
    page.until("three more", lambda: page.is_at("paused", 4))
    told = page.execute("print(stepper.state['step'], len(stepper.history))")
    page.must_be(f"Python sees the same ({told})", told == "4 4")


def run_and_pause(page):
    "It runs while the kernel answers, pauses and stays."
    before = page.pictures()
    page.click("run")
    page.until(
        "it runs", lambda: page.words().startswith(("running", "evaluating")) and page.update() > 5
    )
    begin = time.monotonic()
    first, second = (int(page.execute('print(stepper.state["step"])')) for _ in range(2))
    took = time.monotonic() - begin
    page.must_be(
        f"the kernel answers while it runs (took {took:.1f} s, updates {first}, {second})",
        first <= second,
    )
    page.until("it goes on", lambda: page.update() > second)
    table = page.stepper.locator(".widget-html", has_text="validation images")

    def evaluated_after():  # this or a later evaluation: a slow page may miss one
        return int(re.search(r"after update (\d+)", table.inner_text())[1])

    page.until("the models are evaluated again", lambda: evaluated_after() >= 20)
    begin = time.monotonic()
    page.click("pause")
    page.until("it pauses", lambda: page.words().startswith("paused"))
    paused = time.monotonic() - begin
    number = page.update()
    page.until_new(before)
    page.until(
        "nothing is left to do",
        lambda: page.execute("print(stepper.background.task, stepper.running)") == "None False",
    )
    page.must_be(
        "a paused training stays",
        page.update() == number == int(page.execute('print(stepper.state["step"])')),
    )
    return (
        f"{number} updates, the kernel answered twice in {took:.1f} s, paused after {paused:.1f} s"
    )


def move_slider(page):
    "A slider moved while it runs starts over with another number."
    handle, readout = page.slider("FCA weight")
    before = readout.inner_text()
    page.click("run")
    page.until("it runs", lambda: page.words().startswith(("running", "evaluating")))
    handle.focus()
    for _ in range(3):
        handle.press("ArrowRight")
    page.until("a new training", lambda: page.is_at("ready", 0))
    page.must_be("the slider shows another number", readout.inner_text() != before)

    def seen():
        return float(page.execute('print(stepper.settings["fca"])'))

    page.until(
        "Python sees what the slider shows",
        lambda: abs(seen() - float(readout.inner_text())) < 1e-6,
    )
    page.until("the new training is ready", lambda: page.is_at("ready", 0))
    return f"FCA weight {before} -> {readout.inner_text()}"


def change_method(page):
    "Another method brings its recipe."
    page.choose("method", "VP")
    page.until(
        "VP's learning rate", lambda: float(page.slider("learning rate")[1].inner_text()) == 4
    )
    page.must_be("no FCA for VP", float(page.slider("FCA weight")[1].inner_text()) == 0)
    page.click("step")
    page.until("a step of VP", lambda: page.is_at("paused", 1))
    told = page.execute('print(stepper.settings["method"], stepper.settings["lr"])')
    page.must_be(f"Python sees VP with its own rate ({told})", told == "VP 4.0")


def change_task(page):
    "Another task: other images, other answers."
    before = page.pictures()
    page.choose("task", "digits")
    page.until("another task", lambda: page.is_at("ready", 0))
    page.click("step")
    page.until("a step", lambda: page.is_at("paused", 1))
    page.until_new(before)
    page.must_be(
        "it is about digits", page.execute("print(stepper.training.task.name)") == "digits"
    )


def fail_and_reset(page):
    "What goes wrong is said in words, and can be mended."
    page.execute(
        "from unittest.mock import patch; "
        "failing = patch('tvp.widgets.monitor.TrainingMonitor.advance', "
        "side_effect=MemoryError('no room for this')); failing.start()"
    )
    page.click("step")
    page.until("the error is shown", lambda: page.words().startswith("stopped: no room for this"))
    page.execute("failing.stop()")
    page.click("reset")
    page.until("all is well again", lambda: page.is_at("ready", 0))
    page.click("step")
    page.until("a step", lambda: page.is_at("paused", 1))


def show_explorer(page):
    "A transfer matrix with a button for each cell, and the images of one of them."
    for source in EXPLORER_CELLS:
        page.run(source)
    page.explorer.locator("img.widget-image").wait_for()
    page.until("its pictures", lambda: all(page.pictures(page.explorer)))
    page.must_be("seven targets", page.explorer.locator("button.jupyter-button").count() == 7)


def click_cell(page):
    "Another cell: another sentence, other images, fixed and broken."
    before = page.pictures(page.explorer)
    words = page.words(page.explorer)
    page.explorer.locator("button.jupyter-button[title*='→ tiny-llava']").first.click()
    page.until("the other model's name", lambda: "tiny-llava:" in page.words(page.explorer))
    page.until_new(before, page.explorer)
    told = page.execute(
        "print(quick_explorer.selected['target'], *(int((quick_explorer.cases.change == "
        "kind).sum()) for kind in ('fixed', 'broken')))"
    )
    target, fixed, broken = told.split()
    now = page.words(page.explorer)
    page.must_be(
        f"the page says what Python says ({told}; {now})",
        target == "tiny-llava" and f"{fixed} of 60 images fixed, {broken} broken" in now,
    )
    page.must_be("it is another sentence", now != words)
    return now


def no_errors(page):
    """No error in any cell (a deprecated call of ours is one), no traceback, none in the browser's
    console."""
    found = page.evaluate(ERRORS) + page.console
    page.must_be(f"no errors: {found}", not found)


STORY = (
    open_notebook,
    show,
    step,
    run_and_pause,
    move_slider,
    change_method,
    change_task,
    fail_and_reset,
    show_explorer,
    click_cell,
    no_errors,
)


@contextlib.contextmanager
def open_page(notebook):
    "A page of the real browser on JupyterLab with a copy of the notebook."
    from playwright.sync_api import sync_playwright

    end = time.monotonic() + LIMIT
    with jupyterlab(Path(notebook)) as address, sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser(), args=FLAGS)
        yield Page(chromium.new_page(viewport=VIEWPORT), address, end)


def tell(page, shots, report):
    "Each part of the story, with a screenshot after it; returns problems."
    for number, part in enumerate(STORY):
        begin = time.monotonic()
        try:
            told = part(page)
        except Exception as error:
            shot = shots / f"{number}_{part.__name__}_failed.png"
            with contextlib.suppress(Exception):
                page.page.screenshot(path=shot, timeout=10_000)
            return [f"{part.__name__}: {type(error).__name__}: {error} (screenshot: {shot})"]
        report(
            f"        {time.monotonic() - begin:5.1f} s  "
            f"{part.__doc__}{f' ({told})' if told else ''}"
        )
        page.page.screenshot(path=shots / f"{number}_{part.__name__}.png")
    return []


def stepper_in_browser(shots=None, notebook=NOTEBOOK, report=print):
    """The stepper and the explorer work in JupyterLab, in a real browser; returns problems, none
    where it cannot be tried."""
    if missing():
        report(f"        skipped: {missing()}")
        return []
    folder = Path(shots or tempfile.mkdtemp(prefix="tvp-browser-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open_page(notebook) as page:
            problems = tell(page, folder, report)
    except Exception as error:
        problems = [f"{type(error).__name__}: {error}"]
    if not shots and not problems:
        shutil.rmtree(folder, ignore_errors=True)
    return problems


if __name__ == "__main__":
    begin = time.monotonic()
    problems = stepper_in_browser(*sys.argv[1:])
    print(
        *problems,
        f"{time.monotonic() - begin:.0f} s, "
        f"{'FAILED' if problems else 'skipped' if missing() else 'passed'}",
        sep="\n",
    )
    sys.exit(bool(problems))
