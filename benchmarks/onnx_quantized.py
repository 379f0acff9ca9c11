"""Quantise the default checkpoint's graphs with ONNX Runtime's tools, and measure size, bits per byte and time.

    python -m megalodon_export onnx --all-logits --out BUNDLE
    python benchmarks/onnx_quantized.py BUNDLE --text kjv.txt

`onnxruntime.quantization` quantises matrix products whose second factor is a constant. Its own tools first bring the
graphs into that form: a transposed weight becomes a constant, a Gemm becomes a MatMul. MatMulNBitsQuantizer then stores
4 or 8 bits for each weight, in blocks of 32. The text and the measure are those of `quality.py`.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.shape_inference import quant_pre_process

from megalodon_export.bundles import bundle
from megalodon_export.measure.evaluation import score
from megalodon_export.runtimes.onnx import OnnxRuntime

sys.path.append(str(Path(__file__).parent.parent / "artifacts" / "recipe"))
import corpus

BLOCK = 32


def quantize(source: Path, target: Path, bits: int) -> None:
    """Quantise one graph."""
    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True, skip_onnx_shape=True, save_as_external_data=True)
    model = ONNXModel(onnx.load(prepared))
    model.replace_gemm_with_matmul()
    quantizer = MatMulNBitsQuantizer(model.model, bits=bits, block_size=BLOCK, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=False)


def bits_per_byte(runtime: OnnxRuntime, tokens: torch.Tensor) -> float:
    """Bits to predict every token but the first, in one stream, over the number of bytes among the tokens."""
    return score(runtime, [tokens]).nats / math.log(2) / int((tokens < 256).sum())


def step_milliseconds(runtime: OnnxRuntime) -> float:
    """Median milliseconds of a decode step for one stream."""
    programs, times = runtime.bind(runtime.new_cache(1)), []
    for _ in range(60):
        started = time.perf_counter()
        programs.decode(torch.tensor([65]))
        times.append(time.perf_counter() - started)
    return statistics.median(times[10:]) * 1e3


def main() -> None:
    """Quantise to 8 and 4 bits, score each, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path, help="a bundle with ONNX programs that return all logits")
    parser.add_argument("--text", type=Path, required=True, help="the corpus of artifacts/recipe")
    args = parser.parse_args()
    manifest = bundle.read(args.bundle)
    if manifest.programs.onnx is None or not manifest.programs.onnx.all_logits:
        parser.error("the bundle's prefill returns the logits of the last token alone; export it with --all-logits")
    tokens = torch.tensor(corpus.token_ids(corpus.split(args.text.read_bytes()).held_out))
    torch.set_num_threads(1)
    logging.disable(logging.INFO)  # the quantiser logs every node
    print("weights   decode.onnx bytes   bits a byte   decode ms")
    with tempfile.TemporaryDirectory() as scratch:
        for bits in (None, 8, 4):
            folder = args.bundle if bits is None else Path(scratch, str(bits))
            if bits is not None:
                folder.mkdir()
                for name in ("prefill.onnx", "decode.onnx"):
                    quantize(args.bundle / name, folder / name, bits)
            runtime = OnnxRuntime(folder, manifest, "cpu")
            files = [folder / "decode.onnx", *([folder / "model.safetensors"] if bits is None else [])]
            size = sum(file.stat().st_size for file in files)
            name = "as stored" if bits is None else f"int{bits}"
            print(f"{name:<9}{size:>18,}{bits_per_byte(runtime, tokens):>14.4f}{step_milliseconds(runtime):>12.2f}")


if __name__ == "__main__":
    main()
