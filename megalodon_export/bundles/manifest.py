"""The manifest of a bundle: everything that manifest.json says, as one typed record.

Exporters write it; every runtime, `inspect` and `verify` read it. A Struct's fields are the JSON's keys, in the order
of the file. The records about programs are in `exporters/manifest_types.py`, which exporters may import.

The facts are `config`, `dtype`, `programs`, `versions` and `files`. Everything else follows from them, and stands in
the file for readers without this package. `Manifest.of` derives it, and `contents.py` derives it again to compare.

The C++ library reads the same file (`cpp/src/bundle/manifest.hpp`). Its structs and these:

    C++ Manifest         Manifest: config (vocab_size, num_layers, ids of special tokens), dimensions (V, C), layout_id,
                         model_id; AotiPrograms: limits, all_logits; files, of which it keeps the sizes alone
    C++ CacheTensor      CacheEntry (fill is initial_value, ring is "C" among dims)
    C++ Target           Target, with the torch of versions
    C++ ProgramEntry     CompiledProgram
    C++ Stage            CompiledStage (file is library)
    C++ StageInput       StageInput
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import msgspec
import torch

from ..exporters.manifest_types import Programs, Record
from ..exporters.programs import (
    DtypeName,
    ProgramName,
    ProgramSpec,
    TensorSpec,
    dtype_name,
    program_specs,
    static_sizes,
)
from ..generation.snapshot import layout_id
from ..model import CacheTensor, ModelConfig, cache_layout, dimension_sizes
from ..model.config import WeightFormat
from .sealing import UNSEALED

SCHEMA_VERSION = 4
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, CONSTANTS = "model.safetensors", "constants.safetensors"

ModelDtype = Literal["float32", "bfloat16", "float64", "float16"]
# float16 is for ONNX programs alone, float64 for tests.
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(ModelDtype)}


class CacheEntry(Record, frozen=True):
    """One tensor of the cache. `row_shape` is its shape for one stream, `initial_value` that of every element."""

    name: str
    dims: tuple[str, ...]
    row_shape: tuple[int, ...]
    dtype: DtypeName
    initial_value: float
    meaning: str


class BoundaryTensor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A tensor at a program's boundary, in JSON a list: ["token_ids", ["B", "L"], "int64"]."""

    name: str
    dims: tuple[str, ...]
    dtype: DtypeName


class Boundary(Record, frozen=True):
    """Inputs and outputs of a program. "cache" stands for all tensors of the cache, in the order of the manifest's."""

    inputs: tuple[BoundaryTensor | Literal["cache"], ...]
    updated_in_place: tuple[Literal["cache"], ...]
    outputs: tuple[BoundaryTensor, ...]


class FileEntry(Record, frozen=True):
    """Size in bytes and sha256, in hexadecimal digits, of one file of the bundle."""

    size: int
    sha256: str


class Manifest(Record, frozen=True, kw_only=True):
    """All of manifest.json.

    | key | holds |
    |---|---|
    | `format`, `schema_version`, `created` | what the file is, the version of these keys, when it was made (UTC) |
    | `config` | the model's config |
    | `dtype`, `weight_format` | the dtype of its weights and rings, and how the weights of linear layers are stored |
    | `dimensions` | sizes by the letters of `dims`, but for B (rows) and L (tokens of a call) |
    | `cache` | the tensors of the cache, in order |
    | `layout_id` | a fingerprint of the cache's layout, equal for models that can exchange snapshots |
    | `boundary` | by program: its inputs and outputs |
    | `weights`, `derived_constants` | names of the safetensors files |
    | `programs` | by runtime: target, limits, and the stages or graphs |
    | `versions` | of this package, torch and others that made the bundle |
    | `files` | by name: size and sha256 of each file |
    | `seal` | the sha256 of this file, with zeros in its place |
    """

    format: Literal["megalodon-export"] = "megalodon-export"
    created: str
    config: ModelConfig
    dtype: ModelDtype
    weight_format: WeightFormat
    dimensions: dict[str, int]
    cache: tuple[CacheEntry, ...]
    layout_id: str
    boundary: dict[ProgramName, Boundary]
    weights: str = WEIGHTS
    derived_constants: str = CONSTANTS
    programs: Programs
    versions: dict[str, str]
    schema_version: int = SCHEMA_VERSION
    files: dict[str, FileEntry] = msgspec.field(default_factory=dict)
    seal: str = UNSEALED

    @classmethod
    def of(cls, config: ModelConfig, dtype: ModelDtype, programs: Programs, versions: dict[str, str]) -> Manifest:
        """The manifest of a bundle made now, without its files, which `seal` adds."""
        sizes = dimension_sizes(config)
        return cls(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            config=msgspec.convert({f.name: getattr(config, f.name) for f in fields(ModelConfig)}, ModelConfig),
            dtype=dtype,
            weight_format=config.weight_format,
            dimensions=static_sizes(config),
            cache=tuple(_cache_entry(tensor, sizes, DTYPES[dtype]) for tensor in cache_layout(config)),
            layout_id=layout_id(config),
            boundary={
                name: _boundary(spec)
                for name, spec in program_specs(config, DTYPES[dtype], programs.all_logits).items()
            },
            programs=programs,
            versions=versions,
        )

    @property
    def model_id(self) -> str:
        """A fingerprint of the model: the sha256 of the weights' file, or "" before the files are listed."""
        return self.files[self.weights].sha256 if self.weights in self.files else ""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the model's weights and of the cache's rings."""
        return DTYPES[self.dtype]

    def replace(self, **changes: Any) -> Manifest:
        """A copy of the manifest with other values in some fields."""
        return msgspec.structs.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """The JSON object that stands in the file."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


def _cache_entry(tensor: CacheTensor, sizes: dict[str, int], dtype: torch.dtype) -> CacheEntry:
    return CacheEntry(
        name=tensor.name,
        dims=tensor.dims,
        row_shape=tensor.shape(sizes, 1)[1:],
        dtype=dtype_name(tensor.torch_dtype(dtype)),
        initial_value=tensor.fill,
        meaning=tensor.meaning,
    )


def _boundary(spec: ProgramSpec) -> Boundary:
    def tensors(specs: tuple[TensorSpec, ...]) -> Iterator[BoundaryTensor]:
        return (BoundaryTensor(one.name, one.dims, one.dtype) for one in specs)

    return Boundary((*tensors(spec.arguments), "cache"), ("cache",), tuple(tensors(spec.outputs)))
