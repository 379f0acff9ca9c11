"""The two command lines that continue a prompt print alike, and refuse the same numbers in the same words."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def command_lines(build: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], ...]:
    """Both command lines that continue a prompt."""
    options: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "timeout": 120, "check": False}
    python = [sys.executable, "-m", "megalodon_export", "--threads", "1", "generate"]
    return tuple(subprocess.run([*one, *arguments], **options) for one in (python, [str(build / "megalodon-cli")]))


def test_both_command_lines_print_the_continuation_alone(cpp_build: Path, tiny_bundle: Path) -> None:
    arguments = (str(tiny_bundle), "--prompt", "In the beginning – ě", "--max-new-tokens", "40", "--seed", "3")
    python, cpp = command_lines(cpp_build, *arguments, "--temperature", "0.8")
    assert (python.returncode, cpp.returncode) == (0, 0)
    assert python.stdout == cpp.stdout
    assert python.stdout.endswith("\n")
    assert not python.stdout.startswith("In the")


@pytest.mark.parametrize(
    ("option", "value"), [("--max-new-tokens", "0"), ("--top-p", "1.5"), ("--temperature", "nan"), ("--seed", "-1")]
)
def test_both_command_lines_have_the_same_ranges(cpp_build: Path, option: str, value: str) -> None:
    said = []
    for ran in command_lines(cpp_build, "nothing", "--prompt", "x", f"{option}={value}"):
        assert (ran.returncode, ran.stdout) == (2, "")
        found = re.search(rf"{option}:? (is {re.escape(value)}, expected .*)", ran.stderr)
        assert found, ran.stderr
        said.append(found[1])
    assert said[0] == said[1]
