"""A notebook from a clean kernel: what it computes is what it has saved.

    python tools/saved.py NOTEBOOK             run it, compare, and say what differs
    python tools/saved.py NOTEBOOK RESULT      run it and write the result (what tools/checks.py does, with a time limit)

Texts are compared cell by cell: words exactly, whole numbers exactly, other numbers with a
tolerance. Images, progress bars, durations and widgets are not compared. A cell whose figures
differ from one processor to the next begins with `#| varies`.
"""

import json
import math
import re
import sys
from pathlib import Path

SKIPPED = {"notest", "slow", "gpu"}  # tst_flags in settings.ini
VARIES = "varies"
TOLERANCE = 0.01  # of a number with decimals, relative; one unit of its last place is granted too
TINY = 1e-5  # rounding errors, written like 5e-07, are all the same
NUMBER = re.compile(r"([-+−]?(?:\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|\d*\.\d+))")
CHANGING = [  # what differs between two runs of the same code, and what stands for it
    (r"data:image/[^\"')\s]+", "picture"),
    (r"<svg.*?</svg>", "picture"),
    (r"<style.*?</style>", "looks"),
    (r"\bid=\"[^\"]*\"|\bT_[0-9a-f]{5}\w*|#T_[0-9a-f]+\w*", "id"),
    (r"0x[0-9a-f]+", "address"),
    (r"\b\d+(?:\.\d+)?\s?(?:ms|s|seconds?|min|minutes?)\b", "some time"),
    (r"\s+", " "),
]


def directives(source):
    "The words after `#|` in a cell's first lines."
    found = [re.match(r"#\s*\|\s*([\w-]+)(:\s*false)?", line) for line in source.splitlines()]
    return {f"{line[1]}{': false' if line[2] else ''}" for line in found if line}


def runs(cell):
    "Whether a cell is run: code, not left to a GPU or a patient reader."
    return cell["cell_type"] == "code" and not directives("".join(cell["source"])) & (
        SKIPPED | {"eval: false"}
    )


def execute(path):
    "The notebook as a clean kernel in its folder makes it."
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        if cell["cell_type"] == "code" and not runs(cell):
            cell["source"] = ""
    NotebookClient(
        book, kernel_name="python3", resources={"metadata": {"path": str(Path(path).parent)}}
    ).execute()
    return book


def shown(outputs):
    "The text in a cell's outputs, without what changes from run to run."
    texts = []
    for output in outputs:
        data = output.get("data", {})
        if output["output_type"] == "stream":
            texts.append("".join(output["text"]) if output["name"] == "stdout" else "")
        elif "application/vnd.jupyter.widget-view+json" not in data:
            kinds = [kind for kind in ("text/markdown", "text/html", "text/plain") if kind in data]
            texts += (
                ["".join(data[kinds[0]])]
                if kinds and not (kinds == ["text/plain"] and "image/png" in data)
                else []
            )
    text = " ".join(texts)
    for pattern, instead in CHANGING:
        text = re.sub(pattern, instead, text, flags=re.S)
    return text.strip()


def same_number(a, b):
    """Whole numbers are equal; others agree within the tolerance or one unit of the last place that
    is shown."""
    a = a.replace("−", "-")
    b = b.replace("−", "-")
    if "." not in a + b and "e" not in (a + b).lower():
        return int(a) == int(b)
    places = min(len(text.lower().partition("e")[0].partition(".")[2]) for text in (a, b))
    last = TINY if "e" in (a + b).lower() else 1.01 * 10**-places
    return math.isclose(float(a), float(b), rel_tol=TOLERANCE, abs_tol=last)


def first_difference(saved, fresh):
    "Where two texts part, in a few words; nothing where they agree."
    old = NUMBER.split(saved)
    new = NUMBER.split(fresh)
    for i, (a, b) in enumerate(zip(old, new, strict=False)):
        if a != b and not (i % 2 and same_number(a, b)):
            before = "".join(old[max(0, i - 4) : i])[-40:]
            return (
                f"saved …{before}{''.join(old[i : i + 3])[:60]}… but now "
                f"{''.join(new[i : i + 3])[:60]}…"
            )
    return (
        ""
        if len(old) == len(new)
        else f"saved {len(saved)} characters, now {len(fresh)}: "
        f"…{(saved + fresh)[min(len(saved), len(fresh)) :][:60]}…"
    )


def differences(saved, fresh):
    "What a notebook has saved and no longer computes, cell by cell."
    problems = []
    for number, (old, new) in enumerate(zip(saved["cells"], fresh["cells"], strict=True)):
        source = "".join(old["source"])
        if runs(old) and VARIES not in directives(source):
            why = first_difference(shown(old["outputs"]), shown(new["outputs"]))
            problems += (
                [
                    f"cell {number} "
                    f"({next((line for line in source.splitlines() if line[:2] != '#|'), '')[:60]}): {why}"
                ]
                if why
                else []
            )
    return problems


def main():
    "Run a notebook; compare it with what is saved, or write it."
    path = Path(sys.argv[1])
    fresh = execute(path.resolve())
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(fresh), encoding="utf-8")
        return 0
    found = differences(json.loads(path.read_text(encoding="utf-8")), fresh)
    print(*found, f"{len(found)} cells differ", sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
