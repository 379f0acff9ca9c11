"""ONNX: prefill and decode as two graphs for all layers, over the weights in the bundle's own safetensors files.

    build(folder, ("model.safetensors", "constants.safetensors"), "float32", limits, print)
    -> folder/prefill.onnx, folder/decode.onnx, folder/onnx_constants.safetensors

The stages that every exporter works from are traced once and written once for each layer, so that only writing takes
longer for a deeper model. The graphs hold no weights: an initializer is an offset and a length in a file. They lie
beside `model.safetensors`, since ONNX refers to files of the same folder alone.
Everything that depends on weights alone is computed at export.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import sympy
import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from ...model import MegalodonConfig
from ..manifest_types import OnnxPrograms, StageInput, numbered
from ..onnx_names import TARGET, boundary, graph_files, past_name, present_name
from ..programs import (
    BEGIN,
    DECODE,
    END,
    LAYER,
    NEXT_TOKENS,
    PREFILL,
    Limits,
    ProgramName,
    ProgramSpec,
    TensorSpec,
    program_specs,
    static_sizes,
)
from ..stages import Stage, export_stages, one_layer_model
from ..weight_files import EMBEDDING, HEAD
from . import handlers_elementwise, handlers_indexing, handlers_products  # noqa: F401 - register their handlers
from .cuda_placement import require
from .graph_builder import BATCH, MULTIPLES, OPSET, Blank, Const, Expr, GraphBuilder
from .translator import Translator
from .weight_files import ExternalWeights, move_large_constants

IR_VERSION = 11  # an older one than onnx writes by default: ONNX Runtime lags behind it


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
    weights = ExternalWeights(folder, files)
    model = one_layer_model(folder, "cpu", dtype)
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
        save_graph(graph, folder / f"{name}.onnx")
    return OnnxPrograms(
        target=TARGET,
        limits=limits,
        opset=OPSET,
        all_logits=all_logits,
        files=graph_files(),
        graphs={name: boundary(specs[name]) for name in graphs},
    )


def save_graph(graph: ir.Graph, path: Path) -> None:
    """Write a graph. Its list of types (value_info) has no initializers, which state their types themselves.

    quantize_dynamic of ONNX Runtime replaces initializers by others of other shapes, and would leave their old entries.
    """
    proto = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, producer_name="megalodon-export"))
    listed = [one for one in proto.graph.value_info if one.name not in graph.initializers]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(listed)
    path.write_bytes(proto.SerializeToString())


def build_graph(
    spec: ProgramSpec,
    stages: dict[str, Stage],
    config: MegalodonConfig,
    weights: ExternalWeights,
    limits: Limits,
    shared: dict[Any, Any] | None = None,
) -> ir.Graph:
    """A program's stages as one graph, the layer's once for each layer, with no node too many or twice.

    `shared` gets what the translation leaves there for its caller.
    """
    sizes = static_sizes(config)
    largest = {BATCH: limits.max_batch, MULTIPLES: limits.max_length // limits.length_multiple}
    graph = GraphBuilder(limits.length_multiple, largest, weights.external, shared)
    # Sizes that can have one value only, tracing takes for numbers.
    if limits.max_length == limits.length_multiple:
        graph.length = sympy.Integer(limits.length_multiple)
    batch = BATCH if limits.max_batch > 1 else sympy.Integer(1)
    letters: dict[str, Expr] = {"B": batch, "L": graph.length} | {k: sympy.Integer(v) for k, v in sizes.items()}

    def dims(one: TensorSpec) -> list[Expr]:
        return [letters[d] if d in letters else sympy.Integer(d) for d in one.dims]

    tensors: dict[str, Any] = {
        one.name: graph.input(past_name(one.name), dims(one), getattr(torch, one.dtype)) for one in spec.inputs
    }
    # The traced program takes this tensor to write into it. In a graph it is an output alone.
    tensors |= {one.name: Blank(tuple(dims(one))) for one in spec.outputs if one.name == NEXT_TOKENS}
    constant = cache(lambda name: Const(weights.tensor(name), name))

    # A tied head is an initializer of its own, at the same place: tools that rewrite a matrix expect one user of it.
    def run(stage: Stage, layer: int = 0) -> None:
        def weight(name: str) -> str:
            return HEAD if stage is stages[END] and name == EMBEDDING else name

        def operand(one: StageInput) -> Any:
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
