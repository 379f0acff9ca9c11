"""Conversion of the two kinds of checkpoints, through real folders, against what their own code computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

import megalodon_export.model as m
from megalodon_export.model.conversion import convert_upstream
from megalodon_export.model.rotary import rotate
from support.golden_data import halves, load, names, relative_error, under, write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

UPSTREAM = [name for name in names("model_") if name != "model_inference_longdoc"]
HF = names("hf_")
ALL = UPSTREAM + HF
FORMS = ("blocked", "fft")


def tolerance(name: str) -> float:
    return 1e-3 if name.startswith("hf_") else 2e-4


def load_model(folder: Path, form: str = "blocked") -> m.MegalodonForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, ema_prefill=form).eval()


def whole_cases(info: dict[str, Any]) -> list[tuple[str, int]]:
    cases = [c for c in info["cases"] if "tokens" in c and c["name"] != "grads" and not c["name"].startswith("mask.")]
    assert len(cases) >= 4
    return [(case["name"], case["tokens"][1]) for case in cases]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ALL)
def test_logits_of_whole_prompts(folders: Callable[[str], Path], name: str, form: str) -> None:
    info, tensors = load(name)
    model = load_model(folders(name), form)
    for case, length in whole_cases(info):
        token_ids, expected = tensors["tokens"][:, :length], tensors[f"{case}.logits"]
        with torch.no_grad():
            fresh = model(token_ids, use_cache=False).logits
            cached = model(token_ids, use_cache=True).logits
        assert (fresh - expected).abs().max() < tolerance(name), case
        assert (cached - expected).abs().max() < tolerance(name), case


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ALL)
def test_streams_and_their_cache(folders: Callable[[str], Path], name: str, form: str) -> None:
    info, tensors = load(name)
    model = load_model(folders(name), form)
    segments = next(case["segments"] for case in info["cases"] if case["name"] == "stream")
    marks = {int(key.split(".")[1].removeprefix("cache_after_")) for key in tensors if ".cache_after_" in key}
    assert marks
    cache, start, logits = model.new_cache(tensors["tokens"].shape[0]), 0, []
    for length in segments:
        with torch.no_grad():
            piece = model(tensors["tokens"][:, start : start + length], past_key_values=cache)
        logits.append(piece.logits)
        start += length
        if start in marks:
            marks.remove(start)
            check_cache(model.config, cache, under(tensors, f"stream.cache_after_{start}."), start, name)
    assert not marks
    assert (torch.cat(logits, dim=1) - tensors["stream.logits"]).abs().max() < tolerance(name)


def check_cache(
    config: m.MegalodonConfig, cache: m.MegalodonCache, golden: dict[str, Tensor], position: int, name: str
) -> None:
    """Our cache against theirs: (B len H d) keys and values, interleaved and chunk-relative, or absolute (hf)."""
    assert (cache.position == position).all()
    for i, layer in enumerate(cache.layers):
        theirs = under(golden, f"layers.{i}.")
        length = theirs["attn_k"].shape[1]
        key, value = layer.key[:, :, :length], layer.value[:, :, :length]
        expected_key = theirs["attn_k"].transpose(1, 2)
        if name.startswith("hf_"):
            pairs = torch.arange(0, config.z_head_dim, 2) / config.z_head_dim
            angle = (position - length) * (config.rope_base or 10_000.0) ** -pairs
            key = rotate(key, torch.cos(angle), torch.sin(angle))
        else:
            expected_key = expected_key[..., halves(config.z_head_dim)]
            assert length == position % config.chunk_size
        ema = theirs["ema"] if "ema" in theirs else theirs["hx"]
        actual = {"key": key, "value": value, "ema": layer.ema_state, "mean": layer.norm_mean, "var": layer.norm_var}
        expected = (expected_key, theirs["attn_v"].transpose(1, 2), ema, theirs["norm_mean"], theirs["norm_var"])
        for (what, ours), other in zip(actual.items(), expected, strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=tolerance(name) / 2, msg=f"layer {i} {what}")
    torch.testing.assert_close(cache.final.norm_mean, golden["final_norm.mean"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache.final.norm_var, golden["final_norm.var"], rtol=1e-4, atol=1e-4)


def upstream_gradients(model: m.MegalodonForCausalLM) -> dict[str, Tensor]:
    """Our gradients under the original's names, in its layout."""
    heads, dz = model.config.num_heads, model.config.z_head_dim
    back = (torch.arange(heads)[:, None] * dz + halves(dz).argsort()).flatten()
    gradients = {}
    for ours, parameter in model.named_parameters():
        name = ours.replace("model.layers", "layers").replace(".attn.", ".mega.").replace(".ffn.", ".nffn.")
        name = name.replace("model.norm", "output.final_norm").replace("model.embed", "embed")
        gradient = parameter.grad
        assert gradient is not None, ours
        if ".mega.wz." in name:
            gradient = gradient[back]
        if name.endswith((".mega.gamma", ".mega.beta")):
            gradient = gradient[:, back]
        gradients[name.replace("lm_head", "output.output")] = gradient
    return gradients


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for name in UPSTREAM if "grads.loss" in load(name)[1]])
def test_gradients_of_the_original(folders: Callable[[str], Path], name: str, form: str) -> None:
    tensors = load(name)[1]
    targets = tensors["grads.targets"]
    model = load_model(folders(name), form).train()
    logits = model(tensors["tokens"][:, : targets.shape[1]]).logits
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    losses.mean().backward()
    assert (losses - tensors["grads.token_losses"]).abs().max() < 1e-4
    ours = upstream_gradients(model)
    golden = {key: t for key, t in under(tensors, "grads.").items() if key not in ("targets", "token_losses", "loss")}
    assert golden.keys() == ours.keys()
    errors = {key: relative_error(ours[key], expected) for key, expected in golden.items()}
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", HF)
def test_gradients_of_megalodon_hf(folders: Callable[[str], Path], name: str, form: str) -> None:
    info, tensors = load(name)
    labels = tensors["grads.labels"]
    model = load_model(folders(name), form).train()
    out = model(tensors["tokens"][:, : labels.shape[1]], labels=labels)
    out.loss.backward()
    assert abs(out.loss.item() - tensors["grads.loss"].item()) < 1e-4
    golden = {key: t for key, t in under(tensors, "grads.").items() if key not in ("labels", "loss")}
    checked = 0
    for key, parameter in model.named_parameters():
        ours = parameter.grad
        assert ours is not None
        if key.endswith("cema.gamma"):
            expected = torch.stack([golden[f"{key}_real"], golden[f"{key}_imag"]], dim=-1)
        elif key.endswith("ffn.alpha"):
            continue  # a constant there
        else:
            expected = golden[key.replace("rmsnorm.weight", "rmsnorm.gamma")].view_as(ours)
        if key == "model.embed.weight":  # there the padding token's embedding is not trained
            ours = ours.index_fill(0, torch.tensor(info["config"]["pad_token_id"]), 0.0)
            expected = expected.index_fill(0, torch.tensor(info["config"]["pad_token_id"]), 0.0)
        assert relative_error(ours, expected) < 1e-4, key
        checked += 1
    assert checked == len(golden) - info["config"]["num_layers"]  # gamma_real and gamma_imag are one tensor here


def test_losses_of_a_long_document(tmp_path: Path) -> None:
    name = "model_inference_longdoc"
    tensors = load(name)[1]
    inputs, targets = tensors["tokens"][:, :-1], tensors["tokens"][:, 1:]
    convert_upstream(write_checkpoint(name, tmp_path / "src"), tmp_path / "dst")
    model = load_model(tmp_path / "dst")
    cache = model.new_cache(1)
    with torch.no_grad():
        whole = model(inputs, use_cache=False).logits
        pieces = [model(piece, past_key_values=cache).logits for piece in inputs.split(2 * model.config.chunk_size, 1)]
    for logits in (whole, torch.cat(pieces, dim=1)):
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        assert (losses - tensors["plain.loss"]).abs().max() < 1e-4
