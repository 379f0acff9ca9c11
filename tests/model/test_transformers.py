"""What transformers and accelerate do with a model: devices and offloading, torch.compile, other people's exporters."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.config as dynamo
import torch._inductor.config as inductor
from transformers import AutoModelForCausalLM

import megalodon_export.model as m
from support.small_models import continued, greedy, make_model, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = random_tokens(2, 12)
LEFT = torch.ones_like(TOKENS)
LEFT[0, :5] = 0


# ---- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_cache_len": 32}], ids=["chunks", "window"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_model_can_be_copied(copied: Callable[[Any], Any], options: dict[str, Any]) -> None:
    model = make_model(torch.float32, **options)
    other = copied(model)
    assert type(other.model) is type(model.model)
    with torch.no_grad():
        assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)
        next(other.parameters()).zero_()
        assert not torch.equal(other(TOKENS).logits, model(TOKENS).logits)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing that another test compiled."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mask", [pytest.param(None, marks=pytest.mark.slow), LEFT], ids=["whole", "padded"])
def test_forward_is_one_graph(mask: torch.Tensor | None) -> None:
    model = make_model(torch.float32, num_layers=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    options = {"use_cache": False, "labels": TOKENS} if mask is None else {"use_cache": True, "logits_to_keep": 1}
    with torch.no_grad():
        actual, expected = (f(TOKENS, attention_mask=mask, **options) for f in (compiled, model))
        assert torch.allclose(actual.logits, expected.logits, atol=1e-5)
        assert mask is not None or torch.allclose(actual.loss, expected.loss, atol=1e-5)
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


# ---- transformers' exporters -----------------------------------------------------------------------------------------


@pytest.fixture
def exporters() -> Any:
    module = pytest.importorskip("transformers.exporters", reason="this transformers has no exporters")
    if not hasattr(module, "ModelRunner"):
        pytest.skip("the exporters of this transformers have no runners (transformers 5.24 has)")
    return module


def assert_runs_as_eager(model: m.MegalodonForCausalLM, exported: Any, token_ids: torch.Tensor, start: int) -> None:
    """A call that goes on from a cache at `start`; what the program returns as the cache is that of eager."""
    caches = [model.new_cache(len(token_ids)) for _ in range(2)]
    with torch.no_grad():
        if start:
            for cache in caches:
                model(random_tokens(len(token_ids), start), past_key_values=cache)
        expected = model(token_ids, past_key_values=caches[0])
        actual = exported(input_ids=token_ids, cache=caches[1])
    assert torch.allclose(actual.logits, expected.logits, atol=1e-5)
    for one, other in zip(actual.cache.tensors(), caches[0].tensors(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.slow
def test_dynamo_exporter_takes_any_batch_and_padding(exporters: Any) -> None:
    model = make_model(torch.float32, num_layers=1, chunk_size=64)
    model.config.use_cache = False
    inputs = {"input_ids": random_tokens(2, 40), "attention_mask": torch.ones(2, 40, dtype=torch.int64)}
    with dynamo.patch(fake_tensor_cache_enabled=False):  # which takes longer where sizes are symbols
        exported = exporters.DynamoExporter().export(model, inputs, exporters.DynamoConfig(dynamic=True))
    token_ids, mask = random_tokens(3, 50), torch.ones(3, 50, dtype=torch.int64)
    mask[0, :7], mask[1, 30:] = 0, 0
    actual = exported(input_ids=token_ids, attention_mask=mask).logits
    assert torch.allclose(actual, model(token_ids, attention_mask=mask).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [
        ("Dynamo", False),
        pytest.param("Onnx", False, marks=pytest.mark.slow),  # what these add to Dynamo's is the translation to ONNX
        pytest.param("Onnx", True, marks=pytest.mark.slow),
    ],
)
def test_exported_stages_continue_padded_prompts(exporters: Any, backend: str, dynamic: bool) -> None:
    model = make_model(torch.float32, num_layers=1)
    batch = 3 if dynamic else 2
    mask = torch.ones(batch, 8, dtype=torch.int64)
    mask[0, :3] = mask[1:, :1] = 0
    config = getattr(exporters, f"{backend}Config")(dynamic=dynamic)
    inputs = {"input_ids": random_tokens(2, 8), "attention_mask": mask[:2]}
    exported = getattr(exporters, f"{backend}Exporter")().export_for_generation(model, inputs, config)
    assert set(exported.runners) == {"prefill", "decode"}
    prompts, after = random_tokens(batch, 8, seed=1), random_tokens(batch, 1, seed=2)
    cache, eager = model.new_cache(batch), model.new_cache(batch)
    with torch.no_grad():
        for stage, token_ids in (("prefill", prompts), ("decode", after)):
            out = exported.runners[stage](input_ids=token_ids, attention_mask=mask, cache=cache)
            expected = model(token_ids, attention_mask=mask, past_key_values=eager).logits[:, -1]
            assert torch.allclose(out.logits[:, -1], expected, atol=1e-5)
            cache, mask = out.cache, torch.nn.functional.pad(mask, (0, 1), value=1)
    assert cache.get_seq_length() == eager.get_seq_length() == 9
    unpadded = exported.runners["prefill"](
        input_ids=prompts, attention_mask=torch.ones_like(prompts), cache=model.new_cache(batch)
    )
    assert vars(unpadded.cache).keys() == vars(model.new_cache(batch)).keys()  # names in a graph are of these


@pytest.mark.slow
def test_onnx_exporter(exporters: Any) -> None:
    model = make_model(torch.float32, num_layers=1)
    inputs = {"input_ids": TOKENS, "cache": model.new_cache(2)}
    exported = exporters.OnnxExporter().export(model, inputs, exporters.OnnxConfig())
    assert_runs_as_eager(model, exported, random_tokens(2, 12, seed=1), 9)


@pytest.mark.slow  # the test above exports one size
def test_onnx_exporter_takes_any_batch_and_length(exporters: Any) -> None:
    model = make_model(torch.float32, num_layers=1, chunk_size=64)
    model.config.use_cache = False
    with dynamo.patch(fake_tensor_cache_enabled=False):
        config = exporters.OnnxConfig(dynamic=True)
        exported = exporters.OnnxExporter().export(model, {"input_ids": random_tokens(2, 40)}, config)
    for batch, length in ((3, 50), (1, 33), (1, 7)):
        token_ids = random_tokens(batch, length)
        assert torch.allclose(exported(input_ids=token_ids).logits, model(token_ids).logits, atol=1e-5)


LOAD = """
import sys, torch
import megalodon_export.exporters.transformers_backend
from transformers.exporters import ExportedModel
from megalodon_export.model import MegalodonCache
exported = ExportedModel.from_pretrained(sys.argv[1], trust_remote_code=True)
cache = MegalodonCache.allocate(exported.config, 2, torch.float32)
print(exported(input_ids=torch.tensor([[3], [5]]), cache=cache).logits.flatten().tolist())
"""


# Slow: it compiles one program by AOTInductor. The other back ends of transformers' exporters run in faster tests.
@pytest.mark.slow
def test_aotinductor_is_a_back_end(exporters: Any, tmp_path: Path) -> None:
    from transformers.exporters import AutoExportConfig, AutoHfExporter

    from megalodon_export.exporters import transformers_backend

    model = make_model(torch.float32, num_layers=1)
    exporter = AutoHfExporter.from_config({"export_format": "aoti"})
    config = AutoExportConfig.from_dict({"export_format": "aoti"})
    assert isinstance(config, transformers_backend.AotiConfig)
    cheap = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
    with inductor.patch(cheap):
        exported = exporter.export(model, {"input_ids": random_tokens(2, 1), "cache": model.new_cache(2)}, config)
    assert_runs_as_eager(model, exported, random_tokens(2, 1, seed=1), 9)
    with pytest.raises(ValueError, match="compiled for cpu, not cuda"):
        exported.to("cuda")
    exported.save_pretrained(tmp_path / "exported")
    run = subprocess.run([sys.executable, "-c", LOAD, tmp_path / "exported"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with torch.no_grad():
        expected = model(torch.tensor([[3], [5]]), past_key_values=model.new_cache(2)).logits.flatten()
    assert torch.allclose(torch.tensor(json.loads(run.stdout)), expected, atol=1e-5)
