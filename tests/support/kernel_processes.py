"""Runs modules of `support` under Triton's interpreter, each in a process of its own with one thread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def run_interpreted(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m support.MODULE ARGUMENTS` with Triton interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", f"support.{module}", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
