"""Compiles kernels for sm_90, which needs no GPU, and prints how often each has instructions that it should not have.

python kernel_types.py float64    arithmetic in float64 where eps or scale is float64; conversions do not count
python kernel_types.py narrow     loads of single numbers of 16 bits, from aligned tensors in bfloat16
"""

from __future__ import annotations

import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megalodon_export.model.kernels import layer_norm
from megalodon_export.model.kernels.decode import attention as decode_attention
from megalodon_export.model.kernels.decode import embedding, final_norm, up_projection
from megalodon_export.model.kernels.prefill import attention, norms

ATTENTION = {"H": 1, "C": 64, "QUERIES": 64, "KEYS": 64, "TILES": 2, "PDL": True}
# count -> its instructions in PTX, the dtypes of tensors and of eps and scale, kernels with their constants
COUNTS: dict[str, tuple[str, str, str, list[tuple[Any, dict[str, Any]]]]] = {
    "float64": (
        r"^\s+(?!cvt|ld|mov)\w[\w.]*\.f64",
        "*fp32",
        "fp64",
        [
            (
                up_projection.megalodon_up_projection_gemv,
                {"F": 512, "D": 256, "WIDTH": 256, "BITS": 0, "GROUP": 0, "FEATURES": 2, "AFFINE": True, "BIAS": True}
                | {"SWIGLU": True, "PDL": True},
            ),
            (
                decode_attention.megalodon_attend,
                {"H": 1, "C": 64, "HALF": 32, "HALF_P": 32, "DV": 64, "DV_BLOCK": 64, "SLOTS": 16, "PDL": True},
            ),
            (norms.megalodon_rms_norm, {"D": 256, "D_P": 256, "AFFINE": True, "PDL": True}),
            (layer_norm.megalodon_layer_norm, {"D": 256, "D_P": 256, "SUM": True, "AFFINE": True, "PDL": True}),
            (
                embedding.megalodon_embed_tokens,
                {"V": 512, "D": 256, "D_P": 256, "C": 64, "HALF": 32, "HALF_P": 32, "PDL": True},
            ),
            (
                final_norm.megalodon_final_norm,
                {"G": 8, "G_P": 8, "GROUP": 32, "GROUP_P": 32, "HF": True, "PDL": True},
            ),
        ],
    ),
    "narrow": (
        r"ld\.global[\w.:]*\.b16",
        "*bf16",
        "fp32",
        [
            (attention.megalodon_pv_matmul, {**ATTENTION, "DV": 256, "DV_BLOCK": 128, "STAGES": 3, "IEEE": False}),
            (attention.megalodon_scores, {**ATTENTION, "DZ": 64, "DZ_P": 64, "IEEE": False}),
            (attention.megalodon_softmax, {**ATTENTION, "ROWS": 16, "GROUP": 2, "TILES_P": 2}),
            (
                attention.megalodon_store_ring,
                {"H": 1, "C": 64, "DZ": 256, "DZ_P": 256, "DV": 2048, "BLOCK": 2048, "PDL": True},
            ),
        ],
    ),
}
OTHERS = dict.fromkeys(("token_ptr", "position_ptr", "lengths_ptr"), "*i64")
OTHERS |= dict.fromkeys(("row_max_ptr", "row_sumexp_ptr"), "*fp32")


def compiled(function: Any, constants: dict[str, Any], tensors: str, eps: str) -> str:
    """A kernel's PTX."""

    def of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return OTHERS.get(name, tensors)
        return eps if name in ("eps", "scale") else "i32"

    signature = {name: of(name) for name in function.arg_names}
    place = {name: (function.arg_names.index(name),) for name in signature}
    fixed = {place[name]: value for name, value in constants.items()}
    aligned = {place[name]: [["tt.divisibility", 16]] for name, kind in signature.items() if kind.startswith("*")}
    source = ASTSource(function, signature, fixed, aligned)
    ptx: str = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    return ptx


if __name__ == "__main__":
    instructions, tensors, eps, kernels = COUNTS[sys.argv[1]]
    for function, constants in kernels:
        found = re.findall(instructions, compiled(function, constants, tensors, eps), re.MULTILINE)
        print(function.__name__, len(found))
