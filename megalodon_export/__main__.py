"""`python -m megalodon_export COMMAND`, also installed as `megalodon-export`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line; the exit status."""
    from .cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
