"""Padding on either side: every row of a batch gives the logits, the loss and the cache that it gives alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import megalodon_export.model as m
from support.golden_data import load, names, relative_error
from support.small_models import VARIANTS, make_model, named_tensors, padded, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

Padded = list[tuple[int, int, int]]  # a call: per row the padding before its tokens, their number, and padding after


@st.composite
def batches(draw: st.DrawFn) -> tuple[dict[str, Any], list[Padded]]:
    """A model variant and calls over the same rows, each with columns of its own."""
    rows = draw(st.integers(1, 3))
    calls = []
    for _ in range(draw(st.integers(1, 3))):
        tokens = [draw(st.integers(0, 40)) for _ in range(rows)]
        columns = max(max(tokens) + draw(st.integers(0, 5)), 1)
        before = [draw(st.integers(0, columns - count)) for count in tokens]
        calls.append([(first, n, columns - n - first) for first, n in zip(before, tokens, strict=True)])
    form = draw(st.sampled_from(["blocked", "fft"]))
    return {**VARIANTS[draw(st.sampled_from(sorted(VARIANTS)))], "ema_prefill": form}, calls


@settings(max_examples=40, deadline=None, derandomize=True)
@given(batch=batches())
def test_a_padded_row_gives_what_it_gives_alone(batch: tuple[dict[str, Any], list[Padded]]) -> None:
    overrides, calls = batch
    model = make_model(torch.float32, **overrides)
    rows = len(calls[0])
    text = random_tokens(rows, 150) % model.config.logits_size
    cache, alone = model.new_cache(rows), [model.new_cache(1) for _ in range(rows)]
    columns = 0
    for number, call in enumerate(calls):
        token_ids = random_tokens(rows, sum(call[0]), seed=number + 1) % model.config.logits_size
        mask = torch.zeros_like(token_ids)
        expected = []
        for row, (first, count, _) in enumerate(call):
            start = int(cache.position[row])
            tokens = text[row, start : start + count]
            token_ids[row, first : first + count], mask[row, first : first + count] = tokens, 1
            if count:
                with torch.no_grad():
                    expected.append(model(tokens[None], past_key_values=alone[row], labels=tokens[None]))
        before = torch.ones(rows, columns, dtype=torch.int64)  # what transformers puts in front with a cache
        with torch.no_grad():
            out = model(
                token_ids,
                attention_mask=torch.cat([before, mask], dim=1),
                past_key_values=cache,
                labels=token_ids,
            )
        columns += token_ids.shape[1]
        assert out.logits.shape[:2] == token_ids.shape
        assert not out.logits[mask == 0].any()
        if expected:
            assert relative_error(out.logits[mask == 1], torch.cat([one.logits[0] for one in expected])) < 1e-5
        targets = [n - 1 for _, n, _ in call if n]
        if sum(targets):
            losses = [one.loss * n for one, n in zip(expected, targets, strict=True) if n]
            assert abs(out.loss - sum(losses) / sum(targets)) < 1e-5 * abs(out.loss)
        assert cache.get_seq_length() == columns
    for row in range(rows):
        assert_same_cache(model, cache.rows(model.config, torch.tensor([row])), alone[row])


def assert_same_cache(model: m.MegalodonForCausalLM, one: m.MegalodonCache, other: m.MegalodonCache) -> None:
    valid = int(other.position) % model.config.chunk_size
    both = zip(named_tensors(model.config, one), named_tensors(model.config, other), strict=True)
    for (name, actual), (_, expected) in both:
        if name.endswith(("key", "value")):  # what is not valid is not compared
            actual, expected = actual[:, :, :valid], expected[:, :, :valid]
        if actual.numel():
            assert (actual - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item()), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_a_cache(side: str) -> None:
    model = make_model(torch.float32)
    lengths = [3, 17, 9]
    token_ids, mask = padded([random_tokens(n, seed=n) for n in lengths], side)
    model.train()
    out = model(token_ids, attention_mask=mask, labels=token_ids)
    alone = [model(row[valid == 1][None]).logits[0] for row, valid in zip(token_ids, mask, strict=True)]
    assert out.past_key_values is None
    assert relative_error(out.logits[mask == 1], torch.cat(alone)) < 1e-5
    hidden = model.model(token_ids, attention_mask=mask).last_hidden_state
    assert relative_error(model.logits(hidden), out.logits) < 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_to_keep_are_those_of_the_last_tokens(side: str) -> None:
    model = make_model(torch.float32)
    token_ids, mask = padded([random_tokens(n, seed=n) for n in (3, 17, 9)], side)
    with torch.no_grad():
        whole = model(token_ids, attention_mask=mask).logits
        kept = model(token_ids, attention_mask=mask, logits_to_keep=2).logits
        columns = model(token_ids, attention_mask=mask, logits_to_keep=torch.tensor([16, 1])).logits
    last = torch.stack([row[valid == 1][-2:] for row, valid in zip(whole, mask, strict=True)])
    assert torch.allclose(kept, last, atol=1e-6)
    assert torch.allclose(columns, whole[:, [16, 1]], atol=1e-6)
    with pytest.raises(ValueError, match="labels need the logits of all tokens"):
        model(token_ids, labels=token_ids, logits_to_keep=1)


def test_padding_between_tokens_is_as_if_not_there() -> None:
    """Virtual tokens before a prompt that is padded on the left, as prompt tuning makes them; and anything else."""
    model = make_model()
    token_ids = random_tokens(3, 12)
    mask = torch.tensor([[1] * 3 + [0] * 4 + [1] * 5, [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0], [1] * 12])
    out = model(token_ids, attention_mask=mask, labels=token_ids, output_hidden_states=True)
    alone = [model(row[valid == 1][None]) for row, valid in zip(token_ids, mask, strict=True)]
    assert relative_error(out.logits[mask == 1], torch.cat([one.logits[0] for one in alone])) < 1e-12
    assert not out.logits[mask == 0].any()
    counts = (mask[:, 1:] * mask[:, :-1]).bool()
    expected = F.cross_entropy(out.logits[:, :-1][counts], token_ids[:, 1:][counts])
    assert torch.allclose(out.loss, expected)
    last = model(token_ids, attention_mask=mask, logits_to_keep=1).logits[:, 0]
    assert relative_error(last, torch.stack([one.logits[0, -1] for one in alone])) < 1e-12
    for row, one in enumerate(alone):
        assert_same_cache(model, out.past_key_values.rows(model.config, torch.tensor([row])), one.past_key_values)
    assert out.past_key_values.get_seq_length() == 12


@pytest.mark.parametrize("length", [9, 1])
def test_lengths_are_padding_on_the_right(length: int) -> None:
    model = make_model(torch.float32)
    token_ids, lengths = random_tokens(3, length), torch.tensor([length, 0, length // 2])
    mask = torch.arange(length) < lengths[:, None]
    with torch.no_grad():
        one, other = model(token_ids, lengths=lengths), model(token_ids, attention_mask=mask)
    assert torch.equal(one.logits, other.logits)
    assert one.past_key_values.position.tolist() == lengths.tolist() == other.past_key_values.position.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": [[1, 1, 1], [1, 1, 1]]}, r"attention_mask has shape \(2, 3\), expected \(2, 4\)"),
        ({"attention_mask": [[[[1, 1, 1, 1]]]]}, r"attention_mask has shape \(1, 1, 1, 4\)"),
        ({"attention_mask": [[0, 1, 1, 1]] * 2, "lengths": [3, 3]}, "give one of them"),
    ],
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model()(random_tokens(2, 4), **{name: torch.tensor(value) for name, value in arguments.items()})


def test_a_cache_of_another_batch_is_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="past_key_values has 3 rows and input_ids 2"):
        model(random_tokens(2, 4), past_key_values=model.new_cache(3))


@pytest.mark.parametrize("case", ["right.short", "right.multi", "left.short", "left.multi"])
@pytest.mark.parametrize("name", names("hf_"))
def test_masks_of_megalodon_hf(folders: Callable[[str], Path], name: str, case: str) -> None:
    """Right padding gives its logits; its left padding leaks into the state, ours gives those of the unpadded row."""
    model = AutoModelForCausalLM.from_pretrained(folders(name)).eval()
    tensors = load(name)[1]
    token_ids, mask, theirs = (tensors[f"mask.{case}.{what}"] for what in ("input_ids", "attention_mask", "logits"))
    assert not mask.all()
    with torch.no_grad():
        ours = model(token_ids, attention_mask=mask).logits
        alone = [model(row[valid == 1][None]).logits[0] for row, valid in zip(token_ids, mask, strict=True)]
    assert relative_error(ours[mask == 1], torch.cat(alone)) < 1e-5
    difference = [(ours[i] - theirs[i])[mask[i] == 1].abs().max() for i in range(len(mask))]
    for row, error in enumerate(difference):
        assert error > 0.1 if case.startswith("left") and not mask[row].all() else error < 1e-3
