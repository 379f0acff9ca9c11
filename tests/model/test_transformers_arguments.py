"""Arguments that callers of transformers' models pass to `forward`, and the outputs and fields that they look for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, DataCollatorWithFlattening, DynamicCache, StaticCache

import megalodon_export.model as m
from megalodon_export.model.transformers_api.generation import CACHE
from support.small_models import SMALL, make_model, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = random_tokens(2, 12)
LEFT = torch.ones_like(TOKENS)
LEFT[0, :5] = 0


@pytest.fixture(scope="module")
def model() -> m.MegalodonForCausalLM:
    return make_model()


# ---- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"tokenizer": object(), "assistant_tokenizer": object()},
        {"token_type_ids": torch.zeros(2, 12, dtype=torch.int64)},
        {"output_attentions": True},
        {"output_router_logits": True},
        {"is_causal": True, "return_dict": True},
        {"position_ids": torch.arange(12)[None]},
        {"position_ids": torch.arange(12).expand(2, 12)},
        {"position_ids": None, "cu_seq_lens_q": None, "seq_idx": None},
        {"max_length_q": 12, "max_length_k": 12, "cu_seq_lens_q": torch.tensor([0, 12, 24])},
        {"seq_idx": torch.tensor([[0], [1]]).expand(2, 12)},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_says_nothing_new_is_accepted(model: m.MegalodonForCausalLM, arguments: dict[str, Any]) -> None:
    out = model(TOKENS, **arguments)
    assert torch.equal(out.logits, model(TOKENS).logits)
    assert out.get("attentions") is None


def test_positions_of_padded_rows_and_of_a_cache_are_accepted(model: m.MegalodonForCausalLM) -> None:
    positions = (LEFT.cumsum(1) - 1).masked_fill(LEFT == 0, 1)
    expected = model(TOKENS, attention_mask=LEFT)
    out = model(TOKENS, attention_mask=LEFT, position_ids=positions)
    assert torch.equal(out.logits, expected.logits)
    after = model(TOKENS[:, :1], position_ids=torch.tensor([[7], [12]]), past_key_values=out.past_key_values)
    assert torch.equal(after.logits, model(TOKENS[:, :1], past_key_values=expected.past_key_values).logits)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "input_ids or inputs_embeds, and neither"),
        ({"input_ids": TOKENS, "inputs_embeds": torch.zeros(2, 4, 12)}, ValueError, "and both of them came"),
        ({"input_ids": TOKENS[:, :0]}, ValueError, r"input_ids has shape \(2, 0\), expected \(batch, tokens\)"),
        ({"input_ids": TOKENS[:0]}, ValueError, r"input_ids has shape \(0, 12\)"),
        ({"input_ids": TOKENS[0]}, ValueError, r"input_ids has shape \(12,\)"),
        ({"inputs_embeds": torch.zeros(2, 0, 12)}, ValueError, r"inputs_embeds has shape \(2, 0, 12\)"),
        (
            {"input_ids": TOKENS, "past_key_values": DynamicCache()},
            TypeError,
            r"DynamicCache.*model.new_cache\(batch\)",
        ),
        ({"input_ids": TOKENS, "cache": []}, TypeError, r"past_key_values is a list.*model.new_cache\(batch\)"),
        ({"input_ids": TOKENS, "past_key_values": ((TOKENS,),)}, TypeError, "past_key_values is a tuple"),
        ({"input_ids": TOKENS, "is_causal": False}, ValueError, "is_causal is False"),
        (
            {"input_ids": TOKENS, "position_ids": torch.arange(5, 17)[None]},
            ValueError,
            r"position_ids of row 0 are \[5, 6, 7, 8, 9, 10, ...\], and its tokens are at \[0, 1, 2, 3, 4, 5, ...\]",
        ),
        (
            {"input_ids": TOKENS, "attention_mask": LEFT, "position_ids": torch.arange(12)[None]},
            ValueError,
            "position_ids of row 0 are .* leave position_ids out",
        ),
        (
            {"input_ids": TOKENS, "position_ids": torch.zeros(3, 2, 12)},
            ValueError,
            r"position_ids has shape \(3, 2, 12\), expected \(2, 12\), or \(12\) for all rows",
        ),
        ({"input_ids": TOKENS, "seq_idx": TOKENS[:1]}, ValueError, r"seq_idx has shape \(1, 12\), expected \(2, 12\)"),
        ({"input_ids": TOKENS, "cu_seq_lens_q": torch.tensor([0, 5, 12])}, ValueError, "documents' ends from 0 to 24"),
        ({"input_ids": TOKENS, "cu_seq_lens_q": torch.tensor([0, 12, 12, 24])}, ValueError, "expected ends that grow"),
        (
            {
                "input_ids": TOKENS,
                "cu_seq_lens_q": torch.tensor([0, 5, 12, 24]),
                "cu_seq_lens_k": torch.tensor([0, 6, 12, 24]),
            },
            ValueError,
            "cu_seq_lens_q and cu_seq_lens_k say different things",
        ),
        (
            {"input_ids": TOKENS, "attention_mask": LEFT, "cu_seq_lens_q": torch.tensor([0, 5, 12, 24])},
            ValueError,
            "cu_seq_lens_q: packed sequences do not go with padding",
        ),
        (
            {"input_ids": TOKENS, "use_cache": True, "cu_seq_lens_q": torch.tensor([0, 5, 12, 24])},
            ValueError,
            "packed sequences leave no cache",
        ),
    ],
    ids=str,
)
def test_refused(
    model: m.MegalodonForCausalLM, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model(**arguments)


def test_a_static_cache_is_refused_by_generate(model: m.MegalodonForCausalLM) -> None:
    cache = StaticCache(config=AutoConfig.for_model("llama"), max_cache_len=20)
    with pytest.raises(TypeError, match=r"StaticCache.*model.new_cache\(batch\)"):
        model.generate(TOKENS, max_new_tokens=2, **{CACHE: cache})


def test_packed_sequences_over_a_cache_are_refused(model: m.MegalodonForCausalLM) -> None:
    with pytest.raises(ValueError, match="seq_idx: packed sequences do not go with a cache"):
        model(TOKENS, past_key_values=model.new_cache(2), seq_idx=(torch.arange(12) > 4).long().expand(2, 12))


# ---- packed sequences ------------------------------------------------------------------------------------------------

COUNTS = [70, 3, 1, 40, 33, 2]


def packed(name: str) -> dict[str, Tensor]:
    """The arguments that say that a row holds documents of COUNTS tokens."""
    counts = torch.tensor(COUNTS)
    return {
        "position_ids": {"position_ids": torch.cat([torch.arange(count) for count in COUNTS])[None]},
        "seq_idx": {"seq_idx": torch.arange(len(COUNTS)).repeat_interleave(counts)[None].int()},
        "cu_seq_lens_q": {"cu_seq_lens_q": F.pad(counts.cumsum(0), (1, 0)).int()},
    }[name]


@pytest.mark.parametrize("name", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_packed_documents_give_what_each_gives_alone(name: str) -> None:
    model = make_model()
    token_ids = random_tokens(1, sum(COUNTS))
    out = model(token_ids, labels=token_ids, output_hidden_states=True, **packed(name))
    documents = token_ids.split(COUNTS, dim=1)
    alone = [model(document, labels=document, output_hidden_states=True) for document in documents]
    assert torch.allclose(out.logits, torch.cat([one.logits for one in alone], dim=1), atol=1e-12)
    steps = [count - 1 for count in COUNTS]
    mean = sum(one.loss * count for one, count in zip(alone, steps, strict=True) if count) / sum(steps)
    assert torch.allclose(out.loss, mean, atol=1e-12)
    for layer, found in enumerate(out.hidden_states):
        expected = torch.cat([one.hidden_states[layer] for one in alone], dim=1)
        assert torch.allclose(found, expected, atol=1e-12)
    assert out.past_key_values is None


def test_a_batch_of_packed_rows(model: m.MegalodonForCausalLM) -> None:
    seq_idx = (torch.arange(12) >= torch.tensor([[5], [12]])).long()
    out = model(TOKENS, labels=TOKENS, seq_idx=seq_idx, logits_to_keep=0)
    first, second, whole = (model(t) for t in (TOKENS[:1, :5], TOKENS[:1, 5:], TOKENS[1:]))
    assert torch.allclose(out.logits[0], torch.cat([first.logits[0], second.logits[0]]), atol=1e-12)
    assert torch.allclose(out.logits[1], whole.logits[0], atol=1e-12)
    assert torch.equal(model(TOKENS, seq_idx=seq_idx, logits_to_keep=2).logits, out.logits[:, -2:])


def test_gradients_of_the_collator_of_packed_sequences() -> None:
    model = make_model().train()
    rows = [random_tokens(count, seed=count).tolist() for count in (9, 40, 17)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = dict(collate([{"input_ids": row, "labels": row} for row in rows]))
    parameters = list(model.parameters())
    found = torch.autograd.grad(model(**batch).loss, parameters)
    losses = [model(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in (torch.tensor([row]) for row in rows)]
    expected = torch.autograd.grad(sum(losses) / sum(len(row) - 1 for row in rows), parameters)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))


# ---- embeddings and hidden states ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "padded"])
@pytest.mark.parametrize("options", [{}, {"scale_emb": True}], ids=["plain", "scaled"])
def test_embeddings_give_what_their_tokens_give(mask: Tensor | None, options: dict[str, Any]) -> None:
    model = make_model(**options)
    embeddings = model.get_input_embeddings()(TOKENS)
    out = model(inputs_embeds=embeddings, attention_mask=mask, labels=TOKENS, use_cache=True)
    expected = model(TOKENS, attention_mask=mask, labels=TOKENS, use_cache=True)
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.loss, expected.loss)
    for one, other in zip(out.past_key_values.tensors(), expected.past_key_values.tensors(), strict=True):
        assert torch.equal(one, other)
    step = model.get_input_embeddings()(TOKENS[:, :1])
    after = model(inputs_embeds=step, past_key_values=out.past_key_values).logits
    assert torch.allclose(after, model(TOKENS[:, :1], past_key_values=expected.past_key_values).logits, atol=1e-9)


def test_generate_from_embeddings(model: m.MegalodonForCausalLM) -> None:
    options = {"attention_mask": LEFT, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(TOKENS, **options)[:, 12:]
    assert torch.equal(model.generate(inputs_embeds=model.get_input_embeddings()(TOKENS), **options), expected)


def test_generate_with_position_ids(model: m.MegalodonForCausalLM) -> None:
    options = {"attention_mask": LEFT, "max_new_tokens": 8, "do_sample": False}
    positions = (LEFT.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(model.generate(TOKENS, position_ids=positions, **options), model.generate(TOKENS, **options))


@pytest.mark.parametrize("from_config", [False, True])
def test_hidden_states(from_config: bool) -> None:
    model = make_model(num_layers=3)
    model.config.output_hidden_states = from_config
    arguments = {} if from_config else {"output_hidden_states": True}
    out = model(TOKENS, attention_mask=LEFT, use_cache=True, **arguments)
    plain = make_model(num_layers=3)(TOKENS, attention_mask=LEFT, use_cache=True)
    assert torch.equal(out.logits, plain.logits)
    assert plain.hidden_states is None
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 12, SMALL["model_dim"])] * 4
    assert torch.equal(out.hidden_states[0][LEFT == 1], model.get_input_embeddings()(TOKENS)[LEFT == 1])
    assert torch.equal(out.hidden_states[-1], model.model(TOKENS, attention_mask=LEFT)[0])
    shallow = copy.deepcopy(model)
    shallow.model.layers = shallow.model.layers[:1]
    between = shallow.model(TOKENS, attention_mask=LEFT, output_hidden_states=True, use_cache=False).hidden_states
    assert len(between) == 2  # the last one is normed, so the layer's own output is compared by its norm
    assert all(not h[LEFT == 0].any() for h in out.hidden_states)
    step = model(TOKENS[:, :1], past_key_values=out.past_key_values, **arguments)
    assert [tuple(h.shape) for h in step.hidden_states] == [(2, 1, SMALL["model_dim"])] * 4
    assert torch.allclose(model.logits(step.hidden_states[-1]), step.logits)
    assert model(TOKENS, return_dict=False, output_hidden_states=True)[-1][0].shape == (2, 12, SMALL["model_dim"])


@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "padded"])
def test_hidden_states_keep_their_gradients(mask: Tensor | None) -> None:
    model = make_model()
    out = model(TOKENS, attention_mask=mask, labels=TOKENS, output_hidden_states=True)
    for hidden in out.hidden_states:
        hidden.retain_grad()
    out.loss.backward()
    assert all(hidden.grad is not None and hidden.grad.abs().sum() > 0 for hidden in out.hidden_states)


def test_generate_returns_hidden_states(model: m.MegalodonForCausalLM) -> None:
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    assistant = make_model(num_layers=1)
    for more in ({}, {"assistant_model": assistant}, {"num_beams": 2}):
        out = model.generate(TOKENS[:1], output_hidden_states=True, **options, **more)
        assert torch.equal(out.sequences, model.generate(TOKENS[:1], **options, **more).sequences)
        assert len(out.hidden_states) == 3
        assert all(len(step) == 3 for step in out.hidden_states)


# Slow: torch.compile traces a layer. It buys that packing and hidden states stay outside the compiled layers.
@pytest.mark.slow
def test_compiled_layers_take_them() -> None:
    plain, compiled = make_model(num_layers=1), make_model(num_layers=1)
    torch.compiler.reset()
    compiled.compile(backend="eager", fullgraph=True)
    seq_idx = (torch.arange(12) >= torch.tensor([[5], [12]])).int()
    with torch.no_grad():
        for options in ({"attention_mask": LEFT}, {"seq_idx": seq_idx}):
            options = {"output_hidden_states": True, "labels": TOKENS, **options}
            found, expected = compiled(TOKENS, **options), plain(TOKENS, **options)
            assert torch.allclose(found.loss, expected.loss, atol=1e-12)
            for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
                assert torch.allclose(one, other, atol=1e-12)
    torch.compiler.reset()


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_labels_as_upstream(model: m.MegalodonForCausalLM) -> None:
    logits = model(TOKENS).logits
    labels = TOKENS.clone()
    labels[0, 4] = 3
    aligned = F.pad(labels[:, 1:], (0, 1), value=-100)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(model(TOKENS, labels=labels).loss, expected)
    assert torch.allclose(model(TOKENS, labels=TOKENS, shift_labels=aligned).loss, expected)
    assert torch.allclose(model(TOKENS, shift_labels=aligned).loss, expected)
    assert torch.allclose(model(TOKENS, labels=labels, num_items_in_batch=torch.tensor(11)).loss, expected * 2)
    some = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=3)
    assert not torch.allclose(some, expected)
    assert torch.allclose(model(TOKENS, labels=labels, ignore_index=3).loss, some)


def test_padding_is_no_target(model: m.MegalodonForCausalLM) -> None:
    logits = model(TOKENS, attention_mask=LEFT).logits
    rows = [(logits[0, 5:-1], TOKENS[0, 6:]), (logits[1, :-1], TOKENS[1, 1:])]
    expected = F.cross_entropy(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
    assert torch.allclose(model(TOKENS, attention_mask=LEFT, labels=TOKENS).loss, expected)
    assert torch.allclose(model(TOKENS, attention_mask=LEFT, labels=TOKENS, ignore_index=-7).loss, expected)
    aligned = F.pad(TOKENS[:, 1:], (0, 1), value=-100)
    assert torch.allclose(model(TOKENS, attention_mask=LEFT, shift_labels=aligned).loss, expected)


def test_another_loss_function() -> None:
    model = make_model()
    seen: dict[str, Any] = {}

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **options: Any) -> Tensor:
        seen.update(options, labels=labels, vocab_size=vocab_size)
        return logits.sum()

    model.loss_function = loss
    out = model(TOKENS, attention_mask=LEFT, labels=TOKENS, num_items_in_batch=5)
    assert torch.equal(out.loss, out.logits.sum())
    assert seen.pop("labels")[0].tolist() == [-100] * 6 + TOKENS[0, 6:].tolist()
    assert seen == {"vocab_size": SMALL["vocab_size"], "num_items_in_batch": 5}


# ---- config ----------------------------------------------------------------------------------------------------------


def test_sizes_under_the_names_that_others_look_for(tmp_path: Any) -> None:
    config = m.MegalodonConfig(**SMALL)
    names = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    assert names.items() <= config.to_dict().items()
    config.save_pretrained(tmp_path)
    assert not names.keys() & AutoConfig.from_pretrained(tmp_path).to_diff_dict().keys()
    assert m.MegalodonConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert m.MegalodonConfig.from_dict(config.to_dict()).model_dim == 12
    assert m.MegalodonConfig(**{k: v for k, v in SMALL.items() if k != "model_dim"}, hidden_size=24).model_dim == 24
    with pytest.raises(ValueError, match="hidden_size is 24 and model_dim is 12; they are one size: give one"):
        m.MegalodonConfig(**SMALL, hidden_size=24)
