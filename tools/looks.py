"""The site's pages in a real browser, in light and in dark, on a screen and on a phone.

    python tools/looks.py SITE    the pages in PAGES of a built site, such as docs/

axe-core (which axe-playwright-python brings) looks for serious and critical findings in a page's
text: contrast below 4.5:1, an image without alternative text, a part that scrolls and cannot be
reached with the keyboard. On a phone no page may scroll sideways. What lies outside a page's
`main` is the site builder's and is not looked at.

`tools/checks.py` calls `pages_in_browser` with what nbdev has processed. Quarto is no Python
package, so smalldocs stands in for it: the same Bootstrap themes and class names, and our
nbs/styles.css. Where a tool is missing, `missing` says which.
"""

import contextlib
import functools
import http.server
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import yaml
from browser import FLAGS, browser

ROOT = Path(__file__).resolve().parent.parent
# each page, and the rules that it does not keep yet
PAGES = {
    "index": (),
    "tutorials/01_quickstart": (),
    "explanations/concepts/02_diagrams": (),
    "explanations/concepts/04_reading_a_table": (),
    "api/prompts/03_visual_prompt": (),
}
# What Quarto adds to the themes, and smalldocs does not: one pale ground for code, in dark too.
QUARTO_CSS = """
:is(p, li, td, dd) code:not(.sourceCode) { color: #7d12ba; background-color: #ebebeba6; }
div.sourceCode { background-color: #ebebeba6; }
pre.sourceCode { background-color: transparent; }
"""
SCREEN = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 800}
COLORS = ("color-contrast", "link-in-text-block")  # the rules that another scheme can break
AXE = """async ({disabled, only}) => {
  const rules = Object.fromEntries(disabled.map(name => [name, {enabled: false}]));
  const chosen = only.length ? {runOnly: only} : {rules};
  return (await axe.run('main', {resultTypes: ['violations'], ...chosen})).violations }"""
# what sticks out of the page, and is not inside a part that scrolls by itself
WIDE = """() => {
  const scrolls = part => part && (['auto', 'scroll', 'hidden'].includes(
    getComputedStyle(part).overflowX) || (part !== document.body && scrolls(part.parentElement)));
  return [...document.querySelectorAll('main *')]
    .filter(part => part.getBoundingClientRect().right > innerWidth + 1 && !scrolls(part.parentElement))
    .map(part => `${part.tagName.toLowerCase()} ${part.textContent.trim().slice(0, 40)}`) }"""


def missing():
    "What this computer lacks for the check, or an empty text."
    for module in ("playwright", "axe_playwright_python", "smalldocs"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    return "" if browser() else "no Chromium or Chrome is installed"


def build(processed, folder):
    "Build PAGES, as nbdev has processed them, into a small site; returns its folder."
    for name in ["styles.css", *(f"{page}.ipynb" for page in PAGES)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(processed / name, folder / name)
    options = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    options["format"]["html"]["css"] = ["quarto.css", "styles.css"]
    config = {
        "project": {"type": "website", "output-dir": "_site"},
        "website": {"title": "tvp"},
        "format": options["format"],
    }
    (folder / "quarto.css").write_text(QUARTO_CSS, encoding="utf-8")
    (folder / "_quarto.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "smalldocs.cli", "render", folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"smalldocs: {(done.stdout + done.stderr)[-1500:]}")
    return folder / "_site"


class _Quiet(http.server.SimpleHTTPRequestHandler):
    "Serves files and says nothing."

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(site):
    "The address of a folder, served on this machine."
    handler = functools.partial(_Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def address(site, page):
    "A page's file: nbdev takes the number off its name, another builder may not."
    folder, _, name = page.rpartition("/")
    names = (name, name.partition("_")[2])
    paths = (Path(folder, f"{each}.html") for each in names)
    return next(path.as_posix() for path in paths if (site / path).is_file())


def findings(window, page, disabled, only):
    """What axe finds serious or critical, by some rules or by all but some: a line for each rule,
    with the first element."""
    return [
        f"{page}: {found['id']} ({found['impact']}, {len(found['nodes'])} times): "
        f"{found['nodes'][0]['html'][:100]}"
        for found in window.evaluate(AXE, {"disabled": list(disabled), "only": list(only)})
        if found["impact"] in ("serious", "critical")
    ]


def look(site, pages=PAGES):
    "Problems of a built site's pages, in light, in dark and on a phone."
    import axe_playwright_python
    from playwright.sync_api import sync_playwright

    script = Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text("utf-8")
    problems = []
    with served(site) as root, sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser(), args=FLAGS)
        for scheme, only in (("light", ()), ("dark", COLORS)):
            window = chromium.new_page(viewport=SCREEN, color_scheme=scheme)
            for page, disabled in pages.items():
                window.goto(f"{root}/{address(site, page)}", wait_until="load")
                window.evaluate(script)
                problems += findings(window, f"{page}, {scheme}", disabled, only)
        window = chromium.new_page(viewport=PHONE)
        for page in pages:
            window.goto(f"{root}/{address(site, page)}", wait_until="load")
            wide = window.evaluate(WIDE)
            problems += [f"{page} scrolls sideways on a phone: {part}" for part in wide[:3]]
    return problems


def pages_in_browser(processed):
    "Pages can be read in light and in dark, and do not scroll sideways on a phone."
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return look(build(processed, Path(folder)))


if __name__ == "__main__":
    found = [f"skipped: {missing()}"] if missing() else look(Path(sys.argv[1]).resolve())
    print(*found, f"{len(found)} problems", sep="\n")
    sys.exit(bool(found) and not missing())
