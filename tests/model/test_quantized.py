"""Weight-only quantisation: what is stored, how exact it is, and that every path computes the same from it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import megalodon_export
import megalodon_export.model as m
from megalodon_export.bundles import bundle
from megalodon_export.bundles.verify import Case, compare
from megalodon_export.cli import run
from megalodon_export.exporters.gemv_rewrite import quantized_linear, rewrite_gemv
from megalodon_export.exporters.programs import Limits
from megalodon_export.exporters.stages import export_stages
from megalodon_export.measure.roofline import prefill_flops, weight_bytes
from megalodon_export.model.quantized import pack, replace_linear_layers, unpack
from megalodon_export.runtimes import open_runtime
from support.small_models import VARIANTS, full, make_model, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = ("int8", "int4")
GROUPS = {"group_size": 2}  # the widths of the small models are 12 and 16
BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def quantized_model(weight_format: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> m.MegalodonForCausalLM:
    model = make_model(dtype, **overrides)
    m.quantize(model, weight_format, 2)
    return model


def quantized_layer(weight_format: str, n: int, k: int, group: int, bias: bool = True) -> m.QuantizedLinear:
    """Random integers and scales; the matrix is about as large as a unit vector's."""
    generator = torch.Generator().manual_seed(0)
    layer = m.QuantizedLinear(k, n, bias, weight_format, group)
    low, high = (-128, 128) if weight_format == "int8" else (-8, 8)
    integers = torch.randint(low, high, (n, k), generator=generator, dtype=torch.int8)
    layer.weight = integers if weight_format == "int8" else pack(integers)
    layer.scale = torch.rand(layer.scale.shape, generator=generator) / (high * k)
    if bias:
        layer.bias.data = torch.rand(n, generator=generator)
    return layer.requires_grad_(False)


def linears(model: torch.nn.Module) -> dict[str, m.QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, m.QuantizedLinear)}


# ---- what is stored --------------------------------------------------------------------------------------------------


def test_packed_bytes_hold_the_halves_of_a_row() -> None:
    integers = torch.randint(-8, 8, (5, 12), dtype=torch.int8)
    packed = pack(integers)
    assert (packed.dtype, packed.shape, packed.is_contiguous()) == (torch.uint8, (5, 6), True)
    for row in range(5):
        for j in range(6):
            assert int(packed[row, j]) & 15 == int(integers[row, j]) + 8
            assert int(packed[row, j]) >> 4 == int(integers[row, j + 6]) + 8
    assert torch.equal(unpack(packed), integers.int())


