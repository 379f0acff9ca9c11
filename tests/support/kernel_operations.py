"""Every operator of the kernels against its reference in plain PyTorch, on random tensors.

    export PYTHONPATH=tests
    TRITON_INTERPRET=1 python -m support.kernel_operations [OPERATION ...]      prints each largest difference
    python -m support.kernel_operations --cuda [OPERATION ...]

A difference is relative to the largest number of a tensor, and counts results and tensors that change in place. Where
an operator's name says so, its results are rounded to bfloat16.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from megalodon_export.model.plan import SEGMENT
from megalodon_export.model.quantized import pack
from support.kernel_cases import interpret

B, L, D, Z, E, F, H, C, N, G, V, EPS = 3, 5, 24, 16, 32, 40, 2, 8, 3, 4, 50, 1e-5
_generator = torch.Generator()


def random(*shape: int) -> Tensor:
    """Normally distributed float32."""
    return torch.randn(*shape, generator=_generator)


def integers(*values: int) -> Tensor:
    """int64, such as lengths and positions."""
    return torch.tensor(values)


def layer(
    features: int, columns: int, weights: str = "float", group: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weight as stored, scales and bias of a linear layer; int4 in groups of so many columns."""
    bias = random(features).to(dtype)
    if weights == "float":
        return random(features, columns).to(dtype), None, bias
    groups, limit = (1, 128) if weights == "int8" else (columns // group, 8)
    values = torch.randint(-limit, limit, (features, columns), generator=_generator)
    return values.to(torch.int8) if weights == "int8" else pack(values), random(features, groups).abs() / limit, bias


def norm_states(batch: int) -> tuple[Tensor, Tensor]:
    """Running mean and variance of a TimestepNorm."""
    return random(batch, G), random(batch, G).abs() + 0.1


def embed_tokens() -> tuple[Any, ...]:
    """Known and unknown tokens."""
    return integers(0, V - 1, -1), integers(0, 7, 21), random(V, D), random(C, 4), random(C, 4), 1.5


def ema_step(hf_statistics: bool = False) -> tuple[Any, ...]:
    """Rows at several positions."""
    states = *norm_states(B), random(B, D, N, 2)
    constants = random(D, N), random(D, N, 2), random(D, N, 2), random(D)
    return random(B, D), integers(0, 7, 21), *states, random(D), random(D), *constants, random(D), EPS, hf_statistics


def project(batch: int, weights: str = "float") -> tuple[Any, ...]:
    """After `ema_step`."""
    layers = [t for features in (Z, E, D, E) for t in layer(features, D, weights)]
    inputs = random(batch, D), random(batch, D), random(batch, 4).abs(), torch.arange(batch) * 7
    return *inputs, *layers, random(batch, H, C, E // H), EPS


def attend() -> tuple[Any, ...]:
    """Slots at the start, in the middle and at the end of a chunk."""
    rings = random(B, H, C, Z // H), random(B, H, C, E // H)
    angles = random(B, Z // H // 2), random(B, Z // H // 2)
    return random(B, Z), random(B, E), random(2, Z), random(2, Z), integers(0, 15, 21), *angles, *rings, EPS


def linear(batch: int, weights: str = "float") -> tuple[Any, ...]:
    """With everything that may be added."""
    return random(batch, D), *layer(F, D, weights), random(F), random(batch, F), random(batch, F), torch.float32


def up_projection(batch: int, weights: str = "float") -> tuple[Any, ...]:
    """With SwiGLU."""
    return random(batch, D), random(D), random(D), *layer(F, D, weights), *layer(F, D, weights), EPS, torch.float32


def linear_bfloat16(batch: int, weights: str, features: int, columns: int, group: int = 32) -> tuple[Any, ...]:
    """x in bfloat16, whose weights go straight into the registers of tensor cores; the result stays in float32."""
    alpha, first, second = random(features), random(batch, features), random(batch, features)
    x, layers = random(batch, columns).bfloat16(), layer(features, columns, weights, group, torch.bfloat16)
    return x, *layers, alpha, first, second, torch.float32


def project_bfloat16(batch: int, weights: str) -> tuple[Any, ...]:
    """`project` likewise; r and v are rounded to bfloat16."""
    layers = [t for features in (Z, E, 64, E) for t in layer(features, 64, weights, 16, torch.bfloat16)]
    inputs = random(batch, 64).bfloat16(), random(batch, 64).bfloat16(), random(batch, 4).abs() * 64
    return *inputs, torch.arange(batch) * 7, *layers, random(batch, H, C, E // H).bfloat16(), EPS


def up_projection_bfloat16(batch: int, weights: str) -> tuple[Any, ...]:
    """`up_projection` likewise, with SwiGLU; the norm's result and the hidden layer are rounded to bfloat16."""
    layers = [t for _ in range(2) for t in layer(F, 64, weights, 32, torch.bfloat16)]
    return random(batch, 64), random(64).bfloat16(), random(64).bfloat16(), *layers, EPS, torch.bfloat16


def final_norm(hf_statistics: bool = False) -> tuple[Any, ...]:
    """Rows at several positions."""
    return random(B, D), integers(0, 7, 21), *norm_states(B), random(D), random(D), EPS, hf_statistics


def argmax() -> tuple[Any, ...]:
    """Each logit error, and equal logits."""
    logits = random(6, V)
    logits[1, 3:5], logits[2, 4], logits[3], logits[4], logits[5, 7:9] = 9.0, torch.inf, -torch.inf, 0.0, torch.nan
    return logits, torch.full((2, 6), 77)


def timestep_norm(hf_statistics: bool = False) -> tuple[Any, ...]:
    """More tokens than a segment, ragged rows, one of them empty."""
    length = SEGMENT + L
    lengths = integers(length, 0, 2)
    return random(B, length, D), lengths, integers(0, 7, 21), *norm_states(B), random(D), random(D), EPS, hf_statistics


def ema_scan() -> tuple[Any, ...]:
    """More tokens than a segment, ragged rows, one of them empty; q^S belongs to q."""
    q = torch.polar(0.5 + random(N, D).sigmoid() / 2, random(N, D))
    coefficients = [random(N, D).sigmoid(), q.real, q.imag, random(N, D), random(N, D)]
    coefficients += [(q**SEGMENT).real, (q**SEGMENT).imag]
    x, lengths = random(B, SEGMENT + L, D), integers(SEGMENT + L, 0, 2)
    return x, lengths, random(B, D, N, 2), torch.stack(coefficients), random(D), random(D), EPS


def attend_chunks() -> tuple[Any, ...]:
    """Calls that start at and inside a chunk, and reach into the next ones; an empty row."""
    rings = random(B, H, C, Z // H), random(B, H, C, E // H)
    angles = random(B, 2 * C, Z // H // 2), random(B, 2 * C, Z // H // 2)
    inputs = random(B, 2 * C, Z), random(B, 2 * C, E), random(B, 2 * C, E), random(2, Z), random(2, Z)
    return *inputs, integers(2 * C, 0, C - 1), integers(0, 7, 21), *angles, *rings, EPS


def sum_norm() -> tuple[Any, ...]:
    """With scale and shift."""
    return random(B, L, D), random(B, L, D), random(B, L, D), random(D), random(D), EPS


# name of an operator -> its module in model/kernels, and its arguments, by case
OPERATIONS: dict[str, tuple[str, list[Callable[[], tuple[Any, ...]]]]] = {
    "embed_tokens": ("decode.embedding", [embed_tokens]),
    "ema_step": ("decode.ema", [ema_step, partial(ema_step, True)]),
    "project": ("decode.projections", [partial(project, 3, "int4"), partial(project, 5)]),
    "attend": ("decode.attention", [attend]),
    "linear": (
        "decode.linear",
        [partial(linear, b, w) for b in (3, 5) for w in ("float", "int8", "int4")]
        + [partial(linear_bfloat16, b, w, 40, 96, 16) for b in (1, 2, 9, 17, 40) for w in ("float", "int8", "int4")]
        + [partial(linear_bfloat16, b, w, 48, 320) for b in (8, 33) for w in ("float", "int8", "int4")]
        + [partial(linear_bfloat16, 3, "int4", 16, 512, 128), partial(linear_bfloat16, 3, "float", 20, 100)],
    ),
    "up_projection": ("decode.up_projection", [partial(up_projection, 3), partial(up_projection, 5, "int8")]),
    "project in bfloat16": (
        "decode.projections",
        [partial(project_bfloat16, b, w) for b, w in ((2, "float"), (9, "int4"), (17, "int8"))],
    ),
    "up_projection in bfloat16": (
        "decode.up_projection",
        [partial(up_projection_bfloat16, b, w) for b, w in ((9, "float"), (1, "int8"), (2, "int4"))],
    ),
    "final_norm": ("decode.final_norm", [final_norm, partial(final_norm, True)]),
    "argmax": ("decode.argmax", [argmax]),
    "timestep_norm": ("prefill.norms", [timestep_norm, partial(timestep_norm, True)]),
    "ema_scan": ("prefill.ema", [ema_scan]),
    "attend_chunks": ("prefill.attention", [attend_chunks]),
    "sum_norm": ("layer_norm", [sum_norm]),
}


def largest_difference(name: str, device: str = "cpu") -> float:
    """Largest difference of an operator from its reference, over its cases."""
    where, cases = OPERATIONS[name]
    name = name.removesuffix(" in bfloat16")
    module = import_module(f"megalodon_export.model.kernels.{where}")
    operator, reference = getattr(module, name), getattr(module, f"{name}_reference")
    worst = 0.0
    for index, case in enumerate(cases):
        _generator.manual_seed(index)
        arguments = case()
        found, expected = (on(arguments, device) for device in (device, "cpu"))
        results = operator(*found), reference(*expected)
        pairs = [(a, b) for a, b in zip(found, expected, strict=True) if isinstance(a, Tensor)]
        if name == "attend_chunks":  # its results mean something where they are valid
            valid = torch.arange(2 * C) < arguments[5][:, None]
            results = results[0].cpu()[valid], results[1][valid]
        if results[0] is not None:
            pairs += zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True)
        if name == "ema_step":  # its last result, squares, has as many partial sums as programs
            pairs[-1] = tuple(squares.sum(1) for squares in pairs[-1])
        worst = max([worst, *(relative_difference(a.cpu(), b) for a, b in pairs)])
    return worst


def on(arguments: tuple[Any, ...], device: str) -> list[Any]:
    """Copies of the arguments on a device."""
    return [a.clone().to(device) if isinstance(a, Tensor) else a for a in arguments]


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest |a - b| over the largest |b|, at least 1; infinite if one has NaN where the other has none."""
    if not torch.equal(a.isnan(), b.isnan()) or a.dtype != b.dtype:
        return float("inf")
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


if __name__ == "__main__":
    on_gpu = sys.argv[1:2] == ["--cuda"]
    if not on_gpu:
        interpret()
    for name in sys.argv[1 + on_gpu :] or OPERATIONS:
        print(name, largest_difference(name, "cuda" if on_gpu else "cpu"), flush=True)
