"""megalodon-hf's checkpoints (pszemraj/megalodon-hf), converted."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..transformers_api.config import MegalodonConfig
from .reading import read_config, read_safetensors
from .tensors import Layout, Recipe, check_output, convert, make_config, rename
from .upstream import UPSTREAM_DEFAULTS

# megalodon-hf has the keys of the original's config, with three other defaults.
_HF_DEFAULTS = {**UPSTREAM_DEFAULTS, "num_layers": 12, "ffn_hidden_dim": 2560, "vocab_size": 32_000}
_HF_NAMES = ((".rmsnorm.weight", ".rmsnorm.gamma"),)
_HF_INERT = re.compile(r".*\.inv_freq")


def convert_megalodon_hf(src: Path, dst: Path, dtype: torch.dtype | None = None) -> MegalodonConfig:
    """Convert a checkpoint of megalodon-hf (config.json, model.safetensors or its shards) to the folder dst.

    The converted config selects that port's norm statistics and its additional biases. Otherwise as `convert_upstream`.
    Source: pszemraj/megalodon-hf.
    """
    src, dst = Path(src), Path(dst)
    check_output(dst, dtype)
    raw = read_config(src, "megalodon-hf")
    settings = {key: raw.get(key, default) for key, default in _HF_DEFAULTS.items()}
    settings["cache_unbounded"] = bool(raw.get("cache_unbounded"))  # it then ignores max_cache_len
    settings["max_cache_len"] = None if settings["cache_unbounded"] else raw.get("max_cache_len")
    if settings["output_size"] in (None, settings["vocab_size"]):
        settings["output_size"] = -1
    settings["share_emb"] = settings["output_size"] == -1  # it ties whenever the sizes agree, whatever share_emb says
    tokens = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(key) is not None}
    config = make_config(src, {**settings, **tokens}, norm_statistics="megalodon-hf", projection_bias=True)
    return convert(src, dst, config, read_safetensors(src), Layout(_hf_recipe, _HF_INERT), dtype)


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
