"""The model as a whole: its config, its dtypes, its cache, training and compilation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from golden_data import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Reference
from safetensors.torch import load_file
from torch import Tensor
from torch.fx.experimental import _config as symbolic_shapes
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import megalodon_export.model as m

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {
    **{"vocab_size": 23, "model_dim": 12, "num_layers": 2, "num_heads": 2, "z_dim": 8, "value_dim": 12},
    **{"ffn_hidden_dim": 16, "cema_ndim": 3, "chunk_size": 5, "norm_num_groups": 3},
}
HF: dict[str, Any] = {"norm_statistics": "megalodon-hf", "projection_bias": True, "rescale_nffn": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all flags": {"swiglu": True, "rescale_nffn": True, "scale_emb": True, "share_emb": True, "rope_base": 1e5},
    "no affine": {"norm_affine": False, "norm_eps": 1e-3, "output_size": 7},
    "megalodon-hf": HF,
    "one head": {"num_heads": 1, "norm_num_groups": 12},
    "many heads": {"num_heads": 4, "norm_num_groups": 1},
    **{f"chunk {size}": {"chunk_size": size} for size in (1, 2, 3, 16)},
}


def make_model(dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any) -> m.MegalodonForCausalLM:
    """A small model in which every parameter is random and moves the logits, in evaluation mode."""
    torch.manual_seed(seed)
    model = m.MegalodonForCausalLM(m.MegalodonConfig(**{**SMALL, **overrides})).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=1.0 if ".cema." in name else 0.4)
    return model.to(dtype).eval()


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def full(token_ids: Tensor) -> Tensor:
    return torch.full((token_ids.shape[0],), token_ids.shape[1])


# ---- config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0, expected a whole number of at least 1"),
        ({"num_layers": 1.5}, "num_layers is 1.5"),
        ({"chunk_size": True}, "chunk_size is True"),
        ({"z_dim": 6}, "z_dim 6 over num_heads 2 must be a whole even number"),
        ({"value_dim": 13}, "value_dim 13 must be divisible by num_heads 2"),
        ({"norm_num_groups": 5}, "model_dim 12 must be divisible by norm_num_groups 5"),
        ({"output_size": 0}, "output_size is 0, expected -1"),
        ({"share_emb": True, "output_size": 7}, "output_size must be -1 or vocab_size 23, not 7"),
        ({"dropout": 1.0}, "dropout is 1.0, expected 0 <= dropout < 1"),
        ({"attention_dropout": -0.1}, "attention_dropout is -0.1"),
        ({"hidden_dropout": 2}, "hidden_dropout is 2"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0, expected a positive number"),
        ({"rope_base": -1.0}, "rope_base is -1.0"),
        ({"norm_statistics": "other"}, "norm_statistics is 'other', expected one of megalodon, megalodon-hf"),
        ({"ema_prefill": "scan"}, "ema_prefill is 'scan', expected one of blocked, fft"),
        ({"init_mode": "zeros"}, "init_mode is 'zeros', expected one of he"),
    ],
)
def test_invalid_config(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="invalid Megalodon config") as caught:
        m.MegalodonConfig(**{**SMALL, **change})
    assert message in str(caught.value)


def test_every_problem_of_a_config_is_named() -> None:
    with pytest.raises(ValueError, match=r"value_dim 13.*dropout is 1\.5.*init_mode"):
        m.MegalodonConfig(**{**SMALL, "value_dim": 13, "dropout": 1.5, "init_mode": "no"})


@pytest.mark.parametrize(
    ("name", "millions"), [("200M", 200), ("1.3B", 1300), ("1.3B-pg19", 1300), ("7.1B", 7100), ("7.3B", 7300)]
)
def test_presets_are_as_large_as_their_names_say(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = m.MegalodonForCausalLM(m.preset(name))
    assert 0.88 < model.num_parameters() / (millions * 1e6) < 1.12


def test_unknown_preset() -> None:
    with pytest.raises(KeyError, match="no preset '8B'; there are 200M"):
        m.preset("8B")
    assert m.preset("200M", chunk_size=64).chunk_size == 64


def test_megalodon_hf_folder_is_refused_with_advice(tmp_path: Path) -> None:
    folder = write_checkpoint("hf_base", tmp_path / "hf")
    for load in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="python -m megalodon_export convert megalodon-hf SRC DST"):
            load.from_pretrained(folder)


# ---- saving and dtypes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "all flags", "no affine", "megalodon-hf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    make_model(torch.float32, **VARIANTS[variant]).save_pretrained(tmp_path / "single")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "single", dtype=dtype).eval()
    model.save_pretrained(tmp_path / "again")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert isinstance(loaded, m.MegalodonForCausalLM)
    assert loaded.dtype == dtype
    for (name, tensor), (_, other) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert tensor.dtype == other.dtype == (torch.float32 if ".cema." in name else dtype), name
        assert torch.equal(tensor, other), name
    assert ("lm_head.weight" in load_file(tmp_path / "again" / "model.safetensors")) != loaded.config.share_emb
    ignored = {"dtype", "_name_or_path"}
    ours, theirs = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (model.config, loaded.config))
    assert ours == theirs
    token_ids = random_tokens(2, 13)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, loaded(token_ids).logits)
        base = AutoModel.from_pretrained(tmp_path / "again").eval()
        assert torch.equal(base(token_ids)[0], model.model(token_ids)[0])


def test_tied_head_is_the_embedding() -> None:
    model = make_model(share_emb=True)
    assert model.lm_head.weight is model.model.embed.weight
    assert make_model().lm_head.weight is not make_model().model.embed.weight


def test_new_model_has_the_originals_initialisation() -> None:
    torch.manual_seed(0)
    model = m.MegalodonForCausalLM(m.MegalodonConfig(**{**SMALL, "model_dim": 96, "rescale_nffn": True}))
    for i, layer in enumerate(model.model.layers):
        zeros = (layer.attn.gamma, layer.attn.beta, layer.attn.timenorm.weight, layer.attn.rmsnorm.weight)
        assert not any(t.any() for t in (*zeros, layer.attn.wz.bias, layer.ffn.norm.weight, model.model.norm.weight))
        assert torch.equal(layer.ffn.alpha, torch.full((96,), 0.1 * 0.5**i))
        assert not layer.attn.cema.gamma[..., 1].any()
        assert 0.15 < layer.attn.cema.alpha.std() < 0.25
    assert 0.8 < model.model.embed.weight.std() * 96**0.5 < 1.1


def test_float16_is_refused() -> None:
    model = make_model(torch.float16)
    token_ids = random_tokens(1, 3)
    cache = m.MegalodonCache.allocate(model.config, 1, torch.float32)
    calls: list[Callable[[], Any]] = [
        lambda: model(token_ids),
        lambda: model.prefill(token_ids, full(token_ids)),
        lambda: model.decode(token_ids[:, 0], cache),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"does not run in float16.*torch\.bfloat16 or torch\.float32"):
            call()


def test_bfloat16_stays_near_float32() -> None:
    model = make_model(torch.float32)
    token_ids = random_tokens(2, 60)
    with torch.no_grad():
        expected = model(token_ids).logits
        cema = {name: t.clone() for name, t in model.state_dict().items() if ".cema." in name}
        half = model.bfloat16()
        half.load_state_dict(cema, strict=False)
        for layer in half.model.layers:
            layer.attn.cema.float()
        out = half(token_ids)
    assert out.logits.dtype == torch.float32
    dtypes = {name.split(".")[-1]: t.dtype for name, t in named_tensors(half.config, out.past_key_values)}
    assert dtypes["key"] == dtypes["value"] == torch.bfloat16
    assert dtypes["ema_state"] == dtypes["norm_mean"] == dtypes["norm_var"] == torch.float32
    assert (out.logits - expected).abs().mean() < 0.05 * expected.std()


def test_forward_refuses_what_it_does_not_do() -> None:
    model = make_model()
    token_ids = random_tokens(2, 4)
    with pytest.raises(ValueError, match="attention_mask has padding"):
        model(token_ids, attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))
    for unknown in (
        {"inputs_embeds": torch.zeros(2, 4, 12)},
        {"inputs_embeds": torch.zeros(1)},
        {"output_attentions": True},
    ):
        with pytest.raises(TypeError, match=f"no argument {next(iter(unknown))}"):
            model(token_ids, **unknown)
    harmless = {
        "attention_mask": torch.ones(2, 4),
        "output_attentions": False,
        "return_dict": True,
        "position_ids": None,
    }
    assert torch.equal(model(token_ids, **harmless).logits, model(token_ids).logits)


# ---- the same numbers as the reference -------------------------------------------------------------------------------


def named_tensors(config: m.MegalodonConfig, cache: m.MegalodonCache) -> list[tuple[str, Tensor]]:
    return [(spec.name, t) for spec, t in zip(m.cache_layout(config), cache.tensors(), strict=True)]


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
            out = model.prefill(token_ids, lengths, cache, length + slack, all_logits=True)
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


# ---- constants, training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["blocked", "fft"])
def test_frozen_constants_change_nothing_and_training_drops_them(form: str) -> None:
    model = make_model(ema_prefill=form)
    token_ids = random_tokens(2, 40)

    def run() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            out = model(token_ids)
            return out.logits, model.decode(token_ids[:, 0], out.past_key_values)

    expected = run()
    keys = list(model.state_dict())
    m.freeze_constants(model)
    assert list(model.state_dict()) == keys  # derived, so never saved
    assert any(".frozen." in name for name, _ in model.named_buffers())
    for actual, other in zip(run(), expected, strict=True):
        assert torch.equal(actual, other)
    assert model.eval().model.rotary.frozen is not None
    model.train()
    assert not any(".frozen." in name for name, _ in model.named_buffers())
    m.freeze_constants(model)
    m.unfreeze_constants(model)
    assert not any(".frozen." in name for name, _ in model.named_buffers())


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout", "hidden_dropout"])
def test_dropout_is_for_training_only(kind: str) -> None:
    model = make_model(**{kind: 0.5})
    plain = make_model()
    token_ids = random_tokens(2, 12)
    assert torch.equal(model(token_ids).logits, plain(token_ids).logits)
    model.train()
    first, second = model(token_ids).logits, model(token_ids).logits
    assert not torch.equal(first, second)
    assert torch.allclose(plain.train()(token_ids).logits, plain.eval()(token_ids).logits, atol=1e-12)


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = m.MegalodonForCausalLM(m.MegalodonConfig(**SMALL, swiglu=True, rescale_nffn=True)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    token_ids = random_tokens(2, 24)
    losses = []
    for _ in range(25):
        out = model(token_ids, labels=token_ids)
        assert out.past_key_values is None  # training needs no cache
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert losses[-1] < 0.5 * losses[0]


def test_labels_are_shifted_and_minus_100_is_ignored() -> None:
    model = make_model()
    token_ids = random_tokens(1, 8)
    labels = token_ids.clone()
    labels[:, :4] = -100
    out = model(token_ids, labels=labels)
    expected = -torch.log_softmax(out.logits[0], -1)[torch.arange(3, 7), token_ids[0, 4:]].mean()
    assert torch.allclose(out.loss, expected)


def test_gradient_passes_through_a_cached_prefill() -> None:
    model = make_model()
    token_ids = random_tokens(1, 12)
    cache = model.new_cache(1)
    model(token_ids[:, :4], past_key_values=cache)
    model(token_ids[:, 4:], past_key_values=cache).logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(t.requires_grad for t in cache.tensors())


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def strict_compiler() -> Iterator[None]:
    """A second compilation of a function is an error; that a count of blocks may be 1 is no reason for one."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True), symbolic_shapes.patch(backed_size_oblivious=True):
        yield
    torch.compiler.reset()


