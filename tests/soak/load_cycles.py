"""Load a bundle, generate and delete it, many times in one process for each runtime, and see whether anything grows.

    python tests/soak/load_cycles.py BUNDLE                                     # 200 times with every runtime of Python
    python tests/soak/load_cycles.py BUNDLE --library build/libmegalodon.so     # and with the C++ library

Counted are mappings, open files, files in the temporary folder, and resident memory once free memory is given back to
the system. The first cycles warm up: libraries, arenas and caches come to stay. Nothing may grow after them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import megalodon_export
from megalodon_export.bundles import bundle
from support import native

TEXT = "In the beginning"
PROMPT = list(TEXT.encode())
# What allocators hold more at one time than at another, and what safetensors 0.8 itself keeps: 64 bytes a tensor.
_NOISE = {"resident": 2**22, "mappings": 8}
_WARM_UP = 4  # a quarter of the cycles, and two at least, come before: the arenas of ONNX Runtime settle late


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    mappings: int
    files: int
    temporary: int
    resident: int  # bytes

    @classmethod
    def now(cls, temporary: Path) -> Held:
        """Of this process, after free memory has gone back to the system."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        mappings = Path("/proc/self/maps").read_text().splitlines()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len(os.listdir("/proc/self/fd"))
        return cls(len(mappings), files, sum(1 for _ in temporary.rglob("*")), pages * os.sysconf("SC_PAGE_SIZE"))


def in_python(runtime: str) -> Callable[[Path], None]:
    """Load a bundle in a runtime, generate in two sessions, and forget them."""

    def cycle(folder: Path) -> None:
        session = megalodon_export.load(folder, runtime, "cpu")
        fork = session.fork()
        assert list(fork.generate_ids(PROMPT, 4)) == list(session.generate_ids(PROMPT, 4))
        assert len(session.generate_batch([TEXT, TEXT[:3]], 4)) == 2

    return cycle


def in_library(library: native.Library) -> Callable[[Path], None]:
    """The same through the C interface."""

    def cycle(folder: Path) -> None:
        engine = native.Engine(library, folder)
        session, other = native.Session(engine), native.Session(engine)
        assert session.generate_ids(PROMPT, 4) == other.generate_ids(PROMPT, 4)
        assert session.generate(TEXT, 4)

    return cycle


def run(cycle: Callable[[Path], None], folder: Path, cycles: int) -> tuple[Held, Held]:
    """What is held after the warm-up and at the end."""
    temporary = Path(tempfile.gettempdir())
    for _ in range(max(cycles // _WARM_UP, 2)):
        cycle(folder)
    after = Held.now(temporary)
    for _ in range(cycles):
        cycle(folder)
    return after, Held.now(temporary)


def grown(after: Held, end: Held) -> dict[str, int]:
    """What has grown, and by how much."""
    differences = {name: value - getattr(after, name) for name, value in asdict(end).items()}
    return {name: more for name, more in differences.items() if more > _NOISE.get(name, 0)}


def main() -> int:
    """Print what is held; 1 if something has grown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--library", type=Path, help="libmegalodon.so, for the C++ library as well")
    parser.add_argument("--cycles", type=int, default=200, help="default 200")
    parser.add_argument("--kind", help=argparse.SUPPRESS)  # the one that this process tries
    args = parser.parse_args()
    if args.kind:
        torch.set_num_threads(1)
        cycle = in_library(native.Library(args.library)) if args.kind == "C++" else in_python(args.kind)
        return report(args.kind, cycle, args.bundle, args.cycles)
    kinds = ["eager", *bundle.read(args.bundle).programs.by_runtime(), *(["C++"] if args.library else [])]
    command = [sys.executable, *sys.argv, "--kind"]
    statuses = [subprocess.run([*command, kind], check=False).returncode for kind in kinds]
    return int(any(statuses))


def report(kind: str, cycle: Callable[[Path], None], folder: Path, cycles: int) -> int:
    """Run, and print what is held; 1 if something has grown."""
    with tempfile.TemporaryDirectory() as temporary:
        tempfile.tempdir = os.environ["TMPDIR"] = temporary
        after, end = run(cycle, folder, cycles)
    more = grown(after, end)
    held = ", ".join(f"{name} {getattr(after, name)} -> {value}" for name, value in asdict(end).items())
    print(f"{kind}: {cycles} cycles: {held}; grown: {more or 'nothing'}", flush=True)
    return int(bool(more))


if __name__ == "__main__":
    sys.exit(main())
