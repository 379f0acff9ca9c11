"""Sampling against a reference in plain Python floats, and against the probabilities it claims to follow."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_export.generation.sampling import (
    SamplerKind,
    SamplingParams,
    choose,
    controls,
    device_uniform,
    exp_reproducible,
    raise_logit_errors,
    sample,
    uniform,
    wrap,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def reference_exp(x: float) -> float:
    n = round(x * 1.4426950408889634)
    r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10
    result = 1.0 / math.factorial(13)
    for k in range(12, -1, -1):
        result = result * r + 1.0 / math.factorial(k)
    return math.ldexp(result, n)


def reference_sample(logits: list[float], params: SamplingParams, draw: float) -> int:
    """The algorithm of the module's docstring, one token at a time, in integers wherever sums are taken."""
    peak = max(logits)
    if params.temperature == 0:
        return logits.index(peak)
    one = 2 ** (53 - len(logits).bit_length())
    weights = [round(reference_exp(max((x - peak) / params.temperature, -64.0)) * one) for x in logits]
    kept = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if params.top_k > 0:
        kept = kept[: params.top_k]
    if params.top_p < 1:
        nucleus, reached, total = [], 0, sum(weights[i] for i in kept)
        for i in kept:
            if reached < params.top_p * total:
                nucleus.append(i)
            reached += weights[i]
        kept = nucleus
    kept = sorted(i for i in kept if weights[i] >= params.min_p * one)
    total = sum(weights[i] for i in kept)
    cumulative = 0
    for i in kept:
        cumulative += weights[i]
        if cumulative > draw * total:
            return i
    raise AssertionError("no token beyond the draw")


def draws_of(seed: int, count: int) -> torch.Tensor:
    return torch.tensor([uniform(seed, index) for index in range(count)], dtype=torch.float64)


draws = st.integers(0, 2**53 - 1).map(lambda m: m * 2.0**-53)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-300, 0.1, 0.7, 1.0, 1.5, 100.0, 1e300]) | st.floats(0.01, 10),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([1.0, 0.5, 0.25, 0.9, 1e-9]) | st.floats(0.001, 1),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]) | st.floats(0, 1),
)


@st.composite
def rows(draw: st.DrawFn) -> list[list[float]]:
    """Up to 5 rows of up to 20 logits, on a coarse grid (so that ties are common) or not, some of them ruled out."""
    size = draw(st.integers(1, 20))
    coarse = st.integers(-6, 6).map(lambda n: n / 2)
    logit = draw(st.sampled_from([coarse, st.floats(-30, 30, width=16), st.just(-math.inf) | coarse]))
    row = st.lists(logit, min_size=size, max_size=size).filter(lambda values: max(values) > -math.inf)
    return draw(st.lists(row, min_size=1, max_size=5))


@settings(deadline=None, max_examples=600)
@given(rows(), params, st.lists(draws, min_size=5, max_size=5), st.sampled_from(DTYPES))
def test_equals_the_reference_token_for_token(values, params, draw, dtype):
    logits = torch.tensor(values, dtype=dtype)
    tokens = sample(logits, params, torch.tensor(draw[: len(values)], dtype=torch.float64))
    assert tokens.dtype == torch.int64
    assert tokens.shape == (len(values),)
    rounded = logits.double().tolist()
    assert tokens.tolist() == [reference_sample(row, params, u) for row, u in zip(rounded, draw, strict=False)]


