"""The model as transformers' classes: config, cache, model, generation, padding, placement, quantisation."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Silence torchao, which transformers imports where it is installed: it warns of extensions for other GPUs."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


with _without_remarks():
    import transformers.modeling_utils  # noqa: F401 - the import that brings torchao along
