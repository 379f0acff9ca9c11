"""generate(), streaming and pipelines of transformers, over the model's own cache."""

from __future__ import annotations

from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    TextIteratorStreamer,
    pipeline,
)

import megalodon_export.model as m
from megalodon_export.bundles.checkpoints import default_checkpoint
from megalodon_export.generation.session import Session
from megalodon_export.model.transformers_api.generation import CACHE
from megalodon_export.runtimes.eager import ModelRuntime
from support.small_models import continued, greedy, make_model, padded, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = random_tokens(1, 9)


@pytest.fixture
def model() -> m.MegalodonForCausalLM:
    return make_model(torch.float32)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 4}], ids=str)
def test_greedy(model: m.MegalodonForCausalLM, options: dict[str, Any]) -> None:
    assert continued(model, PROMPT, max_new_tokens=20, **options) == greedy(model, PROMPT, 20)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_prompts_are_continued_as_each_alone(model: m.MegalodonForCausalLM, side: str, use_cache: bool) -> None:
    prompts = [random_tokens(n, seed=n) for n in (3, 9, 6)]
    token_ids, mask = padded(prompts, side)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache}
    out = model.generate(token_ids, attention_mask=mask, **options)
    assert out[:, 9:].tolist() == [greedy(model, prompt[None], 12) for prompt in prompts]


def test_sampling_and_several_sequences(model: m.MegalodonForCausalLM) -> None:
    def sampled(**options: Any) -> Tensor:
        torch.manual_seed(3)
        return model.generate(PROMPT, max_new_tokens=12, do_sample=True, num_return_sequences=3, **options)

    assert sampled().shape == (3, 21)
    assert torch.equal(sampled(), sampled(use_cache=False))
    assert len(sampled().unique(dim=0)) == 3


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=str)
def test_autocast_changes_no_token(model: m.MegalodonForCausalLM, options: dict[str, Any]) -> None:
    def written() -> Tensor:
        torch.manual_seed(3)
        return model.generate(PROMPT, max_new_tokens=12, **{"do_sample": False, **options})

    expected = written()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(written(), expected)


def test_passes_over_a_cache_run_under_autocast(model: m.MegalodonForCausalLM) -> None:
    """Their products are in bfloat16 then, as in training; the cache keeps its dtypes."""

    def passes() -> list[Tensor]:
        cache = model.new_cache(1)
        with torch.no_grad():
            logits = [model(PROMPT, past_key_values=cache).logits[:, -1]]
            logits += [model.decode(PROMPT[:, i], cache) for i in range(3)]
        return [*logits, *cache.tensors()]

    expected = passes()
    with torch.autocast("cpu", torch.bfloat16):
        found = passes()
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    assert (found[3] - expected[3]).norm() < 0.1 * expected[3].norm()


def test_beam_search_reorders_the_state(model: m.MegalodonForCausalLM) -> None:
    beams = {"max_new_tokens": 12, "num_beams": 4}
    found = continued(model, PROMPT, **beams)
    assert found == continued(model, PROMPT, **beams, use_cache=False)
    assert found != greedy(model, PROMPT, 12)  # so beams were exchanged


@pytest.mark.parametrize("assistant", ["itself", "another", "prompt"])
def test_assisted_generation_is_greedy(model: m.MegalodonForCausalLM, assistant: str) -> None:
    prompt = PROMPT.repeat(1, 3)
    helper = {"itself": model, "another": make_model(torch.float32, num_layers=1)}.get(assistant)
    options = {"prompt_lookup_num_tokens": 3} if helper is None else {"assistant_model": helper}
    assert continued(model, prompt, max_new_tokens=20, **options) == greedy(model, prompt, 20)
    torch.manual_seed(0)
    assert len(continued(model, prompt, max_new_tokens=20, do_sample=True, **options)) == 20


