"""Measure how the cost of an export grows with the number of layers, for stages and for one graph of all layers.

    python benchmarks/export_depth.py --preset 200M --layers 4 12 32 --out FILE

The models have random weights in float32, and the device is the CPU. A bundle's programs are made of stages
(`exporters/stages.py`): one compiled layer serves all layers. The whole graph is torch.export's of decode, with the
weights as constants. Inductor does not compile a whole prefill, because the number of ring slots that it reads depends
on data; between stages that number is an ordinary size. Seconds are wall-clock times to export and compile. Bytes are
those of the compiled libraries, without weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from engines import Subject, random_model
from report import head
from torch import Tensor, nn
from torch.export import Dim, export

from megalodon_export.exporters import aoti
from megalodon_export.exporters.programs import DECODE, PREFILL, Limits
from megalodon_export.exporters.torch_internals import compile_graph, symbolic_sizes
from megalodon_export.model import MegalodonCache, MegalodonForCausalLM, freeze_constants, preset


class WholeDecode(nn.Module):
    """A decode step of all layers, as a function of the tokens and the cache's tensors, which it updates in place."""

    def __init__(self, model: MegalodonForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor, tensors: list[Tensor]) -> Tensor:
        """Logits (B, V)."""
        return self.model.decode(token_ids, MegalodonCache.from_tensors(self.model.config, tensors))


def compile_whole(model: MegalodonForCausalLM, request: aoti.CompileRequest) -> list[str]:
    """Compile decode as one graph; the paths of the files that this makes."""
    batch = Dim("batch", min=1, max=request.limits.max_batch)
    inputs = (torch.zeros(2, dtype=torch.int64), model.new_cache(2).tensors())
    with torch.no_grad(), symbolic_sizes():
        exported = export(WholeDecode(model), inputs, dynamic_shapes=({0: batch}, [{0: batch} for _ in inputs[1]]))
    return compile_graph(exported.module(), inputs, aoti.inductor_options(request, request.program))


def compile_stages(model: MegalodonForCausalLM, request: aoti.CompileRequest) -> list[str]:
    """Compile a program in stages from the model's checkpoint, like a bundle's; the paths of the stages' files."""
    model.save_pretrained(request.checkpoint)
    compiled = aoti.compile_program(request, lambda message: None)
    return [file for stage in compiled.values() for file in stage.files]


def measure(model: MegalodonForCausalLM, form: str, program: str) -> dict[str, Any]:
    """Compile a program in one form ("stages" or "whole"); a row of the report."""
    compile_it = compile_whole if form == "whole" else compile_stages
    with tempfile.TemporaryDirectory() as scratch:
        limits, checkpoint = Limits.of(model.config), str(Path(scratch, "checkpoint"))
        request = aoti.CompileRequest(checkpoint, program, "cpu", "float32", limits, False, False, scratch)
        started = time.monotonic()
        files = compile_it(model, request)
        seconds = time.monotonic() - started
        size = sum(Path(file).stat().st_size for file in files if file.endswith(".so"))
    return {"form": form, "program": program, "layers": model.config.num_layers, "seconds": seconds, "bytes": size}


def main() -> None:
    """Measure every depth, and write the report after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="200M")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 32], help="numbers of layers to export")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    args = parser.parse_args()
    found: dict[str, Any] = {**head("cpu"), "results": []}
    for layers in args.layers:
        config = preset(args.preset, num_layers=layers)
        model = random_model(Subject(config, "cpu", "float32", Limits.of(config).max_batch, None))
        freeze_constants(model)
        for form, program in (("stages", PREFILL), ("stages", DECODE), ("whole", DECODE)):
            row = measure(model, form, program)
            found["results"].append(row)
            args.out.write_text(json.dumps(found, indent=1) + "\n")
            print(form, program, layers, f"{row['seconds']:.0f} s, {row['bytes']:,} bytes", flush=True)


if __name__ == "__main__":
    main()
