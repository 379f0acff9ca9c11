"""Reading the files of other implementations' checkpoints; everything wrong with them is a ConversionError."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

_COMMAND = "python -m megalodon_export convert"


class ConversionError(Exception):
    """A checkpoint that cannot be converted. Nothing was written."""


def read_config(src: Path, kind: str) -> dict[str, Any]:
    """config.json of a checkpoint of this kind; ConversionError that names the right command for another kind."""
    config = read_json(src / "config.json")
    if isinstance(config.get("model"), dict):
        actual = "upstream"
    elif config.get("model_type") != "megalodon":
        raise ConversionError(
            f"{src / 'config.json'} is of no Megalodon: it has no section model (the original) and its model_type is "
            f"{config.get('model_type')!r}, not 'megalodon' (megalodon-hf)"
        )
    elif "norm_statistics" in config:
        raise ConversionError(f"{src} is already converted: AutoModelForCausalLM.from_pretrained loads it as it is")
    else:
        actual = "megalodon-hf"
    if actual != kind:
        raise ConversionError(f"{src} is a checkpoint of kind {actual}, not {kind}; use: {_COMMAND} {actual} SRC DST")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(
            f"{path} does not exist; expected a checkpoint folder: config.json, consolidate_config.json and "
            "consolidated.pth (the original), or config.json and model.safetensors (megalodon-hf)"
        ) from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def read_pth(path: Path) -> dict[str, Any]:
    """The state dict of a .pth file, memory-mapped; nothing but tensors is unpickled."""
    if not path.is_file():
        raise ConversionError(f"{path} does not exist; consolidate_config.json promises weights there")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConversionError(
            f"{path} is damaged, or holds more than tensors and is refused (a pickle can run any code): {reason}"
        ) from error
    for key in ("model", "state_dict"):  # the original saves the bare state dict; training scripts often wrap it
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, expected a state dict")
    return {str(name): value for name, value in content.items()}


def read_safetensors(src: Path) -> dict[str, Any]:
    """The tensors of model.safetensors, or of the shards that its index names."""
    files = ["model.safetensors"]
    if (src / "model.safetensors.index.json").is_file():
        weight_map = read_json(src / "model.safetensors.index.json").get("weight_map")
        if not isinstance(weight_map, dict) or any(Path(str(f)).name != f for f in weight_map.values()):
            raise ConversionError(f"{src / 'model.safetensors.index.json'}: no weight_map to files of its own folder")
        files = sorted(set(weight_map.values()))
    tensors: dict[str, Any] = {}
    for file in files:
        try:
            tensors.update(load_file(src / file))
        except FileNotFoundError:
            raise ConversionError(f"{src / file} does not exist; expected the weights as safetensors") from None
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{src / file} is damaged: {error}") from error
    return tensors
