"""What the caller's process and thread have set, and a runtime must not depend on: torch's modes, and os.fork()."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_DEVICES = ("cpu", "cuda")
_first_process: int | None = None  # that opened a runtime, here or in the process that this one was forked from


class ForkedProcess(RuntimeError):
    """A runtime was opened before os.fork() and used after it."""


@contextmanager
def plain_modes() -> Iterator[None]:
    """Run without autograd, inference mode and autocast, whatever the caller has turned on in this thread.

    Tensors made in inference mode cannot be updated outside it, and autocast gives tensors another dtype. torch's
    default dtype and default device are global and stay as they are, so tensors are made with a dtype and a device.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def opening_process() -> int:
    """The id of this process, which opens a runtime; ForkedProcess if a process that it was forked from did so."""
    global _first_process
    process = os.getpid()
    if _first_process is None:
        _first_process = process
    check_process(_first_process)
    return process


def check_process(opened_in: int) -> None:
    """ForkedProcess unless a runtime is used in the process that opened it.

    A child of os.fork() has one thread. The threads of OpenMP that the parent had are missing there, and the first
    operation that needs them would wait forever.
    """
    if os.getpid() != opened_in:
        raise ForkedProcess(
            "this process was forked after the bundle was loaded, and compiled programs cannot run in a fork; load the "
            "bundle after the fork, in each process"
        )
