"""torch.autocast is for training. Evaluation over a cache runs in the model's own dtype, whatever autocast says."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from .cache import ModelCache

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def own_dtype_with_cache(run: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Turn autocast off in calls of a module's method that get a cache, except in training.

    Under autocast some products would be in bfloat16. The cache's rings cannot take them where they are in float32, and
    the tokens would be others than without.
    """

    @wraps(run)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return run(*args, **kwargs)
        module, *others = args
        cache = next((value for value in (*others, *kwargs.values()) if isinstance(value, ModelCache)), None)
        if cache is None or module.training:  # type: ignore[attr-defined]
            return run(*args, **kwargs)
        with torch.autocast(cache.position.device.type, enabled=False):
            return run(*args, **kwargs)

    return wrapped
