"""Training as a user does it: mixed precision, dropout, checkpointing, segments, torch.compile, the Trainer."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainingArguments

import megalodon_export.model as m
from support.small_models import SMALL, make_model, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = ("blocked", "fft")
RECIPE = Path(__file__).parents[2] / "artifacts" / "recipe"


def gradients(model: m.MegalodonForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    """The gradients of a loss at every parameter; all of them have one."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_equal_gradients(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    for name, gradient in a.items():
        assert torch.allclose(gradient, b[name], rtol=1e-9, atol=tolerance), name


# ---- precision -------------------------------------------------------------------------------------------------------


def test_both_forms_of_prefill_have_the_same_gradients() -> None:
    token_ids = random_tokens(2, 70)
    found = []
    for form in FORMS:
        model = make_model(ema_prefill=form).train()
        found.append(gradients(model, model(token_ids, labels=token_ids).loss))
    assert_equal_gradients(*found)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_trains_near_float32(form: str) -> None:
    model = make_model(torch.float32, ema_prefill=form).train()
    token_ids = random_tokens(2, 70)
    out = model(token_ids, labels=token_ids)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(token_ids, labels=token_ids)
    assert half.logits.dtype == torch.float32
    assert half.loss.item() == pytest.approx(out.loss.item(), rel=0.01)
    expected = gradients(model, out.loss)
    for name, gradient in gradients(model, half.loss).items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() < 0.1 * expected[name].norm(), name


@pytest.mark.parametrize("form", FORMS)
def test_autocast_leaves_norms_and_ema_in_float32(form: str) -> None:
    model = make_model(torch.float32, num_layers=1, ema_prefill=form).train()
    seen: list[Tensor] = []
    for module in (model.model.layers[0].attn.timenorm, model.model.layers[0].attn.cema):
        module.register_forward_hook(lambda _, args, out: seen.append(out[0]))
    token_ids = random_tokens(2, 70)
    model(token_ids)
    with torch.autocast("cpu", torch.bfloat16):
        model(token_ids)
    norm, ema, norm_half, ema_half = seen
    assert torch.equal(norm, norm_half)
    assert torch.equal(ema, ema_half)


# ---- dropout, initialisation, loss -----------------------------------------------------------------------------------


def test_dropout_is_where_the_original_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[float, tuple[int, ...]]] = []
    real = F.dropout

    def spy(x: Tensor, p: float = 0.5, *args: Any, **options: Any) -> Tensor:
        calls.append((p, tuple(x.shape)))
        return real(x, p, *args, **options)

    rates = {"dropout": 0.1, "attention_dropout": 0.2, "hidden_dropout": 0.3}
    model = make_model(**rates, num_layers=1, chunk_size=32).train()
    monkeypatch.setattr(F, "dropout", spy)
    model(random_tokens(2, 32))
    c = model.config
    assert calls == [
        (0.1, (2, 32, c.model_dim)),  # the embedding
        (0.3, (2, 32, c.model_dim)),  # the normalised EMA
        *[(0.2, (2, c.num_heads, 8, 8 * parts)) for parts in (1, 2, 3, 4)],  # attention, in four parts
        (0.3, (2, 32, c.value_dim)),  # gated attention
        (0.1, (2, 32, c.model_dim)),  # what attention adds
        (0.3, (2, 32, c.ffn_hidden_dim)),
        (0.1, (2, 32, c.model_dim)),  # what the feed-forward network adds
    ]
    model.eval()(random_tokens(2, 32))
    assert len(calls) == 10  # none in evaluation


def test_drop_key_drops_keys_before_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    token_ids = random_tokens(1, 11)
    plain, model = make_model(), make_model(attention_dropout=0.4, drop_key=True)
    assert torch.equal(plain(token_ids).logits, model(token_ids).logits)
    model.train()
    assert not torch.equal(model(token_ids).logits, model(token_ids).logits)
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.zeros_like(x))  # every key is dropped
    nothing = model(token_ids).logits
    for layer in plain.model.layers:
        torch.nn.init.zeros_(layer.attn.wh2.weight)  # as if attention had found nothing
    assert torch.allclose(nothing, plain(token_ids).logits, atol=1e-12)


@pytest.mark.parametrize("mode", ["he", "bert", "gaussian", "xavier"])
def test_initialisation_is_the_originals(mode: str) -> None:
    torch.manual_seed(0)
    sizes = {**SMALL, "model_dim": 192, "z_dim": 128, "value_dim": 160, "ffn_hidden_dim": 224, "cema_ndim": 16}
    model = m.MegalodonForCausalLM(m.MegalodonConfig(**{**sizes, "vocab_size": 501}, init_mode=mode))
    layer = model.model.layers[0]
    for linear in (*(getattr(layer.attn, n) for n in ("wz", "wv", "wr", "wh1", "wh2")), layer.ffn.fc1, layer.ffn.fc2):
        out, inside = linear.weight.shape
        std = {
            "he": (2 / (1 + 5) / inside) ** 0.5,
            "bert": 0.02,
            "gaussian": 0.9866,
            "xavier": (2 / (inside + out)) ** 0.5,
        }
        assert linear.weight.std().item() == pytest.approx(std[mode], rel=0.03)
        assert linear.bias is None or not linear.bias.any()
    for weight in (model.model.embed.weight, model.lm_head.weight):
        assert weight.std().item() == pytest.approx(0.9866 / 192**0.5, rel=0.02)  # cut off at 3 standard deviations
        assert weight.abs().max() <= 3 / 192**0.5
    cema = layer.attn.cema
    for parameter, std in ((cema.alpha, 0.2), (cema.delta, 0.2), (cema.gamma[..., 0], 1.0), (cema.omega, 0.25)):
        assert parameter.std().item() == pytest.approx(std, rel=0.12)
    frequencies = torch.sigmoid(cema.theta).flatten()
    expected = torch.exp(-math.log(192) / 192 * torch.arange(1, 193))
    assert torch.allclose(frequencies.sort(descending=True).values, expected, rtol=1e-4)
    assert not torch.equal(frequencies, frequencies.sort(descending=True).values)  # in random order


