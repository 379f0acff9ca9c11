"""The interfaces of torch and Triton that `model/kernels/launch.py` uses: they may change without notice."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import re
import subprocess
import sys

import pytest
import torch
from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton", reason="Triton is not installed (it comes with a CUDA build of torch)")
import megalodon_export.model.kernels as model_kernels
from megalodon_export.model.kernels import KERNEL_PREFIX
from megalodon_export.model.kernels.decode.argmax import megalodon_argmax
from megalodon_export.model.kernels.decode.gemm import batch_tiles, gemm_launches, use_gemv
from megalodon_export.model.kernels.launch import launch
from support.kernel_types import compiled

SIZES = {"V": 8, "BLOCK": 8, "UNROLLED": True, "POSITIVE_INFINITY": -1, "ALL_MASKED": -2}


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_the_interpreter_is_recognised(interpreted: str) -> None:
    code = "from megalodon_export.model.kernels.launch import INTERPRETED; print(int(INTERPRETED))"
    environment = {**os.environ, "TRITON_INTERPRET": interpreted}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == interpreted


def traced(batch: int) -> list[str]:
    """Targets of the graph of a function that launches a kernel on so many programs."""

    def run(logits: torch.Tensor, next_tokens: torch.Tensor) -> torch.Tensor:
        launch(megalodon_argmax, (batch,))(logits, next_tokens, batch, **SIZES, PDL=False, num_warps=1)
        return next_tokens

    graph = make_fx(run, tracing_mode="fake")(torch.zeros(2, 8), torch.zeros(2, 2, dtype=torch.int64)).graph
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_a_launch_is_a_node_of_a_traced_graph() -> None:
    assert [target for target in traced(2) if "triton_kernel_wrapper" in target]


def test_an_empty_grid_launches_nothing() -> None:
    assert not [target for target in traced(0) if "triton_kernel_wrapper" in target]


def kernels() -> list[str]:
    """module:name of every kernel."""
    found = []
    for module in pkgutil.walk_packages(model_kernels.__path__, model_kernels.__name__ + "."):
        members = vars(importlib.import_module(module.name))
        found += [f"{module.name}:{name}" for name, member in members.items() if is_kernel(member, module.name)]
    return found


def is_kernel(member: object, module: str) -> bool:
    """Whether it is a Triton function that a module launches and that is written there."""
    function = getattr(member, "fn", None)
    return getattr(function, "__module__", "") == module and function.__name__.startswith(KERNEL_PREFIX)


@pytest.mark.parametrize("kernel", kernels())
def test_a_kernels_source_can_be_copied_into_a_string(kernel: str) -> None:
    """AOTInductor copies a kernel, and all that it refers to, into a string of Python, where a backslash ends it."""
    module, name = kernel.split(":")
    source = user_defined_triton_kernel_transitive_closure_source_code(getattr(importlib.import_module(module), name))
    copied = ast.literal_eval("'''" + source.replace("'''", r"\'\'\'") + "'''")
    assert f"def {name}(" in copied
    compile(copied, kernel, "exec")


@pytest.mark.parametrize("pdl", [True, False])
def test_programmatic_dependent_launch_is_in_the_machine_code(pdl: bool) -> None:
    ptx = compiled(megalodon_argmax, {**SIZES, "PDL": pdl}, "*fp32", "fp32")
    found = re.findall(r"griddepcontrol\.(\w+)", ptx)
    assert found == (["launch_dependents", "wait"] if pdl else [])


WEIGHTS = {  # format -> how a weight (16, 256) is stored, and its scales
    "float": (lambda dtype: torch.zeros(16, 256, dtype=dtype), None),
    "int8": (lambda _: torch.zeros(16, 256, dtype=torch.int8), torch.ones(16, 1)),
    "int4": (lambda _: torch.zeros(16, 128, dtype=torch.uint8), torch.ones(16, 8)),
    "int4 in groups of 8": (lambda _: torch.zeros(16, 128, dtype=torch.uint8), torch.ones(16, 32)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_batch_takes_exactly_one_kernel(weights: str, dtype: torch.dtype) -> None:
    stored, scale = WEIGHTS[weights]
    for batch in (*range(1, 70), 1000):
        x, weight = torch.zeros(1, 256, dtype=dtype), stored(dtype)
        launches = gemm_launches(batch, 16, x, weight, scale)
        factors = [use_gemv(batch, x, weight, scale), *(factor for factor, _ in launches)]
        assert sorted(factors) == [0] * len(launches) + [1], batch
        for factor, sizes in launches:
            assert not factor or batch_tiles(batch, sizes) == -(-batch // sizes["ROWS"])


def test_a_symbolic_batch_chooses_when_it_runs() -> None:
    def factors(rows: torch.Tensor) -> list[int]:
        x, weight = torch.zeros(1, 256, dtype=torch.bfloat16), torch.zeros(16, 256, dtype=torch.bfloat16)
        batch = rows.shape[0]
        return [use_gemv(batch, x, weight, None), *(f for f, _ in gemm_launches(batch, 16, x, weight, None))]

    traced = make_fx(factors, tracing_mode="symbolic")(torch.zeros(7, 1))
    for batch in (2, 8, 9, 16, 17, 500):
        assert traced(torch.zeros(batch, 1)) == factors(torch.zeros(batch, 1)), batch
