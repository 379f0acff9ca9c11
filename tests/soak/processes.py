"""Work item by item in a process of its own, so that an item which ends or hangs the process is named.

The worker prints one line of JSON for each item. If it ends early, another one goes on after the item that ended it.
Trials of a bundle and the C++ library have the same command line, `parser`, and are called by `results`.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


def parser(about: str | None, items: str, count: int) -> argparse.ArgumentParser:
    """The command line of a trial: BUNDLE LIBRARY [--count N], and `--from`, which its worker is given.

    `about` is the docstring of the module, `items` says what is counted, and `count` is the default.
    """
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("bundle", type=Path, help="an export for this machine's CPU")
    found.add_argument("library", type=Path, help="libmegalodon.so")
    found.add_argument("--count", type=int, default=count, help=items)
    found.add_argument("--from", type=int, dest="first", help=argparse.SUPPRESS)
    return found


def results(module: str, bundle: Path, library: Path, count: int, seconds: float = 120) -> Iterator[dict[str, Any]]:
    """Each item that the worker `python -m MODULE BUNDLE LIBRARY --count COUNT --from 0` prints, in their order.

    {"fault": ...} for an item at which the process ended, or about which it was silent for `seconds`.
    """
    arguments = (bundle.resolve(), library.resolve(), "--count", count, "--from")
    done = 0
    while done < count:
        with tempfile.TemporaryFile("w+") as errors:
            command = [sys.executable, "-m", module, *map(str, arguments), str(done)]
            process = subprocess.Popen(command, cwd=TESTS, stdout=subprocess.PIPE, stderr=errors)
            silent = False
            for line in _lines(process, seconds):
                if line is None:
                    silent = True
                    break
                yield json.loads(line)
                done += 1
            process.kill()
            status = process.wait()
            if done < count:
                errors.seek(0)
                what = f"silent for {seconds:.0f} s" if silent else f"ended with {status}"
                yield {"fault": f"{what}: {errors.read()[-2000:]}"}
                done += 1


def _lines(process: subprocess.Popen[bytes], seconds: float) -> Iterator[bytes | None]:
    """The lines of a process; None, and no more, if it is silent for too long."""
    assert process.stdout is not None
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.select(seconds):
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            yield from lines
    yield None


def work(items: Iterable[Any], use: Callable[[Any], dict[str, Any]]) -> None:
    """The worker: print what `use` returns for each item; {"fault": ...} if it raises."""
    for item in items:
        try:
            found = use(item)
        except Exception as error:
            found = {"fault": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)
