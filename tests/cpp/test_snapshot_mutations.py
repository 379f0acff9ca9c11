"""A sample of the edits of `tests/soak/snapshots.py`: Python and C++ take each damaged snapshot alike."""

from __future__ import annotations

import sys
from pathlib import Path

from support.native import sh

SCRIPT = Path(__file__).parents[1] / "soak" / "snapshots.py"


def test_both_sides_agree_on_edited_snapshots(cpp_build: Path, tiny_bundle: Path) -> None:
    printed = sh(sys.executable, SCRIPT, tiny_bundle, cpp_build / "libmegalodon.so", "--edits", 400, "--timeout", 300)
    assert printed.splitlines()[-1] == "400 edits, 0 faults"
