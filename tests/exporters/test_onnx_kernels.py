"""Graphs with kernels, without a GPU: what is recorded, compiled and launched, and what is refused.

The operator library runs in ONNX Runtime's CPU provider over a fake CUDA driver (`support/kernel_graphs.py`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import sympy
import torch

from megalodon_export.bundles.checkpoints import load_model
from megalodon_export.bundles.verify import BOUNDS
from megalodon_export.export.onnx import export_onnx
from megalodon_export.export.steps import write_checkpoint
from megalodon_export.exporters.onnx_names import KERNEL_LIBRARY, KERNELS_FILE, kernel_files
from megalodon_export.exporters.programs import Limits
from support.interpreted import ENVIRONMENT
from support.kernel_graphs import ON_THE_CPU, fake_code, plain_model, write_driver
from support.small_models import make_model

if find_spec("triton") is None or shutil.which("cc") is None or shutil.which("c++") is None:
    pytest.skip("Triton and a C++ compiler are needed", allow_module_level=True)

from megalodon_export.exporters.onnx_kernels import build, library, machine_code, pointwise, recording
from megalodon_export.exporters.onnx_kernels.expressions import evaluate, is_multiple_of_16, to_text
from megalodon_export.exporters.onnx_kernels.recording import Kernel
from megalodon_export.exporters.workers import CompileError
from megalodon_export.model.kernels import use_kernels
from megalodon_export.model.kernels.decode.argmax import megalodon_argmax
from megalodon_export.model.kernels.launch import recorded_launches

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_cuda.py"
FILES = ("model.safetensors", "constants.safetensors")
ARGMAX = Kernel(
    megalodon_argmax,
    tuple(zip(megalodon_argmax.arg_names, ("*fp32", "*i64", "i32", *["constexpr"] * 6), strict=True)),
    (("V", 8), ("BLOCK", 8), ("UNROLLED", True), ("POSITIVE_INFINITY", -1), ("ALL_MASKED", -2), ("PDL", True)),
    ("logits_ptr", "next_tokens_ptr"),
    (("num_warps", 1),),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs with kernels of a small model, for sm_80 and sm_90, whose machine code names itself."""
    place = tmp_path_factory.mktemp("kernels")
    make_model(torch.float32, num_layers=1, chunk_size=16).save_pretrained(place / "checkpoint")
    model = load_model(place / "checkpoint", torch.float32)
    write_checkpoint(model, place / "checkpoint", place)
    kernels: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "compile_kernels", fake_code(kernels))
        limits, architectures = Limits.of(model.config, 64, 64), ("sm_80", "sm_90")
        build.build(place, FILES, "float32", limits, architectures, lambda text: None, library_flags=ON_THE_CPU)
    write_driver(place, kernels)
    return place


def support(*words: object, interpret: bool = False) -> str:
    command = [sys.executable, "-m", "support.kernel_graphs", *map(str, words)]
    environment = {**os.environ, **ENVIRONMENT, "TRITON_INTERPRET": str(int(interpret))}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


DAMAGE = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "newer": lambda data: data.replace(b"kernels 1", b"kernels 2", 1),
    "cut": lambda data: data[: int(data.split(b"\n")[0].split()[2]) + 100],
    "another": lambda data: data.replace(b"embed_tokens.", b"embed_tokenz."),
}


@pytest.fixture(scope="module")
def launches(folder: Path) -> dict[str, Any]:
    """What `kernel_graphs launch` found, by case, also in copies whose file of kernels is damaged."""
    for name, damage in DAMAGE.items():
        copy = folder / f"damaged-{name}"
        copy.mkdir()
        for file in ("decode_kernels.onnx", KERNEL_LIBRARY, *FILES):
            shutil.copy(folder / file, copy)
        if (data := damage((folder / KERNELS_FILE).read_bytes())) is not None:
            (copy / KERNELS_FILE).write_bytes(data)
    found: dict[str, Any] = json.loads(support("launch", folder))
    return found


# Prefill takes most of the time: it runs beside the first decode steps in the slow test alone.
@pytest.mark.parametrize(
    ("calls", "batches"),
    [
        (["decode"] * 2, (1, 5)),  # the GEMV path for one row, and the GEMM path
        pytest.param(["prefill", "decode", "decode", "prefill", "decode"], (1, 2, 5), marks=pytest.mark.slow),
    ],
    ids=["decode", "all"],
)
def test_graphs_with_kernels_compute_what_the_model_does(folder: Path, calls: list[str], batches: Any) -> None:
    lines = support("compare", folder, ",".join(calls), *batches, interpret=True).splitlines()
    assert len(lines) == 2 + len(calls) * len(batches)  # two operations come first
    for line in lines:
        assert float(line.split()[-1]) < BOUNDS["float32"], line


