"""Sequence parallelism and FSDP2 over real processes (gloo): the numbers of one process that has everything.

Starting processes takes most of the time, so they are started once and run every case.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from small_models import make_model, random_tokens
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import megalodon_export.model as m
from megalodon_export.model.sequence_parallel import piece_of

PROCESSES = 3
STEPS = 3
Results = dict[str, Any]

# Frozen: nothing of the first layer's EMA and norm takes gradients, so none comes back for their states.
CASES: dict[str, dict[str, Any]] = {
    "blocked": {},
    "fft, tied, checkpointing": {"ema_prefill": "fft", "share_emb": True, "chunk_size": 20},
    "megalodon-hf, frozen": {"norm_statistics": "megalodon-hf", "projection_bias": True, "num_layers": 3},
}


def prepared(case: str) -> tuple[m.MegalodonForCausalLM, Tensor, Tensor]:
    """The model of a case, token ids and labels."""
    model = make_model(**CASES[case]).train()
    if "frozen" in case:
        for module in (model.model.embed, model.model.layers[0].attn.timenorm, model.model.layers[0].attn.cema):
            module.requires_grad_(False)
    token_ids = random_tokens(2, 120)
    return model, token_ids, token_ids.index_fill(1, torch.arange(30, 50), -100)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Those that there are."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def parallel_case(case: str) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, summed gradients, and this process's logits."""
    model, token_ids, labels = prepared(case)
    if "checkpointing" in case:
        model.gradient_checkpointing_enable()
    loss = m.parallel_loss(model, token_ids, labels)
    loss.backward()
    m.sum_gradients(model)
    with torch.no_grad():
        return loss.detach(), gradients(model), m.parallel_logits(model.eval(), token_ids)


def refusal() -> str:
    """What is said of a length that does not fit."""
    try:
        m.parallel_logits(make_model(), random_tokens(1, 25))
    except ValueError as error:
        return str(error)
    return ""


def train(model: torch.nn.Module, token_ids: Tensor) -> list[float]:
    """The losses of a few steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(token_ids, labels=token_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def sharded(dtype: torch.dtype, policy: MixedPrecisionPolicy) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of this process's row under FSDP2, and the whole weights afterwards."""
    model = make_model(dtype).train()
    for layer in model.model.layers:
        fully_shard(layer.attn.cema)  # a unit of its own, in float32 whatever the policy of the others
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    losses = train(model, random_tokens(PROCESSES, 24)[dist.get_rank()][None])
    return losses, {name: t.full_tensor() for name, t in model.state_dict().items()}


def in_process(rank: int, port: int, folder: Path) -> None:
    """Everything that one process runs; its results go to a file."""
    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{port}"
    timeout = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES, timeout=timeout)
    results: Results = {case: parallel_case(case) for case in CASES}
    results["refusal"] = refusal()
    results["piece"] = piece_of(torch.arange(30)[None], 5)
    results["fsdp"] = sharded(torch.float64, MixedPrecisionPolicy())
    # Forward inputs as they are: FSDP would cast the positions and statistics among them as well.
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    results["fsdp, bfloat16"] = sharded(torch.float32, half)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(in_process, (port, folder), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", CASES)
def test_sequence_parallel_processes_compute_what_one_does(results: list[Results], case: str) -> None:
    model, token_ids, labels = prepared(case)
    out = model(token_ids, labels=labels)
    out.loss.backward()
    expected = gradients(model)
    for result in results:
        loss, ours, _ = result[case]
        assert torch.allclose(loss, out.loss, atol=1e-12)
        assert all(torch.allclose(ours[name], expected[name], rtol=1e-9, atol=1e-11) for name in expected)
        assert not any(gradient.any() for name, gradient in ours.items() if name not in expected)
    assert torch.allclose(torch.cat([result[case][2] for result in results], dim=1), out.logits, atol=1e-10)


def test_pieces_are_whole_chunks(results: list[Results]) -> None:
    assert torch.equal(torch.cat([result["piece"] for result in results], dim=1), torch.arange(30)[None])
    for result in results:
        assert "25 tokens cannot be split over 3 processes in whole chunks of 5; pad it at its end" in result["refusal"]


@pytest.mark.usefixtures("one_thread")
def test_fsdp2_trains_what_one_process_trains(results: list[Results]) -> None:
    model = make_model().train()
    expected = train(model, random_tokens(PROCESSES, 24))
    losses = torch.tensor([result["fsdp"][0] for result in results], dtype=torch.float64)
    assert torch.allclose(losses.mean(0), torch.tensor(expected, dtype=torch.float64), atol=1e-9)
    for result in results:
        for name, tensor in model.state_dict().items():
            assert torch.allclose(result["fsdp"][1][name], tensor, atol=1e-7), name


@pytest.mark.usefixtures("one_thread")
def test_fsdp2_in_bfloat16_stays_near(results: list[Results]) -> None:
    expected = train(make_model(torch.float32).train(), random_tokens(PROCESSES, 24))
    losses = torch.tensor([result["fsdp, bfloat16"][0] for result in results])
    assert torch.allclose(losses.mean(0), torch.tensor(expected), rtol=0.02)
    assert all(t.dtype == torch.float32 for t in results[0]["fsdp, bfloat16"][1].values())
