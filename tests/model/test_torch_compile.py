"""`torch.compile(model)` compiles layer by layer: one graph for each kind of pass, and the model stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments

import megalodon_export.model as m
from support.compiled_graphs import graphs
from support.slow import slow_except
from support.small_models import make_model, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")

CHUNK = 64


@torch.no_grad()
@pytest.mark.parametrize("case", slow_except(["eager", "eager long", "aot_eager long"], "eager"))
def test_a_kind_of_pass_is_compiled_once(case: str) -> None:
    backend, *long = case.split()
    model = make_model(chunk_size=CHUNK, num_layers=2)
    compiled = torch.compile(model, backend=backend)
    plain = model.model.backend
    sizes = [(2, 40), (3, 64), (7, 5), (3, 33), (2, 31), *([(2, 100), (3, 300), (7, 128)] if long else [])]
    for number, (batch, length) in enumerate(sizes):
        token_ids = random_tokens(batch, length)
        mask = (torch.arange(length) >= torch.arange(batch)[:, None] % length).long()
        for options in ({}, {"attention_mask": mask}):
            actual, expected = (f(token_ids, **options, use_cache=False).logits for f in (compiled, model))
            assert torch.allclose(actual, expected, atol=1e-9)
        caches = model.new_cache(batch), model.new_cache(batch)
        for tokens in (token_ids, token_ids[:, :1]):
            both = zip((compiled, model), caches, strict=True)
            actual, expected = (f(tokens, past_key_values=cache).logits for f, cache in both)
            assert torch.allclose(actual, expected, atol=1e-9)
        assert graphs() == {0: 3, 5: 2}.get(number, 0)  # both prefills and a step; prefills of several chunks
        assert model.model.backend is plain


def test_what_torch_compile_was_given_reaches_the_layers() -> None:
    seen = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        seen.append(graph)
        return graph.forward

    model = make_model(num_layers=2).eval()
    with torch.no_grad():
        torch.compile(model, backend=compiler)(random_tokens(2, 5), use_cache=False)
        assert len(seen) == 1
        torch.compile(model.model, backend=compiler)(random_tokens(2, 5), use_cache=False)  # of the same compiler
        assert len(seen) == 1


def test_layers_that_are_compiled_already_stay_so() -> None:
    model = make_model(num_layers=2)
    model.compile(backend="eager")
    with torch.no_grad():
        torch.compile(model, backend="aot_eager")(random_tokens(2, 5), use_cache=False)
        assert graphs() == 1
        model(random_tokens(3, 7), use_cache=False)
        assert graphs() == 0


def test_a_function_that_calls_the_model_is_one_graph() -> None:
    model = make_model(num_layers=2)

    def last(token_ids: torch.Tensor) -> torch.Tensor:
        return model(token_ids, use_cache=False).logits[:, -1]

    token_ids = random_tokens(2, 5)
    with torch.no_grad():
        assert torch.allclose(torch.compile(last, backend="eager", fullgraph=True)(token_ids), last(token_ids))
    assert graphs() == 1


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = make_model(num_layers=1)
    plain = model.model.backend
    with pytest.raises(ValueError, match="input_ids"):
        torch.compile(model, backend="eager")()
    assert model.model.backend is plain
    assert isinstance(model, m.MegalodonForCausalLM)


@pytest.mark.slow  # accelerate's wrappers around `forward`, which torch.compile sees first
@pytest.mark.parametrize("bf16", [False, True])
def test_the_trainer_compiles_one_layer(bf16: bool, tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        model = make_model(torch.float32, chunk_size=CHUNK, num_layers=3)
        rows = [{"input_ids": ids, "labels": ids} for ids in random_tokens(12, 40)]
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=3, bf16=bf16, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True, logging_steps=1, torch_compile=compiled,
            torch_compile_backend="aot_eager" if compiled else None,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert counters["stats"]["unique_graphs"] == 1
    assert losses[0] == pytest.approx(losses[1], abs=1e-2 if bf16 else 1e-5)
