"""Megalodon language models in production: export once, verify, and run a folder.

Importing registers the model with transformers' Auto classes, without importing transformers. `load` opens a bundle
and starts a session.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import auto_classes

if TYPE_CHECKING:
    from .generation.session import Session, load
    from .generation.snapshot import Snapshot


auto_classes.install()

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
