"""Servers in the process of the tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer

from megalodon_export.runtimes import Runtime
from megalodon_export.serving.app import make_app
from megalodon_export.serving.engine import Engine, EngineOptions
from megalodon_export.serving.keys import Keys
from megalodon_export.serving.metrics import Metrics
from megalodon_export.serving.response_store import ResponseStore
from megalodon_export.serving.service import Service, ServiceLimits
from support.serving import TIMEOUT, Client

ORIGIN = "https://page.example"  # a page that may send requests


@contextmanager
def serving(
    runtime: Runtime,
    tokenizer: Tokenizer,
    keys: Sequence[str] = (),
    responses: ResponseStore | None = None,
    limits: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[Client]:
    """A server of the model "small", with the options of its engine."""
    metrics = Metrics("small")
    engine = Engine(runtime, tokenizer, EngineOptions(**{"streams": 8, **options}), metrics)
    stored = ResponseStore() if responses is None else responses
    service = Service(engine, tokenizer, "small", limits=ServiceLimits(**limits or {}), responses=stored)
    metrics.watch(engine, stored)
    try:
        with listening(make_app(service, metrics, Keys(keys), [ORIGIN])) as client:
            yield client
    finally:
        engine.close()


@contextmanager
def listening(app: FastAPI) -> Iterator[Client]:
    """A server of an application, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Client(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(TIMEOUT)
