"""Permissions of files in tests that root runs: root reads and searches whatever it wants, unless it gives that up."""

from __future__ import annotations

import ctypes
import os

_VERSION, _DAC_OVERRIDE, _DAC_READ_SEARCH = 0x20080522, 1, 2  # from Linux's capability.h


def obey_permissions() -> None:
    """Make this thread, and those that it starts, heed the permissions of files from now on, as a user's do."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for index in range(3):  # effective, permitted, inheritable: the lower 32 capabilities
        sets[index] &= ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")
