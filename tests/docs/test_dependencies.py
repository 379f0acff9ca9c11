"""pyproject.toml declares what is imported, and nothing else."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = ("benchmarks", "artifacts", "tests/support")  # some import each other by name
OWN = {"megalodon_export", "soak", "support", "tests"}  # the last are transformers' own, which a test puts there
OWN |= {path.stem for folder in SCRIPTS for path in (ROOT / folder).rglob("*.py")}
UNIMPORTED = {"onnxscript"}  # in the extra of the tests, for transformers' ONNX exporter
IMPLIED = {"numpy"}  # torch needs it for `Tensor.numpy`
TOOLS = {"ruff", "mypy", "setuptools"}


def imported(*folders: str) -> set[str]:
    """The third-party distributions that modules of some folders import."""
    found = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {one.name.split(".")[0] for one in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "importorskip":
                found.add(ast.literal_eval(node.args[0]).split(".")[0])
    return {name.replace("_", "-") for name in found - OWN - sys.stdlib_module_names}


def names(requirements: list[str]) -> set[str]:
    """The distributions that requirements name; onnxruntime is imported by one name, however it was built."""
    found = {re.split(r"[^\w-]", requirement)[0] for requirement in requirements}
    return {name.removesuffix("-gpu") for name in found} - {"megalodon-export"}


REQUIRED = names(PROJECT["dependencies"])
OPTIONAL = {extra: names(needed) for extra, needed in PROJECT["optional-dependencies"].items()}
PACKAGE = imported("model", "exporters", "megalodon_export")


def test_the_package_imports_what_is_declared() -> None:
    optional = OPTIONAL["quantize"] | OPTIONAL["lm-eval"] | OPTIONAL["serve"]
    optional |= {"triton"}  # a torch for CUDA brings it
    assert REQUIRED | optional == PACKAGE | IMPLIED


def test_tests_and_benchmarks_import_what_is_declared() -> None:
    others = imported("tests", "examples", "benchmarks", "artifacts")
    declared = set.union(*OPTIONAL.values()) - TOOLS - UNIMPORTED
    assert others <= REQUIRED | declared
    assert declared <= PACKAGE | others


def test_no_test_module_imports_another() -> None:
    """What they share is in tests/support and in fixtures; modules have names of their own in all folders."""
    modules = [path.stem for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(set(modules)) == len(modules)
    imports = re.compile(r"^\s*(?:from|import)\s+(?!tests\.)(?:[\w.]*\.)?(?:test_\w+|conftest)\b", re.MULTILINE)
    for path in (ROOT / "tests").rglob("*.py"):
        assert not imports.search(path.read_text()), path
