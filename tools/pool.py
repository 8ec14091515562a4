"""Checks, notebooks and scripts, each in a process of its own, two at a time.

A process is forked from one that has imported the libraries, where the system can do that:
importing them anew for each notebook would take half of the time. No job fails for being slow: the
limit only ends what hangs.
"""

import asyncio
import contextlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import nbdev.test
from saved import SKIPPED, differences, execute

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "tools" / "seconds.json"
WORKERS = 2
# seconds of a job that nobody has measured, so that no job is ended within half an hour
USUAL = 180
QUICK = 200  # CPU seconds of the notebooks that `--quick` runs, together
LIBRARIES = [
    "nbdev.test",
    "torch",
    "torchvision",
    "pandas",
    "matplotlib.pyplot",
    "seaborn",
    "nbclient",
    "datasets",
    "accelerate",
    "transformers.modeling_utils",
    "tvp.testing.families",
    "checks",  # the checks themselves, with what they import
]
context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")


# --- what a job does, in its own process ---------------------------------------------------------


class Shell(nbdev.test.CaptureShell):
    "nbdev_test's shell; keeps the notebook that it ran, with its outputs."

    def run_all(self, nb, **options):
        Shell.book = nb
        super().run_all(nb, **options)


def skipped_lines(said):
    "What an output says that was skipped: its lines like `skipped: why`."
    return list(dict.fromkeys(re.findall(r"^skipped: (.+)", said, re.M)))


def skips(cells):
    "What a notebook says that it skipped."
    outputs = [
        output
        for cell in cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream"
    ]
    return skipped_lines("\n".join("".join(output["text"]) for output in outputs))


def run_notebook(path):
    "Run a notebook as nbdev_test does; returns problems and skips."
    nbdev.test.CaptureShell = Shell
    passed, _ = nbdev.test.test_nb(path, skip_flags=SKIPPED, basepath=ROOT)
    return ([] if passed else ["does not run"]), skips(Shell.book.cells)


def run_script(path):
    """Run a script as `python` does, in this process; returns problems and skips, which are lines of
    its output like `skipped: why`."""
    said = io.StringIO()
    with patch.object(sys, "argv", [str(path)]), contextlib.redirect_stdout(said):
        try:
            runpy.run_path(str(path), run_name="__main__")
        finally:
            print(said.getvalue(), file=sys.__stdout__, flush=True)
    return [], skipped_lines(said.getvalue())


def serve(connection, folder, environ):
    "Be the kernel behind a connection file, in a fork of a process whose event loop is running."
    from ipykernel.kernelapp import IPKernelApp

    asyncio._set_running_loop(None)
    asyncio.set_event_loop(None)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    IPKernelApp.launch_instance(
        [
            "-f",
            connection,
            "--matplotlib=inline",
            f"--IPKernelApp.parent_handle={os.getppid()}",
            "--HistoryManager.hist_file=:memory:",
        ]
    )


class ForkedKernel:
    """A kernel's process as jupyter_client handles it, forked from this one: the libraries are
    there already."""

    stdin = stdout = stderr = None

    def __init__(self, command, env, cwd, **_):
        connection = command[command.index("-f") + 1]
        self.process = multiprocessing.get_context("fork").Process(
            target=serve, args=(connection, cwd, env)
        )
        self.process.start()
        self.pid = self.process.pid
        self.kill = self.process.kill
        self.terminate = self.process.terminate
        os.setpgid(self.pid, self.pid)  # jupyter_client ends the whole group

    def poll(self):
        "The exit status, once there is one."
        return self.process.exitcode

    def wait(self):
        "The exit status."
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number):
        "Pass a signal on."
        os.kill(self.pid, number)


def run_tutorial(path, newest=True):
    """Run a tutorial in a clean kernel and compare with what it has saved, by the newest libraries;
    returns problems and skips."""
    os.environ.pop("TVP_SHARED", None)  # a tutorial shows what any reader sees
    forked = patch("jupyter_client.provisioning.local_provisioner.launch_kernel", ForkedKernel)
    with forked if sys.platform == "linux" else contextlib.nullcontext():
        fresh = execute(path)
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return [], [
            *skips(fresh.cells),
            "its outputs were saved on Linux on x86-64 and are only compared there",
        ]
    if not newest:
        return [], [
            *skips(fresh.cells),
            "its outputs were saved with the newest libraries and are only compared with theirs",
        ]
    return differences(json.loads(path.read_text(encoding="utf-8")), fresh), skips(fresh.cells)