@pytest.mark.parametrize("vocab_size", [255, 256, 32_000])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.8, top_k=50, top_p=0.95),
        SamplingParams(temperature=1.3, top_p=0.9, min_p=0.001),
    ],
    ids=str,
)
def test_large_vocabularies_equal_the_reference_and_ignore_the_batch(vocab_size, params):
    logits = 4 * torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    uniforms = draws_of(7, 6)
    tokens = sample(logits, params, uniforms)
    assert tokens.tolist() == [
        reference_sample(row, params, u) for row, u in zip(logits.double().tolist(), uniforms.tolist(), strict=True)
    ]
    order = torch.tensor([3, 0, 5, 1])
    assert torch.equal(sample(logits[order], params, uniforms[order]), tokens[order])
    alone = torch.cat([sample(logits[i : i + 1], params, uniforms[i : i + 1]) for i in range(6)])
    assert torch.equal(alone, tokens)
    strided = torch.stack([logits, logits + 1], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(sample(strided, params, uniforms), tokens)


def test_the_smallest_and_the_largest_draw_stay_on_tokens_that_are_left():
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]])
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.999, min_p=1e-6)):
        assert sample(logits, params, torch.zeros(1, dtype=torch.float64)).item() == 1
        assert sample(logits, params, torch.full((1,), 1 - 2.0**-53, dtype=torch.float64)).item() == 2


def support(logits: list[float], **params: float) -> set[int]:
    uniforms = torch.arange(1000, dtype=torch.float64) / 1000
    batch = torch.tensor([logits]).expand(1000, -1)
    return set(sample(batch, SamplingParams(**{"temperature": 1.0, **params}), uniforms).tolist())


def test_filters_keep_the_tokens_they_promise():
    tied = [1.0, 2.0, 2.0, 2.0, 0.0]
    assert support(tied, temperature=0.0) == {1}
    assert support(tied, top_k=1) == {1}
    assert support(tied, top_k=2) == {1, 2}
    assert support(tied, top_k=4) == {0, 1, 2, 3}
    assert support(tied, top_k=99) == {0, 1, 2, 3, 4}
    assert support([0.0] * 4, top_p=0.5) == {0, 1}
    assert support([0.0] * 4, top_p=0.500001) == {0, 1, 2}
    assert support([0.0] * 4, top_p=1e-12) == {0}
    assert support([0.0] * 4, top_p=0.5, top_k=2) == {0}
    assert support(tied, min_p=1.0) == {1, 2, 3}
    assert support(tied, min_p=0.36) == {0, 1, 2, 3}
    assert support(tied, min_p=0.37) == {1, 2, 3}


def chi_square(tokens: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's statistic over the tokens that can occur; infinite if another one did."""
    counts = torch.bincount(tokens, minlength=expected.numel()).double()
    if bool((counts[expected == 0] > 0).any()):
        return math.inf
    possible = expected > 0
    mean = expected[possible] * tokens.numel()
    return float(((counts[possible] - mean) ** 2 / mean).sum())


LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.3, 1.1, -2.5, 0.0, 0.7])


def expected_probabilities(params: SamplingParams) -> torch.Tensor:
    probabilities = torch.softmax(LOGITS.double() / params.temperature, dim=-1)
    ranked = sorted(range(8), key=lambda i: (-LOGITS[i].item(), i))
    kept, reached = [], 0.0
    top = ranked[: params.top_k or 8]
    total = sum(probabilities[i].item() for i in top)
    for i in top:
        if reached < params.top_p * total:
            kept.append(i)
        reached += probabilities[i].item()
    kept = [i for i in kept if probabilities[i] >= params.min_p * probabilities.max()]
    mask = torch.zeros(8, dtype=torch.float64)
    mask[kept] = 1.0
    return probabilities * mask / (probabilities * mask).sum()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.5, seed=2),
        SamplingParams(temperature=2.0, seed=3),
        SamplingParams(temperature=1.0, top_k=4, seed=4),
        SamplingParams(temperature=1.0, top_p=0.8, seed=5),
        SamplingParams(temperature=1.5, top_k=6, top_p=0.9, min_p=0.2, seed=6),
    ],
    ids=str,
)
def test_frequencies_follow_the_probabilities(params):
    count = 40_000
    tokens = sample(LOGITS.expand(count, -1), params, draws_of(params.seed, count))
    # 24.3: chi-square with 7 degrees of freedom is beyond it once in 1,000; fewer degrees, more rarely.
    assert chi_square(tokens, expected_probabilities(params)) < 24.3
    warmer = SamplingParams(temperature=1.1 * params.temperature)
    assert chi_square(tokens, expected_probabilities(warmer)) > 24.3  # the test would notice a wrong temperature


