"""Fixtures that more than one test module uses."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megalodon_export.bundles import bundle
from megalodon_export.bundles.writing import seal
from megalodon_export.generation.text import byte_tokenizer
from support import native
from support.background import Background, Command, Run, megalodon
from support.golden_data import convert, write_checkpoint
from support.interpreted import MODULES, interpret_kernels
from support.readme import blocks
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
    words = [os.fsdecode(a) if isinstance(a, bytes) else str(a) for a in arguments]
    command = [sys.executable, "-m", "megalodon_export", *words]
    return subprocess.Popen(command, env=environment, preexec_fn=_heed_interrupts, **{**pipes, **options})


def _heed_interrupts() -> None:
    # A test run in the background of a shell script ignores SIGINT, and its children would inherit that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.Popen[str]]:
    """Starts the command line through its real entry point."""
    return start_command


def _names(item: pytest.Item) -> set[str]:
    """The fixtures that a test needs: its arguments, theirs, and those that its parameters name."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return {*getattr(item, "fixturenames", ()), *(value for value in parameters if isinstance(value, str))}


@pytest.fixture(scope="session", autouse=True)
def background(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Background]:
    """Whatever takes long and the selected tests need is under way from the first test on; see JOBS."""
    background = Background()
    needed = set[str]().union(*map(_names, request.session.items))
    for name, (job, fixtures, arguments) in JOBS.items():
        if name in needed:
            values = [request.getfixturevalue(fixture) for fixture in fixtures]
            background.start(name, job, tmp_path_factory.mktemp(name), *values, *arguments)
    yield background
    background.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that need none of JOBS come first, the others in the order in which their jobs end."""
    ends = {name: number for number, name in enumerate(JOBS)}
    modules: dict[Path, int] = {}
    for item in items:
        modules[item.path] = max([ends.get(name, -1) for name in _names(item)] + [modules.get(item.path, -1)])
    items.sort(key=lambda item: modules[item.path])


def _export(run: Run, folder: Path, checkpoints: dict[str, Path], kind: str, name: str, *options: object) -> Path:
    """A checkpoint exported by the command that a user would give."""
    run(megalodon(kind, "--checkpoint", checkpoints[name], "--out", folder / "made", "--max-batch", 8, *options))
    return folder / "made"


def _export_default(run: Run, folder: Path) -> Path:
    """The README's first command; every other one starts with `python`."""
    install, export = blocks("sh")[0].strip().split(" && ")
    assert install == "pip install -e '.[test]'"
    command = [sys.executable, *export.split()[1:], "--device", "cpu"]
    (printed,) = run(Command(command, folder, {"OMP_WAIT_POLICY": "passive"}))
    assert printed.startswith("artifacts/default-aoti-cpu: ")
    assert "programs equal to the eager model" in printed
    return folder


def _build_cpp(run: Run, folder: Path) -> Path:
    if native.missing() is None:
        for command in native.build_commands(folder):
            run(Command(command))
    return folder


CPU = ("--device", "cpu")
INT4 = ("--weight-format", "int4", "--group-size", 4, "--dtype", "bfloat16")
# Fixture -> the function that makes its value, the fixtures and the other arguments that the function takes.
JOBS: dict[str, tuple[Callable[..., Any], tuple[str, ...], tuple[object, ...]]] = {
    "tiny_bundle": (_export, ("checkpoints",), ("aoti", "tiny", *CPU)),
    "tiny_onnx_bundle": (_export, ("checkpoints",), ("onnx", "tiny")),
    "short_chunk_onnx_bundle": (_export, ("checkpoints",), ("onnx", "short-chunk")),
    "int8_bundle": (_export, ("checkpoints",), ("aoti", "tiny", *CPU, "--weight-format", "int8")),
    "workplace": (_export_default, (), ()),
    "short_chunk_bundle": (_export, ("checkpoints",), ("aoti", "short-chunk", *CPU)),
    "int4_bundle": (_export, ("checkpoints",), ("aoti", "tiny", *CPU, *INT4)),
    "cpp_build": (_build_cpp, (), ()),
    "interpreted_kernels": (interpret_kernels, ("wanted_kernels",), ()),
}


