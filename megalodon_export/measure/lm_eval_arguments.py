"""The arguments that lm-evaluation-harness passes to a model: which of its own models' mean something here, and how.

Scripts give every model the arguments of `--model hf`. Those that ask for what is done anyway are taken and need
nothing. One that asks for something else is refused, since ignoring it would give numbers of another setting.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ..bundles import bundle

_LOG = logging.getLogger(__name__)
# The values at which an argument of `--model hf` asks for what is done here anyway. The first is the harness's default.
_NEEDS_NOTHING: dict[str, tuple[Any, ...]] = {
    "backend": ("default", "causal"),
    "revision": ("main", None),
    "subfolder": ("", None),
    "trust_remote_code": (False, True, None),
    "use_fast_tokenizer": (True, None),
    "truncation": (False, True, None),
    "logits_cache": (True, False, None),
    "softmax_dtype": (None, "float32", torch.float32),
    "mixed_precision_dtype": (None,),
    "parallelize": (False, None),
    "enable_thinking": (None, False, True),  # for chat templates
    **dict.fromkeys(("max_memory_per_gpu", "max_cpu_memory", "tp_plan", "peft", "delta", "gguf_file"), (None,)),
    **dict.fromkeys(("autogptq", "gptqmodel"), (False, None)),
    "offload_folder": ("./offload", None),
    "think_end_token": (None,),
}


def check_others(given: dict[str, Any], known: list[str]) -> None:
    """ValueError for arguments that no model of the harness has, and for those that ask for what is not done here."""
    if unknown := sorted(given.keys() - _NEEDS_NOTHING.keys()):
        raise ValueError(
            f"model arguments {unknown} do not exist here; expected some of {sorted(known)}, or --model hf's own at "
            f"their defaults: {sorted(_NEEDS_NOTHING)}"
        )
    for name, value in given.items():
        if not any(type(value) is type(one) and value == one for one in _NEEDS_NOTHING[name]):
            raise ValueError(
                f"model argument {name} is {value!r}, expected {' or '.join(map(repr, _NEEDS_NOTHING[name]))}: the "
                "model megalodon has no such option; leave it out, or use --model hf with trust_remote_code=True"
            )


def usable_device(folder: Path, runtime: str | None, device: str | torch.device | None) -> str | None:
    """The device to open a folder on; None is its own default.

    The harness asks for "cuda:0" where the user names none. Without a GPU that means the CPU, and for compiled programs
    the device that they were compiled for.
    """
    wanted = None if device is None else str(device)
    if wanted is None or not wanted.startswith("cuda"):
        return wanted
    if not torch.cuda.is_available():
        _LOG.info("there is no GPU for device %r; using the CPU", wanted)
        return None
    wanted = "cuda" if wanted == "cuda:0" else wanted
    if (folder / bundle.MANIFEST).exists() and runtime in (None, "aoti"):
        aoti = bundle.read(folder, "sizes").programs.aoti
        if aoti is not None and aoti.target.device == "cpu":
            _LOG.warning("the programs of %s were compiled for a CPU; not using device %r", folder, wanted)
            return None
    return wanted


def dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """A dtype as `--dtype` takes it; None is the default, and so is "auto"."""
    return None if dtype in (None, "auto") else str(dtype).removeprefix("torch.")


def whole_number(name: str, value: int | str | None, least: int) -> int | None:
    """A model argument that is a number of at least `least`, or None where it is not given."""
    if value is None:
        return None
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) < least:
        raise ValueError(f"{name} is {value!r}, expected a whole number from {least} on")
    return int(value)