def test_uniform_is_splitmix64():
    # The published outputs for seed 1234567 (rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64).
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [uniform(1234567, index) for index in range(5)] == [(z >> 11) * 2.0**-53 for z in outputs]
    assert uniform(2**64 - 1, 2**40) == uniform(-1, 2**40)
    with pytest.raises(ValueError, match="index is -1"):
        uniform(0, -1)


numbers = st.sampled_from([0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1]) | st.integers(0, 2**64 - 1)


@settings(deadline=None)
@given(st.lists(numbers, min_size=1, max_size=5), numbers)
def test_draws_on_the_device_are_uniform_bit_for_bit(seeds, index):
    found = device_uniform(torch.tensor([wrap(seed) for seed in seeds]), torch.tensor(wrap(index)))
    assert found.dtype == torch.float64
    assert found.tolist() == [uniform(seed, index) for seed in seeds]


def test_draws_of_many_rows_and_one_index_each():
    seeds, indices = torch.arange(-500, 500), torch.arange(1000) * 7919
    expected = [uniform(seed % 2**64, index) for seed, index in zip(seeds.tolist(), indices.tolist(), strict=True)]
    assert device_uniform(seeds, indices).tolist() == expected


def test_a_choice_flags_what_is_wrong_and_stays_in_the_vocabulary():
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[0.0, 1, 2], [nan, nan, 0], [0, inf, nan], [0, inf, 1], [-inf] * 3, [0, 1, -inf], [0, 1, 2]])
    uniforms = torch.tensor([0.99, 0.5, 0.5, 0.5, 0.5, 1.0, nan], dtype=torch.float64)
    for params in (SamplingParams(), SamplingParams(1.0), SamplingParams(1.0, top_k=2, top_p=0.9, min_p=0.1)):
        rows = [params] * 7
        tokens, logit_errors = choose(logits, SamplerKind.of(rows), controls(rows), None if params.greedy else uniforms)
        assert logit_errors.bool().tolist() == [False, True, True, True, True, not params.greedy, not params.greedy]
        assert tokens[1:5].tolist() == [0] * 4
        assert tokens[0] == 2
        for row, found in ((1, "NaN in 2 of 3"), (2, "NaN in 1 of 3"), (3, "[+]inf among"), (4, "-inf for every")):
            with pytest.raises(ValueError, match=f"row 1 cannot be sampled: {found}"):
                raise_logit_errors([0, int(logit_errors[row])], 3)
    raise_logit_errors([0, 0], 3)


def test_rows_of_a_batch_may_differ_in_their_parameters():
    logits = 4 * torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    rows = [
        *(SamplingParams(1.0), SamplingParams(0.5, top_k=3)),
        *(SamplingParams(2.0, top_p=0.8), SamplingParams(1.1, top_k=400, top_p=0.9, min_p=0.01)),
    ]
    for index in range(50):
        uniforms = draws_of(index, 4)
        tokens, _ = choose(logits, SamplerKind.of(rows), controls(rows), uniforms)
        alone = [sample(logits[i : i + 1], row, uniforms[i : i + 1]).item() for i, row in enumerate(rows)]
        assert tokens.tolist() == alone
    with pytest.raises(ValueError, match="temperature is 0 for some rows"):
        SamplerKind.of([SamplingParams(), SamplingParams(1.0)])


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_uniform_is_uniform_and_uncorrelated(seed):
    u = draws_of(seed, 50_000)
    assert u.min() >= 0
    assert u.max() < 1
    cells = (u * 64).long()
    assert chi_square(cells, torch.full((64,), 1 / 64, dtype=torch.float64)) < 103.4  # 63 degrees, once in 1,000
    pairs = (u[0::2] * 8).long() * 8 + (u[1::2] * 8).long()
    assert chi_square(pairs, torch.full((64,), 1 / 64, dtype=torch.float64)) < 103.4
    neighbours = torch.stack([u, draws_of((seed + 1) % 2**64, 50_000)])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.015  # 3.3 standard deviations