def work(function, arguments, folder):
    "Run a job in this process: its words go to a file, its result to another."
    if hasattr(os, "setsid"):
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup or & it would be ignored
    with open(folder / "log", "w", encoding="utf-8", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            problems, skipped = function(*arguments)
        except Exception as error:
            traceback.print_exc()
            problems = [f"{type(error).__name__}: {error}"[:300]]
            skipped = []
        seconds = round(sum(os.times()[:4]), 1)
        (folder / "result.json").write_text(
            json.dumps([problems, skipped, seconds]), encoding="utf-8"
        )


# --- jobs and their order ------------------------------------------------------------------------


def recorded():
    "CPU seconds of each job, from the last full run that wrote them down."
    return json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}


def record(jobs):
    "Write the seconds down where jobs are new or gone; returns whether they were."
    if {job.name for job in jobs} == set(recorded()):
        return False
    seconds = {job.name: round(job.seconds) for job in sorted(jobs, key=lambda job: job.name)}
    RECORDED.write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8", newline="\n")
    return True


def quick(jobs):
    "The jobs that took least, up to `QUICK` seconds together."
    known = recorded()
    total = 0
    chosen = []
    for job in sorted(jobs, key=lambda job: known.get(job.name, USUAL)):
        total += known.get(job.name, USUAL)
        chosen += [job] if total <= QUICK else []
    return chosen


def longest_first(jobs):
    "Jobs in the order in which two workers have the least to wait for."
    known = recorded()
    return sorted(jobs, key=lambda job: -known.get(job.name, USUAL))


@dataclass
class Job:
    "A function to call in a process of its own, and what came of it."

    name: str
    function: callable
    arguments: tuple = ()
    problems: list = field(default_factory=list)
    skipped: list = field(default_factory=list)
    seconds: float = 0.0  # of CPU, its children's too
    process: multiprocessing.Process = None

    def start(self, folder):
        "Begin."
        self.folder = folder
        self.begin = time.monotonic()
        folder.mkdir()
        self.limit = 10 * max(USUAL, recorded().get(self.name, USUAL))
        self.process = context.Process(target=work, args=(self.function, self.arguments, folder))
        self.process.start()

    def stop(self):
        "End the process and its children."
        if os.name == "nt":
            subprocess.run(
                ["taskkill", "/F", "/T", "/PID", str(self.process.pid)], capture_output=True
            )
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()

    def is_over(self):
        "Whether it has ended, or has to be ended; then its result is read."
        hangs = self.process.is_alive() and time.monotonic() - self.begin > self.limit
        if self.process.is_alive() and not hangs:
            return False
        if hangs:
            self.stop()
        self.process.join()
        result = self.folder / "result.json"
        if result.exists():
            self.problems, self.skipped, self.seconds = json.loads(
                result.read_text(encoding="utf-8")
            )
        else:
            self.problems = [
                f"hung: ended after {self.limit / 60:.0f} minutes"
                if hangs
                else f"its process died ({self.process.exitcode})"
            ]
        if self.problems:
            log = (
                (self.folder / "log").read_text(encoding="utf-8", errors="replace")
                if (self.folder / "log").exists()
                else ""
            )
            self.problems += re.sub(r"\x1b\[[\d;]*m", "", log).splitlines()[-60:]  # without colors
        return True


def run_jobs(jobs):
    "Run jobs in their order; yields each as it ends."
    waiting = list(jobs)
    running = []
    context.set_forkserver_preload(LIBRARIES) if sys.platform == "linux" else None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            while waiting or running:
                while waiting and len(running) < WORKERS:
                    running.append(waiting.pop(0))
                    running[-1].start(Path(folder) / str(len(waiting)))
                multiprocessing.connection.wait(
                    [job.process.sentinel for job in running], timeout=5
                )
                for job in [job for job in running if job.is_over()]:
                    running.remove(job)
                    yield job
        finally:
            for job in running:
                job.stop()
