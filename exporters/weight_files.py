"""The tensors of safetensors files: where each one is, its dtype and shape, and its values.

A safetensors file is 8 bytes with the length of a JSON header, the header, and the tensors' bytes one after the other:

    {"model.embed.weight": {"dtype": "F32", "shape": [257, 32], "data_offsets": [0, 32896]}, ...}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from .programs import DtypeName

# A model with share_emb has one matrix for its embedding and its head, which a file holds under one of two names.
HEAD, EMBEDDING = "lm_head.weight", "model.embed.weight"
TIED_NAMES = {HEAD: EMBEDDING, EMBEDDING: HEAD}

DTYPE_NAMES: dict[str, DtypeName] = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's file, its name there, dtype and shape, and the first byte and the byte after its last."""

    file: str
    name: str
    dtype: DtypeName
    shape: tuple[int, ...]
    start: int
    end: int


class WeightFiles:
    """The tensors of several files of a folder, by name."""

    def __init__(self, folder: Path, files: tuple[str, ...]) -> None:
        self.folder = folder
        self._opened = {file: safe_open(folder / file, framework="pt") for file in files}
        self._stored = {one.name: one for file in files for one in stored_tensors(folder / file)}

    def find(self, name: str) -> StoredTensor:
        """Where a weight is, under its own name or the one that it is tied to; KeyError if it is in no file."""
        found = self._stored.get(name) or self._stored.get(TIED_NAMES.get(name, ""))
        if found is None:
            raise KeyError(f"the program's input {name} is in none of the bundle's files {', '.join(self._opened)}")
        return found

    def tensor(self, name: str) -> Tensor:
        """A weight's values, mapped from its file."""
        found = self.find(name)
        tensor: Tensor = self._opened[found.file].get_tensor(found.name)
        return tensor


def stored_tensors(path: Path) -> list[StoredTensor]:
    """The header of a safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    first = 8 + size
    return [
        StoredTensor(
            path.name, name, DTYPE_NAMES[e["dtype"]], tuple(e["shape"]), *(first + at for at in e["data_offsets"])
        )
        for name, e in header.items()
    ]
