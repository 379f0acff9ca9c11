"""Fixtures that more than one test module uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from golden_data import convert, write_checkpoint


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
