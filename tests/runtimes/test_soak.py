"""Small versions of the long trials in tests/soak/."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "soak"


def soak(script: str, *arguments: object) -> str:
    """What a trial prints; AssertionError with its errors if it fails."""
    command = [sys.executable, SOAK / script, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_killed_exports_leave_a_whole_bundle() -> None:
    assert "24 points" in soak("kill_exports.py", "--points", 24)


def test_nothing_grows_with_the_number_of_loads(tiny_bundle: Path, cpp_build: Path) -> None:
    printed = soak("load_cycles.py", tiny_bundle, "--library", cpp_build / "libmegalodon.so", "--cycles", 20)
    assert printed.count("grown: nothing") == 3


@pytest.mark.slow
def test_nothing_grows_with_onnx_runtime(tiny_onnx_bundle: Path) -> None:
    """Slow, because ONNX Runtime's arenas take more cycles to settle."""
    assert soak("load_cycles.py", tiny_onnx_bundle, "--cycles", 60).count("grown: nothing") == 2
