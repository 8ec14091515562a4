"""Everything from a fresh clone: sets up .venv when needed, then does what you ask.

    python tools/dev.py demo [options of `tvp demo`]   train on one model, evaluate on seven
    python tools/dev.py test                           every check that CI makes
    python tools/dev.py readme                         README.md from nbs/index.ipynb
    python tools/dev.py docs                           the site, into docs/ (needs Quarto)

Needs Python with pip and nothing else; it installs what settings.ini lists.
"""

import configparser
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
STAMP = VENV / "tvp-installed.txt"


def check_python():
    "Stop early, and say why, where Python is too old."
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    wanted = settings["DEFAULT"]["min_python"]
    if sys.version_info < tuple(map(int, wanted.split("."))):
        sys.exit(f"tvp needs Python {wanted} or newer, this is {sys.version.split()[0]}: run this file with a newer one.")


def run(*command, **options):
    "Run a command; where it fails, end with its exit status instead of a traceback."
    status = subprocess.run([str(part) for part in command], **options).returncode
    if status:
        sys.exit(status if status > 0 else 1)


def create_venv():
    "A fresh .venv with pip in it."
    if subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)]).returncode == 0:
        return
    # Some systems ship Python without ensurepip; the pip that came with it can do the same.
    print("Trying once more, with the pip of this Python.", flush=True)
    run(sys.executable, "-m", "venv", "--clear", "--without-pip", VENV)
    run(sys.executable, "-m", "pip", "--python", PYTHON, "install", "pip")


def install(extra=""):
    "Install the package, editable, unless .venv already holds what settings.ini and setup.py ask for."
    facts = [str(ROOT), *((ROOT / name).read_text(encoding="utf-8") for name in ("settings.ini", "setup.py"))]
    wanted = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    if not PYTHON.exists():
        print(f"Creating {VENV}", flush=True)
        create_venv()
    held = STAMP.read_text(encoding="utf-8").split() if STAMP.exists() else []
    if held[:1] == [wanted] and (not extra or extra in held):
        return
    print("Installing tvp into .venv: the first time this takes a few minutes.", flush=True)
    pip = [PYTHON, "-m", "pip", "--disable-pip-version-check", *(["--quiet"] if held else [])]
    STAMP.unlink(missing_ok=True)
    run(*pip, "install", "--use-pep517", "--editable", f".[{extra}]" if extra else ".", cwd=ROOT)
    STAMP.write_text(f"{wanted} {extra}", encoding="utf-8")


def environment(**extra):
    "The variables of an activated .venv, with UTF-8 everywhere."
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    env = {**os.environ, "PATH": path, "VIRTUAL_ENV": str(VENV), "PYTHONUTF8": "1", **extra}
    env.pop("PYTHONHOME", None)
    return env


def demo(arguments):
    "Install, then run `tvp demo` in the caller's folder."
    install()
    run(BIN / "tvp", "demo", *arguments, env=environment())


def test():
    "Install with the development tools, then run tools/checks.py: no hub, one thread for each of two workers."
    install("dev")
    quiet = dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1")
    run(PYTHON, ROOT / "tools" / "checks.py", "test", cwd=ROOT, env=environment(**quiet))


def readme():
    "Write README.md from nbs/index.ipynb."
    install("dev")
    run(PYTHON, ROOT / "tools" / "checks.py", "readme", cwd=ROOT, env=environment())


def docs():
    "Build the site into docs/ with nbdev and Quarto; keep the placeholder there and our own README.md."
    if not shutil.which("quarto"):
        sys.exit("Building the site needs Quarto 1.7: https://quarto.org/docs/download. Nothing else in this project does.")
    install("dev")
    kept = {path: path.read_bytes() for path in (ROOT / "README.md", ROOT / "docs" / "README.md")}
    try:
        run(BIN / "nbdev_docs", cwd=ROOT, env=environment(OMP_NUM_THREADS="1"))
        run(PYTHON, ROOT / "tools" / "checks.py", "texts", cwd=ROOT, env=environment())  # llms.txt, and every page as Markdown
    finally:  # nbdev_docs replaces docs/ as a whole and may render README.md in Quarto's own style
        for path, content in kept.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)


def main():
    "Dispatch on the first argument."
    commands = {"test": test, "readme": readme, "docs": docs}
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if name != "demo" and (name not in commands or arguments):
        sys.exit(__doc__.strip())
    check_python()
    demo(arguments) if name == "demo" else commands[name]()


if __name__ == "__main__":
    main()
