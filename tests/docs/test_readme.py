"""Every command and program of the README, run as it stands there on the default checkpoint."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from support.readme import ROOT, blocks, run


@pytest.mark.parametrize("line", [line for line in blocks("sh")[2].splitlines() if line])
def test_command(workplace: Path, line: str) -> None:
    words = re.findall(r'"[^"]*"|\S+', line)
    printed = run([sys.executable, *(word.strip('"') for word in words[1:])], workplace)
    if "generate" in words:
        assert len(re.findall(r"\b(the|and|of|shall|LORD|unto|that|his)\b", printed)) >= 3, printed
    if "verify" in words:
        assert printed.count("aoti") >= 4
    if "inspect" in words:
        assert "none inside the programs" in printed


def test_onnx_commands(workplace: Path) -> None:
    """In their order: the second and the last read what the first wrote."""
    lines = blocks("sh")[3].splitlines()
    assert len(lines) == 4
    for line in lines:
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
        words = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
        printed = run([sys.executable, *words[1:]], workplace)
        if "generate" in words or "examples" in line:
            assert len(re.findall(r"\b(the|and|of|shall|LORD|unto|that|his)\b", printed)) >= 3, printed
        else:
            assert "programs equal to the eager model" in printed


def test_python_program(workplace: Path) -> None:
    (program,) = blocks("python")
    assert "the" in run([sys.executable, "-c", program], workplace)


def test_ci_runs_the_test_command() -> None:
    command = blocks("sh")[1].strip()
    assert command == "python -m pytest -q"
    assert command in (ROOT / ".ci" / "run").read_text()


def test_readme_names_what_is_in_a_bundle(workplace: Path) -> None:
    bundle = workplace / "artifacts" / "default-aoti-cpu"
    listing = blocks("text")[1]
    if not (bundle / "decode.onnx").exists():
        run([sys.executable, "-m", "megalodon_export", "onnx", "--add", str(bundle)], workplace)
    for file in bundle.rglob("*"):
        if file.is_file() and file.name != "tokenizer_config.json":
            assert file.name in listing, f"the README does not name {file.name}"
