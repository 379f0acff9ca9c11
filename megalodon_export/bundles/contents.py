"""Derives a bundle's manifest from its other files, whose hashes have been checked, and compares the two.

| file | what follows from it |
|---|---|
| `config.json` | `config`, and from that the cache, its dimensions, the boundary of the programs and their limits |
| `model.safetensors` | the dtype and the number of layers |
| `aoti/*.so` | the AOTInductor programs: each library ends with a label, see `labels.py` |
| `prefill.onnx`, `decode.onnx` | the ONNX programs: each graph ends with a label |

Facts of the manifest alone are `created`, `versions` and `files`. The C++ library derives the same, compares in the
same order, and reports the first difference in the same words (cpp/src/bundle/contents.cpp). Nothing here loads native
code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace
from safetensors import SafetensorError, safe_open

from ..exporters.manifest_types import PACKAGE, OnnxPrograms, Programs, StageInput, numbered
from ..exporters.onnx_names import TARGET, boundary, graph_files
from ..exporters.programs import NEXT_TOKENS, PREFILL, Limits, program_specs
from ..exporters.weight_files import DTYPE_NAMES, EMBEDDING, HEAD
from ..model import ModelConfig, cache_layout, dimension_sizes
from .files import BundleError
from .labels import library_names, read_graph_labels, read_labels
from .manifest import CONFIG, CONSTANTS, DTYPES, WEIGHTS, Manifest
from .strict_json import parse_json

Header = dict[str, tuple[str, tuple[int, ...]]]  # of a safetensors file: dtype and shape by the tensor's name
_EXPORT_AGAIN = "Export it again."
_NOTHING = object()
_MOST, _MOST_STATE = 2**31 - 1, 2**40  # of any size in a config; bytes


def check_manifest(folder: Path, found: dict[str, Any]) -> Manifest:
    """The manifest of a folder whose files are right, from its JSON; ValueError says where the two differ."""
    _check_facts(found)
    _check_files(found)
    config = _read_config(folder / CONFIG)
    headers = {name: _read_header(folder / name) for name in (WEIGHTS, CONSTANTS)}
    dtype = _dtype(folder / WEIGHTS, headers[WEIGHTS])
    _check_sizes(folder / CONFIG, config, dtype, headers[WEIGHTS])
    expected = _expected(folder, config, dtype, found)
    _require_equal(json.loads(json.dumps(expected.to_json())), found, "")
    manifest = msgspec.convert(found, Manifest)
    _check_stages(manifest, headers)
    return manifest


# ---- facts of the manifest alone -------------------------------------------------------------------------------------


def _check_facts(found: dict[str, Any]) -> None:
    _require_text(found, "created", "created")
    versions = found.get("versions", _NOTHING)
    if not isinstance(versions, dict):
        raise ValueError(f"versions: an object expected, {_brief(versions)} found")
    for name in sorted(versions.keys() | {"megalodon-export", "torch"}):
        _require_text(versions, name, f"versions.{name}")
    programs = found.get("programs", _NOTHING)
    if not isinstance(programs, dict):
        raise ValueError(f"programs: an object expected, {_brief(programs)} found")


def _require_text(owner: dict[str, Any], key: str, where: str) -> None:
    if not isinstance(owner.get(key), str):
        raise ValueError(f"{where}: a string expected, {_brief(owner.get(key, _NOTHING))} found")


def _check_files(found: dict[str, Any]) -> None:
    """ValueError unless the files of the checkpoint and of the programs are listed."""
    wanted = [CONFIG, WEIGHTS, CONSTANTS]
    if "aoti" in found["programs"]:
        wanted += [f"aoti/{PACKAGE}", *(f"aoti/{name}" for name in library_names())]
    if "onnx" in found["programs"]:
        wanted += graph_files()
    for name in wanted:
        if name not in found["files"]:
            raise ValueError(f"files: {name} expected, none found")


# ---- what the files say ----------------------------------------------------------------------------------------------


def _read_config(path: Path) -> ModelConfig:
    try:
        values = parse_json(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError(f"a JSON object expected, {_brief(values)} found")
        return msgspec.convert({f.name: values[f.name] for f in fields(ModelConfig) if f.name in values}, ModelConfig)
    except (ValueError, OSError) as error:
        raise BundleError(f"{path}: {error}. {_EXPORT_AGAIN}") from error


def _read_header(path: Path) -> Header:
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return {
                name: (DTYPE_NAMES.get(one.get_dtype(), one.get_dtype()), tuple(one.get_shape()))
                for name, one in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} is no safetensors file: {error}. {_EXPORT_AGAIN}") from error


def _dtype(path: Path, weights: Header) -> Any:
    dtype, _ = weights.get(EMBEDDING) or weights.get(HEAD) or ("nothing", ())
    if dtype not in DTYPES:
        raise BundleError(f"{path}: an embedding of {' or '.join(DTYPES)} expected, {dtype} found. {_EXPORT_AGAIN}")
    return dtype


def _check_sizes(path: Path, config: ModelConfig, dtype: str, weights: Header) -> None:
    """BundleError for sizes that no memory holds, and for other layers than the weights have."""
    for name, value in sorted(vars(config).items()):
        if isinstance(value, int) and not (0 <= value <= _MOST or (name, value) == ("output_size", -1)):
            raise BundleError(f"{path}: {name} is {value}, expected 0..{_MOST}. {_EXPORT_AGAIN}")
    prefix = "model.layers."
    layers = {name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)}
    if len(layers) != config.num_layers:
        raise BundleError(f"{path}: num_layers is {config.num_layers}, expected {len(layers)}. {_EXPORT_AGAIN}")
    sizes, model_dtype = dimension_sizes(config), DTYPES[dtype]
    if sum(t.torch_dtype(model_dtype).itemsize * prod(t.shape(sizes, 1)) for t in cache_layout(config)) >= _MOST_STATE:
        raise BundleError(f"{path}: a stream's cache would have a terabyte or more. {_EXPORT_AGAIN}")


def _expected(folder: Path, config: ModelConfig, dtype: Any, found: dict[str, Any]) -> Manifest:
    programs, versions = Programs(), found["versions"]
    if "aoti" in found["programs"]:
        aoti, torch = read_labels(folder)
        limits = Limits.of(config, aoti.limits.max_batch, aoti.limits.max_length)
        programs, versions = Programs(aoti=replace(aoti, limits=limits)), versions | {"torch": torch}
    if "onnx" in found["programs"]:
        programs = programs.including("onnx", _onnx_programs(folder, config, dtype))
    manifest = Manifest.of(config, dtype, programs, versions)
    return manifest.replace(created=found["created"], files=found["files"], seal=found["seal"])


def _onnx_programs(folder: Path, config: ModelConfig, dtype: Any) -> OnnxPrograms:
    """The ONNX programs of a bundle. Their labels must be of this model; their inputs and outputs follow from it."""
    label = read_graph_labels(folder)
    if (label.config, label.dtype) != (msgspec.to_builtins(config), dtype):
        raise BundleError(
            f"{folder / 'prefill.onnx'}: it was made for another {CONFIG} or other weights. Export the bundle again."
        )
    limits = Limits.of(config, label.limits.max_batch, label.limits.max_length)
    specs = program_specs(config, DTYPES[dtype], label.all_logits)
    graphs = {name: boundary(spec) for name, spec in specs.items()}
    return OnnxPrograms(TARGET, limits, label.opset, label.all_logits, graph_files(), graphs, label.versions)


# ---- comparing -------------------------------------------------------------------------------------------------------


def _require_equal(expected: Any, found: Any, where: str) -> None:
    for place, wanted, there in _differences(expected, found, where):
        raise ValueError(f"{place}: {_brief(wanted)} expected, {_brief(there)} found")


def _differences(expected: Any, found: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ, and both values there; a key that is missing has the value _NOTHING."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected | found):
            place = f"{where}.{key}" if where else key
            yield from _differences(expected.get(key, _NOTHING), found.get(key, _NOTHING), place)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, (one, other) in enumerate(zip(expected, found, strict=True)):
            yield from _differences(one, other, f"{where}[{index}]")
    elif not _same(expected, found):
        yield where, expected, found


def _same(expected: Any, found: Any) -> bool:
    """Whether two JSON values are equal. A whole number is no truth value, and 1.0 is no whole number; 1 may be 1.0."""
    same_type = type(expected) is type(found) or (type(expected) is float and type(found) is int)
    return same_type and bool(expected == found)


def _brief(value: Any) -> str:
    if value is _NOTHING:
        return "nothing"
    if isinstance(value, dict):
        return "an object"
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)


# ---- stages and weights ----------------------------------------------------------------------------------------------


def _check_stages(manifest: Manifest, headers: dict[str, Header]) -> None:
    """ValueError unless every input of a stage is there when the stage runs: in a file, in the cache, or computed."""
    if manifest.programs.aoti is None:
        return
    cache = {tensor.name: tensor.dtype for tensor in manifest.cache}
    for program, stages in manifest.programs.aoti.stages.items():
        known = {"argument token_ids", f"argument {'lengths' if program == PREFILL else NEXT_TOKENS}"}
        for stage in stages.stages:
            place = f"programs.aoti.stages: {stage.name}"
            for one in stage.inputs:
                if one.kind == "weight":
                    layers = manifest.config.num_layers if stage is stages.layer else 1
                    _check_weight(one, layers, headers, place)
                elif one.kind == "cache":
                    if cache.get(numbered(one.name, 0)) != one.dtype:
                        raise ValueError(f"{place}: {one.name} is no {one.dtype} tensor of the cache")
                elif f"{one.kind} {one.name}" not in known:
                    what = "argument of its program" if one.kind == "argument" else "result of a stage before it"
                    raise ValueError(f"{place}: {one.name} is no {what}")
            known |= {f"stage {name}" for name in stage.outputs}
        if stages.end.outputs != ("logits",):
            raise ValueError(f"programs.aoti.stages: {stages.end.name}: logits expected from it and nothing else")


def _check_weight(one: StageInput, layers: int, headers: dict[str, Header], place: str) -> None:
    for layer in range(layers):
        file, name = str(one.file), numbered(str(one.tensor), layer)
        stored = headers.get(file, {}).get(name)
        if stored is None:
            raise ValueError(f"{place}: {file} has no tensor {name}")
        if stored != (one.dtype, one.shape):
            dtype, shape = stored
            raise ValueError(
                f"{place}: {name} in {file} is {dtype} {list(shape)}; {one.dtype} {list(one.shape or ())} expected"
            )
