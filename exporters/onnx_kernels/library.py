"""The operator library: built from `cpp/operators` by a C++ compiler alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from ..workers import CompileError

SOURCES = Path(__file__).with_name("operators")
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-s")


def sources() -> Path:
    """The folder of the library's sources: in a checkout `cpp/operators`, in an installed package beside this file."""
    checkout = Path(__file__).parents[2] / "cpp" / "operators"
    return SOURCES if SOURCES.is_dir() else checkout


def build_library(destination: Path, flags: tuple[str, ...] = ()) -> None:
    """Compile the operator library with $CXX or g++ or clang++; CompileError if there is none, or if it fails."""
    given = os.environ.get("CXX", "").split()
    compiler = next(filter(None, map(shutil.which, given[:1] or ("g++", "c++", "clang++"))), None)
    if compiler is None:
        found = f"CXX names {given[0]}, which is not there" if given else "there is none"
        raise CompileError(f"the operator library needs a C++17 compiler, and {found}; install g++, or set CXX")
    files = sorted(map(str, sources().glob("*.cpp")))
    command = [compiler, *given[1:], *_FLAGS, *flags, *files, "-o", str(destination), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{compiler} does not build the operator library: {done.stderr.strip()[-2000:]}")
