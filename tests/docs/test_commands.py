"""Every command and program of the README and of docs/: run as it stands there, or listed as not run, and parsed.

The commands that run share one folder, in which the README's first command has exported the default checkpoint.
"""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from support.readme import PAGES, README, ROOT, blocks, commands, run
from support.slow import slow_except

DOCS = ROOT / "docs"
WORDS = re.compile(r"\b(the|and|of|shall|LORD|unto|that|his)\b")

# Not run, by how a command begins. All but the last two kinds are parsed by the command's own argument parser.
PARSED = {
    "megalodon-export serve": "runs until a signal ends it",
    "megalodon-export bench-serve": "needs a running server",
    "python benchmarks/": "needs a GPU, a large model, or minutes",
    "megalodon-export aoti --weight-format": "another export, which tests/model/test_quantized.py makes",
}
INSTALLS = ("pip install",)
TESTS = ("python -m pytest", ".ci/run", "cmake", "git", ". .venv", "python -m venv")
# Programs that are not run: compiled, no more.
COMPILED = {"lm_eval.simple_evaluate": "downloads a task"}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29517"}


def runs(command: str) -> bool:
    """Whether a command is run here."""
    return not command.startswith((*PARSED, *INSTALLS, *TESTS))


@pytest.fixture(scope="module")
def shell(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Runs a shell command as a reader would, in a folder with the repository's files and the first export."""
    for name in ("examples", "benchmarks", "artifacts/default"):
        if not (workplace / name).exists():
            (workplace / name).symlink_to(ROOT / name)
    programs = tmp_path_factory.mktemp("bin")
    for name, start in (("python", ""), ("megalodon-export", " -m megalodon_export")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{start} "$@"\n')
        (programs / name).chmod(0o755)
    path = f"{programs}:/usr/local/bin:/usr/bin:/bin"
    return lambda command: run(["bash", "-c", command], workplace, PATH=path)


# The pages of docs/ are slow: they repeat what other tests do, the ONNX export for one, on the default checkpoint.
@pytest.mark.parametrize(
    "page", slow_except([p for p in PAGES if any(map(runs, commands(p)))], README), ids=lambda page: page.name
)
def test_commands_run(shell: Callable[[str], str], page: Path) -> None:
    """In their order: some read what an earlier one wrote. The README's first command has run already."""
    for command in filter(runs, commands(page)):
        printed = shell(command)
        if "generate" in command or "onnx_numpy" in command:
            assert len(WORDS.findall(printed)) >= 3, f"{command}: {printed}"
        if " verify " in command:
            assert printed.count("aoti") >= 4
        if " inspect " in command:
            assert "none inside the programs" in printed
        if command.startswith("python -m megalodon_export onnx"):
            verified_there = "--kernels" in command  # in bfloat16, which ONNX Runtime computes on a GPU alone
            assert ("verify it on a GPU" if verified_there else "programs equal to the eager model") in printed


class Parsed(Exception):
    """The arguments were accepted."""


def parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a script parse a command line, and stop it there; SystemExit if it refuses the arguments."""
    words = shlex.split(command)
    words = ["python", "-m", "megalodon_export", *words[1:]] if words[0] == "megalodon-export" else words
    original = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, *arguments: object) -> None:
        original(parser, *arguments)  # type: ignore[call-overload]
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    if words[1] == "-m":
        monkeypatch.setattr(sys, "argv", words[2:])
        runpy.run_module(words[2], run_name="__main__", alter_sys=False)
    else:
        monkeypatch.setattr(sys, "argv", [str(ROOT / words[1]), *words[2:]])
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")


def inline_commands(page: Path) -> list[str]:
    """Commands in the text of a page and its tables, between backticks."""
    start = r"(?:megalodon-export |python -m megalodon_export |python benchmarks/\w+\.py)"
    found = re.findall(rf"`({start}[^`\[]*)`", page.read_text(encoding="utf-8"))
    return [command for command in found if "..." not in command and "COMMAND" not in command]


WITH_BENCHMARKS = [*PAGES, ROOT / "benchmarks" / "README.md"]
NOT_RUN = [command for page in WITH_BENCHMARKS for command in commands(page) if command.startswith(tuple(PARSED))]
INLINE = [command for page in WITH_BENCHMARKS for command in inline_commands(page)]


@pytest.mark.parametrize("command", dict.fromkeys(NOT_RUN + INLINE))
def test_other_commands_parse(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    with pytest.raises(Parsed):
        parse(command, monkeypatch)


def test_every_listed_reason_is_needed() -> None:
    for start in (*PARSED, *INSTALLS):
        assert any(command.startswith(start) for page in PAGES for command in commands(page)), start


def test_installed_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [names for page in PAGES for names in re.findall(r"pip install [^\n`]*\[([\w,-]+)\]", page.read_text())]
    assert named
    for names in named:
        assert set(names.split(",")) <= extras.keys()


def test_the_readme_says_what_the_export_prints(workplace: Path) -> None:
    promised = blocks("text")[0].splitlines()
    bundle = workplace / "artifacts" / "default-aoti-cpu"
    size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    found = re.match(
        r"artifacts/default-aoti-cpu: ([\d,]+) bytes, float32, cpu; programs equal to the eager model", promised[0]
    )
    assert found
    assert promised[1] == 'next: megalodon-export generate artifacts/default-aoti-cpu --prompt "In the beginning"'
    assert size > 0.5 * int(found[1].replace(",", ""))


def programs(page: Path) -> str:
    """The page's blocks of Python that run, as one program."""
    return "\n".join(block for block in blocks("python", page) if not any(text in block for text in COMPILED))


# The page on transformers is slow: it compiles.
FAST_PROGRAMS = [p for p in PAGES if blocks("python", p) and p.name != "transformers.md"]


@pytest.mark.parametrize(
    "page", slow_except([p for p in PAGES if blocks("python", p)], *FAST_PROGRAMS), ids=lambda page: page.name
)
def test_programs_run(shell: Callable[[str], str], workplace: Path, page: Path) -> None:
    for block in blocks("python", page):
        ast.parse(block)
    printed = run([sys.executable, "-c", programs(page)], workplace, OMP_NUM_THREADS="1", **TORCHRUN)
    if page == README:
        assert "the" in printed


def test_ci_runs_the_test_command() -> None:
    command = blocks("sh")[1].strip()
    assert command == "python -m pytest -q"
    assert command in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow  # it adds ONNX graphs to the default bundle
def test_the_bundle_page_names_what_is_in_a_bundle(workplace: Path) -> None:
    bundle = workplace / "artifacts" / "default-aoti-cpu"
    listing = blocks("text", DOCS / "bundle.md")[0]
    if not (bundle / "decode.onnx").exists():
        run([sys.executable, "-m", "megalodon_export", "onnx", "--add", str(bundle)], workplace)
    for file in bundle.rglob("*"):
        if file.is_file() and file.name != "tokenizer_config.json":
            assert file.name in listing, f"docs/bundle.md does not name {file.name}"
