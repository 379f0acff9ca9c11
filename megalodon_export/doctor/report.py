"""The doctor's findings: one `Check` for each row, and the table that a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One row. `ok` is True, False (required, and missing or broken) or None (optional, and not there)."""

    name: str
    ok: bool | None
    found: str
    advice: str = ""


def table(checks: Sequence[Check]) -> str:
    """Rows of state, name and finding, aligned. Advice for a row that is not ok follows on a line of its own."""
    width = max((len(check.name) for check in checks), default=0)
    states = {True: "ok", False: "FAIL", None: "-"}
    lines = []
    for check in checks:
        lines.append(f"{states[check.ok]:<4}  {check.name:<{width}}  {check.found}".rstrip())
        if check.advice and check.ok is not True:
            lines.append(f"{'':<4}  {'':<{width}}  -> {check.advice}")
    return "\n".join(lines)