def llama() -> LlamaForCausalLM:
    """Another model over the same tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=23, **sizes, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("prompt", ["padded", "pad token inside", "pad token at either end", "no mask"])
@pytest.mark.parametrize("assistant", ["another", "llama", "prompt"])
def test_assisted_generation_from_padded_prompts(model: m.MegalodonForCausalLM, prompt: str, assistant: str) -> None:
    pad = 5
    tokens = PROMPT.repeat(1, 3)
    tokens[tokens == pad] = 6
    options: dict[str, Any] = {"attention_mask": torch.ones_like(tokens)}
    if prompt == "padded":
        expected = greedy(model, tokens, 20)
        tokens = torch.nn.functional.pad(tokens, (4, 0), value=pad)
        options = {"attention_mask": (tokens != pad).long()}
    else:
        tokens[0, [10, 11]] = pad
        if prompt == "pad token at either end":
            tokens[0, [0, -1]] = pad
        options = {} if prompt == "no mask" else {"attention_mask": torch.ones_like(tokens)}
        expected = greedy(model, tokens, 20)
    if assistant == "prompt":
        options["prompt_lookup_num_tokens"] = 3
    else:
        options["assistant_model"] = llama() if assistant == "llama" else make_model(torch.float32, num_layers=1)
    assert continued(model, tokens, max_new_tokens=20, pad_token_id=pad, **options) == expected


@pytest.mark.parametrize("side", ["none", "left"])
def test_as_the_assistant_of_another_model(model: m.MegalodonForCausalLM, side: str) -> None:
    target, options = llama(), {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    tokens = PROMPT.clamp(min=1)
    if side == "left":
        tokens = torch.nn.functional.pad(tokens, (4, 0))
    mask = (tokens != 0).long()
    expected = target.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(target.generate(tokens, attention_mask=mask, assistant_model=model, **options), expected)


def test_padded_columns_are_taken_back(model: m.MegalodonForCausalLM) -> None:
    token_ids, mask = padded([random_tokens(n, seed=n) for n in (3, 9)], "left")
    more = random_tokens(2, 6, seed=1)
    with torch.no_grad():
        cache, expected = model.new_cache(2), model.new_cache(2)
        cache.activate_past_recording()
        model(token_ids, attention_mask=mask, past_key_values=cache)
        model(more, past_key_values=cache)
        cache.crop(-8)  # six tokens, and two columns of the padded call
        model(token_ids[:, :7], attention_mask=mask[:, :7], past_key_values=expected)
        assert cache.get_seq_length() == expected.get_seq_length() == 7
        assert torch.equal(cache.position, expected.position)
        after, wanted = (model(more, past_key_values=one).logits for one in (cache, expected))
    assert torch.allclose(after, wanted, atol=1e-5)


def test_pad_tokens_of_prompts_without_a_mask(model: m.MegalodonForCausalLM) -> None:
    """Those at the ends are padding, as everywhere in transformers; one between two tokens is a token."""
    prompts = [PROMPT.clamp(min=1)[0, :6], PROMPT.clamp(min=1)[0]]
    prompts[1][4] = 0
    token_ids, mask = padded(prompts, "left")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(token_ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(token_ids, **options), expected)


def test_a_returned_cache_goes_on(model: m.MegalodonForCausalLM) -> None:
    assistant = make_model(torch.float32, num_layers=1)
    for options in ({}, {"assistant_model": assistant}):
        out = model.generate(PROMPT, do_sample=False, max_new_tokens=10, return_dict_in_generate=True, **options)
        cache = out[CACHE]
        assert isinstance(cache, Cache)
        assert isinstance(cache, m.MegalodonCache)
        assert cache.get_seq_length() == int(cache.position) == 18
        more = model.generate(out.sequences, do_sample=False, max_new_tokens=5, **{CACHE: cache})
        assert more[0, 9:].tolist() == greedy(model, PROMPT, 15)


def test_a_padded_batch_goes_on(model: m.MegalodonForCausalLM) -> None:
    prompts = [random_tokens(n, seed=n) for n in (3, 9)]
    token_ids, mask = (torch.nn.functional.pad(t, (2, 0)) for t in padded(prompts, "left"))  # no row fills the columns
    options = {"do_sample": False, "pad_token_id": 0}
    first = model.generate(token_ids, attention_mask=mask, max_new_tokens=4, return_dict_in_generate=True, **options)
    mask = torch.cat([mask, mask.new_ones(2, 4)], dim=1)
    more = model.generate(first.sequences, attention_mask=mask, max_new_tokens=5, **options, **{CACHE: first[CACHE]})
    assert more[:, 11:].tolist() == [greedy(model, prompt[None], 9) for prompt in prompts]


def test_tokens_are_taken_back(model: m.MegalodonForCausalLM) -> None:
    text = random_tokens(2, 30)
    with torch.no_grad():
        cache = model(text[:, :8]).past_key_values
        cache.activate_past_recording()
        model(text[:, 8:14], past_key_values=cache)
        model(text[:, 14:15], past_key_values=cache)
        cache.crop(-4)
        actual = model(text[:, 11:20], past_key_values=cache).logits
        cache.crop(0)
        expected = model(text[:, :20]).logits[:, 11:]
    assert torch.allclose(actual, expected, atol=1e-5)
    with pytest.raises(ValueError, match="1 tokens cannot be taken back: none were fed"):
        cache.crop(-1)
    model(text[:, 20:22], past_key_values=cache)
    with pytest.raises(ValueError, match="3 tokens cannot be taken back, only the last 2"):
        cache.crop(-3)
    with pytest.raises(ValueError, match="call activate_past_recording before"):
        model.new_cache(1).crop(-1)
    with pytest.raises(ValueError, match="inputs_embeds cannot be taken back"):
        model(inputs_embeds=model.get_input_embeddings()(text[:, :2]), past_key_values=cache)


def test_rows_of_a_cache(model: m.MegalodonForCausalLM) -> None:
    cache = model(random_tokens(2, 9)).past_key_values
    positions = [t.clone() for t in cache.tensors()]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 1, 0]))
    assert cache.batch_size == 3
    assert all(torch.equal(now, then[[1, 0, 0]]) for now, then in zip(cache.tensors(), positions, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, ValueError, "does not generate by contrastive search"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, ValueError, "by group beam search"),
        (
            {"assistant_model": make_model(torch.float32), "inputs": random_tokens(2, 9)},
            ValueError,
            "one prompt at a time in transformers, and 2 came",
        ),
        ({"inputs": torch.zeros(1, 0, dtype=torch.int64)}, ValueError, r"input_ids has shape \(1, 0\)"),
        ({CACHE: DynamicCache()}, TypeError, r"DynamicCache.*model.new_cache\(batch\)"),
        ({"unknown": 1}, ValueError, "not used by the model"),
        ({"dola_layers": "high"}, ValueError, "by dola generation"),
        ({"cache_implementation": "static"}, ValueError, "cache_implementation is 'static'"),
        ({"cache_implementation": "paged"}, NotImplementedError, "no pages of keys and values"),
        (
            {"prefill_chunk_size": 2, "attention_mask": torch.tensor([[1] * 8 + [0]])},
            ValueError,
            "pad them on the left",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_refused(model: m.MegalodonForCausalLM, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model.generate(**{"inputs": PROMPT, "max_new_tokens": 3, "do_sample": False, **options})


# ---- from a folder ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bible() -> m.MegalodonForCausalLM:
    """The default checkpoint."""
    return AutoModelForCausalLM.from_pretrained(default_checkpoint()).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(default_checkpoint(), padding_side="left")


def test_greedy_is_that_of_a_session(bible: m.MegalodonForCausalLM, tokenizer: Any) -> None:
    prompts = ["In the beginning", "And the king of Babylon said unto them, "]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    out = bible.generate(**batch, do_sample=False, max_new_tokens=40)
    try:
        session = Session(ModelRuntime(bible))
        for row, prompt in zip(out, prompts, strict=True):
            session.reset()
            expected = list(session.generate_ids(tokenizer(prompt).input_ids, 40))
            assert row[batch.input_ids.shape[1] :].tolist() == expected
    finally:
        m.unfreeze_constants(bible)


def test_streamed_text(bible: m.MegalodonForCausalLM, tokenizer: Any) -> None:
    prompt = tokenizer("In the beginning", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {**prompt, "do_sample": False, "max_new_tokens": 40}
    thread = Thread(target=bible.generate, kwargs={**options, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    expected = bible.generate(**options)[0, prompt.input_ids.shape[1] :]
    assert len(pieces) > 20
    assert "".join(pieces) == tokenizer.decode(expected)


def test_text_generation_pipeline(bible: m.MegalodonForCausalLM, tokenizer: Any) -> None:
    prompts = ["In the beginning", "And the king of Babylon said unto them, "]
    generate = pipeline("text-generation", model=bible, tokenizer=tokenizer)
    options = {"do_sample": False, "max_new_tokens": 20, "return_full_text": False}
    batched = [texts[0]["generated_text"] for texts in generate(prompts, batch_size=2, **options)]
    assert batched == [generate(prompt, **options)[0]["generated_text"] for prompt in prompts]
    assert all(len(text) == 20 for text in batched)


def test_stop_strings(bible: m.MegalodonForCausalLM, tokenizer: Any) -> None:
    prompts = tokenizer(
        ["In the beginning", "And the king of Babylon said unto them, "], return_tensors="pt", padding=True
    )
    options: dict[str, Any] = {**prompts, "do_sample": False, "max_new_tokens": 60}
    texts = tokenizer.batch_decode(bible.generate(**options)[:, prompts.input_ids.shape[1] :])
    found = bible.generate(**options, tokenizer=tokenizer, stop_strings=["the ", ","])
    written = tokenizer.batch_decode(found[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
    for text, whole in zip(written, texts, strict=True):
        ends = [whole.index(stop) + len(stop) for stop in ("the ", ",") if stop in whole]
        assert text == whole[: min(ends)]
        assert len(text) < len(whole)


def test_token_healing(bible: m.MegalodonForCausalLM, tokenizer: Any) -> None:
    """Tokens are bytes here, so the healed prompt is the prompt."""
    prompt = tokenizer("In the beginning", return_tensors="pt")
    options: dict[str, Any] = {**prompt, "do_sample": False, "max_new_tokens": 10}
    healed = bible.generate(**options, tokenizer=tokenizer, token_healing=True)
    assert tokenizer.decode(healed[0], skip_special_tokens=True).startswith("In the beginning")


def test_stop_strings_with_a_streamer(bible: m.MegalodonForCausalLM, tokenizer: Any) -> None:
    prompt = tokenizer("In the beginning", return_tensors="pt")
    options: dict[str, Any] = {**prompt, "do_sample": False, "max_new_tokens": 60, "tokenizer": tokenizer}
    expected = bible.generate(**options, stop_strings=["the "])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    found = bible.generate(**options, stop_strings=["the "], streamer=streamer)
    assert torch.equal(found, expected)
    assert "".join(streamer) == tokenizer.decode(expected[0, prompt.input_ids.shape[1] :])
