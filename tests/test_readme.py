"""Every command and program of the README, run as it stands there on the default checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} failed: {done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the first command has run; every README command starts with `python` or installs."""
    folder = tmp_path_factory.mktemp("readme")
    install, export = blocks("sh")[0].strip().split(" && ")
    assert install == "pip install -e '.[test]'"
    printed = run([sys.executable, *export.split()[1:], "--device", "cpu"], folder)
    assert printed.startswith("artifacts/default-aoti-cpu: ")
    assert "programs equal to the eager model" in printed
    return folder


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
