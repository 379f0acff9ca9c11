"""The C++ library on a GPU: what Python gives there, from captured graphs. Run with `pytest -m cuda`."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import megalodon_export
from megalodon_export import Snapshot
from support import native
from support.native import sh
from support.service import Service

pytestmark = pytest.mark.cuda

PROMPT = [i * 37 % 251 for i in range(77)]
SAMPLINGS: list[dict[str, Any]] = [{}, {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 5}]


@pytest.fixture(scope="module")
def folders(
    checkpoints: dict[str, Path],
    command: Callable[..., subprocess.Popen[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """The tiny checkpoint exported for the GPU, by dtype."""
    root = tmp_path_factory.mktemp("cuda")
    for dtype in ("float32", "bfloat16"):
        options = ("--out", root / dtype, "--device", "cuda", "--dtype", dtype, "--max-batch", 8)
        process = command("aoti", "--checkpoint", checkpoints["tiny"], *options)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    return {dtype: root / dtype for dtype in ("float32", "bfloat16")}


def test_googletest(cpp_build: Path, folders: dict[str, Path]) -> None:
    printed = sh(cpp_build / "tests" / "megalodon_tests", env={"MEGALODON_TEST_BUNDLE": str(folders["float32"])})
    assert "[  PASSED  ]" in printed
    assert "SKIPPED" not in printed


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_seeds_give_equal_tokens(
    library: native.Library, folders: dict[str, Path], dtype: str, sampling: dict[str, Any]
) -> None:
    python = megalodon_export.load(folders[dtype])
    expected = list(python.generate_ids(PROMPT, 300, eos_token_id=-1, **sampling))
    engine = native.Engine(library, folders[dtype])
    for _ in range(2):  # the second one in the memory, and with the graph, of the first
        session = native.Session(engine)
        assert session.generate_ids(PROMPT, 300, eos=-1, **sampling) == expected
        del session


def test_snapshots_go_both_ways(
    library: native.Library, folders: dict[str, Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    session = native.Session(native.Engine(library, folders["float32"]))
    session.generate_ids(PROMPT, 50, eos=-1)
    session.save(tmp_path / "gpu")
    expected = session.generate_ids([], 60, eos=-1)
    python = megalodon_export.load(folders["float32"])
    python.restore(Snapshot.load(tmp_path / "gpu"))
    assert list(python.generate_ids([], 60, eos_token_id=-1)) == expected
    on_cpu = native.Session(native.Engine(library, tiny_bundle))
    on_cpu.restore(tmp_path / "gpu")
    on_cpu.save(tmp_path / "cpu")
    session.restore(tmp_path / "cpu")
    assert session.generate_ids([], 60, eos=-1) == expected


def test_sessions_give_their_memory_back(library: native.Library, folders: dict[str, Path]) -> None:
    engine = native.Engine(library, folders["float32"])
    free = []
    for _ in range(30):
        sessions = [native.Session(engine) for _ in range(5)]
        for session in sessions:
            session.generate_ids(PROMPT, 3, eos=-1)
        del session, sessions
        free.append(torch.cuda.mem_get_info()[0])
    assert free[-1] >= free[5]


def test_the_service(cpp_build: Path, folders: dict[str, Path]) -> None:
    python = megalodon_export.load(folders["float32"])
    expected = list(python.generate_ids(PROMPT, 100, eos_token_id=-1))
    service = Service(cpp_build / "megalodon-service", folders["float32"])
    answer = service.complete(prompt=PROMPT, max_tokens=100, temperature=0, ignore_eos=True)
    assert answer["choices"][0]["token_ids"] == expected
    assert service.terminate() == 0
