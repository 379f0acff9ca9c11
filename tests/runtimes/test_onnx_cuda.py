"""ONNX Runtime on a GPU: strict placement, CUDA graphs against none, one copy of the weights. `pytest -m cuda`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import megalodon_export
from megalodon_export.bundles import bundle
from megalodon_export.bundles.verify import BOUNDS, cases, compare
from megalodon_export.export.onnx import export_onnx
from megalodon_export.model import MegalodonConfig, MegalodonForCausalLM
from megalodon_export.runtimes import RuntimeUnavailable, open_runtime
from megalodon_export.runtimes.onnx import OnnxRuntime
from megalodon_export.runtimes.onnx_session import open_session
from support.small_models import make_model

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle; the export verifies it on the GPU, since there is one."""
    place = tmp_path_factory.mktemp(request.param)
    make_model(torch.float32, chunk_size=64).save_pretrained(place / "checkpoint")
    export_onnx(place / "checkpoint", place / "bundle", request.param, max_batch=8)
    return place / "bundle"


def opened(folder: Path) -> OnnxRuntime:
    runtime = open_runtime("onnx", folder, bundle.read(folder), "cuda")
    assert isinstance(runtime, OnnxRuntime)
    return runtime


def test_every_node_of_both_graphs_is_on_the_gpu(folder: Path) -> None:
    """The session is strict: it would not have opened otherwise."""
    for session in opened(folder).sessions.values():
        assert session.onnx.get_providers()[0] == "CUDAExecutionProvider"
        assert session.onnx.get_session_options().get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


def test_nodes_that_would_run_on_the_cpu_are_named(folder: Path, tmp_path: Path) -> None:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["B", 8, 1])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    length, axis = (onnx.numpy_helper.from_array(np.array(n), name) for n, name in ((8, "length"), (1, "axis")))
    node = onnx.helper.make_node("DFT", ["x", "length", "axis"], ["y"], name="the_fft")
    graph = onnx.helper.make_graph([node], "g", [x], [y], [length, axis])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "g.onnx")
    with pytest.raises(RuntimeUnavailable, match=r"g\.onnx does not run on CUDA alone.*the_fft \(DFT\)"):
        open_session(tmp_path / "g.onnx", torch.device("cuda", 0), {}, prepack=False, capture=False)


def test_the_gpu_gives_what_the_model_gives(folder: Path) -> None:
    manifest = bundle.read(folder)
    eager = open_runtime("eager", folder, manifest, "cuda")
    runtime = opened(folder)
    for case in cases(64, 8):
        assert max(compare(runtime, eager, case)[:2]) < BOUNDS[manifest.dtype]


def test_ten_thousand_captured_steps_are_those_without_a_graph(folder: Path) -> None:
    runtime = opened(folder)
    plain, graphed = (runtime.bind(runtime.new_cache(2), capture) for capture in (False, True))
    tokens = torch.tensor([3, 5], device="cuda")
    free = []
    for index in range(10_000):
        logits, found = plain.decode(tokens), graphed.decode(tokens)
        assert torch.equal(found, logits), f"step {index}"
        tokens = found.argmax(-1)
        free.append(torch.cuda.mem_get_info()[0])
    assert len(set(free[100:])) == 1
    for a, b in zip(plain.cache.tensors(), graphed.cache.tensors(), strict=True):
        assert torch.equal(a, b)


def test_a_captured_step_starts_from_the_right_state_wherever_it_is_captured(folder: Path) -> None:
    """ONNX Runtime runs a graph three times when it captures it; the stream must move by one step."""
    runtime = opened(folder)
    eager = open_runtime("eager", folder, bundle.read(folder), "cuda")
    ids, lengths = torch.randint(23, (3, 70), device="cuda"), torch.tensor([70, 1, 63])
    pair = [r.bind(r.new_cache(3)) for r in (runtime, eager)]
    for programs in pair:
        programs.prefill(ids, lengths)
    bound = BOUNDS[bundle.read(folder).dtype]
    for token in range(5):
        tokens = torch.full((3,), token, device="cuda")
        assert (pair[0].decode(tokens) - pair[1].decode(tokens)).abs().max() < bound
    assert pair[0].cache.position.tolist() == [75, 6, 68]


def test_both_sessions_share_one_copy_of_the_weights(tmp_path: Path) -> None:
    sizes = {"vocab_size": 4096, "model_dim": 1024, "ffn_hidden_dim": 4096, "num_layers": 4, "chunk_size": 64}
    config = MegalodonConfig(**sizes, z_dim=64, value_dim=1024, norm_num_groups=8, cema_ndim=2)
    MegalodonForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    export_onnx(tmp_path / "checkpoint", tmp_path / "bundle", max_batch=1)
    stored = sum(f.stat().st_size for f in (tmp_path / "bundle").glob("*.safetensors"))
    before = torch.cuda.mem_get_info()[0]
    runtime = opened(tmp_path / "bundle")
    programs = runtime.bind(runtime.new_cache(1))
    programs.prefill(torch.zeros(1, 64, dtype=torch.int64, device="cuda"), torch.tensor([64]))
    programs.decode(torch.zeros(1, dtype=torch.int64, device="cuda"))
    assert before - torch.cuda.mem_get_info()[0] < 1.7 * stored


def test_sessions_write_the_same_text_as_eager(folder: Path) -> None:
    if bundle.read(folder).dtype != "float32":
        pytest.skip("in half precision a tie may fall otherwise")
    texts = []
    for name in ("onnx", "eager"):
        session = megalodon_export.load(folder, runtime=name, device="cuda")
        texts.append(list(session.generate_ids([1, 2, 3], 200, temperature=0.8, seed=1)))
        fork = session.fork()
        texts[-1] += [*session.generate_ids([], 20), *fork.generate_ids([], 20)]
    assert texts[0] == texts[1]
