"""Screenshots of the widgets for README, home and tutorials: `python tools/screenshots.py`.

Opens the tutorial in a real JupyterLab in a real browser, as tools/browser.py does, and writes
nbs/images/stepper.png, stepper.webp (a short animation) and explorer.png.
"""

import io
import sys

from browser import (
    NOTEBOOK,
    ROOT,
    click_cell,
    missing,
    open_notebook,
    open_page,
    show,
    show_explorer,
)
from PIL import Image

IMAGES = ROOT / "nbs" / "images"
FRAMES = 16  # of the animation
UPDATES = 3  # between two frames
WIDTH = 800  # of the animation, pixels
LARGEST = 2**20  # bytes, all together


def snapshot(widget):
    "What a cell of the notebook shows below its code."
    shown = widget.locator(".jp-OutputArea-output").last
    return Image.open(io.BytesIO(shown.screenshot(animations="disabled"))).convert("RGB")


def film(page):
    "The stepper after every few updates."
    frames = [snapshot(page.stepper)]
    for number in range(1, FRAMES):
        for _ in range(UPDATES):
            page.click("step")
        page.until("the updates", lambda: page.is_at("paused", UPDATES * number))
        frames.append(snapshot(page.stepper))
    return frames


def write(frames, explorer):
    "Write both screenshots and the animation."
    frames[-1].save(IMAGES / "stepper.png", optimize=True)
    explorer.save(IMAGES / "explorer.png", optimize=True)
    height = round(frames[-1].height * WIDTH / frames[-1].width)
    first, *others = [frame.resize((WIDTH, height), Image.Resampling.LANCZOS) for frame in frames]
    first.save(
        IMAGES / "stepper.webp", save_all=True, append_images=others, duration=400, loop=0,
        quality=60, method=6,
    )  # fmt: skip
    sizes = {
        name: (IMAGES / name).stat().st_size
        for name in ("stepper.png", "explorer.png", "stepper.webp")
    }
    assert sum(sizes.values()) < LARGEST, sizes
    return sizes


def main():
    "Take the screenshots."
    if missing():
        sys.exit(f"no screenshots: {missing()}")
    with open_page(NOTEBOOK) as page:
        for part in (open_notebook, show):
            part(page)
        frames = film(page)
        for part in (show_explorer, click_cell):
            part(page)
        print(write(frames, snapshot(page.explorer)))


if __name__ == "__main__":
    main()
