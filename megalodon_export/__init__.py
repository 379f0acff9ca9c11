"""Megalodon language models in production: export once, verify, and run a folder.

    import megalodon_export

    session = megalodon_export.load(BUNDLE)
    for piece in session.generate("In the beginning"):
        print(piece, end="")

Importing the package imports neither torch nor transformers. It makes transformers' Auto classes know the model: they
load a checkpoint with `AutoModelForCausalLM.from_pretrained`, whichever of the two packages is imported first.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import auto_classes

if TYPE_CHECKING:
    from .generation.session import Session, load
    from .generation.snapshot import Snapshot

__version__ = "0.1.0"
__all__ = ["Session", "Snapshot", "load"]

_MODULE_OF = {"Session": "session", "Snapshot": "snapshot", "load": "session"}

auto_classes.install()


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".generation.{_MODULE_OF[name]}", __name__), name)