@pytest.mark.parametrize("weight_format", FORMATS)
def test_weights_are_within_half_a_step_of_the_original(weight_format: str) -> None:
    original = dict(make_model(torch.float32, **VARIANTS["all flags"]).named_parameters())
    model = quantized_model(weight_format, **VARIANTS["all flags"])
    found = linears(model)
    assert len(found) == 8 * 2 + 1  # wz wv wr wh1 wh2 fc1 fc2 fc3 of two layers, head
    for name, layer in found.items():
        int4 = weight_format == "int4" and name != "lm_head"
        k, groups = layer.in_features, layer.in_features // 2 if int4 else 1
        assert layer.weight.shape == (layer.out_features, k // 2 if int4 else k)
        assert (layer.weight.dtype, layer.scale.dtype) == (torch.uint8 if int4 else torch.int8, torch.float32)
        assert layer.scale.shape == (layer.out_features, groups)
        assert all(tensor.is_contiguous() for tensor in (layer.weight, layer.scale))
        source = original["model.embed.weight" if name == "lm_head" else f"{name}.weight"]
        error = (layer.dequantized(torch.float32) - source).abs().unflatten(-1, (groups, -1))
        assert (error <= layer.scale[..., None] * 0.5001).all()
        largest = source.abs().unflatten(-1, (groups, -1)).amax(-1)  # the steps are no larger than they have to be
        assert (layer.scale <= largest / (7 if int4 else 127)).all()


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_layer_computes_its_definition(weight_format: str, dtype: torch.dtype) -> None:
    layer = quantized_layer(weight_format, 6, 16, 4).to(dtype)
    integers = layer.weight if weight_format == "int8" else unpack(layer.weight)
    weights = torch.zeros(6, 16, dtype=torch.float64)
    for row in range(6):
        for column in range(16):
            group = column // 4 if weight_format == "int4" else 0
            weights[row, column] = float(integers[row, column]) * float(layer.scale[row, group])
    x = torch.rand(3, 2, 16, dtype=torch.float64).to(dtype)
    expected = x.double() @ weights.T + layer.bias.double()
    assert layer(x).dtype == dtype
    assert torch.allclose(layer(x).double(), expected, atol=BOUNDS[dtype], rtol=BOUNDS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("variant", ["all flags", "megalodon-hf", "no affine"])
def test_a_saved_model_is_the_same_bit_by_bit(
    variant: str, weight_format: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make_model(dtype, **VARIANTS[variant])
    model.save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float").eval()
    m.quantize(model, weight_format, 2)
    model.save_pretrained(tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    assert (config["weight_format"], config["group_size"]) == (weight_format, 2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized").eval()
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() == load_file(tmp_path / "quantized" / "model.safetensors").keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    ids = random_tokens(2, 9)
    assert torch.equal(model.prefill(ids, full(ids)), loaded.prefill(ids, full(ids)))
    scales = [p for name, p in loaded.to(torch.float32).state_dict().items() if name.endswith("scale")]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype=torch.bfloat16).state_dict()
    kept = [p for name, p in again.items() if name.endswith("scale")]
    assert all(torch.equal(a, b) for a, b in zip(scales, kept, strict=True))  # float32 in every dtype


def test_a_tied_embedding_stays_and_the_head_gets_integers_of_its_own() -> None:
    model = quantized_model("int4", **VARIANTS["all flags"])
    assert model.config.share_emb
    assert torch.equal(model.model.embed.weight, make_model(torch.float32, **VARIANTS["all flags"]).model.embed.weight)
    assert isinstance(model.lm_head, m.QuantizedLinear)
    assert model.lm_head.weight.dtype == torch.int8
    assert model.dtype_of_weights == torch.float32


def test_logits_move_by_less_in_int8_than_in_int4() -> None:
    exact, ids = make_model(torch.float64), random_tokens(2, 20)
    expected = exact.score(ids, full(ids)).detach()
    errors = []
    for weight_format in FORMATS:
        logits = quantized_model(weight_format, torch.float64).score(ids, full(ids)).detach()
        errors.append(float((logits - expected).norm() / expected.norm()))
    assert 0 < errors[0] < 0.05
    assert errors[0] < errors[1] < 0.5


# ---- the decode of one stream ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from(list(BOUNDS)),
    st.integers(1, 40),
    st.sampled_from([1, 2, 3, 16, 32, 48]),
    st.integers(1, 5),
    st.integers(1, 3),
    st.booleans(),
)
def test_streamed_products_are_those_of_the_layer(
    weight_format: str, dtype: torch.dtype, n: int, group: int, half_groups: int, batch: int, bias: bool
) -> None:
    layer = quantized_layer(weight_format, n, 2 * half_groups * group, group, bias)
    layer.bias = None if layer.bias is None else torch.nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    x = torch.rand(batch, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    actual, expected = quantized_linear(x, layer.weight, layer.scale, layer.bias), layer(x)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.allclose(actual.double(), expected.double(), rtol=BOUNDS[dtype], atol=BOUNDS[dtype])


@pytest.mark.parametrize("variant", ["plain", "all flags", "megalodon-hf"])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_decode_step_of_one_stream_dequantises_no_matrix(weight_format: str, variant: str) -> None:
    model = quantized_model(weight_format, num_layers=1, **VARIANTS[variant])
    m.freeze_constants(model)
    count = 0
    for stage in export_stages(model, "decode_one", Limits.of(model.config)).values():
        graph = stage.graph.graph
        expected = stage.graph(*(t.clone() for t in stage.examples))
        rewrite_gemv(graph)
        stage.graph.recompile()
        count += len(graph.find_nodes(op="call_function", target=quantized_linear))
        targets = {node.target for node in graph.nodes if node.op == "call_function"}
        assert not targets & {torch.ops.aten.linear.default, torch.ops.aten.bmm.default}
        for node in graph.find_nodes(op="placeholder"):
            if not node.meta["val"].is_floating_point() and node.meta["val"].dim() == 2:
                assert {user.target for user in node.users} == {quantized_linear}
        for a, b in zip(stage.graph(*(t.clone() for t in stage.examples)), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    assert count == len(linears(model))


# ---- bundles ---------------------------------------------------------------------------------------------------------


# Slow: each format takes a minute of compiling. The numbers of both are compared without AOTInductor above.
@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["int8_bundle", "int4_bundle"])
def test_programs_equal_the_quantised_model(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], fixture: str
) -> None:
    folder, name = request.getfixturevalue(fixture), fixture.removesuffix("_bundle")
    manifest = bundle.read(folder)
    assert manifest.weight_format == name
    pair = open_runtime("aoti", folder, manifest), open_runtime("eager", folder, manifest)
    calls = ((5,), *(None,) * 8, (64,), (90,), *(None,) * 3)
    logits, cache, _ = compare(*pair, Case("one stream", 1, calls))
    assert max(logits, cache) <= (1e-4 if name == "int8" else 0.25)
    logits, cache, _ = compare(*pair, Case("three streams", 3, ((5, 0, 70), None, None)))
    assert max(logits, cache) <= (1e-4 if name == "int8" else 0.25)
    stored = load_file(folder / "model.safetensors")
    weight = stored["model.layers.0.attn.wz.weight"]
    assert (weight.dtype, weight.shape) == ((torch.int8, (16, 32)) if name == "int8" else (torch.uint8, (16, 16)))
    assert (folder / "model.safetensors").stat().st_size < (checkpoints["tiny"] / "model.safetensors").stat().st_size
    assert manifest.programs.aoti is not None
    inputs = [one for stage in manifest.programs.aoti.stages["decode_one"].stages for one in stage.inputs]
    assert {one.dtype for one in inputs if one.name.endswith("attn.wz.weight")} == {dtype_of(weight)}


def dtype_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@pytest.mark.slow
def test_a_quantised_bundle_in_daily_use(int8_bundle: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = int8_bundle
    texts = {}
    for runtime in ("aoti", "eager"):
        session = megalodon_export.load(folder, runtime=runtime)
        texts[runtime] = "".join(session.generate("In the", max_new_tokens=12))
        state = session.snapshot()
        more = "".join(session.generate(max_new_tokens=8))
        session.restore(state)
        assert "".join(session.generate(max_new_tokens=8)) == more
    assert texts["aoti"] == texts["eager"]
    assert run(["verify", str(folder)]) == 0
    assert run(["bench", str(folder), "--batch", "1", "--tokens", "2", "--prompt-tokens", "4"]) == 0
    capsys.readouterr()
    assert run(["inspect", str(folder)]) == 0
    assert re.search(r"linear +int8", capsys.readouterr().out)
    assert "int8" in (folder / "README.md").read_text()
    again = ["aoti", "--checkpoint", str(folder), "--weight-format", "int4", "--out", str(tmp_path / "again")]
    assert run([*again, "--device", "cpu"]) == 1
    assert "are int8 already; quantise the original checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_quantised_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = make_model(torch.float32)
    with pytest.raises(ValueError, match="weight_format is 'int3', expected one of int8, int4"):
        m.quantize(model, "int3")
    for group_size, words in (
        (32, "model_dim is 12, expected a multiple of twice group_size 32"),
        (-1, "group_size is"),
    ):
        with pytest.raises(ValueError, match=words):
            m.quantize(model, "int4", group_size)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchao.quantization", None)
        with pytest.raises(ImportError, match=r"pip install 'megalodon-export\[quantize\]'"):
            m.quantize(model, "int8")
    assert not linears(model)
    assert model.config.weight_format == "float"
    m.quantize(model, "int8")
    with pytest.raises(ValueError, match="are int8 already"):
        m.quantize(model, "int8")
    thirds = make_model(ffn_hidden_dim=24)
    m.quantize(thirds, "int4", 3)
    with pytest.raises(TypeError, match="in groups of a power of two, not of 3"):
        m.use_kernels(thirds.float())


# ---- floors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "all flags", "megalodon-hf"])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_floors_count_the_bytes_that_are_stored(weight_format: str, variant: str) -> None:
    model = quantized_model(weight_format, **VARIANTS[variant])
    m.freeze_constants(model)
    used = ("cema.frozen.p", "cema.frozen.q", "cema.frozen.gamma", "cema.frozen.omega")
    expected = sum(p.nbytes for name, p in model.named_parameters() if ".cema." not in name and ".embed." not in name)
    expected += sum(b.nbytes for name, b in model.named_buffers() if name.endswith((*used, ".weight", ".scale")))
    assert weight_bytes(model.config, torch.float32) == expected
    assert prefill_flops(model.config, 2, 7) == prefill_flops(make_model(**VARIANTS[variant]).config, 2, 7)


def test_every_linear_layer_is_replaced() -> None:
    model = make_model(**VARIANTS["all flags"])
    seen: list[str] = []

    def note(layer: torch.nn.Linear, weight_format: str) -> m.QuantizedLinear:
        seen.append(weight_format)
        return m.QuantizedLinear(layer.in_features, layer.out_features, layer.bias is not None, weight_format, 2)

    replace_linear_layers(model, "int4", note)
    assert not [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert (seen.count("int4"), seen.count("int8")) == (16, 1)
