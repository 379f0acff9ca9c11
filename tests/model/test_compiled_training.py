"""Compiled layers train as others: under autocast, over a carried cache, sharded by FSDP2."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import megalodon_export.model as m
from support.small_models import make_model, random_tokens

pytestmark = [pytest.mark.usefixtures("one_thread", "fresh_compiler"), pytest.mark.slow]  # AOTAutograd traces for 10 s

CASES = ["carried", "carried autocast"]  # checkpointing without a cache is in `test_compiled_layers.py`


@pytest.fixture
def group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(model: m.MegalodonForCausalLM, case: str, batch: int, length: int) -> dict[str, Tensor]:
    """The gradients of a padded batch, or of its halves over one cache."""
    token_ids, loss = random_tokens(batch, length), torch.zeros(())
    cache = model.new_cache(batch) if "carried" in case else None
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in case):
        for piece in token_ids.split(-(-length // 2) if cache is not None else length, dim=1):
            mask = torch.ones_like(piece) if cache is not None else (torch.arange(length) < length - 2).expand_as(piece)
            loss = loss + model(piece, attention_mask=mask, labels=piece, past_key_values=cache).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("through", ["model.compile()", "torch.compile(model)"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_layers_as_they_are(case: str, through: str) -> None:
    dtype = torch.float32 if "autocast" in case else torch.float64
    plain, model = (make_model(dtype, chunk_size=64, num_layers=2).train() for _ in range(2))
    compiled = torch.compile(model, backend="aot_eager") if through == "torch.compile(model)" else model
    if through == "model.compile()":
        model.compile(backend="aot_eager")
    for number, (batch, length) in enumerate([(2, 40), (3, 62), (7, 33)]):
        expected = step(plain, case, batch, length)
        found = step(compiled, case, batch, length)
        assert len(found) == len(expected)
        for name, gradient in found.items():
            want = expected[name.removeprefix("_orig_mod.")]
            limit = 0.02 * want.norm() if "autocast" in case else 1e-9
            assert (gradient - want).norm() <= limit, (name, batch, length)
        assert not counters["graph_break"], dict(counters["graph_break"])
        assert counters["stats"]["unique_graphs"] == (1 if number == 0 else 0)
        counters.clear()


@pytest.mark.parametrize("ema_apart", [False, True])
@pytest.mark.parametrize("through", ["model.compile()", "torch.compile(model)"])
@pytest.mark.usefixtures("group")
def test_fsdp2_gives_the_gradients_of_layers_that_are_not_compiled(through: str, ema_apart: bool) -> None:
    """FSDP2 gathers a unit's weights outside the graphs, which it breaks at its hooks."""
    mesh = init_device_mesh("cpu", (1,))
    found = []
    for backend in ("", "aot_eager"):
        model = make_model(chunk_size=64, num_layers=2).train()
        for layer in model.model.layers:
            if ema_apart:
                fully_shard(layer.attn.cema, mesh=mesh)
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if backend and through == "model.compile()":
            model.compile(backend=backend)
        run = torch.compile(model, backend=backend) if backend and through != "model.compile()" else model
        gradients: dict[str, Tensor] = {}
        for batch, length in ((2, 40), (3, 33)):
            token_ids = random_tokens(batch, length)
            run(token_ids, labels=token_ids).loss.backward()
        for name, parameter in model.named_parameters():
            assert isinstance(parameter.grad, DTensor)
            gradients[name] = parameter.grad.full_tensor()
        found.append(gradients)
    assert counters["stats"]["unique_graphs"] > 0
    for name, expected in found[0].items():
        assert torch.allclose(found[1][name], expected, atol=1e-9), name