@pytest.fixture(scope="session")
def tiny_bundle(background: Background) -> Path:
    """AOTInductor's programs of a model of two layers and chunks of 64 tokens."""
    return background.result("tiny_bundle")


@pytest.fixture(scope="session")
def short_chunk_bundle(background: Background) -> Path:
    """AOTInductor's programs of a model of one layer and chunks of 8 tokens, shorter than a block.

    What needs it is marked slow: the same model runs in eager mode and in ONNX in faster tests.
    """
    return background.result("short_chunk_bundle")


@pytest.fixture(scope="session")
def int8_bundle(background: Background) -> Path:
    """The model of `tiny_bundle` in int8 and float32."""
    return background.result("int8_bundle")


@pytest.fixture(scope="session")
def int4_bundle(background: Background) -> Path:
    """The model of `tiny_bundle` in int4 and bfloat16."""
    return background.result("int4_bundle")


@pytest.fixture(scope="session")
def tiny_onnx_bundle(background: Background) -> Path:
    """ONNX graphs of the model of `tiny_bundle`."""
    return background.result("tiny_onnx_bundle")


@pytest.fixture(scope="session")
def short_chunk_onnx_bundle(background: Background) -> Path:
    """ONNX graphs of the model of `short_chunk_bundle`."""
    return background.result("short_chunk_onnx_bundle")


@pytest.fixture(scope="session")
def both_bundle(tiny_bundle: Path, tiny_onnx_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of `tiny_bundle` and of `tiny_onnx_bundle` over one copy of their weights."""
    folder = tmp_path_factory.mktemp("both") / "bundle"
    shutil.copytree(tiny_onnx_bundle, folder, ignore=shutil.ignore_patterns("parity.json"))
    shutil.copytree(tiny_bundle / "aoti", folder / "aoti")
    onnx = bundle.read(tiny_onnx_bundle).programs.onnx
    assert onnx is not None
    manifest = bundle.read(tiny_bundle)
    seal(folder, manifest.replace(programs=manifest.programs.including("onnx", onnx)))
    return folder


@pytest.fixture(scope="session")
def onnx_bundles(tiny_onnx_bundle: Path, short_chunk_onnx_bundle: Path) -> dict[str, Path]:
    """ONNX graphs of every checkpoint of CHECKPOINTS."""
    return {"tiny": tiny_onnx_bundle, "short-chunk": short_chunk_onnx_bundle}


@pytest.fixture(scope="session")
def wanted_kernels(request: pytest.FixtureRequest) -> dict[str, list[str]]:
    """What the selected tests of interpreted kernels look at: values by parameter, see support/interpreted.py."""
    wanted: dict[str, dict[str, None]] = {}
    for item in request.session.items:
        if "interpreted_kernels" in _names(item):
            for parameter in MODULES.keys() & item.callspec.params.keys():
                wanted.setdefault(parameter, {})[item.callspec.params[parameter]] = None
    return {parameter: list(values) for parameter, values in wanted.items()}


@pytest.fixture(scope="session")
def interpreted_kernels(background: Background) -> dict[str, list[float]]:
    """What the kernels' cases, operations and samples found, by name."""
    return background.result("interpreted_kernels")


@pytest.fixture(scope="session")
def workplace(background: Background) -> Path:
    """A folder in which the README's first command has run."""
    return background.result("workplace")


@pytest.fixture(scope="session")
def default_bundle(workplace: Path) -> Path:
    """The default checkpoint, exported."""
    return workplace / "artifacts" / "default-aoti-cpu"


@pytest.fixture(scope="session")
def cpp_build(background: Background) -> Path:
    """The C++ library, its tests, its command line and the service, built."""
    if lacking := native.missing():
        pytest.skip(f"the C++ library cannot be built here: install {lacking}")
    return background.result("cpp_build")


@pytest.fixture(scope="session")
def library(cpp_build: Path) -> native.Library:
    """The C++ library, loaded."""
    return native.Library(cpp_build / "libmegalodon.so")
