"""`model.compile()`: one graph for each kind of pass, no second compilation, the same numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch._dynamo

import megalodon_export.model as m
from support.compiled_graphs import graphs
from support.small_models import make_model, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")

CHUNK = 64
BATCHES, LENGTHS = (2, 3, 7), (64, 5, 40, 31, 33)


def pair(backend: str, **sizes: int | str) -> tuple[m.MegalodonForCausalLM, m.MegalodonForCausalLM]:
    """A model twice: compiled, and not."""
    compiled, plain = (make_model(chunk_size=CHUNK, num_layers=3, **sizes) for _ in range(2))
    compiled.compile(backend=backend, fullgraph=True)
    return compiled, plain


def assert_equal(compiled: m.MegalodonForCausalLM, plain: m.MegalodonForCausalLM, batch: int, length: int) -> None:
    """Passes without a cache and over one, with a mask, and steps, from a fresh stream and from inside a chunk."""
    token_ids = random_tokens(batch, length)
    mask = (torch.arange(length) >= torch.arange(batch)[:, None] % length).long()
    caches = compiled.new_cache(batch), plain.new_cache(batch)
    for options in ({}, {"attention_mask": mask}):
        actual, expected = (f(token_ids, **options, use_cache=False).logits for f in (compiled, plain))
        assert torch.allclose(actual, expected, atol=1e-9)
    for _ in range(2):
        both = zip((compiled, plain), caches, strict=True)
        actual, expected = (f(token_ids, past_key_values=cache).logits for f, cache in both)
        assert torch.allclose(actual, expected, atol=1e-9)
        both = zip((compiled, plain), caches, strict=True)
        actual, expected = (f.decode(token_ids[:, 0], cache) for f, cache in both)
        assert torch.allclose(actual, expected, atol=1e-9)
    for a, b in zip(caches[0].tensors(), caches[1].tensors(), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


# The slow ones also find guards that autograd's tracing adds: they take a minute and a half each.
@torch.no_grad()
# `test_torch_compile.py` counts the same layers by default; here are more sizes and both forms.
@pytest.mark.slow
@pytest.mark.parametrize("case", ["blocked eager", "blocked aot_eager", "fft aot_eager"])
def test_a_kind_of_pass_is_compiled_once(case: str) -> None:
    form, backend = case.split()
    compiled, plain = pair(backend, ema_prefill=form)
    sizes = list(itertools.product(BATCHES, LENGTHS))
    assert_equal(compiled, plain, *sizes[0])
    assert graphs() == 3  # a prefill without a cache, one with a cache, a step
    for batch, length in sizes[1:]:
        assert_equal(compiled, plain, batch, length)
    assert graphs() == 0
    long = [(3, 65), (2, 128), (7, 300), (4, 1000)]
    assert_equal(compiled, plain, *long[0])
    assert graphs() == 2  # prefills of several chunks
    for batch, length in long[1:]:
        assert_equal(compiled, plain, batch, length)
    assert graphs() == 0


def gradients(model: m.MegalodonForCausalLM, batch: int, length: int) -> dict[str, torch.Tensor]:
    """The gradients of the loss of a padded batch at every parameter."""
    token_ids = random_tokens(batch, length)
    mask = (torch.arange(length) < length - torch.arange(batch)[:, None] % length).long()
    loss = model(token_ids, attention_mask=mask, labels=token_ids).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_is_compiled_once(checkpointing: bool) -> None:
    compiled, plain = (model.train() for model in pair("aot_eager"))
    if checkpointing:
        compiled.gradient_checkpointing_enable()
    for number, (batch, length) in enumerate([(3, 40), (2, 64), (7, 33)]):
        expected = gradients(plain, batch, length)
        for name, gradient in gradients(compiled, batch, length).items():
            assert torch.allclose(gradient, expected[name], atol=1e-9), name
        assert graphs() == (1 if number == 0 else 0)


def test_generation_runs_on_the_compiled_layers() -> None:
    compiled, plain = pair("eager")
    options = {"max_new_tokens": 70, "do_sample": False}  # beyond the end of a chunk
    for batch, length in ((2, 5), (3, 17)):
        token_ids = random_tokens(batch, length)
        assert torch.equal(compiled.generate(token_ids, **options), plain.generate(token_ids, **options))
    assert graphs() == 2  # a prefill with a cache, and a step


def test_compiling_twice_is_compiling_once() -> None:
    model = make_model()
    plain = model.model.backend
    for _ in range(2):
        model.compile(backend="eager")
        assert model.model.backend.inner is plain
