"""Fixtures of the tests of serving: engines over the small model of the other tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import megalodon_export
from megalodon_export import Session
from megalodon_export.bundles.checkpoints import load_model
from megalodon_export.exporters.programs import Limits
from megalodon_export.runtimes import Runtime
from megalodon_export.runtimes.eager import ModelRuntime
from megalodon_export.serving.engine import Engine, EngineOptions


@pytest.fixture(scope="package")
def runtime(checkpoints: dict[str, Path]) -> Runtime:
    """The small model of two layers and chunks of 64 tokens, in eager mode."""
    model = load_model(checkpoints["tiny"])
    return ModelRuntime(model, Limits.of(model.config, max_batch=8), "the small model")


@pytest.fixture(scope="package")
def tokenizer(checkpoints: dict[str, Path]) -> Tokenizer:
    return Tokenizer.from_file(str(checkpoints["tiny"] / "tokenizer.json"))


@pytest.fixture
def engine(runtime: Runtime, tokenizer: Tokenizer, one_thread: None) -> Iterator[Callable[..., Engine]]:
    """Makes engines, which end with the test."""
    made: list[Engine] = []

    def make(runtime: Runtime = runtime, store: Any = None, observer: Any = None, **options: Any) -> Engine:
        made.append(Engine(runtime, tokenizer, EngineOptions(**{"streams": 8, **options}), observer, store))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def alone(runtime: Runtime, tokenizer: Tokenizer, one_thread: None) -> Callable[..., list[int]]:
    """The tokens of a session of its own."""

    def generate(prompt: list[int], count: int, eos: int = -1, **sampling: Any) -> list[int]:
        return list(Session(runtime, tokenizer).generate_ids(prompt, count, eos, **sampling))

    return generate


@pytest.fixture(scope="package")
def opened(tiny_bundle: Path, tiny_onnx_bundle: Path) -> dict[str, Session]:
    """Sessions on the exported bundles."""
    return {
        "aoti": megalodon_export.load(tiny_bundle, device="cpu"),
        "onnx": megalodon_export.load(tiny_onnx_bundle, device="cpu"),
    }
