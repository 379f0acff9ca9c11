"""The machine that compiled programs need: kind of device, GPU architecture, CPU instruction sets.

target("cpu", portable=True) -> Target(device="cpu", architecture="x86_64", cpu_features=("avx", "avx2", ...))
target("cuda", False)        -> Target(device="cuda", architecture="sm_90")
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from .manifest_types import Target

PORTABLE_FEATURES = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "popcnt", "sse4_1", "sse4_2", "ssse3")
_FEATURE_PREFIXES = (*("avx", "amx", "bmi", "f16c", "fma", "movbe", "popcnt", "sse", "ssse3"), "asimd", "sve", "bf16")


def target(device: str, portable: bool) -> Target:
    """The needs of programs compiled here: device kind, and CPU features or GPU architecture."""
    if torch.device(device).type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return Target("cuda", f"sm_{major}{minor}")
    features = sorted(set(cpu_features()) & set(PORTABLE_FEATURES)) if portable else cpu_features()
    return Target("cpu", platform.machine(), tuple(features))


def cpu_features() -> list[str]:
    """Instruction-set extensions of this CPU that a compiler may use (`-march=native`); empty where unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return sorted(flag for flag in flags if flag.startswith(_FEATURE_PREFIXES))