class FeedForward(torch.nn.Module):
    """A feed-forward as prefill computes it: every elementwise form behind a product."""

    def __init__(self, swiglu: bool, rescale: bool, bias: bool) -> None:
        super().__init__()
        self.fc1, self.fc3 = torch.nn.Linear(6, 8, bias), torch.nn.Linear(6, 8, bias) if swiglu else None
        self.fc2, self.alpha = torch.nn.Linear(8, 6, bias), torch.nn.Parameter(torch.randn(6)) if rescale else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.silu(self.fc1(x))
        hidden = hidden if self.fc3 is None else hidden * self.fc3(x)
        out = self.fc2(hidden)
        return x + (out if self.alpha is None else self.alpha * out)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("swiglu", [False, True])
def test_what_follows_a_product_becomes_one_operation(swiglu: bool, rescale: bool, bias: bool) -> None:
    module, x = FeedForward(swiglu, rescale, bias), torch.randn(2, 3, 6)
    expected = module(x)
    graph = torch.export.export(module, (x,)).module()
    pointwise.fuse(graph.graph)
    fused = graph.graph.find_nodes(op="call_function", target=torch.ops.megalodon.pointwise.default)
    assert len(fused) == 2 + (swiglu and bias)
    for node in fused:
        node.target = pointwise.pointwise_reference
    called = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert called == {torch.ops.aten.linear.default, pointwise.pointwise_reference}
    graph.recompile()
    assert torch.allclose(graph(x), expected, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 4, 5, 64])
@pytest.mark.parametrize("program", ["decode", "prefill"])
def test_the_library_launches_what_the_model_does(
    folder: Path, launches: dict[str, Any], program: str, batch: int
) -> None:
    """The same kernels on the same grids, in the same order, as the model's own launch code for such tensors."""
    model, expected = plain_model(folder), []
    use_kernels(model)

    def record(function: Any, grid: tuple[Any, ...], tensors: Any, sizes: dict[str, Any]) -> None:
        expected.append([function.__name__, [*map(int, grid), 1, 1][:3], 32 * sizes["num_warps"]])

    with recorded_launches(record):
        cache, ids = model.new_cache(batch), torch.zeros(batch, 64, dtype=torch.int64)
        if program == "prefill":
            model.prefill(ids, torch.full((batch,), 50), cache)
        else:
            logits = model.decode(ids[:, 0], cache)
            model.model.backend.write_next_tokens(logits, torch.zeros(2, batch, dtype=torch.int64))
    found = [[name.split(".")[0], grid, threads] for name, _, grid, threads, _ in _launched(launches, program, batch)]
    # The graph has kernels of its own where the model runs torch's operations.
    found = [one for one in found if one[0] not in ("megalodon_pointwise", "megalodon_take_tokens")]
    assert found == [one for one in expected if 0 not in one[1]]


def _launched(launches: dict[str, Any], program: str, batch: int) -> list[Any]:
    launched: list[Any] = launches[f"{program} {batch}"]["launched"]
    return launched


def test_kernels_of_a_step_are_launched_with_pdl_and_nothing_is_copied(launches: dict[str, Any]) -> None:
    first, *others = _launched(launches, "decode", 1)
    assert not first[-1], "it would start beside the end of the step before, whose states later kernels read early"
    assert {pdl for *_, pdl in others} == {True}
    assert {architecture for _, architecture, *_ in _launched(launches, "decode", 1)} == {"sm_90"}
    assert launches["decode 1"]["copies"] == 0


def test_a_kernel_behind_a_copy_waits_for_it(launches: dict[str, Any]) -> None:
    """With buffers of their own, outputs begin as copies, and a kernel with PDL would start beside the copy."""
    step = launches["other buffers"]
    assert step["copies"] == 8  # a layer's five tensors and the final three
    behind = {name.split(".")[0] for name, *_, pdl in step["launched"] if not pdl}
    assert behind == {f"megalodon_{n}" for n in ("embed_tokens", "ema_step", "project_gemv", "attend", "final_norm")}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("launch fails", r"megalodon_embed_tokens\.\w+ cannot be launched: an error of the fake driver \(719\)"),
        ("two batches", r"embed_tokens: input position has the shape \[2\], expected \[1\]"),
        ("misaligned", "final_norm: tensor mean does not begin at a multiple of 16 bytes"),
    ],
)
def test_a_run_that_cannot_be_right_is_refused(launches: dict[str, Any], case: str, words: str) -> None:
    assert re.search(words, launches[case]["error"]), launches[case]


