"""Keeps runtimes independent of their caller's state: torch's modes of the thread, and os.fork() of the process."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_DEVICES = ("cpu", "cuda")
_first_process: int | None = None  # that opened a runtime, here or in the process that this one was forked from


class ForkedProcess(RuntimeError):
    """A runtime was opened before os.fork() and used after it."""


class PlainModes:
    """Runs its block without autograd, inference mode and autocast, whatever the caller has turned on in this thread.

    Tensors made in inference mode cannot be updated outside it, and autocast gives tensors another dtype. torch's
    default dtype and default device are global and stay as they are, so tensors are made with a dtype and a device.
    A session enters this for every token, so what is off already is not turned off again.
    """

    def __enter__(self) -> None:
        self._entered: list[AbstractContextManager[object]] = []
        if torch.is_inference_mode_enabled():
            self._enter(torch.inference_mode(False))
        if torch.is_grad_enabled():
            self._enter(torch.no_grad())
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                self._enter(torch.autocast(device, enabled=False))

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._entered):
            mode.__exit__(*error)

    def _enter(self, mode: AbstractContextManager[object]) -> None:
        mode.__enter__()
        self._entered.append(mode)


def in_plain_modes(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that runs in `PlainModes`."""

    @wraps(call)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with PlainModes():
            return call(*args, **kwargs)

    return wrapped


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
