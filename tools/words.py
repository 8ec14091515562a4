"""Words that this project has dropped, in prose, docstrings and comments: `python tools/words.py` lists them.

The field has a word for each of these things, and a reader who searches for it should find our page
(nbs/explanations/concepts/06_glossary.ipynb). What stands in backticks or in quotation marks is a
name or a value and stays; so do code and addresses.

ALLOWED lists phrases in which such a word is right. WAITING lists files that still hold some: a file
leaves it when it is rewritten, and may not stay once it holds none.
"""

import ast
import io
import json
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DROPPED = {  # a pattern, and what to write instead
    r"pictures?": "image",
    r"towers?": "vision encoder",
    r"teachers?": "source",
    r"wish(?:es|ed)?": "gradient",
    r"trainings": "runs",
    r"dice": "random numbers",
    r"sake": "for",
    r"kin": "a model with the same encoder",
    r"grey": "gray",
    r"(?:neighb|col|behavi|fav)ours?(?:ing|ed|able)?": "American spelling",
    r"(?:normal|general|optim|initial|summar|quant|token|visual|recogn|organ)is(?:e[ds]?|ing|ations?)": "American spelling",
    r"centre[ds]?|licence[ds]?|labell(?:ed|ing)": "American spelling",
}
PATTERN = re.compile(rf"\b(?:{'|'.join(DROPPED)})\b", re.IGNORECASE)
ALLOWED = re.compile(r"for the sake of|Dice (?:loss|score|coefficient)")
WAITING = {
    "benchmarks/studies/train_small_zoo.py",
    "nbs/api/evaluation/04_runs.ipynb",
    "nbs/api/evaluation/05_tables.ipynb",
    "nbs/api/evaluation/06_results.ipynb",
    "nbs/api/evaluation/07_transfer.ipynb",
    "nbs/api/evaluation/10_feature_shift.ipynb",
    "nbs/api/experiments/01_report.ipynb",
    "nbs/api/experiments/05_demo.ipynb",
    "nbs/api/models/08_tiny.ipynb",
    "nbs/explanations/01_the_small_zoo.ipynb",
    "nbs/explanations/02_does_it_transfer.ipynb",
    "nbs/explanations/05_what_a_picture_can_hold.ipynb",
    "nbs/explanations/06_bad_pictures.ipynb",
    "nbs/explanations/07_beyond_the_task.ipynb",
    "nbs/explanations/08_beyond_the_paper.ipynb",
    "nbs/tutorials/02_step_through_training.ipynb",
    "nbs/tutorials/03_the_paper.ipynb",
    "nbs/tutorials/05_your_task.ipynb",
    "nbs/tutorials/06_ship_a_prompt.ipynb",
    "nbs/tutorials/07_why_prompts_transfer.ipynb",
    "nbs/tutorials/08_tvp_lens.ipynb",
    "tests/test_train_small_zoo.py",
}
CODE = re.compile(
    r"```.*?```|`[^`]*`|“[^”]*”|\"[^\"\n]*\"|\]\([^)]*\)|<[^>]+>|https?://\S+", re.DOTALL
)


def code_text(source):
    "Comments and docstrings of Python code; nothing where it is no Python."
    source = re.sub(r"^\s*[%!].*", "", source, flags=re.MULTILINE)
    try:
        tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
    said = [ast.get_docstring(node) or "" for node in nodes]
    said += [token.string for token in tokens if token.type == tokenize.COMMENT]
    return "\n".join(text for text in said if not text.startswith("#|"))


def prose(path):
    "What a reader reads in a notebook, a script or a Markdown file, without code, names and links."
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(content)["cells"]
        sources = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
        content = "\n".join(
            code_text(source) if kind == "code" else source
            for source, kind in sources
            if kind != "raw"
        )
    elif path.suffix == ".py":
        content = code_text(content)
    return CODE.sub(" ", content)


def pages():
    "Notebooks, Markdown files and scripts; tvp/ is made from notebooks, CHANGELOG.md tells the past."
    places = [*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("nbs/**/*.qmd"), *ROOT.glob("*.md")]
    places += [
        path
        for folder in ("tools", "tests", "benchmarks")
        for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    return sorted(
        path for path in places if path.name != "CHANGELOG.md" and ".ipynb_" not in str(path)
    )


def dropped_words(path):
    "Words of one file that were dropped, without those that are right where they stand."
    return [word.lower() for word in PATTERN.findall(ALLOWED.sub(" ", prose(path)))]


def instead(word):
    "What to write in its place."
    return next(new for old, new in DROPPED.items() if re.fullmatch(old, word, re.IGNORECASE))


def dropped():
    "Each file that holds dropped words, and each that waits without reason."
    problems = []
    for path in pages():
        name = path.relative_to(ROOT).as_posix()
        found = dropped_words(path)
        if name in WAITING and not found:
            problems.append(
                f"{name} holds no dropped word: take it out of WAITING in tools/words.py"
            )
        if name not in WAITING and found:
            words = ", ".join(f"{word} (write: {instead(word)})" for word in dict.fromkeys(found))
            problems.append(f"{name}: {words}")
    return problems


if __name__ == "__main__":
    found = dropped()
    print(*found, f"{len(found)} problems", sep="\n")
    sys.exit(bool(found))