@pytest.mark.parametrize(
    ("gpu", "architecture"),
    # Machine code of the 8.x family runs on its later GPUs. Later code is for one architecture alone.
    [(80, "sm_80"), (89, "sm_80"), (90, "sm_90"), (100, "ptx"), (121, "ptx")],
)
def test_a_gpu_runs_its_own_code_or_the_nearest(launches: dict[str, Any], gpu: int, architecture: str) -> None:
    assert {one[1] for one in launches[f"sm_{gpu}"]["launched"]} == {architecture}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("sm_75", "the kernels are for GPUs from sm_80 on, this one is sm_75; export the bundle with --kernels for it"),
        ("no context", "no CUDA context is current where the kernels are loaded"),
        ("damaged-missing", "onnx_kernels.bin cannot be read: it lies beside the operator library in the bundle"),
        ("damaged-empty", "onnx_kernels.bin is no file of kernels that this library reads; export the bundle again"),
        ("damaged-newer", "onnx_kernels.bin is no file of kernels that this library reads; export the bundle again"),
        ("damaged-cut", "onnx_kernels.bin is damaged: kernel megalodon_"),
        ("damaged-another", "onnx_kernels.bin has no kernel megalodon_embed_tokens"),
    ],
)
def test_a_session_that_could_not_run_is_refused(launches: dict[str, Any], case: str, words: str) -> None:
    assert words in launches[case]["error"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernels": ["sm_75"]}, "'sm_75' is none"),
        ({"kernels": ["90"]}, "'90' is none"),
        ({"kernels": ["sm_90"], "dtype": "float16"}, "float32 and bfloat16, not in float16"),
        ({"dtype": "bfloat16"}, "or make graphs with kernels"),
    ],
)
def test_kernels_that_cannot_be_made_are_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    if options.get("dtype") == "bfloat16" and torch.cuda.is_available():
        pytest.skip("a GPU can verify bfloat16")
    with pytest.raises(ValueError, match=words):
        export_onnx(folder / "checkpoint", tmp_path / "bundle", **options)
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_the_library_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompileError, match="CXX names no-such-compiler, which is not there"):
        library.build_library(tmp_path / KERNEL_LIBRARY)


def test_what_a_compiler_says_is_shown(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"does not build the operator library: .*no-such-flag"):
        library.build_library(tmp_path / KERNEL_LIBRARY, ("-fno-such-flag",))


def test_the_library_needs_the_system_alone(folder: Path) -> None:
    """Neither CUDA, nor ONNX Runtime, nor torch; one function is visible."""
    listed = subprocess.run(["nm", "-D", folder / KERNEL_LIBRARY], capture_output=True, text=True, check=True).stdout
    assert "RegisterCustomOps" in listed
    assert not [line for line in listed.splitlines() if any(w in line for w in (" cu", "torch", "_Ort", " Ort"))]


def test_a_kernel_is_compiled_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    codes = machine_code.compile_kernels([ARGMAX, ARGMAX], ("sm_80", "sm_90"), lambda text: None)
    assert [(one.architecture, one.pdl, one.pointers) for one in codes] == [
        *(("sm_80", False, 2), ("ptx", False, 2), ("sm_90", True, 2))
    ]
    assert all(one.code.startswith(b"\x7fELF") for one in codes if one.architecture != "ptx")
    ptx = codes[1].code.decode()
    assert ".target sm_80" in ptx  # of the oldest: later GPUs run it
    assert "griddepcontrol" not in ptx
    machine_code.write_kernels(tmp_path / KERNELS_FILE, codes)
    data = (tmp_path / KERNELS_FILE).read_bytes()
    size = int(data.split(b"\n")[0].split()[2])
    for line, code in zip(data.split(b"\n")[1:4], codes, strict=True):
        _, name, symbol, architecture, offset, length, *_ = line.decode().split()
        assert (name, symbol, architecture) == (ARGMAX.name, "megalodon_argmax", code.architecture)
        assert data[size + int(offset) :][: int(length)] == code.code


