"""`python -m megalodon_export COMMAND`, also installed as `megalodon-export`."""

from __future__ import annotations

import io
import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Run the command line; the exit status."""
    from .cli import run

    signal.signal(signal.SIGTERM, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # in any locale: texts are not limited to a locale's characters
    return _written(run(sys.argv[1:]))


def _written(status: int) -> int:
    """The exit status when everything printed has been written: 1 if it could not be."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would fail once more when it ends
        if status == 0:
            print(f"megalodon-export: standard output cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    return status


def _interrupt(number: int, frame: FrameType | None) -> None:
    # The default action ends the process at once and leaves half an export behind.
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
