"""The pages' commands and programs, for the tests that run them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
# Pages that this repository's documentation tests hold to its rules, the README first.
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, page: Path = README) -> list[str]:
    """The code blocks of a language on a page, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The shell commands of a page, in order; lines that end with a backslash are joined to the next."""
    text = "".join(blocks("sh", page)).replace("\\\n", " ")
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def prose(page: Path) -> str:
    """A page without its code blocks, which keep their lines as empty ones."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Run a command in a folder; what it printed on stdout."""
    variables = {**os.environ, "OMP_WAIT_POLICY": "passive", **environment}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} failed: {done.stderr[-2000:]}"
    return done.stdout
