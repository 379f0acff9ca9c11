"""Graphs with kernels in ONNX Runtime on a GPU: numbers, captured steps, memory, text. `pytest -m cuda`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megalodon_export
from megalodon_export.bundles import bundle
from megalodon_export.bundles.checkpoints import default_checkpoint
from megalodon_export.bundles.verify import BOUNDS, cases, compare
from megalodon_export.export.onnx import export_onnx
from megalodon_export.runtimes import open_runtime
from megalodon_export.runtimes.onnx import OnnxRuntime
from support.small_models import VARIANTS, make_model

pytestmark = pytest.mark.cuda
EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_cuda.py"


def this_gpu() -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle; the export verifies its kernels on the GPU, since there is one."""
    place = tmp_path_factory.mktemp(request.param)
    make_model(torch.float32, chunk_size=64).save_pretrained(place / "checkpoint")
    export_onnx(place / "checkpoint", place / "bundle", request.param, max_batch=8, kernels=(this_gpu(),))
    return place / "bundle"


def opened(folder: Path) -> OnnxRuntime:
    runtime = open_runtime("onnx", folder, bundle.read(folder), "cuda")
    assert isinstance(runtime, OnnxRuntime)
    assert runtime.kernels
    return runtime


def test_every_node_of_both_graphs_is_on_the_gpu(folder: Path) -> None:
    for session in opened(folder).sessions.values():
        assert session.onnx.get_providers()[0] == "CUDAExecutionProvider"
        assert session.onnx.get_session_options().get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


def test_the_kernels_give_what_the_model_gives(folder: Path) -> None:
    manifest = bundle.read(folder)
    eager, runtime = open_runtime("eager", folder, manifest, "cuda"), opened(folder)
    for case in cases(64, 8):
        assert max(compare(runtime, eager, case)[:2]) < BOUNDS[manifest.dtype], case.name


def test_ten_thousand_captured_steps_are_those_without_a_graph(folder: Path) -> None:
    runtime = opened(folder)
    plain, graphed = (runtime.bind(runtime.new_cache(2), capture) for capture in (False, True))
    tokens, free = torch.tensor([3, 5], device="cuda"), []
    for index in range(10_000):
        logits, found = plain.decode(tokens), graphed.decode(tokens)
        assert torch.equal(found, logits), f"step {index}"
        tokens = found.argmax(-1)
        free.append(torch.cuda.mem_get_info()[0])
    assert len(set(free[100:])) == 1
    for a, b in zip(plain.cache.tensors(), graphed.cache.tensors(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("position", [0, 1, 60, 62, 63, 64, 127])
def test_a_captured_step_starts_from_the_right_state_wherever_it_is_captured(folder: Path, position: int) -> None:
    """Capturing runs the step several times: the states move by one step, and slots that are still read stay."""
    runtime = opened(folder)
    ids = torch.randint(23, (3, 128), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    pair = [runtime.bind(runtime.new_cache(3), capture) for capture in (False, True)]
    for programs in pair:
        programs.prefill(ids, torch.tensor([position, 1, 63]))
    for token in range(5):
        tokens = torch.full((3,), token, device="cuda")
        assert torch.equal(pair[0].decode(tokens), pair[1].decode(tokens))
    assert pair[1].cache.position.tolist() == [position + 5, 6, 68]
    for a, b in zip(pair[0].cache.states(), pair[1].cache.states(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", ["all flags", "no affine", "megalodon-hf", "many heads", "chunk 16"])
def test_models_of_every_kind_run_on_the_kernels(variant: str, tmp_path: Path) -> None:
    make_model(torch.float32, **VARIANTS[variant]).save_pretrained(tmp_path / "checkpoint")
    export_onnx(tmp_path / "checkpoint", tmp_path / "bundle", max_batch=8, kernels=(this_gpu(),))  # it verifies
    assert opened(tmp_path / "bundle").kernels


def test_sessions_write_the_same_text_as_eager(folder: Path) -> None:
    if bundle.read(folder).dtype != "float32":
        pytest.skip("in half precision a tie may fall otherwise")
    texts = []
    for name in ("onnx", "eager"):
        session = megalodon_export.load(folder, runtime=name, device="cuda")
        texts.append(list(session.generate_ids([1, 2, 3], 200, temperature=0.8, seed=1)))
        texts[-1] += list(session.generate_ids([], 512))  # greedy: the graph chooses the tokens
        fork = session.fork()
        texts[-1] += [*session.generate_ids([], 20), *fork.generate_ids([], 20)]
    assert texts[0] == texts[1]


def test_onnxruntime_and_numpy_alone_write_the_text(tmp_path: Path) -> None:
    export_onnx(default_checkpoint(), tmp_path / "bundle", "bfloat16", max_batch=1, kernels=(this_gpu(),))
    code = (
        f"import runpy, sys; sys.argv = ['onnx_cuda.py', {str(tmp_path / 'bundle')!r}]; "
        f"runpy.run_path({str(EXAMPLE)!r}); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 100


def test_the_default_checkpoint_writes_what_eager_writes(tmp_path: Path) -> None:
    export_onnx(default_checkpoint(), tmp_path / "bundle", "float32", max_batch=1, kernels=(this_gpu(),))
    texts = []
    for name in ("onnx", "eager"):
        session = megalodon_export.load(tmp_path / "bundle", runtime=name, device="cuda")
        texts.append(list(session.generate_ids(list(b"In the beginning"), 512)))
    assert texts[0] == texts[1]
