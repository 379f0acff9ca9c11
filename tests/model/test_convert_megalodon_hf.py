"""Checkpoints of megalodon-hf as it saves them: pickles, with a head that it ties whatever its size should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megalodon_export.model.conversion import ConversionError, convert_megalodon_hf
from megalodon_export.model.conversion.megalodon_hf import _HF_DEFAULTS
from soak.megalodon_hf import cases
from support.golden_data import load, under

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY = load("hf_base")[0]["config"]["vocab_size"]
EMBEDDING, HEAD = "model.embed.weight", "lm_head.weight"


def write_bin(folder: Path, shards: int = 1, head: Tensor | None = None, zipped: bool = True, **config: Any) -> Path:
    """hf_base as `save_pretrained(safe_serialization=False)` writes it; `head` in place of the embedding."""
    info, tensors = load("hf_base")
    state = under(tensors, "state_dict.")
    state[HEAD] = state[EMBEDDING] if head is None else head
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**info["config"], **config}))
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return folder
    places = {name: f"pytorch_model-{i % shards + 1:05}-of-{shards:05}.bin" for i, name in enumerate(sorted(state))}
    for file in set(places.values()):
        torch.save({name: t for name, t in state.items() if places[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("options", [{}, {"zipped": False}, {"shards": 3}], ids=["whole", "legacy", "shards"])
def test_pickles_are_read(tmp_path: Path, folders: Callable[[str], Path], options: dict[str, Any]) -> None:
    convert_megalodon_hf(write_bin(tmp_path / "src", **options), tmp_path / "dst")
    expected, found = weights(folders("hf_base")), weights(tmp_path / "dst")
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_a_whole_file_comes_before_an_index_and_safetensors_before_pickles(
    tmp_path: Path, folders: Callable[[str], Path]
) -> None:
    src = write_bin(tmp_path / "src")
    (src / "pytorch_model.bin.index.json").write_text("damaged")
    assert convert_megalodon_hf(src, tmp_path / "a").share_emb
    (src / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConversionError, match=r"model\.safetensors is damaged"):
        convert_megalodon_hf(src, tmp_path / "b")


@pytest.mark.parametrize("output_size", [7, 400, None, -1])
def test_a_head_of_output_size_is_the_embedding_all_the_same(tmp_path: Path, output_size: int | None) -> None:
    """transformers 4 puts the embedding into its place; the logits are those of a tied model."""
    src = write_bin(tmp_path / "src", output_size=output_size)
    config = convert_megalodon_hf(src, tmp_path / "dst")
    assert (config.share_emb, config.output_size) == (True, -1)
    assert HEAD not in weights(tmp_path / "dst")
    tensors = load("hf_base")[1]
    name = next(key for key in tensors if key.endswith(".logits") and not key.startswith(("mask.", "stream")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dst").eval()
    with torch.no_grad():
        logits = model(tensors["tokens"][:, : tensors[name].shape[1]]).logits
    assert (logits - tensors[name]).abs().max() < 1e-4


@pytest.mark.parametrize("tie", [None, False])
def test_a_head_of_its_own_is_kept(tmp_path: Path, tie: bool | None) -> None:
    """The head has another shape than the embedding; the config need not say so."""
    more = {} if tie is None else {"tie_word_embeddings": tie}
    src = write_bin(tmp_path / "src", head=torch.ones(5, 48), output_size=5, **more)
    config = convert_megalodon_hf(src, tmp_path / "dst")
    assert (config.share_emb, config.output_size) == (False, 5)
    assert torch.equal(weights(tmp_path / "dst")[HEAD], torch.ones(5, 48))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_size": 5, "head": torch.ones(6, 48)}, r"lm_head\.weight is float32 \(6, 48\), expected .* \(5, 48\)"),
        ({"output_size": 5, "head": torch.ones(VOCABULARY, 48)}, r"lm_head\.weight and model\.embed\.weight differ"),
        ({"head": torch.ones(5, 48)}, r"lm_head\.weight and model\.embed\.weight differ"),
    ],
)
def test_heads_that_fit_nothing(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        convert_megalodon_hf(write_bin(tmp_path / "src", **change), tmp_path / "dst")
    assert {path.name for path in tmp_path.iterdir()} == {"src"}


def test_incomplete_folders(tmp_path: Path) -> None:
    src = write_bin(tmp_path / "src", shards=3)
    index = src / "pytorch_model.bin.index.json"
    whole = index.read_text()
    for content, message in [
        ('{"weight_map": {"x": "../elsewhere.bin"}}', "no weight_map to files of its own folder"),
        ('{"weight_map": {"x": 3}}', "no weight_map to files of its own folder"),
        ('{"weight_map": {}}', "no weight_map to files of its own folder"),
        ("{}", "no weight_map to files of its own folder"),
        ("{", "cannot be read as JSON"),
    ]:
        index.write_text(content)
        with pytest.raises(ConversionError, match=message):
            convert_megalodon_hf(src, tmp_path / "dst")
    index.write_text(whole)
    (src / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(ConversionError, match=r"pytorch_model-00002-of-00003\.bin does not exist"):
        convert_megalodon_hf(src, tmp_path / "dst")
    index.unlink()
    with pytest.raises(ConversionError, match=r"has no model\.safetensors or pytorch_model\.bin, nor an index"):
        convert_megalodon_hf(src, tmp_path / "dst")
    assert {path.name for path in tmp_path.iterdir()} == {"src"}


def test_the_long_comparison_covers_every_option() -> None:
    """`soak/megalodon_hf.py` runs megalodon-hf itself, which needs transformers 4: 28 checkpoints."""
    made = cases(with_defaults=True)
    assert len(made) == 28
    options = set[str]().union(*(case["config"] for case in made.values()))
    assert {*_HF_DEFAULTS, "max_cache_len", "cache_unbounded"} <= options