def test_exp_is_close_to_the_true_value_and_exactly_the_reference():
    x = -64 * torch.rand(3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([x, torch.tensor([0.0, -0.0, -1e-300, -64.0, -math.log(2) / 2, -math.log(2)], dtype=torch.float64)])
    values = exp_reproducible(x).tolist()
    assert values == [reference_exp(v) for v in x.tolist()]
    with localcontext() as context:
        context.prec = 40
        for argument, value in zip(x.tolist(), values, strict=True):
            truth = Decimal(argument).exp()
            assert abs(Decimal(value) - truth) <= 2 * Decimal(math.ulp(float(truth)))
    assert exp_reproducible(torch.zeros(1, dtype=torch.float64)).item() == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-0.1, math.nan, math.inf, "1", None, True)),
        *(("top_k", value) for value in (-1, 1.5, True)),
        *(("top_p", value) for value in (0.0, -0.5, 1.01, math.nan)),
        *(("min_p", value) for value in (-0.01, 1.01, math.nan)),
        *(("seed", value) for value in (-1, 2**64, 0.5)),
    ],
)
def test_params_that_make_no_sense_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} is .*, expected .*; "):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([0.0, math.nan, 1.0], "row 1 cannot be sampled: NaN in 1 of 3 logits"),
        ([-math.inf] * 3, "row 1 cannot be sampled: -inf for every token"),
        ([0.0, math.inf, 1.0], "row 1 cannot be sampled: \\+inf among the logits"),
    ],
)
def test_rows_without_a_distribution_are_refused(params, bad, message):
    with pytest.raises(ValueError, match=message):
        sample(torch.tensor([[0.0, 1.0, 2.0], bad]), params, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("logits", "uniforms", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.float64), r"logits are torch.float32 of shape \(3,\)"),
        (torch.zeros(1, 0), torch.zeros(1, dtype=torch.float64), r"of shape \(1, 0\)"),
        (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.float64), "logits are torch.int64"),
        (torch.zeros(2, 3), torch.zeros(1, dtype=torch.float64), r"draws are torch.float64 of shape \(1,\)"),
        (torch.zeros(2, 3), torch.zeros(2), "draws are torch.float32"),
        (torch.zeros(2, 3), None, "temperature > 0 needs draws"),
        (torch.zeros(2, 3), torch.tensor([0.5, 1.0], dtype=torch.float64), "draw of row 1 is 1.0"),
        (torch.zeros(2, 3), torch.tensor([math.nan, 0.0], dtype=torch.float64), "draw of row 0 is nan"),
    ],
)
def test_wrong_arguments_are_refused(logits, uniforms, message):
    with pytest.raises(ValueError, match=message):
        sample(logits, SamplingParams(temperature=1.0), uniforms)


def test_greedy_needs_no_draws_and_takes_the_lowest_of_equal_ids():
    assert sample(torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, -1.0]]), SamplingParams()).tolist() == [1, 0]
    assert sample(torch.zeros(0, 5), SamplingParams()).shape == (0,)


@pytest.mark.cuda
@pytest.mark.parametrize("vocab_size", [256, 32_000])
def test_cuda_chooses_the_same_tokens(vocab_size):
    logits = 4 * torch.randn(64, vocab_size, generator=torch.Generator().manual_seed(0))
    uniforms = draws_of(3, 64)
    for params in (SamplingParams(), SamplingParams(temperature=0.7), SamplingParams(1.1, top_k=40, top_p=0.9)):
        tokens = sample(logits.cuda(), params, uniforms.cuda())
        assert tokens.is_cuda
        assert torch.equal(tokens.cpu(), sample(logits, params, uniforms))
    x = -64 * torch.rand(100_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(exp_reproducible(x.cuda()).cpu(), exp_reproducible(x))


@pytest.mark.cuda
def test_cuda_draws_are_the_same():
    seeds, index = torch.arange(-500, 500), torch.tensor(2**40)
    assert torch.equal(device_uniform(seeds.cuda(), index.cuda()).cpu(), device_uniform(seeds, index))
