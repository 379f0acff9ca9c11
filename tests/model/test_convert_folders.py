"""Converted folders: what is in them, and which sources are refused, with nothing written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import megalodon_export.model as m
from megalodon_export.model.conversion import ConversionError, convert_megalodon_hf, convert_upstream
from support.golden_data import convert, load, under, write_checkpoint, write_hf, write_upstream

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- what the folder is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model_base", "model_small_share_emb", "hf_flags"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_dtype_is_kept_or_chosen(tmp_path: Path, name: str, dtype: torch.dtype | None) -> None:
    convert(name)(write_checkpoint(name, tmp_path / "src"), tmp_path / "dst", dtype)
    reference_model = AutoModelForCausalLM.from_pretrained(tmp_path / "dst", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    stored = load_file(tmp_path / "dst" / "model.safetensors")
    state = model.state_dict()
    for key, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if ".cema." in key else dtype or torch.float32), key
        assert state[key].dtype == tensor.dtype
        assert torch.equal(state[key], tensor), key
        assert torch.equal(reference_model.state_dict()[key], tensor.float()), key
    assert set(state) - set(stored) == ({"lm_head.weight"} if model.config.share_emb else set())
    assert model.lm_head.weight.data_ptr() == model.model.embed.weight.data_ptr() or not model.config.share_emb


def test_bfloat16_source_stays_bfloat16(tmp_path: Path) -> None:
    info, tensors = load("hf_base")
    state = {key: t.bfloat16() for key, t in under(tensors, "state_dict.").items()}
    convert_megalodon_hf(write_hf(tmp_path / "src", info["config"], state), tmp_path / "dst")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    assert model.dtype == torch.bfloat16
    attention, source = model.model.layers[0].attn, under(state, "model.layers.0.attn.")
    assert torch.equal(attention.wz.weight, source["wz.weight"])
    assert torch.equal(attention.cema.alpha, source["cema.alpha"].float())


def test_float16_source_needs_a_dtype(tmp_path: Path) -> None:
    info, tensors = load("model_small_plain")
    state = {key: t.half() if t.is_floating_point() else t for key, t in under(tensors, "state_dict.").items()}
    src = write_upstream(tmp_path / "src", info["config"], state, "fp16")
    with pytest.raises(ConversionError, match=r"float16.*--dtype bfloat16 or --dtype float32"):
        convert_upstream(src, tmp_path / "dst")
    assert_nothing_written(tmp_path)
    with pytest.raises(ConversionError, match="cannot convert to float16"):
        convert_upstream(src, tmp_path / "dst", torch.float16)
    convert_upstream(src, tmp_path / "dst", torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dst").dtype == torch.bfloat16


def test_folder_has_config_generation_config_and_tokenizer(tmp_path: Path) -> None:
    src = write_checkpoint("hf_base", tmp_path / "src")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "unrelated.bin"):
        (src / name).write_text(f'"{name}"')
    config = convert_megalodon_hf(src, tmp_path / "deep" / "dst")
    files = {path.name for path in (tmp_path / "deep" / "dst").iterdir()}
    assert files == {
        *("config.json", "generation_config.json", "model.safetensors", "modeling_megalodon.py"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    }
    generation = GenerationConfig.from_pretrained(tmp_path / "deep" / "dst")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)
    loaded = AutoConfig.from_pretrained(tmp_path / "deep" / "dst")
    assert (loaded.norm_statistics, loaded.projection_bias, loaded.share_emb) == ("megalodon-hf", True, True)
    assert loaded.eos_token_id == config.eos_token_id == 2
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["dst"]


def test_norm_without_affine_of_megalodon_hf(tmp_path: Path) -> None:
    info, tensors = load("hf_base")
    absent = ("timenorm.", "rmsnorm.", "ffn.norm.", "model.norm.")
    state = {k: t for k, t in under(tensors, "state_dict.").items() if not any(part in k for part in absent)}
    src = write_hf(tmp_path / "src", {**info["config"], "norm_affine": False}, state)
    convert_megalodon_hf(src, tmp_path / "dst")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    assert not model.model.norm.weight.any()
    assert model.model.layers[0].attn.rmsnorm.weight is None


def test_rescaling_of_megalodon_hf_is_its_constant(folders: Callable[[str], Path]) -> None:
    for i, layer in enumerate(AutoModelForCausalLM.from_pretrained(folders("hf_flags")).model.layers):
        assert torch.equal(layer.ffn.alpha, torch.full_like(layer.ffn.alpha, 0.1 * 0.5**i))


def test_untied_head_of_megalodon_hf(tmp_path: Path) -> None:
    info, tensors = load("hf_base")
    src = write_hf(tmp_path / "src", {**info["config"], "output_size": 5}, under(tensors, "state_dict."))
    state = load_file(src / "model.safetensors")
    save_file({**state, "lm_head.weight": torch.ones(5, 48)}, src / "model.safetensors")
    assert not convert_megalodon_hf(src, tmp_path / "dst").share_emb
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "dst").lm_head.weight, torch.ones(5, 48))


def test_sharded_safetensors(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    src = write_checkpoint("hf_base", tmp_path / "src")
    state = load_file(src / "model.safetensors")
    (src / "model.safetensors").unlink()
    shard = {key: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(sorted(state))}
    for file in set(shard.values()):
        save_file({key: t for key, t in state.items() if shard[key] == file}, src / file)
    (src / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard}))
    convert_megalodon_hf(src, tmp_path / "dst")
    whole = load_file(folders("hf_base") / "model.safetensors")
    assert all(torch.equal(t, whole[key]) for key, t in load_file(tmp_path / "dst" / "model.safetensors").items())
    (src / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"00002-of-00002\.safetensors does not exist"):
        convert_megalodon_hf(src, tmp_path / "other")
    (src / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(ConversionError, match="weight_map to files of its own folder"):
        convert_megalodon_hf(src, tmp_path / "other")


def test_vocabulary_size_may_be_left_to_the_tokenizer(tmp_path: Path) -> None:
    info, tensors = load("model_small_plain")
    state = under(tensors, "state_dict.")
    src = write_upstream(tmp_path / "src", {**info["config"], "vocab_size": -1}, {"model": state})
    assert convert_upstream(src, tmp_path / "dst").vocab_size == 31
    assert math.isclose(AutoConfig.from_pretrained(tmp_path / "dst").norm_eps, 1e-5)


def test_tied_head_may_be_absent_but_must_not_differ(tmp_path: Path) -> None:
    info, tensors = load("model_small_share_emb")
    state = under(tensors, "state_dict.")
    head = state.pop("output.output.weight")
    convert_upstream(write_upstream(tmp_path / "a", info["config"], state), tmp_path / "dst")
    src = write_upstream(tmp_path / "b", info["config"], {**state, "output.output.weight": head + 1})
    with pytest.raises(ConversionError, match=r"output.output.weight and embed.weight differ"):
        convert_upstream(src, tmp_path / "other")


# ---- what is refused -------------------------------------------------------------------------------------------------


def assert_nothing_written(root: Path) -> None:
    assert {path.name for path in root.iterdir()} <= {"src"}


def test_every_wrong_tensor_is_listed_and_nothing_written(tmp_path: Path) -> None:
    info, tensors = load("model_small_plain")
    state: dict[str, Any] = under(tensors, "state_dict.")
    del state["layers.0.mega.wz.bias"], state["layers.1.nffn.fc1.weight"]
    state["layers.0.mega.gamma"] = state["layers.0.mega.gamma"][:, :-1]
    state["embed.weight"] = state["embed.weight"].to(torch.int8)
    state["layers.1.mega.beta"] = "nothing"
    state["layers.7.extra"] = torch.zeros(1)
    with pytest.raises(ConversionError) as caught:
        convert_upstream(write_upstream(tmp_path / "src", info["config"], state), tmp_path / "dst")
    message = str(caught.value)
    assert "2 missing: layers.0.mega.wz.bias, layers.1.nffn.fc1.weight" in message
    assert "3 misshapen: embed.weight is int8 (31, 32), expected floating point (31, 32)" in message
    assert "layers.0.mega.gamma is float32 (2, 15), expected floating point (2, 16)" in message
    assert "layers.1.mega.beta is a str, expected a tensor" in message
    assert "1 unknown: layers.7.extra" in message
    assert_nothing_written(tmp_path)


def test_long_lists_are_cut(tmp_path: Path) -> None:
    info, tensors = load("hf_base")
    state = {f"x{i:02}.{key}": t for i, (key, t) in enumerate(under(tensors, "state_dict.").items())}
    with pytest.raises(ConversionError) as caught:
        convert_megalodon_hf(write_hf(tmp_path / "src", info["config"], state), tmp_path / "dst")
    assert "more. " in str(caught.value)
    assert str(caught.value).count("expected") == 0
    assert str(caught.value).count(": x00") == 1
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("source", "function", "advice"),
    [
        ("hf_base", convert_upstream, "use: python -m megalodon_export convert megalodon-hf SRC DST"),
        ("model_small_plain", convert_megalodon_hf, "use: python -m megalodon_export convert upstream SRC DST"),
    ],
)
def test_other_kind_of_folder(tmp_path: Path, source: str, function: Callable[..., Any], advice: str) -> None:
    src = write_checkpoint(source, tmp_path / "src")
    with pytest.raises(ConversionError, match=advice):
        function(src, tmp_path / "dst")
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("function", [convert_upstream, convert_megalodon_hf])
def test_folder_without_a_checkpoint(tmp_path: Path, function: Callable[..., Any], folders: Any) -> None:
    (tmp_path / "src").mkdir()
    with pytest.raises(ConversionError, match=r"config\.json does not exist; expected a checkpoint folder"):
        function(tmp_path / "src", tmp_path / "dst")
    (tmp_path / "src" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConversionError, match="model_type is 'llama'"):
        function(tmp_path / "src", tmp_path / "dst")
    (tmp_path / "src" / "config.json").write_text("[1")
    with pytest.raises(ConversionError, match="cannot be read as JSON"):
        function(tmp_path / "src", tmp_path / "dst")
    with pytest.raises(ConversionError, match="already converted"):
        function(folders("hf_base"), tmp_path / "dst")
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("name", "parts"),
    [("model_base", 2), ("model_base", 4), ("model_allflags", 2), ("model_small_norm_noaffine", 2)],
)
def test_model_parallel_parts_are_put_together(
    tmp_path: Path, folders: Callable[[str], Path], name: str, parts: int
) -> None:
    info, tensors = load(name)
    src = write_upstream(tmp_path / "src", info["config"], under(tensors, "state_dict."), parts=parts)
    convert_upstream(src, tmp_path / "dst")
    whole, merged = (load_file(folder / "model.safetensors") for folder in (folders(name), tmp_path / "dst"))
    assert whole.keys() == merged.keys()
    assert all(torch.equal(tensor, merged[key]) for key, tensor in whole.items())


def test_broken_parts_are_refused(tmp_path: Path) -> None:
    info, tensors = load("model_small_plain")
    src = write_upstream(tmp_path / "src", info["config"], under(tensors, "state_dict."), parts=2)
    last = torch.load(src / "consolidated.01.pth", weights_only=True)
    layer = "layers.0.mega."
    broken: list[tuple[dict[str, Any], str]] = [
        ({f"{layer}rmsnorm.weight": last[f"{layer}rmsnorm.weight"] + 1}, "rmsnorm.weight should be the same in every"),
        ({f"{layer}wv.weight": last[f"{layer}wv.weight"][1:]}, "the pieces of layers.0.mega.wv.weight should have one"),
        ({"extra": torch.ones(1)}, "one of parts 0 and 1 lacks what the other has: extra"),
    ]
    for change, message in broken:
        torch.save({**last, **change}, src / "consolidated.01.pth")
        with pytest.raises(ConversionError, match=message):
            convert_upstream(src, tmp_path / "dst")
    (src / "consolidated.01.pth").unlink()
    with pytest.raises(ConversionError, match=r"consolidated\.01\.pth does not exist"):
        convert_upstream(src, tmp_path / "dst")
    for count in (0, "two", 1):
        (src / "consolidate_config.json").write_text(json.dumps({"model_parallel_size": count, "dtype": "bf16"}))
        with pytest.raises(ConversionError, match=r"model_parallel_size is|consolidated\.pth does not exist"):
            convert_upstream(src, tmp_path / "dst")
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(("kernel", "drop_key"), [(None, False), ("swift", True), ("fused", True)])
def test_fused_attention_of_the_original_drops_keys(tmp_path: Path, kernel: str | None, drop_key: bool) -> None:
    info, tensors = load("model_small_plain")
    config = {**info["config"], "efficient_attn": kernel}
    src = write_upstream(tmp_path / "src", config, under(tensors, "state_dict."))
    assert convert_upstream(src, tmp_path / "dst").drop_key == drop_key
    assert AutoConfig.from_pretrained(tmp_path / "dst").drop_key == drop_key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": 4}, "unknown keys in section model: window_size"),
        ({"z_dim": 15}, "z_dim 15"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_upstream_config_is_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    info, tensors = load("model_small_plain")
    src = write_upstream(tmp_path / "src", {**info["config"], **change}, under(tensors, "state_dict."))
    with pytest.raises(ConversionError, match=message):
        convert_upstream(src, tmp_path / "dst")
    assert_nothing_written(tmp_path)


def test_hf_option_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    info, tensors = load("hf_base")
    src = write_hf(tmp_path / "src", {**info["config"], "max_cache_len": 8}, under(tensors, "state_dict."))
    with pytest.raises(ConversionError, match="max_cache_len is 8, expected at least chunk_size 16"):
        convert_megalodon_hf(src, tmp_path / "dst")
    assert_nothing_written(tmp_path)


class Payload:
    """What an attacker's pickle would hold: a call, made while it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_payload_is_refused(tmp_path: Path, zipped: bool) -> None:
    src = write_checkpoint("model_small_plain", tmp_path / "src")
    state = {"embed.weight": torch.zeros(31, 32), "payload": Payload(tmp_path / "executed")}
    torch.save(state, src / "consolidated.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConversionError, match="holds more than tensors and is refused"):
        convert_upstream(src, tmp_path / "dst")
    other = write_checkpoint("hf_base", tmp_path / "src" / "hf")
    (other / "model.safetensors").unlink()
    torch.save(state, other / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConversionError, match="holds more than tensors and is refused"):
        convert_megalodon_hf(other, tmp_path / "dst")
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x80\x02}q\x00."])
def test_damaged_weights_are_refused(tmp_path: Path, content: bytes) -> None:
    upstream = write_checkpoint("model_small_plain", tmp_path / "src" / "a")
    hf = write_checkpoint("hf_base", tmp_path / "src" / "b")
    (upstream / "consolidated.pth").write_bytes(content)
    (hf / "model.safetensors").write_bytes(content)
    with pytest.raises(ConversionError):
        convert_upstream(upstream, tmp_path / "dst")
    with pytest.raises(ConversionError, match="is damaged"):
        convert_megalodon_hf(hf, tmp_path / "dst")
    (upstream / "consolidated.pth").unlink()
    with pytest.raises(ConversionError, match=r"consolidated.pth does not exist"):
        convert_upstream(upstream, tmp_path / "dst")
    assert_nothing_written(tmp_path)


def test_existing_destination(tmp_path: Path) -> None:
    src = write_checkpoint("model_small_plain", tmp_path / "src")
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "precious").write_text("kept")
    with pytest.raises(ConversionError, match="exists and is not an empty folder"):
        convert_upstream(src, dst)
    assert [path.name for path in dst.iterdir()] == ["precious"]
    (dst / "precious").unlink()
    convert_upstream(src, dst)
    assert (dst / "model.safetensors").is_file()


def test_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = write_checkpoint("model_small_plain", tmp_path / "src")

    def fail(self: m.MegalodonForCausalLM, folder: Path) -> None:
        Path(folder).mkdir(exist_ok=True)
        raise OSError("no space left on device")

    monkeypatch.setattr(m.MegalodonForCausalLM, "save_pretrained", fail)
    with pytest.raises(ConversionError, match="no space left"):
        convert_upstream(src, tmp_path / "dst")
    assert_nothing_written(tmp_path)
