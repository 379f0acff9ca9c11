"""PEFT's adapters on a model: what they train, what generate() does with them, and what comes back from their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import megalodon_export.model as m
from support.small_models import SMALL, make_model, padded, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
peft = pytest.importorskip("peft", reason="adapters need PEFT: pip install peft")

LINEAR = ("wz", "wv", "wr", "wh1", "wh2", "fc1", "fc2")
PROMPTS = [random_tokens(n, seed=n) for n in (3, 9)]
ADAPTERS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"),
    "lora by name": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=list(LINEAR)),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
}


def trained(name: str, **options: Any) -> tuple[Any, list[float]]:
    """A model with an adapter after some steps on a padded batch, and their losses."""
    torch.manual_seed(0)
    model = peft.get_peft_model(make_model(torch.float32), ADAPTERS[name]()).train()
    if options:
        model.base_model.gradient_checkpointing_enable(options)
        model.enable_input_require_grads()
    token_ids, mask = padded([random_tokens(n, seed=1) for n in (12, 30)], "left")
    labels = token_ids.masked_fill(mask == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(10):
        loss = model(input_ids=token_ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses


def written(model: Any, prompts: list[Tensor]) -> list[list[int]]:
    token_ids, mask = padded(prompts, "left")
    out = model.generate(input_ids=token_ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return out[:, -8:].tolist()


def stepwise(model: Any, prompt: Tensor) -> list[int]:
    """Greedy tokens from whole passes, which have the virtual tokens of prompt tuning once."""
    tokens = prompt[None]
    with torch.no_grad():
        for _ in range(8):
            tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, -8:].tolist()


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_train_and_generate(name: str, tmp_path: Path) -> None:
    model, losses = trained(name)
    assert losses[-1] < losses[0] - 0.02
    found = written(model, PROMPTS)
    assert found == [written(model, [prompt])[0] for prompt in PROMPTS]  # padding of a batch changes nothing
    assert found == [stepwise(model, prompt) for prompt in PROMPTS]
    assert found != written(make_model(torch.float32), PROMPTS)
    model.save_pretrained(tmp_path)
    assert written(peft.PeftModel.from_pretrained(make_model(torch.float32), tmp_path).eval(), PROMPTS) == found


def test_a_merged_adapter_is_in_the_weights() -> None:
    model, _ = trained("lora")
    token_ids = random_tokens(2, 20)
    with torch.no_grad():
        expected = model(input_ids=token_ids).logits
        merged = model.merge_and_unload()
        assert isinstance(merged, m.MegalodonForCausalLM)
        assert torch.allclose(merged(token_ids).logits, expected, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_step(reentrant: bool) -> None:
    expected = trained("lora")[1]
    assert trained("lora", use_reentrant=reentrant)[1] == pytest.approx(expected, rel=1e-5)


def test_kernels_refuse_adapters() -> None:
    model = peft.get_peft_model(make_model(torch.float32), ADAPTERS["lora"]())
    with pytest.raises(TypeError, match="not adapters; merge them first"):
        m.use_kernels(model)


def test_prefix_tuning_is_refused() -> None:
    """It makes keys and values of its own, for a cache that a running state has no place for."""
    model = peft.get_peft_model(
        make_model(torch.float32), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    with pytest.raises(TypeError, match=r"DynamicCache.*model.new_cache\(batch\)"):
        model(input_ids=random_tokens(1, 4))
    assert model.config.to_dict()["hidden_size"] == SMALL["model_dim"]
