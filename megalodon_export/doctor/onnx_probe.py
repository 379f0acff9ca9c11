"""The doctor's probe of ONNX Runtime, a script like `probes.py`: a small model is exported, and its graphs run.

The graphs have every operator that those of a large model have. This script imports the package, whose exporter makes
them.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from megalodon_export.doctor.probes import Report, main

SMALL = {
    **{"vocab_size": 16, "model_dim": 16, "num_layers": 1, "num_heads": 2, "z_dim": 8, "value_dim": 12},
    **{"ffn_hidden_dim": 8, "cema_ndim": 2, "norm_num_groups": 2, "chunk_size": 64},
}


def onnx_graphs(report: Report, device: str) -> None:
    """Export a small random model, and run its graphs on the device beside the model in eager mode."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: an export verifies on a GPU if there is one
    report.stage("importing torch and onnxruntime")
    import onnxruntime
    import torch

    offered = onnxruntime.get_available_providers()
    if device == "cpu":
        report.add(True, f"{onnxruntime.__version__}; {', '.join(offered)}", name="ONNX Runtime")
    elif not torch.cuda.is_available():
        report.add(None, "no CUDA device")
        return
    elif "CUDAExecutionProvider" not in offered:
        report.add(None, "this build has no CUDA provider", "For the GPU, replace onnxruntime by onnxruntime-gpu")
        return
    report.stage("importing the package")
    from megalodon_export.export.onnx import export_onnx
    from megalodon_export.generation.session import load
    from megalodon_export.model import MegalodonConfig, MegalodonForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = SMALL
    MegalodonForCausalLM(MegalodonConfig(**settings)).save_pretrained(report.folder / "checkpoint")
    report.stage("exporting and running a small model")
    with contextlib.redirect_stdout(sys.stderr):
        export_onnx(report.folder / "checkpoint", report.folder / "bundle", max_batch=2)
    report.stage("generating with its graphs")
    texts = [
        list(load(report.folder / "bundle", runtime=runtime, device=device).generate_ids([1] * 70, 70, eos_token_id=-1))
        for runtime in ("eager", "onnx")
    ]
    report.add(texts[0] == texts[1], "a small model exported and run; 70 tokens " + _compare(*texts))


def _compare(expected: list[int], found: list[int]) -> str:
    return "equal to eager mode's" if expected == found else f"{found}, in eager mode {expected}"


if __name__ == "__main__":
    main((onnx_graphs,), *sys.argv[1:])
