"""The documents' tables name the test that shows each feature; the tests must be there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
DOCS = sorted((TESTS.parent / "docs").glob("*.md"))


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_named_tests_exist(path: Path) -> None:
    """`test_file.py::test_name`, `test_file.py`, or `::test_name` of the file named before it."""
    file, named = "", 0
    for before, name in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", path.read_text(encoding="utf-8")):
        file = before or file
        if file and (before or name):
            (path_of_test,) = TESTS.rglob(file)
            text = path_of_test.read_text(encoding="utf-8")
            assert not name or f"def {name}(" in text, f"{file} has no {name}"
            named += 1
    assert named
