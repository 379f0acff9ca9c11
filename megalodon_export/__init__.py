"""Megalodon language models in production: export once, verify, and run a folder.

Importing registers the model with transformers' Auto classes. `load` opens a bundle and starts a session.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .generation.session import Session, load
    from .generation.snapshot import Snapshot


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Where torchao is installed transformers imports it, and it warns of each extension for another kind of GPU."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# A broken torch must not keep `doctor` from saying so; whatever needs the model raises its error again.
with suppress(ImportError, OSError), _without_remarks():
    from . import model  # noqa: F401 - registers the classes

__version__ = "0.1.0"
__all__ = ["Session", "Snapshot", "load"]


def __getattr__(name: str) -> Any:
    if name == "Snapshot":
        from .generation.snapshot import Snapshot

        return Snapshot
    if name in __all__:
        from .generation import session

        return getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
