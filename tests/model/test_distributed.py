"""Sequence parallelism and FSDP2 over real processes: the numbers of one process that has everything.

On a CPU through gloo, on GPUs through NCCL. Starting processes takes most of the time: they are started once, as copies
of one that has imported everything, and run every case.
"""

from __future__ import annotations

import multiprocessing
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import megalodon_export.model as m
from megalodon_export.model.distributed.sequence_parallel import piece_of
from support.small_models import make_model, random_tokens

STEPS = 3
Results = dict[str, Any]


@dataclass(frozen=True)
class World:
    """What the processes are."""

    backend: str
    device: str
    size: int


WORLDS = [
    pytest.param(World("gloo", "cpu", 3), id="gloo", marks=pytest.mark.slow),  # it takes 20 s to start them
    pytest.param(World("nccl", "cuda", 2), id="nccl", marks=pytest.mark.cuda),
]

# Frozen: nothing of the first layer's EMA and norm takes gradients, so none comes back for their states.
CASES: dict[str, dict[str, Any]] = {
    "blocked": {},
    "fft, tied, checkpointing": {"ema_prefill": "fft", "share_emb": True, "chunk_size": 20},
    "megalodon-hf, frozen": {"norm_statistics": "megalodon-hf", "projection_bias": True, "num_layers": 3},
}


def prepared(case: str, device: str) -> tuple[m.MegalodonForCausalLM, Tensor, Tensor]:
    """The model of a case, token ids and labels."""
    model = make_model(**CASES[case]).to(device).train()
    if "frozen" in case:
        for module in (model.model.embed, model.model.layers[0].attn.timenorm, model.model.layers[0].attn.cema):
            module.requires_grad_(False)
    token_ids = random_tokens(2, 120)
    labels = token_ids.index_fill(1, torch.arange(30, 50), -100)
    return model, token_ids.to(device), labels.to(device)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Those that there are."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def parallel_case(case: str, device: str) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, summed gradients, and this process's logits."""
    model, token_ids, labels = prepared(case, device)
    if "checkpointing" in case:
        model.gradient_checkpointing_enable()
    loss = m.parallel_loss(model, token_ids, labels)
    loss.backward()
    m.sum_gradients(model)
    with torch.no_grad():
        return loss.detach(), gradients(model), m.parallel_logits(model.eval(), token_ids)


def refusal(device: str) -> str:
    """What is said of a length that does not fit."""
    try:
        m.parallel_logits(make_model().to(device), random_tokens(1, 25).to(device))
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


def sharded(world: World, dtype: torch.dtype, policy: MixedPrecisionPolicy) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of this process's row under FSDP2, and the whole weights afterwards."""
    model = make_model(dtype).to(world.device).train()
    mesh = init_device_mesh(world.device, (world.size,))  # FSDP's own choice is a GPU wherever there is one
    for layer in model.model.layers:
        fully_shard(layer.attn.cema, mesh=mesh)  # a unit of its own, in float32 whatever the policy of the others
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    losses = train(model, rows(world)[dist.get_rank()][None])
    return losses, {name: t.full_tensor() for name, t in model.state_dict().items()}


def rows(world: World) -> Tensor:
    """Token ids, a row for every process."""
    return random_tokens(world.size, 24).to(world.device)


def in_process(rank: int, world: World, port: int, folder: Path) -> None:
    """Everything that one process runs; its results go to a file."""
    torch.set_num_threads(1)
    if world.device == "cuda":
        torch.cuda.set_device(rank)
    store = f"tcp://127.0.0.1:{port}"
    timeout = timedelta(seconds=120)
    dist.init_process_group(world.backend, init_method=store, rank=rank, world_size=world.size, timeout=timeout)
    results: Results = {case: parallel_case(case, world.device) for case in CASES}
    results["refusal"] = refusal(world.device)
    results["piece"] = piece_of(torch.arange(30)[None], 5)
    results["fsdp"] = sharded(world, torch.float64, MixedPrecisionPolicy())
    # Forward inputs as they are: FSDP would cast the positions and statistics among them as well.
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    results["fsdp, bfloat16"] = sharded(world, torch.float32, half)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=WORLDS)
def world(request: pytest.FixtureRequest) -> World:
    """gloo, or NCCL where every process has a GPU."""
    world: World = request.param
    if world.device == "cuda" and torch.cuda.device_count() < world.size:
        pytest.skip(f"NCCL wants a GPU for each of {world.size} processes, and there are {torch.cuda.device_count()}")
    return world


@pytest.fixture(scope="module")
def results(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["megalodon_export.model", "torch.distributed.fsdp", "pytest"]
    )
    start = torch.multiprocessing.start_processes
    start(in_process, (world, port, folder), nprocs=world.size, start_method="forkserver")
    files = (folder / f"{rank}.pt" for rank in range(world.size))
    return [torch.load(file, weights_only=True, map_location=world.device) for file in files]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", CASES)
def test_sequence_parallel_processes_compute_what_one_does(world: World, results: list[Results], case: str) -> None:
    model, token_ids, labels = prepared(case, world.device)
    out = model(token_ids, labels=labels)
    out.loss.backward()
    expected = gradients(model)
    for result in results:
        loss, ours, _ = result[case]
        assert torch.allclose(loss, out.loss, atol=1e-12)
        assert all(torch.allclose(ours[name], expected[name], rtol=1e-9, atol=1e-11) for name in expected)
        assert not any(gradient.any() for name, gradient in ours.items() if name not in expected)
    assert torch.allclose(torch.cat([result[case][2] for result in results], dim=1), out.logits, atol=1e-10)


def test_pieces_are_whole_chunks(world: World, results: list[Results]) -> None:
    assert torch.equal(torch.cat([result["piece"] for result in results], dim=1).cpu(), torch.arange(30)[None])
    wrong = f"25 tokens cannot be split over {world.size} processes in whole chunks of 5; pad it at its end"
    assert all(wrong in result["refusal"] for result in results)


@pytest.mark.usefixtures("one_thread")
def test_fsdp2_trains_what_one_process_trains(world: World, results: list[Results]) -> None:
    model = make_model().to(world.device).train()
    expected = train(model, rows(world))
    losses = torch.tensor([result["fsdp"][0] for result in results], dtype=torch.float64)
    assert torch.allclose(losses.mean(0), torch.tensor(expected, dtype=torch.float64), atol=1e-9)
    for result in results:
        for name, tensor in model.state_dict().items():
            assert torch.allclose(result["fsdp"][1][name], tensor, atol=1e-7), name


@pytest.mark.usefixtures("one_thread")
def test_fsdp2_in_bfloat16_stays_near(world: World, results: list[Results]) -> None:
    expected = train(make_model(torch.float32).to(world.device).train(), rows(world))
    losses = torch.tensor([result["fsdp, bfloat16"][0] for result in results])
    assert torch.allclose(losses.mean(0), torch.tensor(expected), rtol=0.02)
    assert all(t.dtype == torch.float32 for t in results[0]["fsdp, bfloat16"][1].values())
