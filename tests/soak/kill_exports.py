"""Kill exports with SIGKILL at random points, alone and two at once, and look at what stands at their destination.

    python tests/soak/kill_exports.py --points 100                 # about a minute
    python tests/soak/kill_exports.py --points 0 --real 4          # exports by the command, minutes each

The folder must hold the old bundle or a whole new one after every kill, and have no siblings after the next export.
Points are lines of Python, counted over everything that writes, locks and renames, so that the last steps, which take
microseconds, are hit as often as the writing of a file. An export is the real one but for its compilers: it writes
random bytes in their place. `--real` kills the command itself, at a random time, with its compilers.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import megalodon_export
from megalodon_export.bundles.bundle import BundleError, read
from megalodon_export.bundles.parity import read_parity
from megalodon_export.bundles.writing import staged, update_parity

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder tests, for support
from support.damaged_bundles import seal_small

_TRACED = (__file__, *(f"{name}.py" for name in ("staged_folder", "writing", "sealed_files", "files")))
_REFUSED, _BLOCK, _BLOCKS = 3, 2**16, 8


def export(destination: Path, number: int) -> None:
    """A bundle whose programs say which export wrote it."""
    with staged(destination) as staging:
        _programs(staging).parent.mkdir()
        with _programs(staging).open("wb") as file:
            for _ in range(_BLOCKS):
                file.write(number.to_bytes(8, "little") * (_BLOCK // 8))
        sealed = seal_small(staging)
        update_parity(staging, sealed, {"measured": "", "dtype": "float32", "against": "eager", "results": []})


def _programs(folder: Path) -> Path:
    return folder / "aoti" / "programs.pt2"


def number_at(destination: Path) -> int:
    """The number of the export that wrote a bundle, which is checked. BundleError if it is not whole."""
    read_parity(destination, read(destination))
    with _programs(destination).open("rb") as file:
        return int.from_bytes(file.read(8), "little")


def start(work: Callable[[], None], kill_at: int | None = None, lines_to: Path | None = None) -> int:
    """Do something in a forked process that is killed at a line; the process's id.

    `lines_to` gets the number of lines of a process that ends well.
    """
    if pid := os.fork():
        return pid
    lines = 0

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.endswith(_TRACED):
            return None
        lines += event == "line"
        if lines == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return count

    sys.settrace(count)
    try:
        work()
    except BundleError as error:
        os._exit(_REFUSED if "is being written by another export" in str(error) else 1)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    sys.settrace(None)
    if lines_to is not None:
        lines_to.write_text(str(lines))
    os._exit(0)


def end(pid: int) -> str:
    """Wait for a process; how it ended."""
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return "killed"
    return {0: "done", _REFUSED: "refused"}.get(os.WEXITSTATUS(status), "failed")


def number_of_lines(scratch: Path) -> int:
    """The lines of an export that replaces a bundle."""
    for _ in range(2):
        assert end(start(lambda: export(scratch / "counted", 1), lines_to=scratch / "lines")) == "done"
    return int((scratch / "lines").read_text())


def kill_at_lines(scratch: Path, points: int, random_source: random.Random) -> Counter[str]:
    """Kill at random lines; every third time another export to the same place runs at once, and may be killed, too."""
    destination, number = scratch / "bundle", 1
    total, found = number_of_lines(scratch), Counter[str]()
    for point in range(points):
        allowed = {number_at(destination)} if destination.exists() else set()
        children = []
        for _ in range(2 if point % 3 == 0 else 1):
            number += 1
            allowed.add(number)
            kill_at = random_source.randrange(1, total + 1) if not children or random_source.random() < 0.5 else None
            children.append(start(lambda number=number: export(destination, number), kill_at))  # type: ignore[misc]
        ends = sorted(map(end, children))
        if "failed" in ends:
            raise AssertionError(f"point {point}: an export failed")
        if destination.exists() or len(allowed) > len(children):
            now = number_at(destination)
            assert now in allowed, f"point {point}: export {now} stands there, of {sorted(allowed)}"
            found["old" if now == min(allowed) and len(allowed) > len(children) else "new"] += 1
        else:
            found["nothing"] += 1  # there was no bundle before
        found[" and ".join(ends)] += 1
        if point % 2:
            number += 1
            assert end(start(lambda number=number: export(destination, number))) == "done"  # type: ignore[misc]
            assert number_at(destination) == number
            require_no_siblings(destination)
        if point % 10 == 9:
            shutil.rmtree(destination)
    return found


def require_no_siblings(destination: Path) -> None:
    """AssertionError if a file or folder of an export lies beside the destination."""
    left = [path.name for path in destination.parent.iterdir() if path.name.startswith(f".{destination.name}.")]
    assert not left, f"left beside {destination}: {left}"


def kill_commands(scratch: Path, count: int, random_source: random.Random, seconds: float) -> Counter[str]:
    """Kill `megalodon-export` at random times, both ways to export in turn; its compilers have to end with it."""
    destination, found = scratch / "bundle", Counter[str]()
    temporary = scratch / "temporary"
    temporary.mkdir()
    export(destination, 1)
    for point in range(count):
        kind = ("onnx", "aoti")[point % 2]
        command = [sys.executable, "-m", "megalodon_export", kind, "--out", str(destination)]
        environment = {**os.environ, "TMPDIR": str(temporary)}
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
        time.sleep(random_source.uniform(0.0, seconds))
        process.kill()
        found["killed" if process.wait() else "done"] += 1
        read(destination)
        deadline = time.monotonic() + 10
        while working_on(scratch) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not working_on(scratch), f"still running: {working_on(scratch)}"
        export(destination, point + 2)
        assert number_at(destination) == point + 2
        require_no_siblings(destination)
        left = list(temporary.glob(".megalodon-export-*"))
        assert not left, f"left in the temporary folder: {left}"
    return found


def working_on(folder: Path) -> list[str]:
    """The processes whose command lines name a folder, but for this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in command and process.name != str(os.getpid()):
            found.append(command[:200])
    return found


def main() -> None:
    """Kill, and print what was found; an AssertionError names the first point at which something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100, help="exports to kill at random lines (default 100)")
    parser.add_argument("--real", type=int, default=0, help="exports by the command to kill at random times")
    parser.add_argument("--seconds", type=float, default=60.0, help="--real: the latest time (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the random points (default 0)")
    args = parser.parse_args()
    print(f"{megalodon_export.__name__} {megalodon_export.__version__}, seed {args.seed}")
    for count, kill in ((args.points, kill_at_lines), (args.real, kill_commands)):
        if count:
            with tempfile.TemporaryDirectory() as scratch:
                more = (args.seconds,) if kill is kill_commands else ()
                found = kill(Path(scratch), count, random.Random(args.seed), *more)  # type: ignore[operator]
            print(
                f"{kill.__name__}: {count} points: " + ", ".join(f"{number} {name}" for name, number in found.items())
            )


if __name__ == "__main__":
    main()
