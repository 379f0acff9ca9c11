"""Other people's tools on the graphs: those of ONNX Runtime run here, all of them in benchmarks/onnx_tools.py."""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from megalodon_export.exporters.programs import ProgramName

pytestmark = pytest.mark.usefixtures("one_thread")
GRAPHS: tuple[ProgramName, ...] = ("prefill", "decode")


def logits(path: Path) -> Any:
    """The outputs of a graph for random bytes from an empty cache."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds, random = {}, np.random.default_rng(0)
    for one in session.get_inputs():
        shape = [{"B": 2, "L": 64}.get(size, size) for size in one.shape]
        dtype = np.int64 if one.type == "tensor(int64)" else np.float32
        feeds[one.name] = np.full(shape, one.name.endswith("norm_var"), dtype)
        if one.name == "input_ids":
            feeds[one.name] = random.integers(0, 256, shape)
        if one.name == "lengths":
            feeds[one.name] = np.array([64, 37])
    return session.run(["logits"], feeds)[0]


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("bits", ["QInt8", "QUInt8"])
def test_quantize_dynamic(onnx_bundles: dict[str, Path], tmp_path: Path, name: str, bits: str) -> None:
    """As ONNX Runtime's documentation calls it, for both graphs of a bundle."""
    quantization = import_module("onnxruntime.quantization")
    source, target = onnx_bundles["tiny"] / f"{name}.onnx", tmp_path / f"{name}.onnx"
    quantization.quantize_dynamic(source, target, weight_type=quantization.QuantType[bits])
    kinds = {node.op_type for node in onnx.load(target).graph.node}
    assert "MatMulInteger" in kinds
    expected, found = logits(source), logits(target)
    assert 0 < np.abs(found - expected).max() < 0.2 * np.abs(expected).max()


@pytest.mark.parametrize("name", GRAPHS)
def test_float16_of_onnxruntime(onnx_bundles: dict[str, Path], tmp_path: Path, name: str) -> None:
    convert = import_module("onnxruntime.transformers.float16").convert_float_to_float16
    source, target = onnx_bundles["tiny"] / f"{name}.onnx", tmp_path / f"{name}.onnx"
    onnx.save(convert(onnx.load(source), keep_io_types=True), target)
    expected, found = logits(source), logits(target)
    assert 0 < np.abs(found - expected).max() < 2e-2 * np.abs(expected).max()


def test_an_optimised_graph_is_saved_beside_the_weights(onnx_bundles: dict[str, Path], tmp_path: Path) -> None:
    """`optimized_model_filepath` must name the folder of the weights, to which the graph refers."""
    folder = tmp_path / "bundle"
    shutil.copytree(onnx_bundles["tiny"], folder)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(folder / "decode.onnx"), options, providers=["CPUExecutionProvider"])
    assert np.abs(logits(folder / "optimized.onnx") - logits(folder / "decode.onnx")).max() < 1e-4


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("kind", ["tiny", "short-chunk"])
def test_what_the_tools_expect_of_a_graph(onnx_bundles: dict[str, Path], kind: str, name: str) -> None:
    """No initializer is listed among the types. No product broadcasts a tensor to a constant of more dimensions.

    quantize_dynamic needs the first. onnxsim needs the second: see `_of_rank` of the exporter.
    """
    path = onnx_bundles[kind] / f"{name}.onnx"
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    assert not {one.name for one in onnx.load(path, load_external_data=False).graph.value_info} & {
        one.name for one in model.graph.initializer
    }
    ranks = {one.name: len(one.type.tensor_type.shape.dim) for one in (*model.graph.value_info, *model.graph.input)}
    constants = {one.name: len(one.dims) for one in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "Mul" and node.input[1] in constants]
    assert products
    for node in products:
        rank = ranks.get(node.input[0], constants.get(node.input[0]))
        assert rank is not None
        assert constants[node.input[1]] <= rank or rank == 0, node.name
