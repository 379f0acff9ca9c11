"""Choosing the next token from logits, specified so exactly that other languages can reproduce it bit for bit.

`exp`, sums and scans differ in their last bits between libraries, devices and batch shapes. Here every operation is
either exact or one correctly rounded IEEE float64 operation (no fused multiply-add). So neither the device, nor the
batch, nor the order of a sum can change a token. For one row of V logits, converted to float64:

1. Greedy (temperature 0): the largest logit, the lowest id among equals. Nothing below applies.
2. `x[i] = max((logit[i] - peak) / temperature, -64)`, where `peak` is the row's largest logit.
3. `e[i] = exp(x[i])` by `exp_reproducible`: n = rint(x * LOG2_E), r = (x - n * LN2_HIGH) - n * LN2_LOW, the Taylor
   polynomial of degree 13 in r by Horner's rule with coefficients 1.0 / k!, times 2**n.
4. `w[i] = rint(e[i] * 2**K)` with K = 53 - bit_length(V), rint to nearest, ties to even. The weights are integers whose
   sum stays below 2**53: float64 adds them without rounding, in any order. The peak's weight is 2**K; a token less
   than 2**-(K+1) times as likely as the peak (3e-14 for 256 tokens, 4e-12 for 32,768) has weight 0.
5. Rank the tokens by falling logit, equal logits by rising id. top-k keeps the first k.
6. top-p: `total` is the sum of the weights that top-k kept. A token stays while the sum of those ranked before it is
   `< top_p * total`: the smallest set that reaches top_p, never empty.
7. min-p keeps `w[i] >= min_p * 2**K`.
8. `total` is the sum of the weights that are left. The token is the first id, in id order, whose cumulative weight,
   itself included, is `> draw * total`. No weight is divided by `total`, which would only round.

The draws are splitmix64 (Steele, Lea and Flood, 2014) used as a counter: `uniform(seed, index)` is the draw of the
token that a stream samples after `index` others. A stream needs no generator state beside that count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..model.logit_errors import ALL_MASKED, POSITIVE_INFINITY
from .arguments import is_integer, number, plain, show

_MASK = 2**64 - 1
_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_LOG2_E = 1.4426950408889634
# ln 2 in two parts (fdlibm e_exp.c): the high part ends in 21 zero bits, so its product with a small n is exact.
_LN2_HIGH = 6.93147180369123816490e-01
_LN2_LOW = 1.90821492927058770002e-10
_TAYLOR = tuple(1.0 / math.factorial(k) for k in range(14))
_BAD_DRAW = -3  # a row's error beside POSITIVE_INFINITY and ALL_MASKED
_LOWEST_EXPONENT = -64.0  # exp(-64) is below half a unit of every weight, and 2**n stays far from subnormal


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; the defaults are greedy.

    temperature: 0 is greedy. top_k: 0 is off. top_p: in (0, 1], 1 is off. min_p: in [0, 1], 0 is off; relative to the
    most probable token. seed: in [0, 2**64). Scalars of numpy become Python numbers. Raises ValueError
    for anything else.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        temperature, top_p, min_p = map(number, (self.temperature, self.top_p, self.min_p))
        top_k: Any = plain(self.top_k)
        seed: Any = plain(self.seed)
        _require(
            0.0 <= temperature < math.inf,
            f"temperature is {show(self.temperature)}, expected a finite number >= 0; use 0 for greedy decoding",
        )
        _require(
            is_integer(top_k) and top_k >= 0,
            f"top_k is {show(top_k)}, expected an integer >= 0; use 0 to turn top-k off",
        )
        _require(
            0.0 < top_p <= 1.0,
            f"top_p is {show(self.top_p)}, expected a number in (0, 1]; use 1 to turn top-p off",
        )
        _require(
            0.0 <= min_p <= 1.0,
            f"min_p is {show(self.min_p)}, expected a number in [0, 1]; use 0 to turn min-p off",
        )
        _require(
            is_integer(seed) and 0 <= seed <= _MASK,
            f"seed is {show(seed)}, expected an integer in [0, 2**64); reduce it modulo 2**64",
        )
        values = {"temperature": temperature, "top_k": int(top_k), "top_p": top_p, "min_p": min_p, "seed": int(seed)}
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def greedy(self) -> bool:
        """Whether tokens are chosen without draws."""
        return self.temperature == 0.0


def uniform(seed: int, index: int) -> float:
    """The draw in [0, 1) of the token that a stream samples after `index` others; see the module's docstring.

    A multiple of 2**-53, so float64 holds it exactly. Raises ValueError if index is negative.
    """
    _require(index >= 0, f"index is {index}, expected the number of tokens sampled so far, >= 0")
    z = (seed + (index + 1) * _GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    z ^= z >> 31
    return (z >> 11) * 2.0**-53


def device_uniform(seeds: Tensor, index: Tensor) -> Tensor:
    """`uniform(seed, index)` of every seed, bit for bit, on the seeds' device and without waiting for it.

    seeds (B) int64, modulo 2**64 (`wrap`); index int64, () or (B) -> (B) float64.
    """
    z = seeds + (index + 1) * wrap(_GAMMA)  # int64 products and sums wrap around, as modulo 2**64
    z = (z ^ _shift_right(z, 30)) * wrap(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * wrap(_MIX_2)
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 11).double() * 2.0**-53


def wrap(seed: int) -> int:
    """A number modulo 2**64 as an int64 holds it."""
    return (seed + 2**63) % 2**64 - 2**63


class SamplerKind(Enum):
    """Which operations choose a token. All other parameters are in tensors, so a kind needs one captured graph."""

    GREEDY = "greedy"
    UNRANKED = "unranked"  # no top-k, no top-p: nothing has to be sorted
    RANKED = "ranked"

    @classmethod
    def of(cls, rows: Sequence[SamplingParams]) -> SamplerKind:
        """The kind for a batch; ValueError if some rows are greedy and some are not."""
        greedy = {row.greedy for row in rows}
        _require(len(greedy) == 1, "temperature is 0 for some rows of the batch only; sample those apart")
        if greedy.pop():
            return cls.GREEDY
        return cls.RANKED if any(row.top_k > 0 or row.top_p < 1.0 for row in rows) else cls.UNRANKED


def controls(rows: Sequence[SamplingParams]) -> Tensor:
    """The parameters of each row for `choose`, (4, B, 1) float64 on the CPU: temperature, top-k, top-p, min-p."""
    columns = [[row.temperature, min(row.top_k, 2**53) or math.inf, row.top_p, row.min_p] for row in rows]
    return torch.tensor(columns, dtype=torch.float64, device="cpu").T[..., None].contiguous()


def choose(
    logits: Tensor, kind: SamplerKind, control: Tensor | None = None, draws: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token id per row, by the algorithm in the module's docstring, without waiting for the device.

    logits (B, V) any float dtype; control (4, B, 1) from `controls` and draws (B) float64, both None if greedy
    -> token ids (B) int64, logit_errors (B) int64. Where `logit_errors` is not 0 the token is 0, and
    `raise_logit_errors` says what was wrong. Every operation can be captured in a CUDA graph.
    """
    peak = logits.amax(dim=-1, keepdim=True)  # (B, 1); NaN if the row holds one
    logit_errors = _logit_errors(logits, peak[:, 0], draws)
    if kind is SamplerKind.GREEDY or control is None or draws is None:
        return logits.argmax(dim=-1).where(logit_errors == 0, 0), logit_errors  # the first of equal maxima
    temperature, top_k, top_p, min_p = control
    weights = _integer_weights(logits.double() - peak.double(), temperature)  # (B, V)
    if kind is SamplerKind.RANKED:
        weights = _keep_most_probable(weights, logits, top_k, top_p)
    weights = weights.where(weights >= min_p * _unit(logits.shape[-1]), 0.0)
    cumulative = weights.cumsum(dim=-1, dtype=torch.int64)  # integers: torch has no deterministic sum of floats
    target = draws[:, None] * cumulative[:, -1:]
    tokens = (cumulative <= target).sum(dim=-1)  # cumulative never falls: how many ids lie before the first beyond it
    return tokens.where(logit_errors == 0, 0), logit_errors


