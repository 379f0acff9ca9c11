"""Compiles kernels for sm_90, which takes no GPU, with a float64 eps; prints how many float64 instructions each has.

Conversions to and from float64 do not count.
"""

from __future__ import annotations

import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megalodon_export.model.kernels import decode, norms, ring

KERNELS: list[tuple[Any, dict[str, Any]]] = [
    (
        decode.megalodon_feed_up,
        {"F": 512, "D": 256, "WIDTH": 256, "BITS": 0, "GROUP": 0, "ROWS": 2, "AFFINE": True, "BIAS": True}
        | {"SWIGLU": True, "PDL": True},
    ),
    (
        ring.megalodon_attend,
        {"H": 1, "C": 64, "HALF": 32, "HALF_P": 32, "DV": 64, "DV_BLOCK": 64, "SLOTS": 16, "PDL": True},
    ),
    (norms.megalodon_rms, {"D": 256, "D_P": 256, "AFFINE": True, "PDL": True}),
    (norms.megalodon_layer_norm, {"D": 256, "D_P": 256, "SUM": True, "AFFINE": True, "PDL": True}),
]
INTEGERS = ("position_ptr", "lengths_ptr")


def signature(function: Any, constants: dict[str, Any]) -> dict[str, str]:
    """Types of a kernel's arguments."""

    def of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return "*i64" if name in INTEGERS else "*fp32"
        return "fp64" if name == "eps" else "i32"

    return {name: of(name) for name in function.arg_names}


if __name__ == "__main__":
    for function, constants in KERNELS:
        fixed = {(function.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(function, signature(function, constants), fixed)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        arithmetic = re.findall(r"^\s+(?!cvt|ld|mov)\w[\w.]*\.f64", compiled.asm["ptx"], re.MULTILINE)
        print(function.__name__, len(arithmetic))
