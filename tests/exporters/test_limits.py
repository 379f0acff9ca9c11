"""The sizes that programs are exported for: every one of them is dynamic, the smallest ranges included."""

from __future__ import annotations

import operator
from pathlib import Path

import pytest
import torch
from torch import SymInt

import megalodon_export.model as m
from megalodon_export.exporters.aoti import CompileRequest, compile_stage, inductor_options
from megalodon_export.exporters.programs import Limits
from megalodon_export.exporters.stages import Stage, export_stages
from megalodon_export.exporters.torch_internals import load_library
from support.slow import slow_except
from support.small_models import make_model

pytestmark = pytest.mark.usefixtures("one_thread")


def stages(program: str, max_batch: int, blocks: int) -> tuple[Limits, dict[str, Stage]]:
    """The stages of a small model whose chunk is a number of blocks."""
    model = make_model(torch.float32, num_layers=1, chunk_size=32 * blocks)
    m.freeze_constants(model)
    limits = Limits.of(model.config, max_batch)
    return limits, export_stages(model, program, limits)


SIZES = [(1, 3), (2, 1), (2, 2), (3, 3), (4, 1), (64, 2)]


# The fast ones are the smallest range of each size; more rows and blocks leave the same ranges, wider.
@pytest.mark.parametrize(("max_batch", "blocks"), slow_except(SIZES, (1, 3), (2, 1)))
def test_no_size_is_taken_for_a_constant(max_batch: int, blocks: int) -> None:
    for program in ("prefill", "decode"):
        limits, found = stages(program, max_batch, blocks)
        (token_ids,) = (node for node in found["begin"].graph.graph.nodes if node.name == "tensors_0")
        dynamic = [max_batch > 1, blocks > 1][: token_ids.meta["val"].dim()]
        assert [isinstance(size, SymInt) for size in token_ids.meta["val"].shape] == dynamic
        for stage in found.values():
            for node in stage.graph.graph.find_nodes(op="placeholder"):
                for size in node.meta["val"].shape:
                    if isinstance(size, SymInt):
                        bounds = size.node.shape_env.bound_sympy(size.node.expr)
                        assert bounds.lower < bounds.upper, (program, stage.name, size, limits)


@pytest.mark.parametrize("chunk", slow_except([128, 20], 20))
def test_lengths_are_known_to_be_whole_blocks(chunk: int) -> None:
    """A stage that doubts it computes a remainder, pads to whole blocks and cuts again: slower, and easily caused."""
    model = make_model(torch.float32, num_layers=1, chunk_size=chunk)
    m.freeze_constants(model)
    for stage in export_stages(model, "prefill", Limits.of(model.config, 8)).values():
        remainders = [node for node in stage.graph.graph.nodes if node.target is operator.mod]
        assert not remainders, (stage.name, remainders)


@pytest.mark.slow
@torch.no_grad()
def test_programs_for_two_rows_run_one(tmp_path: Path) -> None:
    """Slow, because it compiles a stage for what the test above reads in its graph."""
    limits, found = stages("prefill", 2, 2)
    stage = found["layer"]
    request = CompileRequest("", "prefill", "cpu", "float32", limits, False, False, str(tmp_path / "out"))
    files = compile_stage(stage, inductor_options(request, stage.name)).files
    (library,) = [Path(file) for file in files if file.endswith(".so")]
    run = load_library(library, torch.device("cpu"))
    per_row = [
        one.kind != "weight" and len(example) == 2 for one, example in zip(stage.inputs, stage.examples, strict=True)
    ]
    assert sum(per_row) > 10
    for rows in (1, 2):
        inputs = [t[:rows].clone() if own else t for t, own in zip(stage.examples, per_row, strict=True)]
        same = [t.clone() for t in inputs]
        (actual,), (expected,) = run(inputs), stage.graph(*same)
        assert actual.shape[0] == rows
        for a, b in zip([actual, *inputs], [expected, *same], strict=True):  # the cache, too
            assert torch.allclose(a, b, atol=1e-5)
