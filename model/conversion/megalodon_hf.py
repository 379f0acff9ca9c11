"""megalodon-hf's checkpoints (pszemraj/megalodon-hf), converted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..transformers_api.config import MegalodonConfig
from .reading import read_config, read_weights
from .tensors import Layout, Recipe, check_output, convert, make_config, rename
from .upstream import UPSTREAM_DEFAULTS

# megalodon-hf has the keys of the original's config, with three other defaults.
_HF_DEFAULTS = {**UPSTREAM_DEFAULTS, "num_layers": 12, "ffn_hidden_dim": 2560, "vocab_size": 32_000}
_HF_NAMES = ((".rmsnorm.weight", ".rmsnorm.gamma"),)
_HF_INERT = re.compile(r".*\.inv_freq")


def convert_megalodon_hf(src: Path, dst: Path, dtype: torch.dtype | None = None) -> MegalodonConfig:
    """Convert a checkpoint of megalodon-hf to the folder dst.

    Its weights are pytorch_model.bin, model.safetensors, or shards of either with an index. The converted config
    selects that port's norm statistics and its additional biases. Otherwise as `convert_upstream`.
    Source: pszemraj/megalodon-hf.
    """
    src, dst = Path(src), Path(dst)
    check_output(dst, dtype)
    raw = read_config(src, "megalodon-hf")
    tensors = read_weights(src)
    settings = {key: raw.get(key, default) for key, default in _HF_DEFAULTS.items()}
    settings["cache_unbounded"] = bool(raw.get("cache_unbounded"))  # it then ignores max_cache_len
    settings["max_cache_len"] = None if settings["cache_unbounded"] else raw.get("max_cache_len")
    settings["share_emb"] = _is_tied(raw, settings, tensors)
    if settings["share_emb"] or settings["output_size"] is None:
        settings["output_size"] = -1
    tokens = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(key) is not None}
    config = make_config(src, {**settings, **tokens}, norm_statistics="megalodon-hf", projection_bias=True)
    return convert(src, dst, config, tensors, Layout(_hf_recipe, _HF_INERT), dtype)


def _is_tied(raw: dict[str, Any], settings: dict[str, Any], tensors: dict[str, Any]) -> bool:
    """Whether the head is the embedding there, whatever `share_emb` says.

    It is if their sizes agree. If they do not, transformers 4 ties them all the same, unless the config says otherwise
    (`tie_word_embeddings`): the head that was made in `output_size` is replaced by the embedding, and so it is saved.
    """
    if settings["output_size"] in (None, -1, settings["vocab_size"]):
        return True
    head, embedding = (tensors.get(name) for name in ("lm_head.weight", "model.embed.weight"))
    if head is None:
        return raw.get("tie_word_embeddings") is not False
    return isinstance(embedding, Tensor) and isinstance(head, Tensor) and head.shape == embedding.shape


def _hf_recipe(name: str, shape: torch.Size, config: MegalodonConfig) -> Recipe:
    dim, ndim = config.model_dim, config.cema_ndim
    theirs = rename(name, _HF_NAMES)
    if name.endswith(".cema.gamma"):
        names = (f"{name}_real", f"{name}_imag")
        return Recipe(names, ((dim, ndim),) * 2, lambda real, imag: torch.stack([real, imag], dim=-1))
    if name.endswith(".cema.omega"):
        return Recipe((theirs,), ((dim,),), lambda t: t[:, None])
    if name.endswith(".ffn.norm.weight"):
        return Recipe((theirs,), (tuple(shape),), lambda t: t.float() - 1)  # our scale is weight + 1
    if match := re.fullmatch(r"model\.layers\.(\d+)\.ffn\.alpha", name):
        alpha = 0.1 * 0.5 ** int(match[1])  # there a number that is not saved, here a learned vector
        return Recipe((), (), lambda: torch.full(shape, alpha))
    if not config.norm_affine and re.search(r"timenorm\.|^model\.norm\.", name):
        return Recipe((), (), lambda: torch.zeros(shape))
    return Recipe((theirs,), (tuple(shape),), lambda t: t)