def sample(logits: Tensor, params: SamplingParams, draws: Tensor | None = None) -> Tensor:
    """One token id per row, by the algorithm in the module's docstring.

    logits (B, V), any float dtype; draws (B) float64 in [0, 1), one `uniform` per row, not needed when greedy
    -> (B) int64 on the device of logits. Waits for the device once, to check the values.
    Raises ValueError for wrong shapes or dtypes, rows holding NaN or +inf or nothing but -inf, draws outside [0, 1).
    """
    _check_shapes(logits, params, draws)
    draws = None if params.greedy or draws is None else draws.to(logits.device)
    tokens, logit_errors = choose(logits, SamplerKind.of([params]), controls([params]).to(logits.device), draws)
    raise_logit_errors(logit_errors.tolist(), logits.shape[-1], list if draws is None else draws.tolist)
    return tokens


def raise_logit_errors(logit_errors: Sequence[int], vocab_size: int, draws: Callable[[], list[float]] = list) -> None:
    """ValueError for the first row whose error is not 0; `draws` is called if a draw was wrong."""
    row = next((i for i, error in enumerate(logit_errors) if error), None)
    if row is None:
        return
    if logit_errors[row] == _BAD_DRAW:
        raise ValueError(f"draw of row {row} is {draws()[row]}, expected a number in [0, 1); use uniform()")
    found = {POSITIVE_INFINITY: "+inf among the logits", ALL_MASKED: "-inf for every token"}.get(
        logit_errors[row], f"NaN in {logit_errors[row]} of {vocab_size} logits"
    )
    raise ValueError(
        f"row {row} cannot be sampled: {found}, expected finite logits (or -inf for tokens that are ruled out); "
        "check the weights, the dtype and any logits mask"
    )


