"""The model against the reference, and any split of a stream against the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import megalodon_export.model as m
from support.reference import Reference
from support.small_models import SMALL, VARIANTS, make_model, named_tensors, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the same numbers as the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["blocked", "fft"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_model_is_the_reference(variant: str, form: str) -> None:
    model = make_model(**{**VARIANTS[variant], "ema_prefill": form})
    token_ids = random_tokens(1, 75)
    reference = Reference(model)
    expected = reference.feed(token_ids[0].tolist())
    with torch.no_grad():
        whole = model(token_ids, use_cache=False).logits[0]
        prefilled = model(token_ids[:, :70])
        cache = prefilled.past_key_values
        last = torch.cat([model(token_ids[:, t : t + 1], past_key_values=cache).logits[0] for t in range(70, 75)])
    assert (whole - expected).abs().max() < 1e-9
    assert (prefilled.logits[0] - expected[:70]).abs().max() < 1e-9
    assert (last - expected[70:]).abs().max() < 1e-9
    assert_reference_cache(model.config, cache, reference)


def assert_reference_cache(config: m.MegalodonConfig, cache: m.MegalodonCache, reference: Reference) -> None:
    valid = reference.position % config.chunk_size
    assert cache.position.tolist() == [reference.position]
    for layer, state in zip(cache.layers, reference.layers, strict=True):
        if valid:
            assert torch.allclose(layer.key[0, :, :valid], torch.stack(state.keys, dim=1), atol=1e-9)
            assert torch.allclose(layer.value[0, :, :valid], torch.stack(state.values, dim=1), atol=1e-9)
        assert torch.allclose(layer.ema_state[0], torch.view_as_real(state.ema), atol=1e-9)
        mean, variance = state.norm.statistics(config.norm_statistics)
        assert torch.allclose(layer.norm_mean[0], mean, atol=1e-9)
        assert torch.allclose(layer.norm_var[0], variance, atol=1e-9)
    mean, variance = reference.final.statistics(config.norm_statistics)
    assert torch.allclose(cache.final.norm_mean[0], mean, atol=1e-9)
    assert torch.allclose(cache.final.norm_var[0], variance, atol=1e-9)


def test_float32_model_is_the_reference() -> None:
    model = make_model(torch.float32)
    token_ids = random_tokens(1, 200)
    expected = Reference(model).feed(token_ids[0].tolist())
    with torch.no_grad():
        assert (model(token_ids).logits[0] - expected).abs().max() < 2e-5 * expected.abs().max()


# ---- any split gives the same ----------------------------------------------------------------------------------------

Call = tuple[int, ...] | None  # lengths of a prefill, or None for one decoded token in every row


@st.composite
def streams(draw: st.DrawFn) -> tuple[dict[str, Any], list[Call], int]:
    """A model variant, a list of calls over a batch of rows, and the slack of the prefills' max_length."""
    rows = draw(st.integers(1, 3))
    variant = draw(st.sampled_from(sorted(VARIANTS)))
    longest = 2 * VARIANTS[variant].get("chunk_size", SMALL["chunk_size"]) + 2
    prefill = st.tuples(*[st.integers(0, longest)] * rows)
    long_prefill = st.tuples(*[st.integers(0, 80)] * rows)
    calls = draw(st.lists(st.one_of(st.none(), st.none(), prefill, long_prefill), min_size=1, max_size=7))
    form = draw(st.sampled_from(["blocked", "fft"]))
    return {**VARIANTS[variant], "ema_prefill": form}, calls, draw(st.sampled_from([0, 1, 100]))


def run_calls(
    model: m.MegalodonForCausalLM, rows: Tensor, calls: list[Call], slack: int
) -> tuple[list[list[Tensor]], m.MegalodonCache]:
    """Logits of every token of every row, and the cache at the end. What lies behind a row's length is noise."""
    batch = rows.shape[0]
    cache = model.new_cache(batch)
    logits: list[list[Tensor]] = [[] for _ in range(batch)]
    for number, call in enumerate(calls):
        position = cache.position.clone()
        if call is None:
            out = model.decode(rows[torch.arange(batch), position], cache)[:, None]
            call = (1,) * batch
        else:
            length = max(*call, 1)
            token_ids = random_tokens(batch, length, seed=number + 1)
            for row, valid in enumerate(call):
                start = int(position[row])
                token_ids[row, :valid] = rows[row, start : start + valid]
            lengths = torch.tensor(call)
            twin = cache.clone(model.config)
            out = model.score(token_ids, lengths, cache, length + slack)
            last = model.prefill(token_ids, lengths, twin, length + slack)
            for row, valid in enumerate(call):
                assert not out[row, valid:].any()
                assert valid == 0 or torch.allclose(last[row], out[row, valid - 1], rtol=1e-5, atol=1e-5)
        for row, valid in enumerate(call):
            logits[row].extend(out[row, :valid])
        assert cache.position.tolist() == [int(p) + n for p, n in zip(position, call, strict=True)]
    return logits, cache


def assert_same_stream(dtype: torch.dtype, stream: tuple[dict[str, Any], list[Call], int], tolerance: float) -> None:
    overrides, calls, slack = stream
    model = make_model(dtype, **overrides)
    batch = next((len(call) for call in calls if call is not None), 2)
    rows = random_tokens(batch, 7 * 82)
    with torch.no_grad():
        logits, cache = run_calls(model, rows, calls, slack)
        for row in range(batch):
            count = int(cache.position[row])
            alone = model.new_cache(1)
            if count:
                expected = model(rows[row : row + 1, :count], past_key_values=alone).logits[0]
                error = (torch.stack(logits[row]) - expected).abs().max()
                assert error <= tolerance * expected.abs().max()
            one = cache.rows(model.config, torch.tensor([row]))
            for (name, actual), (_, other) in zip(
                named_tensors(model.config, one), named_tensors(model.config, alone), strict=True
            ):
                if name.endswith(("key", "value")):  # what is not valid is not compared
                    valid = count % model.config.chunk_size
                    actual, other = actual[:, :, :valid], other[:, :, :valid]
                if actual.numel():
                    assert (actual - other).abs().max() <= tolerance * max(1.0, other.abs().max().item()), name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(stream=streams())
def test_any_split_gives_the_same_in_float64(stream: tuple[dict[str, Any], list[Call], int]) -> None:
    assert_same_stream(torch.float64, stream, 1e-9)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(stream=streams())
def test_any_split_gives_the_same_in_float32(stream: tuple[dict[str, Any], list[Call], int]) -> None:
    assert_same_stream(torch.float32, stream, 5e-5)


def test_token_by_token_from_an_empty_cache() -> None:
    assert_same_stream(torch.float64, ({}, [None] * 33, 0), 1e-9)


def test_cache_of_rows_forks_and_restores() -> None:
    model = make_model()
    token_ids = random_tokens(2, 9)
    with torch.no_grad():
        cache = model(token_ids).past_key_values
        saved = cache.clone(model.config)
        forked = cache.rows(model.config, torch.tensor([1, 1, 0]))
        first = model.decode(torch.tensor([3, 4]), cache)
        second = model.decode(torch.tensor([4, 4, 3]), forked)
        addresses = [t.data_ptr() for t in cache.tensors()]
        cache.copy_(saved)
        again = model.decode(torch.tensor([3, 4]), cache)
    assert [t.data_ptr() for t in cache.tensors()] == addresses
    assert torch.equal(first, again)
    assert torch.allclose(second, first[[1, 1, 0]], atol=1e-12)
