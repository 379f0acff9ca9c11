"""ONNX graphs: every kind of model, where nodes run, caches in place, weights in the bundle's own files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors import safe_open

import megalodon_export
from megalodon_export.bundles import bundle
from megalodon_export.bundles.manifest import Manifest, ModelDtype
from megalodon_export.bundles.verify import BOUNDS, cases, compare
from megalodon_export.export.onnx import add_onnx, export_onnx, halve
from megalodon_export.export.steps import write_checkpoint
from megalodon_export.exporters.manifest_types import Programs
from megalodon_export.exporters.onnx import build_graphs, cuda_placement
from megalodon_export.exporters.programs import Limits, ProgramName
from megalodon_export.model import MegalodonForCausalLM
from megalodon_export.runtimes import Runtime, RuntimeUnavailable, open_runtime
from megalodon_export.runtimes.onnx import BoundOnnxPrograms, OnnxRuntime
from support.slow import slow_except
from support.small_models import VARIANTS, make_model

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = ("model.safetensors", "constants.safetensors")
GRAPHS: tuple[ProgramName, ...] = ("prefill", "decode")
EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_numpy.py"


def built(model: MegalodonForCausalLM, folder: Path, dtype: ModelDtype = "float32", **limits: Any) -> Manifest:
    """The graphs of a model in a folder, and their manifest."""
    write_checkpoint(model, Path("nowhere"), folder)
    entry = build_graphs.build(folder, FILES, dtype, Limits.of(model.config, **limits), lambda message: None)
    return Manifest.of(model.config, dtype, Programs(onnx=entry), {})


def graph(folder: Path, name: str) -> ir.Graph:
    return ir.load(folder / f"{name}.onnx").graph


# ---- every kind of model ---------------------------------------------------------------------------------------------


# The fast ones have no option, and all of them.
@pytest.mark.parametrize("name", slow_except(VARIANTS, "plain", "all flags"))
def test_every_kind_of_model(tmp_path: Path, name: str) -> None:
    manifest = built(make_model(torch.float32, **VARIANTS[name]), tmp_path, max_batch=8)
    runtime, eager = OnnxRuntime(tmp_path, manifest, "cpu"), open_runtime("eager", tmp_path, manifest, "cpu")
    for case in cases(runtime.config.chunk_size, 8):
        logits, cache, agreement = compare(runtime, eager, case)
        assert max(logits, cache) < 1e-4, case
        assert agreement == 1.0
    for program in GRAPHS:
        onnx.checker.check_model(str(tmp_path / f"{program}.onnx"), full_check=True)


@pytest.mark.parametrize(("length", "form"), slow_except([(32, "fft"), (96, "blocked"), (128, "fft")], (96, "blocked")))
def test_calls_within_and_beyond_a_chunk_in_both_forms_of_the_ema(tmp_path: Path, length: int, form: str) -> None:
    """As in the graph, so against eager: with "fft" that is torch.fft."""
    manifest = built(
        make_model(torch.float32, chunk_size=32, ema_prefill=form), tmp_path, max_batch=8, max_length=length
    )
    runtime, eager = OnnxRuntime(tmp_path, manifest, "cpu"), open_runtime("eager", tmp_path, manifest, "cpu")
    for case in cases(32, 8):
        assert max(compare(runtime, eager, case)[:2]) < 1e-4


def test_logits_of_every_token(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    manifest = export_onnx(checkpoints["short-chunk"], tmp_path / "b", all_logits=True, max_batch=2)
    runtime, eager = (open_runtime(name, tmp_path / "b", manifest, "cpu") for name in ("onnx", "eager"))
    ids = torch.randint(256, (2, 50), generator=torch.Generator().manual_seed(0))
    found, expected = (r.bind(r.new_cache(2)).score(ids, torch.tensor([50, 50])) for r in (runtime, eager))
    last = runtime.bind(runtime.new_cache(2)).prefill(ids, torch.tensor([50, 3]))
    assert (last - found[[0, 1], [49, 2]]).abs().max() < 1e-5
    assert found.shape == (2, 50, 257)
    assert (found - expected).abs().max() < 1e-4


def test_float16_is_close_to_float32_of_the_same_weights(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    manifest = export_onnx(checkpoints["tiny"], tmp_path / "b", "float16", max_batch=8)
    runtime, eager = (open_runtime(name, tmp_path / "b", manifest, "cpu") for name in ("onnx", "eager"))
    assert runtime.new_cache(1).layers[0].key.dtype == torch.float16
    assert {t.dtype for t in runtime.new_cache(1).states()} == {torch.float32, torch.int64}
    assert eager.dtype == torch.float32
    for case in cases(64, 8):
        assert 0 < max(compare(runtime, eager, case)[:2]) < BOUNDS["float16"]


def test_bfloat16_is_exported_only_where_it_can_be_verified(
    tmp_path: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="run on CUDA only, and this machine has none"):
        export_onnx(checkpoints["tiny"], tmp_path / "b", "bfloat16")
    assert not (tmp_path / "b").exists()


# ---- where nodes run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "chunk"), [("float16", 8), ("bfloat16", 64)])
def test_every_node_has_a_cuda_kernel_in_half_precision_too(tmp_path: Path, dtype: str, chunk: int) -> None:
    """In float32 the exporter requires it of the graphs of all other tests."""
    model = make_model(torch.float32, chunk_size=chunk, num_layers=1, swiglu=True, rescale_nffn=True)
    if dtype == "float16":
        halve(model)
    elif dtype == "bfloat16":
        model.save_pretrained(tmp_path)
        model = MegalodonForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    built(model, tmp_path, dtype)
    for name in GRAPHS:
        assert len(graph(tmp_path, name)) > 100
        cuda_placement.require(graph(tmp_path, name))
        assert graph(tmp_path, name).inputs[-1].name == "past_key_values.final.position"


def one_node(kind: str, dtype: ir.DataType, **attributes: Any) -> ir.Graph:
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(["B", 4]))
    node = ir.node(kind, [x], attributes, name="the_node")
    node.outputs[0].type = ir.TensorType(dtype)
    return ir.Graph([x], list(node.outputs), nodes=[node], opset_imports={"": 24}, name="g")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (one_node("DFT", ir.DataType.FLOAT), "the_node: DFT of opset 24 has no CUDA kernel for f32"),
        (one_node("Reciprocal", ir.DataType.BFLOAT16), "Reciprocal of opset 24 has no CUDA kernel for bf16"),
        (one_node("ReduceMean", ir.DataType.INT64), "ReduceMean of opset 24 has no CUDA kernel for i64"),
        (one_node("Hardmax", ir.DataType.FLOAT), "Hardmax of opset 24 is not in the table"),
        (one_node("Cast", ir.DataType.FLOAT, to=int(ir.DataType.UINT8)), "Cast->None of opset 24 is not in the table"),
    ],
    ids=["on the CPU", "no bfloat16", "on the CPU for integers", "unknown", "unknown dtype"],
)
def test_nodes_without_a_cuda_kernel_are_named(found: ir.Graph, message: str) -> None:
    with pytest.raises(cuda_placement.PlacementError, match=message):
        cuda_placement.require(found)


def test_sizes_computed_in_the_graph_are_named() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["B"]))
    shape = ir.node("Shape", [x], name="size_of_x")
    shape.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    double = ir.node("Add", [shape.outputs[0], shape.outputs[0]], name="twice")
    found = ir.Graph([x], list(double.outputs), nodes=[shape, double], opset_imports={"": 24}, name="g")
    assert cuda_placement.not_on_cuda(found) == ["twice: Add computes with the sizes that size_of_x reads, on the CPU"]


@pytest.mark.parametrize("version", ["1.23.2", "1.24.4", "1.25.1"])
def test_an_onnx_runtime_that_is_too_old_is_named_first(
    onnx_bundles: dict[str, Path],
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
) -> None:
    monkeypatch.setattr("onnxruntime.__version__", version)
    uses = (
        lambda: megalodon_export.load(onnx_bundles["tiny"], runtime="onnx"),
        lambda: export_onnx(checkpoints["tiny"], tmp_path / "out"),
    )
    for use in uses:
        with pytest.raises(RuntimeUnavailable, match=rf"need onnxruntime 1\.26 or newer, found {version}; install it"):
            use()
    assert not [*tmp_path.iterdir()]


def test_a_missing_gpu_is_no_silent_cpu(onnx_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = onnx_bundles["tiny"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeUnavailable, match=r"cuda:0 needs an ONNX Runtime and a torch with CUDA, found"):
        OnnxRuntime(folder, bundle.read(folder), "cuda:0")


# ---- caches in place -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "short-chunk"])
def test_a_read_of_the_ring_after_its_write_is_found(onnx_bundles: dict[str, Path], name: str) -> None:
    found = graph(onnx_bundles[name], "prefill")
    assert cuda_placement.unsafe_in_place(found) == []
    ring = next(value for value in found.inputs if value.name == "past_key_values.0.key")
    scatter = next(user for user, _ in ring.uses() if user.op_type == "TensorScatter")
    late = ir.node("Neg", [ring], name="late")
    late.outputs[0].type = ring.type
    found.insert_after(scatter, late)
    assert cuda_placement.unsafe_in_place(found) == [
        f"late may read past_key_values.0.key after {scatter.name} has written to it"
    ]


def test_a_run_that_is_repeated_gives_what_it_gives_once(onnx_bundles: dict[str, Path]) -> None:
    """ONNX Runtime runs a graph three times where it captures it."""
    runtime = open_runtime("onnx", onnx_bundles["tiny"], bundle.read(onnx_bundles["tiny"]), "cpu")
    assert isinstance(runtime, OnnxRuntime)
    once, repeated = (runtime.bind(runtime.new_cache(2)) for _ in range(2))
    ids = torch.tensor([65, 66])
    for programs in (once, repeated):
        programs.prefill(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([3, 2]))
    expected = once.decode(ids)
    assert isinstance(repeated, BoundOnnxPrograms)
    step = repeated.bind_graph("decode", {"token_ids": ids}, (2,))
    for _ in range(2):
        step.session.run(step.binding)
    step.run()
    assert torch.equal(expected, step.logits)
    assert all(torch.equal(a, b) for a, b in zip(once.cache.tensors(), repeated.cache.tensors(), strict=True))


def test_caches_take_turns(onnx_bundles: dict[str, Path]) -> None:
    runtime = open_runtime("onnx", onnx_bundles["tiny"], bundle.read(onnx_bundles["tiny"]), "cpu")
    bound = [runtime.bind(runtime.new_cache(1)) for _ in range(4)]
    written = [[programs.decode(torch.tensor([t])) for programs in bound] for t in (65, 66, 67)]
    for logits in written:
        assert all(torch.equal(logits[0], other) for other in logits)


def test_a_decode_step_writes_nothing_as_large_as_a_ring(tmp_path: Path) -> None:
    """A step's time grows with the cache's capacity by reading it alone: only the write in place gives out as much."""
    manifest = built(make_model(torch.float32, chunk_size=4096, num_layers=1), tmp_path, max_batch=1, max_length=64)
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    runtime = OnnxRuntime(tmp_path, manifest, "cpu")
    session = runtime.sessions["decode"]
    session.onnx = onnxruntime.InferenceSession(str(tmp_path / "decode.onnx"), options, ["CPUExecutionProvider"])
    cache = runtime.new_cache(1)
    runtime.bind(cache).decode(torch.tensor([1]))
    events = json.loads(Path(session.onnx.end_profiling()).read_text())
    sizes: dict[str, int] = {}
    for event in events:
        if event.get("cat") == "Node" and "output_size" in event.get("args", {}):
            kind, size = event["args"]["op_name"], int(event["args"]["output_size"])
            sizes[kind] = max(sizes.get(kind, 0), size)
    ring = min(cache.layers[0].key.nbytes, cache.layers[0].value.nbytes)
    assert sizes.pop("TensorScatter") >= ring
    assert max(sizes.values()) < ring


# ---- the weights -----------------------------------------------------------------------------------------------------


def test_graphs_refer_to_the_bundles_own_weights(onnx_bundles: dict[str, Path]) -> None:
    folder = onnx_bundles["tiny"]
    with safe_open(folder / "model.safetensors", framework="np") as stored:
        names = set(stored.keys())
        for program in GRAPHS:
            found = graph(folder, program).initializers
            outside = {n: v.const_value for n, v in found.items() if isinstance(v.const_value, ir.ExternalTensor)}
            matrices = {name for name in names if name.endswith(".weight") and stored.get_tensor(name).ndim == 2}
            assert matrices <= set(outside)
            for name in names & set(outside):
                assert Path(outside[name].location).name == "model.safetensors"
                assert np.array_equal(outside[name].numpy(), stored.get_tensor(name))
            inside = [v.const_value.nbytes for v in found.values() if not isinstance(v.const_value, ir.ExternalTensor)]
            assert max(inside) <= 1 << 16


def test_names_are_those_of_the_ecosystem_and_in_the_manifest(onnx_bundles: dict[str, Path]) -> None:
    folder = onnx_bundles["tiny"]
    entry = bundle.read(folder).programs.onnx
    assert entry is not None
    for program in GRAPHS:
        found = graph(folder, program)
        assert [v.name for v in found.inputs] == [one.name for one in entry.graphs[program].inputs]
        assert [v.name for v in found.outputs] == [one.name for one in entry.graphs[program].outputs]
        names = [v.name for v in found.inputs]
        assert names[0] == "input_ids"
        assert {"past_key_values.1.key", "past_key_values.1.value", "past_key_values.0.ema_state"} <= set(names)
        past = [name for name in names if str(name).startswith("past_key_values.")]
        assert [str(name).replace("past_key_values", "present") for name in past] == [v.name for v in found.outputs][1:]
        assert [list(v.shape) for v in found.inputs if v.name == "past_key_values.0.key"] == [["B", 2, 64, 8]]
    assert [d.value for d in graph(folder, "prefill").inputs[0].shape] == ["B", "L"]


# ---- without this package --------------------------------------------------------------------------------------------


def test_the_example_writes_what_eager_writes_with_onnxruntime_and_numpy_alone(onnx_bundles: dict[str, Path]) -> None:
    folder, prompt = onnx_bundles["tiny"], "In the beginning, " * 8  # two calls of prefill
    program = f"""
