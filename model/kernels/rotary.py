"""Queries and keys from the normalised z of one head: scale, shift and rotation. Decode and prefill both use it.

    q, k = rotate(z / rms(z) * (gamma + 1) / sqrt(dz) + beta)

A head's dz features are held as two halves, since the rotation pairs feature j with feature j + dz / 2. The plain form
is `model/gated_attention.py: GatedAttention.project`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_query_key_affine(gamma_ptr, beta_ptr, at, ok, HALF: tl.constexpr):
    """(gamma + 1) / sqrt(dz) and beta of one head's queries or keys: scale and shift of each half, (HALF_P) float32."""
    root: tl.constexpr = (2 * HALF) ** -0.5
    gamma_lo = (tl.load(gamma_ptr + at, mask=ok, other=0.0).to(tl.float32) + 1.0) * root
    gamma_hi = (tl.load(gamma_ptr + at + HALF, mask=ok, other=0.0).to(tl.float32) + 1.0) * root
    beta_lo = tl.load(beta_ptr + at, mask=ok, other=0.0).to(tl.float32)
    beta_hi = tl.load(beta_ptr + at + HALF, mask=ok, other=0.0).to(tl.float32)
    return gamma_lo, gamma_hi, beta_lo, beta_hi


@triton.jit
def scale_and_rotate(lo, hi, affine, cos, sin):
    """One head's query or key, in halves, from the halves of its normalised z and `load_query_key_affine`."""
    a = lo * affine[0] + affine[2]
    c = hi * affine[1] + affine[3]
    return a * cos - c * sin, c * cos + a * sin