def test_a_gpu_that_has_no_room_for_a_kernel_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine_code._SHARED_MEMORY, 90, -1)
    no_room = r"megalodon_argmax\.\w+ needs \d+ bytes of shared memory, sm_90 has -1"
    with pytest.raises(ValueError, match=no_room):
        machine_code.compile_kernels([ARGMAX], ("sm_90",), lambda text: None)
    said: list[str] = []
    codes = machine_code.compile_kernels([ARGMAX], ("sm_80", "sm_90"), said.append)
    assert [one.architecture for one in codes] == ["sm_80", "ptx"]
    assert re.fullmatch(f"no kernels for sm_90: {no_room}", said[0])


B = sympy.Symbol("B", positive=True, integer=True)


@pytest.mark.parametrize("batch", [1, 3, 4, 5, 64])
def test_sizes_are_evaluated_as_python_does(batch: int) -> None:
    sizes = {
        lambda b: 7 - (1 - min(1, (b - 1) // 4)): sympy.sympify(7) - (1 - sympy.Min(1, _floor_divide(B - 1, 4))),
        lambda b: max(1, min(128, 264 // (b * 2))): sympy.Max(
            1, sympy.Min(128, _floor_divide(sympy.sympify(264), B * 2))
        ),
    }
    for function, expression in sizes.items():
        assert evaluate(to_text(expression), {"B": batch}) == function(batch)


def _floor_divide(a: Any, b: Any) -> Any:
    from torch.utils._sympy.functions import FloorDiv

    return FloorDiv(sympy.sympify(a), b)


def test_a_size_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="which the operator library cannot compute"):
        to_text(sympy.sqrt(B))


def test_multiples_of_16_are_known_whatever_the_symbols_are() -> None:
    assert is_multiple_of_16(32 * B + 16)
    assert not is_multiple_of_16(8 * B)
    assert not is_multiple_of_16(32 * B + 1)


def test_what_a_launch_computes_beside_its_kernels_is_an_error() -> None:
    """It would be missing in the graph."""

    @torch.library.triton_op("megalodon_test::adds", mutates_args={})
    def adds(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    with pytest.raises(NotImplementedError, match=r"adds computes aten\.add\.Tensor beside its kernels"):
        recording.record(torch.ops.megalodon_test.adds.default, [torch.zeros(2)], sympy.Integer)


def test_nodes_name_their_operation_and_give_the_next_tokens(folder: Path) -> None:
    graph = ir.load(folder / "decode_kernels.onnx").graph
    names = [node.attributes["operation"].as_string() for node in graph if node.domain == "megalodon"]
    layer = ["ema_step", "project", "attend", "linear", "up_projection", "linear"]
    assert names == ["embed_tokens", *layer, "final_norm", "linear", "argmax"]
    assert len(names) == len(graph)
    assert [one.name for one in graph.outputs][:2] == ["logits", "next_tokens"]
    assert "next_tokens" not in [one.name for one in graph.inputs]


@pytest.mark.slow
def test_the_example_writes_what_the_model_does(folder: Path, tmp_path: Path) -> None:
    """`examples/onnx_cuda.py` over the fake driver: how it binds the cache, and feeds a step the token before."""
    kernels: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "compile_kernels", fake_code(kernels))
        patch.setattr(build, "build_library", lambda path, flags: library.build_library(path, ON_THE_CPU))
        export_onnx(folder / "checkpoint", tmp_path / "bundle", max_batch=2, max_length=32, kernels=["sm_90"])
    write_driver(tmp_path / "bundle", kernels)
    model, ids = plain_model(folder), torch.tensor([[1, 2, 3]])
    cache, expected = model.new_cache(1), []
    logits = model.prefill(ids, torch.tensor([3]), cache)
    for _ in range(3):
        expected.append(int(logits.argmax()))
        logits = model.decode(logits.argmax(-1), cache)
    assert [*map(int, support("example", tmp_path / "bundle", EXAMPLE, interpret=True).split())] == expected


@pytest.mark.slow
def test_the_command_makes_machine_code_for_gpus_that_are_not_here(
    tmp_path: Path, checkpoints: dict[str, Path], command: Any
) -> None:
    """In bfloat16, for the oldest and the newest; the command in docs/onnx.md, which a test runs, makes all six."""
    words = "onnx", "--checkpoint", checkpoints["tiny"], "--out", tmp_path / "made", "--dtype", "bfloat16"
    process = command(*words, "--kernels", "sm_80,sm_120")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text())
    assert set(kernel_files()) <= manifest["files"].keys()
    head = (tmp_path / "made" / KERNELS_FILE).read_bytes().split(b"\n\n")[0].decode()
    kinds = {line.split()[3] for line in head.splitlines()[1:]}
    assert kinds == {"sm_80", "sm_120", "ptx"}
