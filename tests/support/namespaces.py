"""Commands in Linux namespaces of their own: read-only, full or noexec places, and process ids that begin at 1.

The permissions that these set up hold for root, too.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from functools import cache

import pytest


def in_mounts(mounts: str, *command: object) -> list[str]:
    """The command, in a namespace in which the shell commands `mounts` have run; skips where there are none."""
    return _unshare("--mount", "sh", "-ec", f"{mounts}\nexec {shlex.join(map(str, command))}")


def as_process_one(*command: object) -> list[str]:
    """The command, with process id 1; skips where there are no namespaces."""
    return _unshare("--pid", "--fork", "--kill-child", *map(str, command))


def _unshare(*arguments: str) -> list[str]:
    if not _are_there():
        pytest.skip("no namespaces for this user: unshare --map-root-user fails")
    return ["unshare", "--map-root-user", *arguments]


@cache
def _are_there() -> bool:
    trial = ["unshare", "--map-root-user", "--mount", "--pid", "--fork", "true"]
    return shutil.which("unshare") is not None and subprocess.run(trial, capture_output=True).returncode == 0
