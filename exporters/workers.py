"""Processes of their own for what may crash or hang: compilations here, the doctor's probes.

    workers = [Worker("prefill", "megalodon_export.exporters.aoti", request, folder), ...]
    results = run_side_by_side(workers, print)     # {"prefill": ...}, or CompileError with the end of a log

Each process runs in a session of its own, so that the compilers which it started end with it. Workers end when the
export does, even one that is killed. This module needs the standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.1


class CompileError(Exception):
    """A program could not be exported or compiled; the message ends with the compiler's own words."""


@dataclass
class Worker:
    """One process: `python -m MODULE REQUEST`, with a folder for its log, its progress and its result."""

    name: str
    module: str
    request: dict[str, Any]
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)  # beside that of this process
    process: subprocess.Popen[bytes] = field(init=False)
    seen: int = 0  # lines of its progress that were reported

    def start(self) -> None:
        """Start the process, its output going to a log."""
        self.folder.mkdir(parents=True)
        command = [sys.executable, "-m", self.module, json.dumps(self.request)]
        # passive: threads that wait must not take the cores from the other worker. The instruction sets are those of
        # /proc/cpuinfo; Inductor would compile a test program for each, which takes up to a minute.
        environment = {"OMP_WAIT_POLICY": "passive", "TORCHINDUCTOR_VEC_ISA_OK": "1", **os.environ}
        environment |= self.environment
        self.process = start_process(command, self.folder / "log", environment, subprocess.PIPE)

    def report_progress(self, report: Callable[[str], None]) -> None:
        """Pass on what the worker has written since the last time."""
        path = self.folder / "progress"
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines[self.seen :]:
            report(f"{self.name}: {line}")
        self.seen = len(lines)

    def result(self) -> Any:
        """What the worker left; CompileError, with the end of its log, if it failed."""
        if self.process.returncode:
            log = (self.folder / "log").read_text(errors="replace")
            raise CompileError(
                f"{self.name} could not be compiled (exit status {self.process.returncode}); "
                f"`megalodon-export doctor` checks the compiler. The end of its log:\n{log[-3000:]}"
            )
        return json.loads((self.folder / "result.json").read_text())


def start_process(
    command: list[str], log: Path, environment: dict[str, str], stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, with all its output in a log."""
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdin=stdin, stdout=output, stderr=output, env=environment, start_new_session=True
        )


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Kill a process of `start_process` and what it started, if it still runs, and wait for it."""
    with process:  # closes its stdin, waits for it
        if process.poll() is None:
            _kill_group(process.pid)


def run_side_by_side(workers: list[Worker], report: Callable[[str], None]) -> dict[str, Any]:
    """Run all workers, passing on their progress; results by name. The first failure ends the others."""
    results = {}
    try:
        for worker in workers:
            worker.start()
        running = list(workers)
        while running:
            time.sleep(_POLL_SECONDS)
            ended = [worker for worker in running if worker.process.poll() is not None]
            for worker in running:
                worker.report_progress(report)
            for worker in ended:
                results[worker.name] = worker.result()
            running = [worker for worker in running if worker not in ended]
    finally:
        for worker in workers:
            if hasattr(worker, "process"):
                end_process(worker.process)
    return results


def serve(compile_request: Callable[[dict[str, Any], Path, Callable[[str], None]], Any]) -> None:
    """In the worker's process: do the request of the command line, leave progress and result in its folder."""
    request = json.loads(sys.argv[1])
    folder = Path(request["directory"])
    _end_with_parent(folder)

    def note(message: str) -> None:
        with open(folder / "progress", "a") as progress:
            progress.write(message + "\n")

    result = compile_request(request, folder, note)
    (folder / "result.json").write_text(json.dumps(result))


def _end_with_parent(folder: Path) -> None:
    """A killed export must leave neither compilers running nor their files in the temporary folder."""

    def watch() -> None:
        os.read(0, 1)  # nothing is ever written, so this returns when the export has ended
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # the last worker removes the folder of all
            folder.parent.rmdir()
        _kill_group(os.getpid())

    threading.Thread(target=watch, daemon=True).start()


def _kill_group(leader: int) -> None:
    if os.name == "posix":
        os.killpg(leader, signal.SIGKILL)
    else:
        os.kill(leader, signal.SIGTERM)