import runpy, sys
sys.argv = ["onnx_numpy.py", {str(folder)!r}, {prompt!r}]
runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")
assert not {{"torch", "megalodon_export", "transformers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr.decode()
    eager = megalodon_export.load(folder, runtime="eager", device="cpu")
    ids = list(eager.generate_ids(list(prompt.encode()), 200))
    assert done.stdout == prompt.encode() + bytes(token for token in ids if token < 256)


# ---- bundles ---------------------------------------------------------------------------------------------------------


def test_a_session_writes_the_same_text_on_every_runtime(onnx_bundles: dict[str, Path]) -> None:
    sessions = [megalodon_export.load(onnx_bundles["tiny"], runtime=name, device="cpu") for name in ("onnx", "eager")]
    texts = ["".join(s.generate("In the beginning", 80, temperature=0.8, seed=3)) for s in sessions]
    assert texts[0] == texts[1]
    sessions[1].restore(sessions[0].snapshot())
    assert "".join(sessions[1].generate("", 20)) == "".join(sessions[0].generate("", 20))


def test_onnx_is_added_to_a_bundle_that_has_other_programs(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    before = bundle.read(folder)
    manifest = add_onnx(folder, max_batch=4)
    assert set(manifest.programs.by_runtime()) == {"aoti", "onnx"}
    assert manifest.programs.aoti == before.programs.aoti
    assert manifest.versions == before.versions
    kept = {name: entry for name, entry in before.files.items() if name != "README.md"}
    assert {name: manifest.files[name] for name in kept} == kept
    runtimes: list[Runtime] = [open_runtime(name, folder, bundle.read(folder), "cpu") for name in ("aoti", "onnx")]
    assert max(compare(*runtimes, case)[0] for case in cases(64, 4)) < 1e-4
    rows = json.loads((folder / "parity.json").read_text())["results"]
    assert {row["runtime"] for row in rows} == {"aoti", "onnx"}
    card = (folder / "README.md").read_text()
    assert card.count("## This bundle") == 1
    assert "aoti for cpu" in card
    with pytest.raises(bundle.BundleError, match="has onnx programs already"):
        add_onnx(folder)
