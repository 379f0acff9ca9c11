"""ONNX: prefill and decode as two graphs for all layers, over the weights in the bundle's own safetensors files.

The stages that every exporter works from are traced once and written once for each layer, so that only writing takes
longer for a deeper model. The graphs lie beside `model.safetensors`, since ONNX refers to files of the same folder
alone, and hold no weights: an initializer is a place (offset, length) in that file or in one of derived constants.
Everything that depends on weights alone is computed at export; `onnx_constants.safetensors` has what is large of it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import onnx_ir as ir
import sympy
import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...model import MegalodonConfig, MegalodonForCausalLM
from ..aoti import CompileRequest, one_layer_model
from ..manifest_types import Graph, GraphTensor, OnnxPrograms, StageInput, Target, numbered
from ..programs import (
    BEGIN,
    DECODE,
    END,
    LAYER,
    PREFILL,
    Limits,
    ProgramName,
    ProgramSpec,
    TensorSpec,
    program_specs,
    static_sizes,
)
from ..stages import Stage, export_stages
from . import ops, products  # noqa: F401 - register what they write
from .check import require
from .graph import BATCH, MULTIPLES, OPSET, Const, Expr, GraphBuilder, Operand
from .translator import Translator

CONSTANTS = "onnx_constants.safetensors"
IR_VERSION = 11  # an older one than onnx writes by default: ONNX Runtime lags behind it
_SMALL = 1 << 16  # bytes; larger constants are in the file of that name
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}


def past_name(name: str) -> str:
    """The graphs' name of an input: as optimum and onnxruntime-genai name it, derived from the cache's."""
    return "input_ids" if name == "token_ids" else f"past_key_values.{_short(name)}" if "." in name else name


def present_name(name: str) -> str:
    """The graphs' name of an output."""
    return f"present.{_short(name)}" if "." in name else name


def _short(name: str) -> str:
    return name.removeprefix("layers.")


class WeightFiles:
    """The tensors of a bundle's safetensors files, as values and as places in the files."""

    def __init__(self, folder: Path, files: tuple[str, ...]) -> None:
        self._opened = {file: safe_open(folder / file, framework="pt") for file in files}
        self._entries = {name: (file, e) for file in files for name, e in _places(folder / file).items()}
        self._folder = folder
        tied = dict(MegalodonForCausalLM._tied_weights_keys)
        self._alias = tied | {source: name for name, source in tied.items()}  # a file holds one of the two

    def tensor(self, name: str) -> Tensor:
        """A weight's value, mapped from the file."""
        name = self._stored(name)
        return self._opened[self._entries[name][0]].get_tensor(name)

    def external(self, name: str) -> ir.ExternalTensor:
        """A weight as ONNX refers to it."""
        file, (dtype, shape, start, end) = self._entries[self._stored(name)]
        kind = from_torch_dtype(getattr(torch, _DTYPES[dtype]))
        return ir.ExternalTensor(
            file, start, end - start, kind, shape=ir.Shape(shape), name=name, base_dir=self._folder
        )

    def _stored(self, name: str) -> str:
        found = name if name in self._entries else self._alias.get(name)
        if found not in self._entries:
            raise KeyError(f"the program's input {name} is in none of the bundle's files {', '.join(self._opened)}")
        return found  # type: ignore[return-value]


