"""Fixtures of the tests of serving: engines over the small model of the other tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
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
from support.serving import Client

_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance", "jinja2")
# Without the extra `serve`, the engine's tests alone can be imported.
collect_ignore_glob = [] if all(map(find_spec, _NEEDED)) else ["test_[!es]*.py"]


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


@pytest.fixture(scope="package")
def serve(runtime: Runtime, tokenizer: Tokenizer) -> Iterator[Callable[..., Client]]:
    """Starts servers in this process, each at a port of its own; they end with the tests."""
    from support.serving_http import serving  # needs the extra `serve`

    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(serving(runtime, tokenizer, **options))


@pytest.fixture(scope="package")
def client(serve: Callable[..., Client]) -> Client:
    """A server without keys."""
    return serve()


@pytest.fixture(scope="package")
def small_limits(serve: Callable[..., Client]) -> Client:
    """A server of one stream, a queue of one, and low limits."""
    limits = {"body_bytes": 60_000, "prompt_tokens": 100, "body_seconds": 0.5}
    return serve(streams=1, queue=1, limits=limits)


@pytest.fixture
def expected(alone: Callable[..., list[int]], tokenizer: Tokenizer) -> Callable[..., str]:
    """The text that a session alone writes, which ignores the end of the sequence."""

    def generate(prompt: str, count: int, **sampling: Any) -> str:
        return str(tokenizer.decode(alone(tokenizer.encode(prompt).ids, count, **sampling)))

    return generate
