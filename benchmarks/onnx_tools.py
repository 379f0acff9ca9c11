"""Run other people's tools on a bundle's graphs, and compare what they make with the graphs as exported.

    python -m megalodon_export onnx --out BUNDLE
    python benchmarks/onnx_tools.py BUNDLE

Every tool that is installed is tried: onnxsim, onnxslim, onnxoptimizer, onnxconverter-common and openvino beside those
of onnxruntime and onnxscript. Their results run in ONNX Runtime on a CPU. A tool that hangs is stopped after a minute.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

LENGTH = 96
SECONDS = 60
PACKAGES = (
    "onnx",
    "onnxruntime",
    "onnxscript",
    "onnxsim",
    "onnxslim",
    "onnxoptimizer",
    "onnxconverter-common",
    "openvino",
)


def run(path: Path) -> np.ndarray[Any, Any]:
    """The logits that a graph gives for LENGTH random bytes, or for one."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds, random = {}, np.random.default_rng(0)
    for one in session.get_inputs():
        shape = [{"B": 1, "L": LENGTH}.get(size, size) for size in one.shape]
        dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}[one.type]
        feeds[one.name] = np.full(shape, one.name.endswith("norm_var"), dtype)
        if one.name == "input_ids":
            feeds[one.name] = random.integers(0, 256, shape)
        if one.name == "lengths":
            feeds[one.name] = np.full(shape, LENGTH)
    (logits,) = session.run(["logits"], feeds)
    return np.asarray(logits, np.float32)


def loaded(make: Callable[[onnx.ModelProto], onnx.ModelProto]) -> Callable[[Path, Path], None]:
    """A tool that takes a model in memory, as one that reads and writes files."""
    return lambda source, target: onnx.save(make(onnx.load(source)), target)


def pre_process(**options: Any) -> Callable[[Path, Path], None]:
    """Prepare a graph as ONNX Runtime's documentation advises before quantisation."""
    module = import_module("onnxruntime.quantization.shape_inference")
    return lambda source, target: module.quant_pre_process(source, target, **options)


def optimized(source: Path, target: Path) -> None:
    """The graph as ONNX Runtime optimises it, in the folder of its weights."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    beside = source.with_name(f"optimized-{source.name}")
    options.optimized_model_filepath = str(beside)
    try:
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        onnx.save(onnx.load(beside), target)
    finally:
        beside.unlink(missing_ok=True)


def openvino(source: Path, target: Path) -> None:
    """Compile a graph for a CPU."""
    import_module("openvino").Core().compile_model(str(source), "CPU")
    onnx.save(onnx.load(source), target)


TOOLS: dict[str, Callable[[], Callable[[Path, Path], None]]] = {
    "onnxruntime: quantize_dynamic": lambda: (
        lambda source, target: import_module("onnxruntime.quantization").quantize_dynamic(source, target)
    ),
    "onnxruntime: quant_pre_process": lambda: pre_process(),
    "onnxruntime: quant_pre_process, as in onnx_quantized.py": lambda: pre_process(
        skip_symbolic_shape=True, skip_onnx_shape=True, save_as_external_data=True
    ),
    "onnxruntime: transformers.float16": lambda: loaded(
        lambda model: import_module("onnxruntime.transformers.float16").convert_float_to_float16(
            model, keep_io_types=True
        )
    ),
    "onnxruntime: optimized_model_filepath": lambda: optimized,
    "onnxscript: optimizer": lambda: loaded(import_module("onnxscript.optimizer").optimize),
    "onnxsim": lambda: loaded(lambda model: import_module("onnxsim").simplify(model)[0]),
    "onnxslim": lambda: loaded(import_module("onnxslim").slim),
    "onnxoptimizer": lambda: loaded(import_module("onnxoptimizer").optimize),
    "onnxconverter-common: float16": lambda: loaded(
        lambda model: import_module("onnxconverter_common.float16").convert_float_to_float16(model)
    ),
    "openvino": lambda: openvino,
}


def attempt(tool: str, source: Path, target: Path, answers: Any) -> None:
    """Run a tool on a graph and put one line about it into `answers`."""
    try:
        started = time.monotonic()
        TOOLS[tool]()(source, target)
        seconds, expected = time.monotonic() - started, run(source)
        difference = float(np.abs(run(target) - expected).max())
        nodes = len(onnx.load(target, load_external_data=False).graph.node)
        answers.put(f"{difference:.1e} of {np.abs(expected).max():.0f}, {nodes} nodes, {seconds:.1f} s")
    except ModuleNotFoundError as error:
        answers.put(f"not installed: {error.name}")
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        answers.put(f"{type(error).__name__}: {(lines or [''])[-1][:200]}")


def main() -> None:
    """Print a line for each tool and graph: the largest difference of a logit, or why there is none."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path, help="a bundle with ONNX programs in float32")
    args = parser.parse_args()
    print({name: metadata.version(name) for name in PACKAGES if _installed(name)})
    context = multiprocessing.get_context("spawn")
    for tool in TOOLS:
        for graph in ("prefill", "decode"):
            with tempfile.TemporaryDirectory() as scratch:
                answers = context.SimpleQueue()
                source, target = args.bundle / f"{graph}.onnx", Path(scratch, f"{graph}.onnx")
                process = context.Process(target=attempt, args=(tool, source, target, answers))
                process.start()
                process.join(SECONDS)
                process.kill()
                answer = f"stopped after {SECONDS} s" if answers.empty() else answers.get()
                print(f"{tool:<57}{graph:<9}{answer}", flush=True)


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main())
