"""The original's checkpoints (XuezheMax/megalodon), in one part or several, converted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..transformers_api.config import MegalodonConfig
from .merge_shards import merge_parts
from .reading import ConversionError, read_config, read_json, read_pth
from .tensors import Layout, Recipe, check_output, convert, make_config, rename

# Keys of the original's config and their defaults there; megalodon-hf has the same, with three other defaults.
UPSTREAM_DEFAULTS: dict[str, Any] = {
    **{"num_layers": 8, "model_dim": 1024, "z_dim": 256, "value_dim": 2048, "num_heads": 1, "ffn_hidden_dim": 2048},
    **{"cema_ndim": 16, "chunk_size": 2048, "init_mode": "he", "vocab_size": -1, "output_size": -1},
    **{"norm_num_groups": 32, "norm_affine": True, "norm_eps": 1e-5, "rope_base": None},
    **{"dropout": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    **{"swiglu": False, "rescale_nffn": False, "scale_emb": False, "share_emb": False},
}
# How the original computes or trains, not what: kernels (but see drop_key), recomputation, the parallel loss.
_UPSTREAM_INERT_KEYS = frozenset({"efficient_attn", "layerwise_ckpt", "custom_bwd", "loss_parallel"})

# Ours -> theirs, applied in order to a tensor's name.
_UPSTREAM_NAMES = (
    ("model.embed.", "embed."),
    ("model.norm.", "output.final_norm."),
    ("lm_head.", "output.output."),
    ("model.layers.", "layers."),
    (".attn.", ".mega."),
    (".ffn.", ".nffn."),
)
# Buffers: the rotary frequencies follow from the config, and no statistics are learned before the first token.
_UPSTREAM_INERT = re.compile(r"rope\.freqs|.*norm\.prior_(count|mean|logv)")


def convert_upstream(src: Path, dst: Path, dtype: torch.dtype | None = None) -> MegalodonConfig:
    """Convert a checkpoint of the original (config.json, consolidate_config.json, consolidated.pth) to the folder dst.

    Of a checkpoint in N model-parallel parts the weights are consolidated.00.pth, .01.pth and so on.
    `dtype` float32 or bfloat16, by default the source's; the complex EMA's parameters stay float32. `dst` must not
    exist or be empty. Raises ConversionError, with nothing written. Source: XuezheMax/megalodon, reloading.py.
    """
    src, dst = Path(src), Path(dst)
    check_output(dst, dtype)
    raw = read_config(src, "upstream")
    unknown = sorted(raw["model"].keys() - UPSTREAM_DEFAULTS.keys() - _UPSTREAM_INERT_KEYS)
    if unknown:
        raise ConversionError(
            f"{src / 'config.json'}: unknown keys in section model: {', '.join(unknown)}; they may change what the "
            f"model computes. Known: {', '.join(sorted(UPSTREAM_DEFAULTS.keys() | _UPSTREAM_INERT_KEYS))}"
        )
    tensors = _read_parts(src, read_json(src / "consolidate_config.json").get("model_parallel_size", 1))
    settings = {key: raw["model"].get(key, default) for key, default in UPSTREAM_DEFAULTS.items()}
    settings["drop_key"] = raw["model"].get("efficient_attn") is not None  # its fused attention drops keys, not weights
    if settings["vocab_size"] == -1:  # the original takes it from its tokenizer; the embedding has the same number
        embedding = tensors.get("embed.weight")
        if not isinstance(embedding, Tensor) or embedding.dim() != 2:
            raise ConversionError(f"{src} sets no vocab_size and has no embed.weight (V, D) that would tell it")
        settings["vocab_size"] = embedding.shape[0]
    config = make_config(src, settings)
    return convert(src, dst, config, tensors, Layout(_upstream_recipe, _UPSTREAM_INERT), dtype)


def rotary_order(config: MegalodonConfig) -> Tensor:
    """Order (Z) that turns interleaved rotary pairs (2j, 2j+1) into halves (j, j + dz/2), head by head."""
    dz = config.z_head_dim
    head = torch.cat([torch.arange(0, dz, 2), torch.arange(1, dz, 2)])
    return (torch.arange(config.num_heads)[:, None] * dz + head).flatten()


def _upstream_recipe(name: str, shape: torch.Size, config: MegalodonConfig) -> Recipe:
    def copy(t: Tensor) -> Tensor:
        return t

    def reorder_rows(t: Tensor) -> Tensor:
        return t[rotary_order(config)]

    def reorder_columns(t: Tensor) -> Tensor:
        return t[:, rotary_order(config)]

    build = copy
    if name.endswith((".attn.wz.weight", ".attn.wz.bias")):
        build = reorder_rows
    elif name.endswith((".attn.gamma", ".attn.beta")):
        build = reorder_columns
    return Recipe((rename(name, _UPSTREAM_NAMES),), (tuple(shape),), build)


def _read_parts(src: Path, count: Any) -> dict[str, Any]:
    """The state dict of a consolidated checkpoint, its model-parallel parts put together."""
    if count == 1:
        return read_pth(src / "consolidated.pth")
    if not isinstance(count, int) or count < 1:
        raise ConversionError(
            f"{src / 'consolidate_config.json'}: model_parallel_size is {count!r}, expected a whole number from 1 on"
        )
    try:
        return merge_parts([read_pth(src / f"consolidated.{part:02d}.pth") for part in range(count)])
    except ValueError as error:
        raise ConversionError(f"{src}: {error}") from error
