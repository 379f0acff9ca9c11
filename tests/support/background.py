"""Long work beside the tests: what some tests need is made while others run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Job = Callable[..., Any]
Run = Callable[..., list[str]]  # Background.run


@dataclass(frozen=True)
class Command:
    """A command line, the folder that it runs in, and what is added to its environment."""

    words: Sequence[object]
    folder: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


def megalodon(*arguments: object) -> Command:
    """`python -m megalodon_export ARGUMENTS` on one thread."""
    return Command([sys.executable, "-m", "megalodon_export", *arguments], environment={"OMP_NUM_THREADS": "1"})


class Background:
    """A queue of jobs with names, and a thread that works on one at a time.

    A job is a function that calls `run` for whatever takes long. The processes end with the tests, whoever ends them.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._jobs: dict[str, Future[Any]] = {}
        self._running: list[subprocess.Popen[str]] = []
        self._environment = dict(os.environ)  # a test may change it while a job starts a process

    def start(self, name: str, job: Job, *arguments: Any) -> None:
        """Queue a job, which is called with `run` and the arguments."""
        self._jobs[name] = self._thread.submit(job, self.run, *arguments)

    def result(self, name: str) -> Any:
        """Wait for a job; what it returned, or its exception."""
        return self._jobs[name].result()

    def run(self, *commands: Command) -> list[str]:
        """Run commands side by side; what each printed on stdout. AssertionError with their stderr if one fails."""
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2 * len(commands))]
            outputs, errors = files[: len(commands)], files[len(commands) :]
            for command, output, error in zip(commands, outputs, errors, strict=True):
                environment = {**self._environment, **command.environment}
                self._running.append(
                    subprocess.Popen(
                        [str(word) for word in command.words],
                        **{"stdout": output, "stderr": error, "cwd": command.folder, "env": environment},
                        **{"text": True, "start_new_session": True},
                    )
                )
            statuses = [process.wait() for process in self._running]
            self._running.clear()
            for file in files:
                file.seek(0)
            for command, status, error in zip(commands, statuses, errors, strict=True):
                assert status == 0, f"{command.words} failed: {error.read()[-4000:]}"
            return [output.read() for output in outputs]

    def close(self) -> None:
        """End what is running, and forget what is queued."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        self._thread.shutdown()
