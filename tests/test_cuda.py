"""The GPU: programs against eager, CUDA graphs against none, memory over many steps. Run with `pytest -m cuda`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import make_model

from megalodon_export import bundle
from megalodon_export.export import export_aoti
from megalodon_export.runtimes import Runtime, open_runtime
from megalodon_export.verify import BOUNDS

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for the GPU; the export itself verifies it against eager on the GPU."""
    assert not torch.backends.cuda.matmul.allow_tf32
    place = tmp_path_factory.mktemp(request.param)
    make_model(torch.float32, chunk_size=64).save_pretrained(place / "checkpoint")
    export_aoti(place / "checkpoint", place / "bundle", "cuda", request.param, max_batch=8)
    return place / "bundle"


def opened(folder: Path, name: str = "aoti") -> Runtime:
    return open_runtime(name, folder, bundle.read(folder), "cuda")


def test_gpu_equals_cpu(folder: Path) -> None:
    manifest = bundle.read(folder)
    runtime, reference = opened(folder), open_runtime("eager", folder, manifest, "cpu")
    ids, lengths = torch.randint(runtime.config.vocab_size, (3, 150)), torch.tensor([150, 1, 64])
    found = runtime.prefill(ids.cuda(), lengths, runtime.new_cache(3)).cpu()
    expected = reference.prefill(ids, lengths, reference.new_cache(3))
    assert (found - expected).abs().max() < BOUNDS[manifest["dtype"]]


@pytest.mark.parametrize("name", ["aoti", "eager"])
def test_a_captured_decode_gives_the_same_tokens(folder: Path, name: str) -> None:
    runtime = opened(folder, name)
    plain, graphed = runtime.new_cache(2), runtime.new_cache(2)
    step = runtime.decoder(graphed)
    tokens = [torch.tensor([3, 5], device="cuda")] * 2
    memory = []
    for index in range(1000):
        tokens[0] = runtime.decode(tokens[0], plain).argmax(-1)
        tokens[1] = step(tokens[1]).argmax(-1)
        assert torch.equal(*tokens), f"step {index}"
        memory.append(torch.cuda.memory_allocated())
    assert memory[-1] == memory[10]
    for a, b in zip(plain.tensors(), graphed.tensors(), strict=True):
        assert torch.equal(a, b)


def test_capturing_leaves_the_cache_as_it_was(folder: Path) -> None:
    runtime = opened(folder)
    cache = runtime.new_cache(2)
    runtime.prefill(torch.randint(runtime.config.vocab_size, (2, 70), device="cuda"), torch.tensor([70, 9]), cache)
    before = [tensor.clone() for tensor in cache.tensors()]
    runtime.decoder(cache)
    for a, b in zip(before, cache.tensors(), strict=True):
        assert torch.equal(a, b)
