"""Edits of a manifest that make no sense, with what both languages say about them. The manifest is sealed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Lie = tuple[Callable[[dict[str, Any]], object], str]


def _aoti(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["programs"]["aoti"]
    return found


def _stage(manifest: dict[str, Any], program: str = "decode", part: str = "layer") -> dict[str, Any]:
    found: dict[str, Any] = _aoti(manifest)["stages"][program][part]
    return found


def _weight(manifest: dict[str, Any]) -> dict[str, Any]:
    """The first weight among the inputs of a stage."""
    found: dict[str, Any] = next(one for one in _stage(manifest)["inputs"] if one["kind"] == "weight")
    return found


def _at(*path: str | int, **changes: Any) -> Callable[[dict[str, Any]], object]:
    """Changes of the object at a place of the manifest."""

    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for key in path:
            place = place[key]
        place.update(changes)

    return change


_LIMITS = ("programs", "aoti", "limits")

LIES: dict[str, Lie] = {
    "a format": (_at(format="other"), "format: 'megalodon-export' expected, 'other' found"),
    "a date": (_at(created=5), "created: a string expected, 5 found"),
    "a dtype of no model": (_at(dtype="int64"), "dtype: 'float32' expected, 'int64' found"),
    "another dtype": (_at(dtype="bfloat16"), "dtype: 'float32' expected, 'bfloat16' found"),
    "the weights' format": (_at(weight_format="int8"), "weight_format: 'float' expected, 'int8' found"),
    "a missing field": (lambda m: m.pop("layout_id"), "layout_id: '[0-9a-f]{16}' expected, nothing found"),
    "an unknown field": (_at(extra=1), "extra: nothing expected, 1 found"),
    "no config": (_at(config=None), "config: an object expected, None found"),
    "no layers": (_at("config", num_layers=0), "config.num_layers: 2 expected, 0 found"),
    "one layer": (_at("config", num_layers=1), "config.num_layers: 2 expected, 1 found"),
    "many layers": (_at("config", num_layers=10**7), "config.num_layers: 2 expected, 10000000 found"),
    "a chunk": (_at("config", chunk_size=32), "config.chunk_size: 64 expected, 32 found"),
    "a chunk of text": (_at("config", chunk_size="64"), "config.chunk_size: 64 expected, '64' found"),
    "a chunk with a point": (_at("config", chunk_size=64.0), "config.chunk_size: 64 expected, 64.0 found"),
    "a true chunk": (_at("config", chunk_size=True), "config.chunk_size: 64 expected, True found"),
    "rotations": (_at("config", rope_base=2e4), "config.rope_base: None expected, 20000.0 found"),
    "a switch": (_at("config", swiglu=1), "config.swiglu: False expected, 1 found"),
    "an unknown setting": (_at("config", extra=[]), "config.extra: nothing expected, a list of 0 found"),
    "dimensions": (_at("dimensions", C=32), "dimensions.C: 64 expected, 32 found"),
    "a dtype that there is not": (
        _at("cache", 0, dtype="float8"),
        r"cache\[0\].dtype: 'float32' expected, 'float8' found",
    ),
    "a cache's shape": (_at("cache", 0, row_shape=[2, 64, 4]), r"cache\[0\].row_shape\[2\]: 8 expected, 4 found"),
    "a cache's dimensions": (_at("cache", 0, dims=[1, 2, 3, 4]), r"cache\[0\].dims\[0\]: 'B' expected, 1 found"),
    "an initial value": (_at("cache", 4, initial_value=0), r"cache\[4\].initial_value: 1.0 expected, 0 found"),
    "a meaning": (_at("cache", 0, meaning=""), r"cache\[0\].meaning: 'rotated keys .*' expected, '' found"),
    "a cache's tensors": (lambda m: m["cache"].pop(), "cache: a list of 13 expected, a list of 12 found"),
    "the layout": (_at(layout_id="0"), "layout_id: '[0-9a-f]{16}' expected, '0' found"),
    "the boundary": (
        lambda m: m["boundary"]["decode"]["inputs"].pop(),
        "boundary.decode.inputs: a list of 2 expected, a list of 1 found",
    ),
    "other weights": (_at(weights="x"), "weights: 'model.safetensors' expected, 'x' found"),
    "no weights": (lambda m: m["files"].pop("model.safetensors"), "model.safetensors: not listed"),
    "programs that are none": (_at(programs=[]), "programs: an object expected, a list of 0 found"),
    "an unknown runtime": (_at("programs", tpu={}), "programs.tpu: nothing expected, an object found"),
    "text for a number": (_at(*_LIMITS, max_batch="8"), "limits.max_batch: 8 expected, '8' found"),
    "a missing limit": (lambda m: _aoti(m)["limits"].pop("max_batch"), "limits.max_batch: 8 expected, nothing found"),
    "an unknown limit": (_at(*_LIMITS, granule=1), "limits.granule: nothing expected, 1 found"),
    "no multiple": (_at(*_LIMITS, length_multiple=0), "limits.length_multiple: 32 expected, 0 found"),
    "a small multiple": (_at(*_LIMITS, length_multiple=1), "limits.length_multiple: 32 expected, 1 found"),
    "a large batch": (_at(*_LIMITS, max_batch=2**63 - 1), "limits.max_batch: 8 expected, 9223372036854775807 found"),
    "a short call": (_at(*_LIMITS, max_length=32), "limits.max_length: 64 expected, 32 found"),
    "all logits": (_at("programs", "aoti", all_logits=True), "aoti.all_logits: False expected, True found"),
    "another package": (_at("programs", "aoti", package="x"), "aoti.package: 'model.pt2' expected, 'x' found"),
    "no decode": (lambda m: _aoti(m)["stages"].pop("decode"), "stages.decode: an object expected, nothing found"),
    "a target": (
        _at("programs", "aoti", "target", device="cuda"),
        "programs.aoti.target.device: 'cpu' expected, 'cuda' found",
    ),
    "a result": (
        lambda m: _stage(m, "decode_one", "end").update(outputs=["foo"]),
        r"stages.decode_one.end.outputs\[0\]: 'logits' expected, 'foo' found",
    ),
    "a library elsewhere": (
        lambda m: _stage(m).update(library="../../x.so"),
        "decode.layer.library: 'decode_layer.so' expected, '../../x.so' found",
    ),
    "no library": (lambda m: _stage(m).pop("library"), "layer.library: 'decode_layer.so' expected, nothing found"),
    "another input": (lambda m: _stage(m)["inputs"][0].update(name="y"), r"inputs\[0\].name: 'x' expected, 'y' found"),
    "an input of no kind": (lambda m: _weight(m).update(kind="dog"), "kind: 'weight' expected, 'dog' found"),
    "inputs in another order": (lambda m: _stage(m)["inputs"].reverse(), r"decode.layer.inputs\[0\].file: nothing exp"),
    "weights elsewhere": (
        lambda m: _weight(m).update(file="/etc/passwd"),
        "file: 'model.safetensors' expected, '/etc/passwd' found",
    ),
    "a weight of no file": (lambda m: _weight(m).pop("file"), "file: 'model.safetensors' expected, nothing found"),
    "a weight's shape": (lambda m: _weight(m).update(shape=[1]), "shape: a list of 2 expected, a list of 1 found"),
    "a negative size": (lambda m: _weight(m)["shape"].__setitem__(0, -1), r"shape\[0\]: 2 expected, -1 found"),
    "versions": (_at(versions=None), "versions: an object expected, None found"),
    "no torch": (lambda m: m["versions"].pop("torch"), "versions.torch: a string expected, nothing found"),
    "another torch": (_at("versions", torch="2.1"), "versions.torch: '2.*' expected, '2.1' found"),
    "no version": (lambda m: m["versions"].pop("megalodon-export"), "megalodon-export: a string expected, nothing"),
    "a version": (_at("versions", onnx=1), "versions.onnx: a string expected, 1 found"),
}


_ONNX = ("programs", "onnx")

# Lies about the ONNX programs of a bundle that has both kinds of programs.
ONNX_LIES: dict[str, Lie] = {
    "no object": (_at("programs", onnx=3), "programs.onnx: an object expected, 3 found"),
    "no limits": (_at(*_ONNX, limits=None), "programs.onnx.limits: an object expected, None found"),
    "a larger batch": (_at(*_ONNX, "limits", max_batch=9), "onnx.limits.max_batch: 8 expected, 9 found"),
    "a smaller batch": (_at(*_ONNX, "limits", max_batch=7), "onnx.limits.max_batch: 8 expected, 7 found"),
    "a batch of text": (_at(*_ONNX, "limits", max_batch="8"), "onnx.limits.max_batch: 8 expected, '8' found"),
    "a longer call": (_at(*_ONNX, "limits", max_length=128), "onnx.limits.max_length: 64 expected, 128 found"),
    "a shorter call": (_at(*_ONNX, "limits", max_length=32), "onnx.limits.max_length: 64 expected, 32 found"),
    "a smaller multiple": (_at(*_ONNX, "limits", length_multiple=1), "onnx.limits.length_multiple: 32 expected, 1"),
    "an unknown limit": (_at(*_ONNX, "limits", granule=1), "onnx.limits.granule: nothing expected, 1 found"),
    "another opset": (_at(*_ONNX, opset=23), "onnx.opset: 24 expected, 23 found"),
    "all logits": (_at(*_ONNX, all_logits=True), "onnx.all_logits: False expected, True found"),
    "versions": (_at(*_ONNX, versions={}), "onnx.versions.megalodon-export: '.*' expected, nothing found"),
    "a version": (_at(*_ONNX, "versions", onnx="1.0"), "onnx.versions.onnx: '.*' expected, '1.0' found"),
    "a target": (_at(*_ONNX, "target", device="cuda"), "onnx.target.device: 'cpu or cuda' expected, 'cuda' found"),
    "no decode": (lambda m: m["programs"]["onnx"]["graphs"].pop("decode"), "onnx.graphs.decode: an object expected"),
    "a graph elsewhere": (
        _at(*_ONNX, "graphs", "decode", file="prefill.onnx"),
        "onnx.graphs.decode.file: 'decode.onnx' expected, 'prefill.onnx' found",
    ),
    "an input": (
        _at(*_ONNX, "graphs", "decode", "inputs", 0, name="x"),
        r"onnx.graphs.decode.inputs\[0\].name: 'input_ids' expected, 'x' found",
    ),
}

_GRAPHS_OF_OTHERS = r"prefill.onnx: it was made for another config.json or other weights. Export the bundle again\.$"
# Labels of the graphs that are those of no such bundle, while the manifest is right.
GRAPH_LIES: dict[str, Lie] = {
    "another config": (lambda label: label["config"].update(rope_base=2e4), _GRAPHS_OF_OTHERS),
    "no config": (lambda label: label.update(config={}), _GRAPHS_OF_OTHERS),
    "another dtype": (lambda label: label.update(dtype="bfloat16"), _GRAPHS_OF_OTHERS),
    "other limits": (lambda label: label["limits"].update(max_batch=4), "onnx.limits.max_batch: 4 expected, 8 found"),
    "no limits": (
        lambda label: label["limits"].update(max_batch=0),
        "max_batch is 0, expected at least 1|its label cannot be read",
    ),
    "another opset": (lambda label: label.update(opset=23), "onnx.opset: 23 expected, 24 found"),
    "all logits": (lambda label: label.update(all_logits=True), "onnx.all_logits: True expected, False found|boundary"),
}


def _input(manifest: dict[str, Any], kind: str) -> dict[str, Any]:
    """The first input of a kind of a stage."""
    found: dict[str, Any] = next(one for one in _stage(manifest)["inputs"] if one["kind"] == kind)
    return found


# Edits of the manifest and of the libraries' labels: a bundle that contradicts itself in both.
LABEL_LIES: dict[str, Lie] = {
    "a weight's shape": (
        lambda m: _weight(m).update(shape=[1]),
        r"decode_layer: model.layers.0.attn.gamma in model.safetensors is float32 \[2, \d+\]; float32 \[1\] expected",
    ),
    "a weight's dtype": (lambda m: _weight(m).update(dtype="int64"), r"float32 \[2, \d+\]; int64 \[2, \d+\] expected"),
    "a weight of no file": (lambda m: _weight(m).update(tensor="x"), "decode_layer: model.safetensors has no tensor x"),
    "a file of no weights": (lambda m: _weight(m).update(file="x"), "decode_layer: x has no tensor model.layers.0"),
    "a result of no stage": (lambda m: _input(m, "stage").update(name="y"), "y is no result of a stage before it"),
    "an argument": (
        lambda m: _stage(m, "decode", "begin")["inputs"][0].update(name="lengths"),
        "decode_begin: lengths is no argument of its program",
    ),
    "a cache": (lambda m: _input(m, "cache").update(name="final.x"), "final.x is no float32 tensor of the cache"),
    "a cache's dtype": (lambda m: _input(m, "cache").update(dtype="int8"), "key is no int8 tensor of the cache"),
    "a program's result": (
        lambda m: _stage(m, "decode", "end").update(outputs=["y"]),
        "decode_end: logits expected",
    ),
    "limits": (_at(*_LIMITS, length_multiple=64), "limits.length_multiple: 32 expected, 64 found"),
}

# Values in config.json and in the manifest alike, and what is said of config.json.
CONFIG_LIES: dict[str, tuple[dict[str, Any], str]] = {
    "many layers": ({"num_layers": 10**7}, "num_layers is 10000000, expected 2"),
    "no layers": ({"num_layers": 0}, "num_layers is 0"),
    "no chunk": ({"chunk_size": -1}, "chunk_size is -1"),
    "a chunk of 64 bits": ({"chunk_size": 2**63 - 1}, "chunk_size is 9223372036854775807"),
    "a large cache": ({"chunk_size": 2**31 - 1, "z_dim": 2**20}, "a stream's cache would have a terabyte or more"),
    "an odd head": ({"z_dim": 15}, "z_dim"),
    "text for a number": ({"vocab_size": "257"}, "vocab_size"),
    "a negative token": ({"bos_token_id": -1}, "bos_token_id is -1"),
    "attention beyond the chunk": ({"max_cache_len": 128}, "max_cache_len is 128"),
    "an unknown choice": ({"ema_prefill": "slow"}, "ema_prefill|'slow'"),
    "a rate": ({"dropout": 1.0}, "dropout is 1.0"),
}
