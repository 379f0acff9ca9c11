"""Versions of what made a bundle, or a measurement."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "onnx",
    "onnxruntime-gpu",
    "onnxruntime",
    "triton",
    "torchao",
)


def versions() -> dict[str, str]:
    """Versions by name: this package, Python, the installed packages that matter, and CUDA where torch has it."""
    found = {"megalodon-export": version("megalodon-export"), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["torch"] = str(torch.__version__)  # with the suffix of the build, which the package's version lacks
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found
