"""Attention beyond the chunk in cached calls, against what megalodon-hf computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import megalodon_export.model as m
from megalodon_export.export.aoti import export_aoti
from megalodon_export.model.conversion import convert_megalodon_hf
from support.golden_data import load, relative_error, under, write_hf
from support.small_models import SMALL, continued, greedy, make_model, padded, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

HORIZONS: dict[str, dict[str, Any]] = {
    "sliding": {"max_cache_len": 24},
    "unbounded": {"cache_unbounded": True, "max_cache_len": None},
}


@pytest.fixture(scope="module", params=sorted(HORIZONS))
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A megalodon-hf folder with such a horizon, converted."""
    root = tmp_path_factory.mktemp("horizon")
    info, tensors = load("hf_base")
    write_hf(root / "src", {**info["config"], **HORIZONS[request.param]}, under(tensors, "state_dict."))
    convert_megalodon_hf(root / "src", root / "dst")
    return request.param, root / "dst"


def test_logits_of_megalodon_hf(converted: tuple[str, Path]) -> None:
    name, folder = converted
    info, golden = load("horizon")
    tokens = load("hf_base")[1]["tokens"][:1]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    cases = [case for case in info["cases"] if case["name"].startswith(name)]
    assert len(cases) == 3
    for case in cases:
        cache = model.new_cache(1)
        with torch.no_grad():
            pieces = [model(p, past_key_values=cache).logits for p in tokens.split(case["segments"], dim=1)]
        expected = golden[f"{case['name']}.logits"]
        assert (torch.cat(pieces, dim=1) - expected).abs().max() < 1e-3, case["name"]
    with torch.no_grad():  # without a cache it attends inside chunks
        inside = model(tokens, use_cache=False).logits
    assert (inside - load("hf_base")[1]["stream.logits"][:1]).abs().max() < 1e-3


@pytest.mark.parametrize("horizon", [{"max_cache_len": 8}, {"cache_unbounded": True}], ids=str)
def test_padded_rows_and_generation(horizon: dict[str, Any]) -> None:
    model = make_model(torch.float32, **horizon)
    prompts = [random_tokens(n, seed=n) for n in (3, 17, 9)]
    token_ids, mask = padded(prompts, "left")
    with torch.no_grad():
        logits = model(token_ids, attention_mask=mask).logits
        alone = torch.cat([model(prompt[None]).logits[0] for prompt in prompts])
    assert relative_error(logits[mask == 1], alone) < 1e-5
    out = model.generate(token_ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert out[:, 17:].tolist() == [greedy(model, prompt[None], 12) for prompt in prompts]
    assistant = make_model(torch.float32, num_layers=1)
    assisted = continued(model, prompts[2][None], max_new_tokens=12, assistant_model=assistant)
    if model.config.cache_unbounded:  # what is seen of a sliding horizon depends on the calls
        assert assisted == greedy(model, prompts[2][None], 12)


def test_an_unbounded_cache_in_any_split() -> None:
    model = make_model(cache_unbounded=True)
    tokens = random_tokens(2, 60)
    cache, other = model.new_cache(2), model.new_cache(2)
    with torch.no_grad():
        whole = model(tokens, past_key_values=cache).logits
        pieces = [model(piece, past_key_values=other).logits for piece in tokens.split([1, 7, 30, 1, 1, 20], dim=1)]
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-9)
    assert other.layers[0].key.shape[2] >= 60


def test_a_horizon_of_one_chunk_is_the_chunk() -> None:
    assert m.MegalodonConfig(**SMALL, max_cache_len=SMALL["chunk_size"]).attention_window is None
    with pytest.raises(ValueError, match="max_cache_len is 4, expected at least chunk_size 5"):
        m.MegalodonConfig(**SMALL, max_cache_len=4)
    with pytest.raises(ValueError, match="None with cache_unbounded"):
        m.MegalodonConfig(**SMALL, max_cache_len=10, cache_unbounded=True)


def test_exports_and_kernels_refuse_it(converted: tuple[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="programs attend inside chunks"):
        export_aoti(converted[1], tmp_path / "out", device="cpu")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="the kernels attend inside chunks"):
        m.use_kernels(make_model(torch.float32, cache_unbounded=True))
