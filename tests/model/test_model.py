"""The model as a whole: its config, its dtypes, saving and training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import megalodon_export.model as m
from support.golden_data import write_checkpoint
from support.small_models import SMALL, VARIANTS, full, make_model, named_tensors, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")


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
    for unknown in ({"attention_bias": torch.zeros(1)}, {"head_mask": torch.ones(2)}, {"encoder_outputs": ()}):
        with pytest.raises(TypeError, match=f"no argument {next(iter(unknown))}"):
            model(token_ids, **unknown)


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
