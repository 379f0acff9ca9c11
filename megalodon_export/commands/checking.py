"""`doctor`: check this machine. It must say what is wrong where torch cannot be imported, so this module needs none."""

from __future__ import annotations

import argparse

from ..doctor import checks


def doctor(args: argparse.Namespace) -> int:
    """Print what was tried, and return 1 if something has to be changed."""
    return checks.main(args.json)
