"""The eager runtime's model, loaded without transformers, is the one that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megalodon_export.bundles.checkpoints import load_model
from megalodon_export.model import quantize
from megalodon_export.runtimes.eager import ModelRuntime, load_weights
from support.small_models import make_model

CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "one tensor for embedding and head": {"share_emb": True},
    "int8": {"weight_format": "int8"},
    "int4": {"weight_format": "int4", "group_size": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_both_ways_load_the_same_model(tmp_path: Path, case: str) -> None:
    options = dict(CASES[case])
    dtype, weight_format = options.pop("dtype", torch.float32), options.pop("weight_format", None)
    group_size = options.pop("group_size", None)
    make_model(dtype, **options).save_pretrained(tmp_path / "checkpoint")
    model = load_model(tmp_path / "checkpoint", dtype)  # and saved in that dtype, as an export does
    if weight_format is not None:
        quantize(model, weight_format, group_size)
    model.save_pretrained(tmp_path / "bundle")
    expected = load_model(tmp_path / "bundle", dtype)
    found = load_weights(expected.config, tmp_path / "bundle" / "model.safetensors", torch.device("cpu"))
    tensors = expected.state_dict()
    assert found.state_dict().keys() == tensors.keys()
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == tensors[name].dtype, name
        assert torch.equal(tensor, tensors[name]), name
    assert not any(tensor.requires_grad for tensor in found.parameters())
    ids, lengths = torch.tensor([[3, 5, 7, 2], [1, 4, 0, 0]]), torch.tensor([4, 2])
    logits = []
    for runtime in (ModelRuntime(found), ModelRuntime(expected)):
        programs = runtime.bind(runtime.new_cache(2))
        logits.append(torch.stack([programs.prefill(ids, lengths), programs.decode(ids[:, 0])]))
    assert torch.equal(*logits)


def test_float16_weights_run_in_float32(tmp_path: Path) -> None:
    model = make_model(torch.float32)
    model.to(torch.float16).save_pretrained(tmp_path)
    found = load_weights(model.config, tmp_path / "model.safetensors", torch.device("cpu"))
    assert {tensor.dtype for tensor in found.state_dict().values()} == {torch.float32}
