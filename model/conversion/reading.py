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
            "consolidated.pth (the original), or config.json and pytorch_model.bin or model.safetensors (megalodon-hf)"
        ) from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def read_pth(path: Path) -> dict[str, Any]:
    """The state dict of a .pth or .bin file, memory-mapped; nothing but tensors is unpickled."""
    if not path.is_file():
        raise ConversionError(f"{path} does not exist; the checkpoint's other files promise weights there")
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


def read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file."""
    try:
        return dict(load_file(path))
    except FileNotFoundError:
        raise ConversionError(f"{path} does not exist; the index beside it promises weights there") from None
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is damaged: {error}") from error


def read_weights(src: Path) -> dict[str, Any]:
    """The tensors of a folder that transformers wrote: one file, or the shards that an index names.

    As in transformers, safetensors come before pickles, and a whole file before an index.
    """
    formats = {"model.safetensors": read_safetensors, "pytorch_model.bin": read_pth}
    for name, read in formats.items():
        index = src / f"{name}.index.json"
        if (src / name).exists():
            return read(src / name)
        if index.is_file():
            shards = [read(src / file) for file in _shards(index)]
            return {tensor: value for shard in shards for tensor, value in shard.items()}
    names = " or ".join(formats)
    raise ConversionError(f"{src} has no {names}, nor an index of shards; expected the weights in one of them")


def _shards(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not files or any(not isinstance(file, str) or Path(file).name != file for file in files):
        raise ConversionError(f"{index}: no weight_map to files of its own folder")
    return sorted(set(files))