def test_loss_over_accumulated_batches() -> None:
    model = make_model().train()
    token_ids = random_tokens(2, 12)
    labels = token_ids.index_fill(1, torch.arange(3), -100)
    out = model(token_ids, labels=labels)
    counted = model(token_ids, labels=labels, num_items_in_batch=torch.tensor(50))
    assert torch.allclose(counted.loss, out.loss * 18 / 50)


# ---- checkpointing and segments --------------------------------------------------------------------------------------


def saved_bytes(function: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What a function returns, and the bytes that autograd keeps for it."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        return function(), sum(kept.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_memory_alone(form: str, reentrant: bool) -> None:
    rates = {"dropout": 0.1, "attention_dropout": 0.1, "hidden_dropout": 0.1}
    model = make_model(ema_prefill=form, num_layers=4, **rates).train()
    token_ids = random_tokens(2, 70)

    def run() -> tuple[dict[str, Tensor], int]:
        torch.manual_seed(1)  # the same dropout, also where a layer is run again
        loss, size = saved_bytes(lambda: model(token_ids, labels=token_ids).loss)
        model.zero_grad()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, size

    expected, whole = run()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    actual, size = run()
    assert_equal_gradients(expected, actual)
    assert size < whole / 3
    model.gradient_checkpointing_disable()
    assert run()[1] > 3 * size


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_truncated_back_propagation(form: str, checkpointing: bool) -> None:
    """Segments with a carried cache: the whole text's losses, and gradients that take the incoming cache as given."""
    model = make_model(ema_prefill=form).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    token_ids = random_tokens(2, 48)
    cache, losses, starts, found = model.new_cache(2), [], [], []
    for piece in token_ids.split(17, dim=1):
        starts.append(cache.clone(model.config))
        losses.append(model(piece, labels=piece, past_key_values=cache).loss)
    assert not any(t.requires_grad for t in cache.tensors())
    together = gradients(model, torch.stack(losses).sum())  # backward through all, after every cache has moved on
    for piece, start in zip(token_ids.split(17, dim=1), starts, strict=True):
        found.append(gradients(model, model(piece, labels=piece, past_key_values=start.clone(model.config)).loss))
    assert_equal_gradients(together, {name: sum(g[name] for g in found) for name in together})

    whole = model(token_ids).logits[:, 34:-1].flatten(0, 1)
    assert torch.allclose(losses[-1], F.cross_entropy(whole, token_ids[:, 35:].flatten()), atol=1e-12)

    torch.manual_seed(0)
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    slope = sum((found[-1][name] * v).sum() for name, v in direction.items())
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for name, p in model.named_parameters():
                p += sign * step * direction[name]
            piece = token_ids[:, 34:]
            values.append(model(piece, labels=piece, past_key_values=starts[-1].clone(model.config)).loss)
    assert torch.allclose((values[0] - values[1]) / (2 * step), torch.as_tensor(slope), rtol=1e-5)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "autocast", "tolerance"),
    [
        ("aot_eager", False, 1e-9),
        pytest.param("aot_eager", True, 0.02, marks=pytest.mark.slow),
        pytest.param("inductor", False, 1e-9, marks=pytest.mark.slow),
    ],
)
def test_compiled_training_step(backend: str, autocast: bool, tolerance: float) -> None:
    """Forward, loss and backward without a graph break: the steps of eager. Autocast and Inductor are slow."""
    torch.compiler.reset()
    token_ids = random_tokens(2, 40)
    found = []
    for compiled in (False, True):
        model = make_model(torch.float32 if autocast else torch.float64, num_layers=1).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

        def loss_of(ids: Tensor, model: m.MegalodonForCausalLM = model) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return model(ids, labels=ids).loss

        function = torch.compile(loss_of, backend=backend, fullgraph=True) if compiled else loss_of
        losses = []
        for _ in range(4):
            loss = function(token_ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=tolerance)
    assert found[1][-1] < found[1][0]


# ---- the Trainer -----------------------------------------------------------------------------------------------------


def trained(folder: Path, resume: Path | None = None) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of a dozen steps on the default recipe's smallest model, over this project's README."""
    sys.path.append(str(RECIPE))
    import train as recipe

    torch.manual_seed(0)
    rates = {"dropout": 0.05, "hidden_dropout": 0.05}
    model = m.MegalodonForCausalLM(m.MegalodonConfig(**{**recipe.COMMON, **recipe.TINY, **rates}))
    text = torch.tensor(list((RECIPE.parent.parent / "README.md").read_bytes()[: 64 * 48])).view(-1, 48)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=12, save_steps=6, per_device_train_batch_size=4, logging_steps=1, seed=0,
        gradient_accumulation_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in text])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model.state_dict()


def test_trainer_lowers_the_loss_and_resumes_to_identical_losses(tmp_path: Path) -> None:
    losses, weights = trained(tmp_path / "whole")
    resumed, again = trained(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-6")
    assert len(losses) == 12
    assert losses[-1] < 0.75 * losses[0]
    assert resumed[6:] == losses[6:]  # the first six are read from the checkpoint
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
