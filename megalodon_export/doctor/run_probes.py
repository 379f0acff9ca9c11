"""Running probes, each in a process of its own. Standard library only.

A crash in native code ends its process alone, so it becomes a finding. Every process has an empty cache of compiled
code, so nothing compiled earlier hides a broken compiler.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..exporters.workers import end_process, start_process
from .machine import usable_cores
from .report import Check

MAX_PROCESSES = 4  # compilers need memory
_POLL_SECONDS = 0.02
_SCRIPT = Path(__file__).with_name("probes.py")


@dataclass(frozen=True)
class Probe:
    """One process: a function of the script, its arguments, how many seconds it may take, and advice if it fails."""

    title: str
    function: str
    arguments: tuple[str, ...] = ()
    timeout: float = 60.0
    advice: str = ""
    script: Path = _SCRIPT


def run_probes(probes: Sequence[Probe]) -> list[Check]:
    """Run the probes side by side, and return their checks in the order of the probes. Progress goes to stderr.

    A probe that takes longer than its timeout is killed, with all processes that it started.
    """
    waiting = sorted(range(len(probes)), key=lambda index: -probes[index].timeout)  # the long ones first
    running: dict[int, _Run] = {}
    results: dict[int, list[Check]] = {}
    _progress(f"doctor: {len(probes)} probes, about a minute in all")
    try:
        while waiting or running:
            while waiting and len(running) < min(MAX_PROCESSES, usable_cores()):
                index = waiting.pop(0)
                running[index] = _Run(probes[index])
            for index, run in list(running.items()):
                if run.ended():
                    results[index] = run.checks()
                    run.close()
                    del running[index]
                    _progress(f"doctor: {len(results)}/{len(probes)} {run.probe.title}, {run.seconds():.1f} s")
            time.sleep(_POLL_SECONDS)
    finally:
        for run in running.values():
            run.close()
    return [check for index in range(len(probes)) for check in results[index]]


class _Run:
    """The process of one probe, and the folder in which it reports."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.timed_out = False
        self._temporary = tempfile.TemporaryDirectory(prefix="megalodon-doctor-", ignore_cleanup_errors=True)
        self._folder = Path(self._temporary.name)
        self._started = time.monotonic()
        # -P keeps the script's folder off the import path, where its modules would shadow other packages.
        command = [sys.executable, "-P", str(probe.script), str(self._folder), probe.title, probe.function]
        caches = {name: str(self._folder / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        self._process = start_process([*command, *probe.arguments], self._folder / "output", {**os.environ, **caches})

    def seconds(self) -> float:
        """Seconds since the process was started."""
        return time.monotonic() - self._started

    def ended(self) -> bool:
        """Kill the process if it is over its time; True once it has ended."""
        if self._process.poll() is None and self.seconds() > self.probe.timeout:
            self.timed_out = True
            end_process(self._process)
        return self._process.returncode is not None

    def checks(self) -> list[Check]:
        """The checks that the process has written, and one more if it did not end well."""
        written = self._folder / "checks"
        lines = written.read_text(encoding="utf-8").splitlines() if written.exists() else []
        checks = [Check(**json.loads(line)) for line in lines]
        if failure := self._failure():
            checks.append(Check(self.probe.title, False, failure))
        return [
            replace(check, advice=self.probe.advice) if check.ok is False and not check.advice else check
            for check in checks
        ]

    def close(self) -> None:
        """Kill the process if it still runs, and remove its folder."""
        end_process(self._process)
        self._temporary.cleanup()

    def _failure(self) -> str:
        stage = self._folder / "stage"
        doing = f" while {stage.read_text(encoding='utf-8')}" if stage.exists() else ""
        status = self._process.returncode
        if self.timed_out:
            return f"not done after {self.probe.timeout:.0f} s{doing}"
        if status < 0:
            return f"killed by {signal.Signals(-status).name}{doing}"
        if status > 0:
            output = (self._folder / "output").read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line for line in reversed(output) if line.strip()), "no output")
            return f"exit status {status}{doing}: {last.strip()[:200]}"
        return ""


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
