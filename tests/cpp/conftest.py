"""Fixtures of the tests of the C++ library and its service."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from support import native
from support.service import Service

LIMITS = {"--max-new-tokens": 1_000_000, "--max-prompt-tokens": 1000, "--max-body-bytes": 20_000, "--streams": 8}


@pytest.fixture(scope="module")
def engine(library: native.Library, tiny_bundle: Path) -> native.Engine:
    """The tiny bundle, opened by the C++ library."""
    return native.Engine(library, tiny_bundle)


@pytest.fixture(scope="module")
def start(cpp_build: Path, tiny_bundle: Path) -> Iterator[Callable[..., Service]]:
    """Starts services; all end with status 0."""
    with ExitStack() as stack:

        def one(*options: object, bundle: Path = tiny_bundle, **environment: str) -> Service:
            service = Service(cpp_build / "megalodon-service", bundle, *options, **environment)
            stack.callback(service.process.kill)
            return service

        yield one


@pytest.fixture(scope="module")
def service(start: Callable[..., Service]) -> Iterator[Service]:
    """One service for all tests that leave it as it was; at the end no session is left."""
    one = start(*(part for option in LIMITS.items() for part in option), "--prefill-tokens", 100)
    yield one
    one.await_value("megalodon_sessions", 0)
    assert one.terminate() == 0


@pytest.fixture(scope="session")
def nan_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in which token 200 makes the logits of its stream NaN."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("nan") / "bundle"))
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:start])["model.embed.weight"]
    row = start + entry["data_offsets"][0] + 200 * 4 * entry["shape"][1]
    data[row : row + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    return folder
