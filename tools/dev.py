"""Everything from a fresh clone: sets up an environment when needed, then does what you ask.

    python tools/dev.py demo [options of `tvp demo`]   train on one model, evaluate on seven
    python tools/dev.py test                           every check that CI makes
    python tools/dev.py test --quick                   those that take little: three minutes
    python tools/dev.py test --lowest                  with the lowest versions that settings.ini allows, in .venv-lowest
    python tools/dev.py readme                         README.md from nbs/index.ipynb
    python tools/dev.py docs                           the site, into docs/ (needs Quarto)

With `--verbose` the installation shows what pip says. Needs Python with pip and nothing else.
"""

import configparser
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# of the time of the lowest versions: ipywidgets 7 in JupyterLab, and what matplotlib 3.9 parses with
COMPANIONS = ["jupyterlab_widgets<2", "pyparsing<3.3"]


def settings():
    "What settings.ini says."
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def check_python():
    "Stop early, and say why, where Python is too old."
    wanted = settings()["min_python"]
    if sys.version_info < tuple(map(int, wanted.split("."))):
        sys.exit(
            f"tvp needs Python {wanted} or newer, this is {sys.version.split()[0]}: run this "
            "file with a newer one."
        )


def lowest():
    "The lowest versions that settings.ini allows, as pip's constraints."
    needed = settings()["requirements"].split()
    return [*COMPANIONS, *(name.replace(">=", "==").partition(",")[0] for name in needed if ">=" in name)]


def run(*command, **options):
    "Run a command; where it fails, end with its exit status instead of a traceback."
    status = subprocess.run([str(part) for part in command], **options).returncode
    if status:
        sys.exit(status if status > 0 else 1)


def run_quietly(*command):
    "Run a command with a dot every ten seconds; what it says is shown only where it fails."
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [str(part) for part in command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
        begin = time.monotonic()
        status = None
        while status is None:
            try:
                status = process.wait(10)
            except subprocess.TimeoutExpired:
                print(".", end="", flush=True)
        print(
            f" {'failed' if status else 'done'} after {time.monotonic() - begin:.0f} s", flush=True
        )
        if status:
            log.seek(0)
            sys.exit(log.read().decode(errors="replace"))


class Environment:
    "A virtual environment in the clone, with the package in it, editable."

    def __init__(self, name=".venv", constraints=(), verbose=False):
        self.folder = ROOT / name
        self.constraints = list(constraints)
        self.verbose = verbose
        self.bin = self.folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / ("python.exe" if os.name == "nt" else "python")
        self.stamp = self.folder / "tvp-installed.txt"

    def create(self):
        "A fresh environment with pip in it."
        print(f"Creating {self.folder}", flush=True)
        if (
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(self.folder)]).returncode
            == 0
        ):
            return
        # Some systems ship Python without ensurepip; the pip that came with it can do the same.
        print("Trying once more, with the pip of this Python.", flush=True)
        run(sys.executable, "-m", "venv", "--clear", "--without-pip", self.folder)
        run(sys.executable, "-m", "pip", "--python", self.python, "install", "pip")

    def install(self, extra=""):
        """Install the package, unless the environment already holds what settings.ini and setup.py
        ask for."""
        facts = [
            str(ROOT),
            *((ROOT / name).read_text(encoding="utf-8") for name in ("settings.ini", "setup.py")),
        ]
        wanted = hashlib.sha256("\n".join(facts).encode()).hexdigest()
        if not self.python.exists():
            self.create()
        held = self.stamp.read_text(encoding="utf-8").split() if self.stamp.exists() else []
        if held[:1] == [wanted] and (not extra or extra in held):
            return
        self.stamp.unlink(missing_ok=True)
        limits = self.folder / "constraints.txt"
        limits.write_text("\n".join(self.constraints), encoding="utf-8")
        pip = [
            self.python,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--no-input",
            "install",
            "--use-pep517",
            "--constraint",
            limits,
        ]
        print(
            f"Installing tvp into {self.folder.name} (first time: a few minutes) ",
            end="\n" if self.verbose else "",
            flush=True,
        )
        (run if self.verbose else run_quietly)(
            *pip, "--editable", f"{ROOT}[{extra}]" if extra else ROOT
        )
        self.stamp.write_text(f"{wanted} {extra}", encoding="utf-8")

    def run(self, *command, cwd=None, **variables):
        "Run a command as if the environment were activated, with UTF-8 everywhere."
        path = os.pathsep.join([str(self.bin), os.environ.get("PATH", "")])
        env = {
            **os.environ,
            "PATH": path,
            "VIRTUAL_ENV": str(self.folder),
            "PYTHONUTF8": "1",
            **variables,
        }
        env.pop("PYTHONHOME", None)
        run(*command, cwd=cwd, env=env)

    def check(self, *arguments, **variables):
        "Install with the development tools, then run tools/checks.py."
        self.install("dev")
        self.run(self.python, ROOT / "tools" / "checks.py", *arguments, cwd=ROOT, **variables)


def demo(environment, arguments):
    "Install, then run `tvp demo` in the caller's folder."
    environment.install()
    environment.run(environment.bin / "tvp", "demo", *arguments)


def test(environment, arguments):
    "All checks: no hub, one thread for each of two workers."
    quiet = dict(
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        PYTHONUNBUFFERED="1",
    )
    environment.check("test", *arguments, **quiet)


def readme(environment, _):
    "Write README.md from nbs/index.ipynb."
    environment.check("readme")


def docs(environment, _):
    """Build the site into docs/ with nbdev and Quarto; keep the placeholder there and our own
    README.md."""
    if not shutil.which("quarto"):
        sys.exit(
            "Building the site needs Quarto 1.7: https://quarto.org/docs/download. Nothing else "
            "in this project does."
        )
    environment.install("dev")
    kept = {path: path.read_bytes() for path in (ROOT / "README.md", ROOT / "docs" / "README.md")}
    try:
        environment.run(
            environment.bin / "nbdev_docs", cwd=ROOT, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)
        )
        environment.check("texts")  # llms.txt, and every page as Markdown
    finally:  # nbdev_docs replaces docs/ as a whole and may render README.md in Quarto's own style
        for path, content in kept.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)


COMMANDS = {"demo": demo, "test": test, "readme": readme, "docs": docs}
# those of demo are its own
OPTIONS = {"test": {"--quick", "--lowest"}, "readme": set(), "docs": set()}


def main():
    "Dispatch on the first argument."
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    verbose = "--verbose" in arguments
    arguments = [argument for argument in arguments if argument != "--verbose"]
    if name not in COMMANDS or not OPTIONS.get(name, set(arguments)).issuperset(arguments):
        sys.exit(__doc__.strip())
    check_python()
    low = name == "test" and "--lowest" in arguments
    environment = (
        Environment(".venv-lowest", lowest(), verbose) if low else Environment(verbose=verbose)
    )
    COMMANDS[name](environment, arguments)


if __name__ == "__main__":
    main()
