"""The bytes of a snapshot's file: a safetensors file with a checksum. Python and C++ write the same bytes.

The file is the header's length (8 bytes), the header (JSON, padded with spaces to a multiple of 8 bytes), and the data
of the tensors. The header's metadata is:

    format    "megalodon-export snapshot 2"
    model     the sha256 of the model's weights file
    pending   "null", or the token id in decimal digits that was returned but not fed yet
    sha256    the checksum: see `checksum`

`decode` and the C++ library (cpp/src/generation/snapshot.cpp) make the same checks, in the same order and words.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from itertools import accumulate, pairwise
from operator import mul
from typing import Any

import torch
from torch import Tensor

from ..bundles.strict_json import parse_json
from ..exporters.programs import dtype_name
from ..exporters.weight_files import DTYPE_NAMES

FORMAT = "megalodon-export snapshot 2"
_FORMAT_1 = "megalodon-export snapshot 1"
_METADATA = ["format", "model", "pending", "sha256"]
_MAX_HEADER = 100_000_000  # bytes; the safetensors format's own limit
_DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in DTYPE_NAMES.items()}
_DTYPES["I16"] = torch.int16  # no model has it, and both languages read it before they refuse it
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def encode(tensors: Mapping[str, Tensor], pending: int | None, model: str) -> bytes:
    """The bytes of a file. Tensors of large elements come first, as the safetensors library orders them."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in _NAMES:
            what = dtype_name(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} of the snapshot is {what}, which its file cannot hold; take it again")
    fields = {"format": FORMAT, "model": model, "pending": "null" if pending is None else str(pending)}
    data = {name: _bytes(tensor) for name, tensor in sorted(tensors.items())}
    header: dict[str, Any] = {"__metadata__": {**fields, "sha256": checksum(fields, tensors, data)}}
    order = sorted(data, key=lambda name: -tensors[name].dtype.itemsize)
    end = 0
    for name in order:
        begin, end = end, end + len(data[name])
        dtype, shape = _NAMES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(data[name] for name in order)])


def decode(content: bytes, name: str) -> tuple[dict[str, Tensor], int | None, str]:
    """The tensors, the pending token and the model in the bytes of a file, which messages call `name`.

    ValueError unless it is a safetensors file of this format with the right checksum.
    """
    try:
        metadata, tensors, data = _read(content)
    except ValueError as error:
        raise ValueError(
            f"{name} is no snapshot, or not a whole one: it cannot be read as a safetensors file"
        ) from error
    found = metadata.get("format")
    if found == _FORMAT_1:
        raise ValueError(f"{name} is a snapshot of format 1, and this version reads format 2; take it again")
    if found != FORMAT:
        raise ValueError(f"{name} is no snapshot: its format is {found!r}, expected {FORMAT!r}")
    if sorted(metadata) != _METADATA:
        keys, expected = ", ".join(sorted(metadata)), ", ".join(_METADATA)
        raise ValueError(f"{name} is no whole snapshot: its metadata has {keys}, expected {expected}; take it again")
    if metadata["sha256"] != checksum(metadata, tensors, data):
        raise ValueError(
            f"{name} is damaged: its checksum is not that of its contents; copy it again, or take it again"
        )
    pending = metadata["pending"]
    if not re.fullmatch("null|0|[1-9][0-9]{0,17}", pending):
        raise ValueError(f"{name} is no whole snapshot: its pending token is {pending!r}, expected null or a token id")
    return tensors, None if pending == "null" else int(pending), metadata["model"]


def checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> str:
    """The sha256 over everything that a restored session depends on.

    It is taken over "format\\nmodel\\npending\\n" and then, for each tensor in the order of its name, over
    "NAME DTYPE D0,D1,...\\n" and its data.
    """
    digest = hashlib.sha256("".join(f"{metadata[key]}\n" for key in ("format", "model", "pending")).encode())
    for name in sorted(tensors):
        shape = ",".join(map(str, tensors[name].shape))
        digest.update(f"{name} {dtype_name(tensors[name].dtype)} {shape}\n".encode())
        digest.update(data[name])
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    dense = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return dense.reshape(-1).view(torch.uint8).numpy().data


def _read(content: bytes) -> tuple[dict[str, str], dict[str, Tensor], dict[str, memoryview]]:
    """The metadata, the tensors, and their bytes; ValueError if this is no safetensors file."""
    length = int.from_bytes(content[:8], "little")
    if length > min(_MAX_HEADER, len(content) - 8):
        raise ValueError("no header")
    data = memoryview(bytearray(content[8 + length :]))
    text = content[8 : 8 + length]
    if not re.fullmatch(rb"[ -\[\]-~]*", text):
        raise ValueError("a header needs neither escapes nor characters beyond printable ASCII")
    header = parse_json(text)
    if not isinstance(header, dict):
        raise ValueError("no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("no metadata of strings")
    places = {name: _entry(entry) for name, entry in header.items()}
    ends = sorted((begin, end) for _, _, begin, end in places.values())
    if any(one[1] != other[0] for one, other in pairwise([(0, 0), *ends, (len(data), len(data))])):
        raise ValueError("the tensors do not fill the file")
    tensors, pieces = {}, {}
    for name, (dtype, shape, begin, end) in places.items():
        pieces[name] = data[begin:end]
        tensors[name] = (
            torch.frombuffer(pieces[name], dtype=dtype) if end > begin else torch.empty(0, dtype=dtype, device="cpu")
        )
        tensors[name] = tensors[name].reshape(shape)
    return metadata, tensors, pieces


def _entry(entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    """The dtype, shape, and place in the data that a header gives a tensor."""
    if not isinstance(entry, dict) or sorted(entry) != ["data_offsets", "dtype", "shape"]:
        raise ValueError("no entry of a tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if (
        not isinstance(dtype, str)
        or dtype not in _DTYPES
        or not isinstance(shape, list)
        or not isinstance(offsets, list)
    ):
        raise ValueError("no entry of a tensor")
    if len(offsets) != 2 or any(type(number) is not int or number < 0 for number in (*shape, *offsets)):
        raise ValueError("no whole numbers")
    begin, end = offsets
    sizes = list(accumulate([_DTYPES[dtype].itemsize, *shape], mul))
    if max(sizes) >= 2**63 or end - begin != sizes[-1]:
        raise ValueError("a tensor of another size")
    return _DTYPES[dtype], shape, begin, end
