"""The complex EMA and quantised scales stay in float32, however a model comes to half precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import megalodon_export.model as m
from support.small_models import SMALL, make_model, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

Change = Callable[[m.MegalodonForCausalLM], m.MegalodonForCausalLM]
CASTS: dict[str, Change] = {
    "to": lambda model: model.to(torch.bfloat16),
    "to, with a device": lambda model: model.to("cpu", torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "type": lambda model: model.type(torch.bfloat16),
    "there and back": lambda model: model.double().to(torch.bfloat16),
    "frozen": lambda model: _frozen(model).to(torch.bfloat16),
}


def _frozen(model: m.MegalodonForCausalLM) -> m.MegalodonForCausalLM:
    m.freeze_constants(model)
    return model


def dtypes(model: torch.nn.Module) -> dict[str, torch.dtype]:
    """The dtypes of the EMA's tensors and of scales, and of the others."""
    found: dict[str, torch.dtype] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kind = "wide" if any(part in f".{name}" for part in (".cema.", ".rotary.", ".scale")) else "others"
        if tensor.is_floating_point() and tensor.numel():
            assert found.setdefault(kind, tensor.dtype) == tensor.dtype, name
    return found


HALF = {"wide": torch.float32, "others": torch.bfloat16}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_model_is_the_loaded_one(cast: str, tmp_path: Path) -> None:
    model = make_model(torch.float32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    model = CASTS[cast](model)
    assert dtypes(model) == dtypes(loaded) == HALF
    token_ids = random_tokens(2, 40)
    assert torch.equal(model(token_ids).logits, loaded(token_ids).logits)


@pytest.mark.parametrize("default", [False, True], ids=["from_config", "default dtype"])
def test_a_new_model_has_the_dtypes_of_a_loaded_one(default: bool) -> None:
    config = m.MegalodonConfig(**SMALL)
    if default:
        torch.set_default_dtype(torch.bfloat16)
        try:
            model: Any = m.MegalodonForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert dtypes(model) == HALF


def test_training_from_scratch_is_training_a_loaded_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = m.MegalodonConfig(**SMALL)
    models = [AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()]
    models[0].save_pretrained(tmp_path)
    models.append(AutoModelForCausalLM.from_pretrained(tmp_path).train())
    token_ids = random_tokens(2, 40)
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            model(token_ids, labels=token_ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other), name


def test_wider_dtypes_are_taken() -> None:
    assert dtypes(make_model(torch.float32).double()) == {"wide": torch.float64, "others": torch.float64}
    assert dtypes(make_model(torch.float64).float()) == {"wide": torch.float32, "others": torch.float32}
    assert dtypes(make_model(torch.float32).to("meta")) == {"wide": torch.float32, "others": torch.float32}


def test_scales_of_quantised_weights(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    model = make_model(torch.float32, projection_bias=True)
    m.quantize(model, "int8")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    model.to(torch.bfloat16)
    assert dtypes(model) == dtypes(loaded) == HALF
    assert AutoConfig.from_pretrained(tmp_path).weight_format == "int8"
    assert torch.equal(model(random_tokens(2, 9)).logits, loaded(random_tokens(2, 9)).logits)