def _places(path: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """dtype, shape, first and last byte of every tensor of a safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    start = 8 + size
    return {n: (e["dtype"], e["shape"], *(start + at for at in e["data_offsets"])) for n, e in header.items()}


def build(
    folder: Path,
    files: tuple[str, ...],
    dtype: str,
    limits: Limits,
    report: Callable[[str], None],
    all_logits: bool = False,
) -> OnnxPrograms:
    """Write prefill.onnx and decode.onnx beside the checkpoint in `folder`; returns the manifest's entry about them."""
    config = MegalodonConfig.from_pretrained(folder)
    if config.weight_format != "float":
        raise ValueError(
            f"the checkpoint's linear layers are {config.weight_format}, which the ONNX exporter does not write; "
            "export the float checkpoint, and quantise its graphs with onnxruntime.quantization"
        )
    weights = WeightFiles(folder, files)
    request = CompileRequest(str(folder), "", "cpu", dtype, limits, all_logits, False, "")
    model = one_layer_model(request)
    model.model.supported_dtypes += (torch.float16,)
    specs = program_specs(config, getattr(torch, dtype), all_logits)
    graphs: dict[ProgramName, ir.Graph] = {}
    for name in (PREFILL, DECODE):
        started = time.monotonic()
        stages = export_stages(model, name, limits, all_logits)
        graphs[name] = build_graph(specs[name], stages, config, weights, limits)
        report(f"{name}: {len(graphs[name])} nodes in {time.monotonic() - started:.1f} s")
    move_large_constants(list(graphs.values()), folder)
    for name, graph in graphs.items():
        require(graph)
        ir.save(ir.Model(graph, ir_version=IR_VERSION, producer_name="megalodon-export"), folder / f"{name}.onnx")
    return OnnxPrograms(
        target=Target("cpu or cuda", "any"),
        limits=limits,
        opset=OPSET,
        all_logits=all_logits,
        files=(*(f"{name}.onnx" for name in graphs), CONSTANTS),
        graphs={name: boundary(specs[name]) for name in graphs},
    )


def move_large_constants(graphs: list[ir.Graph], folder: Path) -> None:
    """Write the large constants of graphs to one file, equal ones once, and let the graphs refer to it."""
    places: dict[str, list[ir.Value]] = {}
    tensors: dict[str, Tensor] = {}
    for value in (value for graph in graphs for value in graph.initializers.values()):
        constant = value.const_value
        if isinstance(constant, TorchTensor) and constant.nbytes > _SMALL:
            name = hashlib.sha256(constant.tobytes() + str(constant.shape).encode()).hexdigest()[:16]
            tensors[name] = constant.raw
            places.setdefault(name, []).append(value)
    save_file(tensors, folder / CONSTANTS)
    stored = WeightFiles(folder, (CONSTANTS,))
    for name, value in ((name, value) for name, values in places.items() for value in values):
        value.const_value = stored.external(name)


def boundary(spec: ProgramSpec) -> Graph:
    """A graph's file, and its inputs and outputs in order, with the names that the rest of the manifest uses."""

    def entries(specs: tuple[TensorSpec, ...], name: Callable[[str], str]) -> tuple[GraphTensor, ...]:
        return tuple(GraphTensor(name(s.name), s.name, s.dims, s.dtype) for s in specs)

    outputs = entries(spec.outputs + spec.cache, present_name)
    return Graph(f"{spec.name}.onnx", entries(spec.inputs, past_name), outputs)


def build_graph(
    spec: ProgramSpec,
    stages: dict[str, Stage],
    config: MegalodonConfig,
    weights: WeightFiles,
    limits: Limits,
) -> ir.Graph:
    """A program's stages as one graph, the layer's once for each layer, with no node too many or twice."""
    sizes = static_sizes(config)
    largest = {BATCH: limits.max_batch, MULTIPLES: limits.max_length // limits.length_multiple}
    graph = GraphBuilder(limits.length_multiple, largest, weights.external)
    # Sizes that can have one value only, tracing takes for numbers.
    if limits.max_length == limits.length_multiple:
        graph.length = sympy.Integer(limits.length_multiple)
    batch = BATCH if limits.max_batch > 1 else sympy.Integer(1)
    letters: dict[str, Expr] = {"B": batch, "L": graph.length} | {k: sympy.Integer(v) for k, v in sizes.items()}

    def dims(one: TensorSpec) -> list[Expr]:
        return [letters[d] if d in letters else sympy.Integer(d) for d in one.dims]

    tensors: dict[str, Operand] = {
        one.name: graph.input(past_name(one.name), dims(one), getattr(torch, one.dtype)) for one in spec.inputs
    }
    constant = cache(lambda name: Const(weights.tensor(name), name))

    # A tied head is an initializer of its own, at the same place: tools that rewrite a matrix expect one user of it.
    heads = {source: name for name, source in MegalodonForCausalLM._tied_weights_keys.items()}

    def run(stage: Stage, layer: int = 0) -> None:
        def weight(name: str) -> str:
            return heads.get(name, name) if stage is stages[END] else name

        def operand(one: StageInput) -> Operand:
            name = numbered(one.name, layer)
            return constant(weight(name)) if one.kind == "weight" else tensors[name]

        inputs = {one.name: operand(one) for one in stage.inputs}
        results = Translator(graph, stage, inputs).run()
        tensors.update({numbered(name, layer): tensor for name, tensor in results.items()})

    run(stages[BEGIN])
    for layer in range(config.num_layers):
        run(stages[LAYER], layer)
    run(stages[END])
    outputs = {present_name(one.name): graph.val(tensors[one.name]) for one in spec.outputs + spec.cache}
    finished = graph.graph(f"megalodon_{spec.name}", outputs)
    tidy = ir.Model(finished, ir_version=IR_VERSION)
    RemoveUnusedNodesPass()(tidy)
    CommonSubexpressionEliminationPass()(tidy)
    return finished