def mark(token_ids: Tensor, *others: Tensor) -> None:
    """Batch and length vary; everything else of a model's inputs is fixed."""
    for tensor in (token_ids, *others):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    if token_ids.dim() == 2:
        torch._dynamo.maybe_mark_dynamic(token_ids, 1)


def assert_compiled_is_eager(
    model: m.MegalodonForCausalLM, sizes: list[tuple[int, int]], bound: int, backend: str, tolerance: float
) -> None:
    """One compiled prefill and one compiled decode, against eager, over sizes (B, L) and positions in the chunk."""
    m.freeze_constants(model)
    prefill, decode = (torch.compile(f, backend=backend, fullgraph=True) for f in (model.prefill, model.decode))
    for batch, length in sizes:
        token_ids = random_tokens(batch, length)
        lengths = (torch.arange(batch) + length // 2).clamp(min=1, max=length)
        cache, expected_cache = model.new_cache(batch), model.new_cache(batch)
        for _ in range(2):  # from the start, then from inside a chunk
            mark(token_ids, lengths, *cache.tensors())
            actual = prefill(token_ids, lengths, cache, bound)
            assert torch.allclose(actual, model.prefill(token_ids, lengths, expected_cache, bound), atol=tolerance)
        step = random_tokens(batch)
        mark(step, *cache.tensors())
        assert torch.allclose(decode(step, cache), model.decode(step, expected_cache), atol=tolerance)
        for (name, tensor), expected in zip(named_tensors(model.config, cache), expected_cache.tensors(), strict=True):
            assert torch.allclose(tensor, expected, atol=tolerance), name


@pytest.mark.usefixtures("strict_compiler")
@pytest.mark.parametrize(
    ("batches", "bound", "form"),
    [((3, 2, 7, 1), SMALL["chunk_size"], "blocked"), ((3, 2, 7, 1), 70, "blocked"), ((2, 5, 1), 70, "fft")],
)
def test_compiled_programs_never_recompile(batches: tuple[int, ...], bound: int, form: str) -> None:
    model = make_model(num_layers=1, ema_prefill=form)
    lengths = [n for n in (4, 2, 3, 5, 6, 31, 32, 33, 64, 65, 69, 70, 1) if n <= bound]
    with torch.no_grad():
        assert_compiled_is_eager(model, list(itertools.product(batches, lengths)), bound, "eager", 1e-10)


@pytest.mark.usefixtures("strict_compiler")
def test_prefill_in_inductors_operations() -> None:
    """What Inductor would compile, without its minutes of C++ compilation."""
    model = make_model(num_layers=1)
    with torch.no_grad():
        assert_compiled_is_eager(model, [(3, 4), (2, 7), (7, 2)], 12, "aot_eager_decomp_partition", 1e-10)


@pytest.mark.usefixtures("strict_compiler")
def test_decode_by_inductor() -> None:
    model = make_model(torch.float32, num_layers=1)
    m.freeze_constants(model)
    decode = torch.compile(model.decode, fullgraph=True)
    with torch.no_grad():
        for batch in (3, 2, 7):
            cache, expected_cache = model.new_cache(batch), model.new_cache(batch)
            for position in range(SMALL["chunk_size"] + 2):
                token_ids = random_tokens(batch, seed=position)
                mark(token_ids, *cache.tensors())
                actual, expected = decode(token_ids, cache), model.decode(token_ids, expected_cache)
                assert torch.allclose(actual, expected, atol=1e-4)


def test_compiled_training_has_no_graph_break() -> None:
    torch.compiler.reset()
    model = make_model().train()
    token_ids = random_tokens(2, 12)
    prefill = torch.compile(model.prefill, backend="aot_eager", fullgraph=True)
    prefill(token_ids, full(token_ids), all_logits=True).square().mean().backward()
    compiled = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.prefill(token_ids, full(token_ids), all_logits=True).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(compiled[name], parameter.grad, atol=1e-10), name
