"""The engine on a GPU: captured steps of every batch size, and states that move between the GPU, the host and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megalodon_export import Session
from megalodon_export.bundles.checkpoints import load_model
from megalodon_export.exporters.programs import Limits
from megalodon_export.runtimes import Runtime
from megalodon_export.runtimes.eager import ModelRuntime
from megalodon_export.serving.engine import Engine
from megalodon_export.serving.state_store import StateStore
from megalodon_export.serving.streams import LogitRules
from support.serving import Reader, answers, request

pytestmark = pytest.mark.cuda
SAMPLING: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.8, "top_k": 20, "seed": 4}]
PROMPTS = [[1], [*range(64)], [*range(150)], [7] * 65]


@pytest.fixture(scope="module")
def on_gpu(checkpoints: dict[str, Path]) -> Runtime:
    model = load_model(checkpoints["tiny"], torch.float32, "cuda")
    return ModelRuntime(model, Limits.of(model.config, max_batch=8), "the small model")


def alone(runtime: Runtime, prompt: list[int], count: int, **sampling: Any) -> list[int]:
    return list(Session(runtime).generate_ids(prompt, count, -1, **sampling))


def test_streams_on_a_gpu_are_sessions(engine: Callable[..., Engine], on_gpu: Runtime) -> None:
    one = engine(on_gpu, streams=8)
    cases = [(p, 5 + 9 * i % 40, s) for i, (p, s) in enumerate((p, s) for p in PROMPTS for s in SAMPLING)]
    for _ in range(2):  # the second time with hits
        readers = [Reader(one, request(prompt, count, **sampling)) for prompt, count, sampling in cases]
        for reader, (prompt, count, sampling) in zip(readers, cases, strict=True):
            (answer,) = reader.wait()
            assert answer.ids == alone(on_gpu, prompt, count, **sampling), answer.error


def test_states_move_between_the_gpu_the_host_and_files(
    engine: Callable[..., Engine], on_gpu: Runtime, tmp_path: Path
) -> None:
    store = StateStore(on_gpu.config, on_gpu.device, 60_000, 60_000, tmp_path, 10**8)
    one = engine(on_gpu, store=store)
    prompts = [[i, *range(100)] for i in range(8)]
    for prompt in prompts:
        answers(one, prompt, 4)
    assert all(store.used)
    for prompt in prompts:
        (answer,) = answers(one, [*prompt, 5], 6)
        assert answer.cached_tokens == len(prompt)
        assert answer.ids == alone(on_gpu, [*prompt, 5], 6)


def test_rules_and_logprobs_on_a_gpu(engine: Callable[..., Engine], on_gpu: Runtime) -> None:
    one = engine(on_gpu)
    rules = [LogitRules(), LogitRules(bias={65: 1000.0}), LogitRules(presence_penalty=1000.0)]
    readers = [Reader(one, request([*b"same"], 20, rules=rule, logprobs=2)) for rule in rules]
    plain, forced, distinct = (reader.wait()[0] for reader in readers)
    assert plain.ids == alone(on_gpu, [*b"same"], 20)
    assert forced.ids == [65] * 20
    assert len({*distinct.ids}) == 20
    assert all(token.logprob == token.top[0][1] for token in plain.tokens)
