"""Fixtures that more than one test module uses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megalodon_export.export.onnx import export_onnx
from megalodon_export.generation.text import byte_tokenizer
from support import native
from support.golden_data import convert, write_checkpoint
from support.readme import blocks, run
from support.small_models import make_model

BYTES: dict[str, Any] = {
    **{"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256, "model_dim": 32, "num_heads": 2, "z_dim": 16},
    **{"value_dim": 24, "ffn_hidden_dim": 48, "cema_ndim": 4, "norm_num_groups": 4},
}
# The two forms of prefill: calls of up to one chunk, and calls of many short chunks.
CHECKPOINTS = {"tiny": {"num_layers": 2, "chunk_size": 64}, "short-chunk": {"num_layers": 1, "chunk_size": 8}}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One intra-op thread: the models of the tests are too small to share among more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The converted folder of a golden file, made once."""
    root = tmp_path_factory.mktemp("converted")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            convert(name)(write_checkpoint(name, root / "source" / name), root / name)
        return root / name

    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of small random models over bytes, by the names of CHECKPOINTS."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, sizes in CHECKPOINTS.items():
        make_model(torch.float32, **BYTES, **sizes).save_pretrained(root / name)
        byte_tokenizer().save(str(root / name / "tokenizer.json"))
    return {name: root / name for name in CHECKPOINTS}


def start_command(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """`python -m megalodon_export ARGUMENTS`, on one thread, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", **options.pop("env", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    command = [sys.executable, "-m", "megalodon_export", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, preexec_fn=_heed_interrupts, **{**pipes, **options})


def _heed_interrupts() -> None:
    # A test run in the background of a shell script ignores SIGINT, and its children would inherit that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.Popen[str]]:
    """Starts the command line through its real entry point."""
    return start_command


@pytest.fixture(scope="session")
def bundles(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every checkpoint of CHECKPOINTS exported, side by side, by the command a user would give."""
    root = tmp_path_factory.mktemp("bundles")
    exports = {
        name: start_command("aoti", "--checkpoint", path, "--out", root / name, "--device", "cpu", "--max-batch", 8)
        for name, path in checkpoints.items()
    }
    for name, process in exports.items():
        _, errors = process.communicate()
        assert process.returncode == 0, f"{name}: {errors}"
    return {name: root / name for name in exports}


@pytest.fixture(scope="session")
def tiny_bundle(bundles: dict[str, Path]) -> Path:
    """Two layers, chunks of 64 tokens."""
    return bundles["tiny"]


@pytest.fixture(scope="session")
def short_chunk_bundle(bundles: dict[str, Path]) -> Path:
    """One layer, chunks of 8 tokens: shorter than a block."""
    return bundles["short-chunk"]


@pytest.fixture(scope="session")
def onnx_bundles(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every checkpoint of CHECKPOINTS exported to ONNX."""
    root = tmp_path_factory.mktemp("onnx-bundles")
    for name, path in checkpoints.items():
        export_onnx(path, root / name, max_batch=8)
    return {name: root / name for name in checkpoints}


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's first command has run; every other one starts with `python`."""
    folder = tmp_path_factory.mktemp("readme")
    install, export = blocks("sh")[0].strip().split(" && ")
    assert install == "pip install -e '.[test]'"
    printed = run([sys.executable, *export.split()[1:], "--device", "cpu"], folder)
    assert printed.startswith("artifacts/default-aoti-cpu: ")
    assert "programs equal to the eager model" in printed
    return folder


@pytest.fixture(scope="session")
def default_bundle(workplace: Path) -> Path:
    """The default checkpoint, exported."""
    return workplace / "artifacts" / "default-aoti-cpu"


@pytest.fixture(scope="session")
def cpp_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ library, its tests, its command line and the service, built."""
    if lacking := native.missing():
        pytest.skip(f"the C++ library cannot be built here: install {lacking}")
    folder = tmp_path_factory.mktemp("cpp")
    native.build(folder)
    return folder


@pytest.fixture(scope="session")
def library(cpp_build: Path) -> native.Library:
    """The C++ library, loaded."""
    return native.Library(cpp_build / "libmegalodon.so")
