"""The kernels under Triton's interpreter, in processes of their own: it has to be chosen before Triton is imported."""

from __future__ import annotations

import sys
from pathlib import Path

from support.background import Command, Run

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
# A test's parameter -> the module of `support` that takes its values as arguments.
MODULES = {"case": "kernel_cases", "operation": "kernel_operations", "dtype": "kernel_samples"}


def interpret_kernels(run: Run, _: Path, wanted: dict[str, list[str]]) -> dict[str, list[float]]:
    """Run what MODULES name, for the wanted values of each parameter; the numbers that they print, by value.

    One process runs all cases, one all operations, and one the samples of each dtype, side by side.
    """
    calls = [(MODULES[parameter], values) for parameter, values in wanted.items() if parameter != "dtype"]
    calls += [(MODULES["dtype"], [dtype]) for dtype in wanted.get("dtype", [])]
    printed = run(
        *(
            Command([sys.executable, "-m", f"support.{module}", *names], environment=ENVIRONMENT)
            for module, names in calls
        )
    )
    found: dict[str, list[float]] = {}
    for (module, names), text in zip(calls, printed, strict=True):
        for line in text.splitlines():
            name, value = line.rsplit(" ", 1)
            found.setdefault(names[0] if module == MODULES["dtype"] else name, []).append(float(value))
    return found
