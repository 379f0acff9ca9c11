"""Megalodon language models in production: export once, verify, and run a folder.

Importing registers the model with transformers' Auto classes. `load` opens a bundle and starts a session.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .session import Session, load
    from .snapshot import Snapshot

# A broken torch must not keep `doctor` from saying so; whatever needs the model raises its error again.
with suppress(ImportError, OSError):
    from . import model  # noqa: F401 - registers the classes

__version__ = "0.1.0"
__all__ = ["Session", "Snapshot", "load"]


def __getattr__(name: str) -> Any:
    if name == "Snapshot":
        from .snapshot import Snapshot

        return Snapshot
    if name in __all__:
        from . import session

        return getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
