"""What transformers and accelerate do with a model: devices and offloading, torch.compile, other people's exporters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import make_model, random_tokens
from test_generation import continued, greedy
from transformers import AutoModelForCausalLM

import megalodon_export.model as m

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = random_tokens(2, 12)
LEFT = torch.ones_like(TOKENS)
LEFT[0, :5] = 0


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "padded"])
def test_forward_is_one_graph(mask: torch.Tensor | None) -> None:
    model = make_model(torch.float32, num_layers=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    calls: list[dict[str, Any]] = [{"use_cache": False, "labels": TOKENS}, {"use_cache": True, "logits_to_keep": 1}]
    with torch.no_grad():
        for options in calls:
            actual, expected = (f(TOKENS, attention_mask=mask, **options) for f in (compiled, model))
            assert torch.allclose(actual.logits, expected.logits, atol=1e-5)
            if "labels" in options:
                assert torch.allclose(actual.loss, expected.loss, atol=1e-5)
        caches = model.new_cache(2), model.new_cache(2)
        for step in range(3):  # a prefill, then steps
            token_ids = random_tokens(2, 1, seed=step) if step else TOKENS
            if mask is not None and step:
                mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            both = zip((compiled, model), caches, strict=True)
            actual, expected = (f(token_ids, attention_mask=mask, past_key_values=cache) for f, cache in both)
            assert torch.allclose(actual.logits, expected.logits, atol=1e-5)
            assert caches[0].get_seq_length() == caches[1].get_seq_length() == 12 + step
        for one, other in zip(*(cache.tensors() for cache in caches), strict=True):
            assert torch.allclose(one, other, atol=1e-5)


# ---- devices ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    make_model(torch.float32, num_layers=4).save_pretrained(path)
    return path


def assert_runs_like(dispatched: m.MegalodonForCausalLM, model: m.MegalodonForCausalLM) -> None:
    """Whole, in cached calls and in generate()."""
    with torch.no_grad():
        logits = dispatched(TOKENS, attention_mask=LEFT, use_cache=False).logits
        assert torch.allclose(logits.cpu(), model(TOKENS, attention_mask=LEFT).logits, atol=1e-4)
    prompt = TOKENS[1:]
    assert continued(dispatched, prompt, max_new_tokens=10) == greedy(model, prompt, 10)


def test_blocks_stay_whole_and_run_from_a_disk(folder: Path, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    device_map = accelerate.infer_auto_device_map(
        model, {"cpu": size // 2, "disk": size}, no_split_module_classes=model._no_split_modules
    )
    assert {"cpu", "disk"} == set(device_map.values())
    assert {f"model.layers.{i}" for i in range(4)} <= set(device_map)
    offloaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path).eval()
    assert torch.device("meta") in {p.device for p in offloaded.parameters()}
    assert_runs_like(offloaded, model)


def test_cpu_offload(folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    offloaded = accelerate.cpu_offload(AutoModelForCausalLM.from_pretrained(folder), torch.device("cpu"))
    assert {p.device for p in offloaded.parameters()} == {torch.device("meta")}
    assert_runs_like(offloaded, model)


@pytest.mark.cuda
def test_device_map_auto_on_gpus(folder: Path) -> None:
    pytest.importorskip("accelerate")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    memory: dict[int | str, int] = {0: int(size * 0.7), "cpu": 10 * size}
    if torch.cuda.device_count() > 1:
        memory = {0: int(size * 0.7), 1: int(size * 0.7), "cpu": 10 * size}
    spread = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", max_memory=memory).eval()
    assert len(set(spread.hf_device_map.values())) > 1
    assert_runs_like(spread, model)
