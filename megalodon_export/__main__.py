"""`python -m megalodon_export COMMAND`, also installed as `megalodon-export`."""

from __future__ import annotations

import signal
import sys
from types import FrameType


def main() -> int:
    """Run the command line; the exit status."""
    from .cli import run

    signal.signal(signal.SIGTERM, _interrupt)
    return run(sys.argv[1:])


def _interrupt(number: int, frame: FrameType | None) -> None:
    # The default action ends the process at once and leaves half an export behind.
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