def exp_reproducible(x: Tensor) -> Tensor:
    """exp(x) to within 2 units in the last place, from correctly rounded float64 operations only.

    x float64, any shape, in [-700, 700]. Cody and Waite's reduction; step 3 in the module's docstring.
    """
    n = torch.round(x * _LOG2_E)  # ties to even
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    result = torch.full_like(r, _TAYLOR[-1])
    for coefficient in reversed(_TAYLOR[:-1]):
        result = result * r + coefficient  # two kernels in eager mode, hence two roundings
    power_of_two = ((n.long() + 1023) << 52).view(torch.float64)  # built from its bits: pow may round
    return result * power_of_two


def _unit(vocab_size: int) -> float:
    return 2.0 ** (53 - vocab_size.bit_length())


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift of 64 bits. int64's own shift is arithmetic: it repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _logit_errors(logits: Tensor, peak: Tensor, draws: Tensor | None) -> Tensor:
    logit_errors = logits.isnan().sum(dim=-1)
    logit_errors = logit_errors.masked_fill(peak == math.inf, POSITIVE_INFINITY)
    logit_errors = logit_errors.masked_fill(peak == -math.inf, ALL_MASKED)
    if draws is None:
        return logit_errors
    return logit_errors.masked_fill(~((draws >= 0.0) & (draws < 1.0)), _BAD_DRAW)


def _integer_weights(below_peak: Tensor, temperature: Tensor) -> Tensor:
    # A tensor: dividing by a Python number multiplies by its reciprocal on CUDA, which rounds differently.
    exponent = (below_peak / temperature).clamp(min=_LOWEST_EXPONENT)
    return torch.round(exp_reproducible(exponent) * _unit(below_peak.shape[-1]))


def _keep_most_probable(weights: Tensor, logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Weights (B, V) with those that top-k and top-p (B, 1) drop set to zero."""
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    rank = torch.arange(weights.shape[-1], device=weights.device)
    ranked = weights.gather(-1, order).where(rank < top_k, 0.0)
    reached = ranked.cumsum(dim=-1, dtype=torch.int64)
    ranked = ranked.where(reached - ranked < top_p * reached[:, -1:], 0.0)
    return torch.zeros_like(weights).scatter(-1, order, ranked)


def _check_shapes(logits: Tensor, params: SamplingParams, draws: Tensor | None) -> None:
    _require(
        logits.dim() == 2 and logits.shape[-1] > 0 and logits.is_floating_point(),
        f"logits are {logits.dtype} of shape {tuple(logits.shape)}, expected floating point (B, V) with V >= 1; "
        "pass the last position's logits only",
    )
    if draws is None:
        _require(params.greedy, "temperature > 0 needs draws; pass one uniform(seed, index) per row")
        return
    _require(
        draws.dtype == torch.float64 and draws.shape == logits.shape[:1],
        f"draws are {draws.dtype} of shape {tuple(draws.shape)}, expected float64 of shape ({logits.shape[0]},); "
        "pass one uniform(seed, index) per row",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
