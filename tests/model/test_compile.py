"""torch.compile of prefill and decode: no graph break, no second compilation, the same numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.fx.experimental import _config as symbolic_shapes

import megalodon_export.model as m
from support.small_models import SMALL, full, make_model, named_tensors, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def strict_compiler() -> Iterator[None]:
    """A second compilation of a function is an error; that a count of blocks may be 1 is no reason for one."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True), symbolic_shapes.patch(backed_size_oblivious=True):
        yield
    torch.compiler.reset()


def mark(token_ids: Tensor, *others: Tensor) -> None:
    """Batch and length vary; everything else of a model's inputs is fixed."""
    for tensor in (token_ids, *others):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    if token_ids.dim() == 2:
        torch._dynamo.maybe_mark_dynamic(token_ids, 1)


def assert_compiled_is_eager(
    model: m.MegalodonForCausalLM, sizes: list[tuple[int, int]], bound: int, backend: str, tolerance: float
) -> None:
    """One compiled prefill and one compiled decode, against eager, over sizes (B, L) and positions in the chunk."""
    m.freeze_constants(model)
    prefill, decode = (torch.compile(f, backend=backend, fullgraph=True) for f in (model.prefill, model.decode))
    for batch, length in sizes:
        token_ids = random_tokens(batch, length)
        lengths = (torch.arange(batch) + length // 2).clamp(min=1, max=length)
        cache, expected_cache = model.new_cache(batch), model.new_cache(batch)
        for _ in range(2):  # from the start, then from inside a chunk
            mark(token_ids, lengths, *cache.tensors())
            actual = prefill(token_ids, lengths, cache, bound)
            assert torch.allclose(actual, model.prefill(token_ids, lengths, expected_cache, bound), atol=tolerance)
        step = random_tokens(batch)
        mark(step, *cache.tensors())
        assert torch.allclose(decode(step, cache), model.decode(step, expected_cache), atol=tolerance)
        for (name, tensor), expected in zip(named_tensors(model.config, cache), expected_cache.tensors(), strict=True):
            assert torch.allclose(tensor, expected, atol=tolerance), name


@pytest.mark.usefixtures("strict_compiler")
@pytest.mark.parametrize(
    ("batches", "bound", "form"),
    [
        pytest.param((3, 2, 7, 1), SMALL["chunk_size"], "blocked", marks=pytest.mark.slow),
        pytest.param((3, 2, 7, 1), 70, "blocked", marks=pytest.mark.slow),
        pytest.param((2, 5, 1), 70, "fft", marks=pytest.mark.slow),
    ],
)
def test_compiled_programs_never_recompile(batches: tuple[int, ...], bound: int, form: str) -> None:
    model = make_model(num_layers=1, ema_prefill=form)
    lengths = [n for n in (4, 2, 3, 5, 6, 31, 32, 33, 64, 65, 69, 70, 1) if n <= bound]
    with torch.no_grad():
        assert_compiled_is_eager(model, list(itertools.product(batches, lengths)), bound, "eager", 1e-10)


@pytest.mark.slow
@pytest.mark.usefixtures("strict_compiler")
def test_prefill_in_inductors_operations() -> None:
    """What Inductor would compile, without its minutes of C++ compilation."""
    model = make_model(num_layers=1)
    with torch.no_grad():
        assert_compiled_is_eager(model, [(3, 4), (2, 7), (7, 2)], 12, "aot_eager_decomp_partition", 1e-10)


@pytest.mark.usefixtures("strict_compiler")
def test_decode_by_inductor() -> None:
    model = make_model(torch.float32, num_layers=1)
    m.freeze_constants(model)
    decode = torch.compile(model.decode, fullgraph=True)
    with torch.no_grad():
        for batch in (3, 2, 7):
            cache, expected_cache = model.new_cache(batch), model.new_cache(batch)
            for position in range(SMALL["chunk_size"] + 2):
                token_ids = random_tokens(batch, seed=position)
                mark(token_ids, *cache.tensors())
                actual, expected = decode(token_ids, cache), model.decode(token_ids, expected_cache)
                assert torch.allclose(actual, expected, atol=1e-4)


@pytest.mark.slow  # test_compiled_layers.py has the faster one, layer by layer
def test_compiled_training_has_no_graph_break() -> None:
    torch.compiler.reset()
    model = make_model().train()
    token_ids = random_tokens(2, 12)
    prefill = torch.compile(model.score, backend="aot_eager", fullgraph=True)
    prefill(token_ids, full(token_ids)).square().mean().backward()
    compiled = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.score(token_ids, full(token_ids)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(compiled[name], parameter.grad, atol=1e-10), name
