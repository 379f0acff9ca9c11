"""The roofline against counts taken from running models, and the harness end to end on a small bundle."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalodon_export.measure.bench import fill
from megalodon_export.measure.roofline import decode_bytes, prefill_flops, visible_tokens, weight_bytes
from megalodon_export.model import freeze_constants, preset
from support.small_models import VARIANTS, full, make_model, random_tokens

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_counted_as_the_model_has_them(variant: str) -> None:
    model = make_model(torch.float32, **VARIANTS[variant])
    freeze_constants(model)
    read = {id(p): p.nbytes for name, p in model.named_parameters() if ".cema." not in name}
    if not model.config.share_emb:
        del read[id(model.model.embed.weight)]
    for name, buffer in model.named_buffers():
        if name.endswith((".cema.frozen.p", ".cema.frozen.q", ".cema.frozen.gamma", ".cema.frozen.omega")):
            read[id(buffer)] = buffer.nbytes
    assert weight_bytes(model.config, torch.float32) == sum(read.values())


def test_bytes_of_a_step() -> None:
    config = preset("200M")
    row = 12 * (2 * 32 * 4 + 1024 * 16 * 2 * 4) + 2 * 32 * 4 + 8  # states
    ring = 12 * (256 + 2048) * 2  # one token's keys and values
    for batch, visible in ((1, 1), (8, 2048), (3, 100.5)):
        expected = weight_bytes(config, torch.bfloat16) + batch * (ring * (visible + 1) + 2 * row + 1024 * 2)
        assert decode_bytes(config, torch.bfloat16, batch, visible).total == expected


@pytest.mark.parametrize("variant", ["plain", "all flags", "megalodon-hf", "many heads", "chunk 3"])
def test_operations_of_a_prefill(variant: str) -> None:
    """PyTorch's counter sees the matrix products; it cannot see what a mask leaves out, so attention is taken apart."""
    model = make_model(torch.float32, **VARIANTS[variant])
    c = model.config
    ids = random_tokens(2, 32)
    linear: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            with FlopCounterMode(display=False) as counter:
                module(torch.zeros(1 if module is model.lm_head else 32, module.in_features))
            linear[name] = counter.get_total_flops()
    assert model.prefill(ids, full(ids)).shape == (2, c.logits_size)
    seen = sum(position % c.chunk_size + 1 for position in range(32))
    attention = c.num_layers * seen * 2 * (c.z_dim + c.value_dim)
    ema = c.num_layers * 32 * c.model_dim * (12 * c.cema_ndim + 2)
    assert prefill_flops(c, 2, 32) == 2 * (sum(linear.values()) + attention + ema)
    head = 2 * c.model_dim * c.logits_size
    assert prefill_flops(c, 2, 32, all_logits=True) - prefill_flops(c, 2, 32) == 2 * 31 * head


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_visible_tokens_are_a_sum(chunk: int) -> None:
    config = preset("200M", chunk_size=chunk)
    for start in range(0, 2 * chunk + 1):
        for tokens in range(0, 3 * chunk):
            expected = sum(position % chunk + 1 for position in range(start, start + tokens))
            assert visible_tokens(config, start, tokens) == expected
    assert prefill_flops(config, 1, 7) + prefill_flops(config, 1, 9, start=7) == (
        prefill_flops(config, 1, 16) + 2 * config.model_dim * config.logits_size
    )


def test_a_filled_cache_holds_no_zeros_and_runs() -> None:
    model = make_model(torch.float32)
    cache = model.new_cache(2)
    fill(cache, 3)
    assert cache.position.tolist() == [3, 3]
    assert all((tensor != 0).all() for tensor in cache.tensors())
    assert model.decode(random_tokens(2), cache).isfinite().all()


@pytest.mark.slow
def test_the_harness_measures_a_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "speed.py", "--bundle", tiny_bundle, "--device", "cpu"]
    command += ["--runtime", "eager", "aoti", "--batch", "1", "9", "--prompt-tokens", "5", "70", "--repeats", "2"]
    command += ["--steps", "4", "--context-tokens", "200", "64", "--process-memory", "--out", tmp_path / "out"]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "speed.json").read_text())
    for name in ("command", "date", "machine", "dtype", "versions", "config", "file_bytes", "process_memory"):
        assert found[name], name
    rows = found["results"]
    prefills = [(r["runtime"], r["batch"], r["prompt_tokens"]) for r in rows if "prefill_seconds" in r]
    assert [key for key in prefills if key[0] == "eager"] == [("eager", b, t) for b in (1, 9) for t in (5, 70)]
    assert [key for key in prefills if key[0] == "aoti"] == [("aoti", 1, t) for t in (5, 70)]
    assert [(r["runtime"], r["batch"]) for r in rows if "decode_seconds" in r] == [
        ("eager", 1),
        ("eager", 9),
        ("aoti", 1),
    ]
    assert all("outside 1..8" in r["error"] for r in rows if "error" in r)  # the bundle's limit
    contexts = [(r["runtime"], r["context_tokens"], r.get("fresh_streams")) for r in found["contexts"]]
    assert contexts == [
        (name, *row)
        for name in ("eager", "aoti")
        for row in ((64, None), (200, None), (64, 2))  # 136 tokens afresh
    ]
    for row in rows + found["contexts"]:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    text = (tmp_path / "out" / "speed.md").read_text()
    assert text == done.stdout.removesuffix("\n")
    assert "## Contexts" in text
    assert "## Not measured" in text
