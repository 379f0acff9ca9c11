"""Fixtures of the tests of sessions."""

from __future__ import annotations

from pathlib import Path

import pytest

import megalodon_export
from megalodon_export import Session


@pytest.fixture(scope="package")
def loaded(tiny_bundle: Path) -> dict[str, Session]:
    """The tiny bundle in both of its runtimes. Tests make sessions of their own on these."""
    return {name: megalodon_export.load(tiny_bundle, runtime=name, device="cpu") for name in ("eager", "aoti")}


@pytest.fixture(scope="package")
def opened(loaded: dict[str, Session], tiny_onnx_bundle: Path) -> dict[str, Session]:
    """The tiny model in all three runtimes."""
    return {**loaded, "onnx": megalodon_export.load(tiny_onnx_bundle, device="cpu")}
