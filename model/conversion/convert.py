"""Other people's Megalodon checkpoints, converted to a folder that `AutoModelForCausalLM.from_pretrained` loads.

A layout says for each of our tensors which tensors of the source it is made of; one loader checks all of them before
anything is written. Layouts: the original (XuezheMax/megalodon, in one part or several) and megalodon-hf.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig

from ..transformers_api.config import MegalodonConfig
from ..transformers_api.modeling import MegalodonForCausalLM
from .merge_shards import merge_parts
from .staged_folder import StagingError, staged_folder

OUTPUT_DTYPES = (torch.float32, torch.bfloat16)

_LISTED = 20  # names of a kind in an error
_COMMAND = "python -m megalodon_export convert"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed.weight"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)

# Keys of the original's config and their defaults there; megalodon-hf has the same, with three other defaults.
_UPSTREAM_DEFAULTS: dict[str, Any] = {
    **{"num_layers": 8, "model_dim": 1024, "z_dim": 256, "value_dim": 2048, "num_heads": 1, "ffn_hidden_dim": 2048},
    **{"cema_ndim": 16, "chunk_size": 2048, "init_mode": "he", "vocab_size": -1, "output_size": -1},
    **{"norm_num_groups": 32, "norm_affine": True, "norm_eps": 1e-5, "rope_base": None},
    **{"dropout": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    **{"swiglu": False, "rescale_nffn": False, "scale_emb": False, "share_emb": False},
}
_HF_DEFAULTS = {**_UPSTREAM_DEFAULTS, "num_layers": 12, "ffn_hidden_dim": 2560, "vocab_size": 32_000}
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
_HF_NAMES = ((".rmsnorm.weight", ".rmsnorm.gamma"),)
# Buffers: the rotary frequencies follow from the config, and no statistics are learned before the first token.
_UPSTREAM_INERT = re.compile(r"rope\.freqs|.*norm\.prior_(count|mean|logv)")
_HF_INERT = re.compile(r".*\.inv_freq")


class ConversionError(Exception):
    """A checkpoint that cannot be converted. Nothing was written."""


@dataclass(frozen=True)
class Recipe:
    """How one of our tensors is made: the source's tensors, the shapes they must have, and the function of them."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    build: Callable[..., Tensor]


@dataclass(frozen=True)
class Layout:
    """A kind of checkpoint: the recipe of each of our tensors, and the names of its tensors that mean nothing."""

    recipe: Callable[[str, torch.Size, MegalodonConfig], Recipe]
    inert: re.Pattern[str]


def convert_upstream(src: Path, dst: Path, dtype: torch.dtype | None = None) -> MegalodonConfig:
    """Convert a checkpoint of the original (config.json, consolidate_config.json, consolidated.pth) to the folder dst.

    Of a checkpoint in N model-parallel parts the weights are consolidated.00.pth, .01.pth and so on.
    `dtype` float32 or bfloat16, by default the source's; the complex EMA's parameters stay float32. `dst` must not
    exist or be empty. Raises ConversionError, with nothing written. Source: XuezheMax/megalodon, reloading.py.
    """
    src, dst = Path(src), Path(dst)
    _check_output(dst, dtype)
    raw = _read_config(src, "upstream")
    unknown = sorted(raw["model"].keys() - _UPSTREAM_DEFAULTS.keys() - _UPSTREAM_INERT_KEYS)
    if unknown:
        raise ConversionError(
            f"{src / 'config.json'}: unknown keys in section model: {', '.join(unknown)}; they may change what the "
            f"model computes. Known: {', '.join(sorted(_UPSTREAM_DEFAULTS.keys() | _UPSTREAM_INERT_KEYS))}"
        )
    tensors = _read_parts(src, _read_json(src / "consolidate_config.json").get("model_parallel_size", 1))
    settings = {key: raw["model"].get(key, default) for key, default in _UPSTREAM_DEFAULTS.items()}
    settings["drop_key"] = raw["model"].get("efficient_attn") is not None  # its fused attention drops keys, not weights
    if settings["vocab_size"] == -1:  # the original takes it from its tokenizer; the embedding has the same number
        embedding = tensors.get("embed.weight")
        if not isinstance(embedding, Tensor) or embedding.dim() != 2:
            raise ConversionError(f"{src} sets no vocab_size and has no embed.weight (V, D) that would tell it")
        settings["vocab_size"] = embedding.shape[0]
    config = _make_config(src, settings)
    return _convert(src, dst, config, tensors, Layout(_upstream_recipe, _UPSTREAM_INERT), dtype)


def convert_megalodon_hf(src: Path, dst: Path, dtype: torch.dtype | None = None) -> MegalodonConfig:
    """Convert a checkpoint of megalodon-hf (config.json, model.safetensors or its shards) to the folder dst.

    The converted config selects that port's norm statistics and its additional biases. Otherwise as `convert_upstream`.
    Source: pszemraj/megalodon-hf.
    """
    src, dst = Path(src), Path(dst)
    _check_output(dst, dtype)
    raw = _read_config(src, "megalodon-hf")
    settings = {key: raw.get(key, default) for key, default in _HF_DEFAULTS.items()}
    settings["cache_unbounded"] = bool(raw.get("cache_unbounded"))  # it then ignores max_cache_len
    settings["max_cache_len"] = None if settings["cache_unbounded"] else raw.get("max_cache_len")
    if settings["output_size"] in (None, settings["vocab_size"]):
        settings["output_size"] = -1
    settings["share_emb"] = settings["output_size"] == -1  # it ties whenever the sizes agree, whatever share_emb says
    tokens = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(key) is not None}
    config = _make_config(src, {**settings, **tokens}, norm_statistics="megalodon-hf", projection_bias=True)
    return _convert(src, dst, config, _read_safetensors(src), Layout(_hf_recipe, _HF_INERT), dtype)


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
    return Recipe((_rename(name, _UPSTREAM_NAMES),), (tuple(shape),), build)


def _hf_recipe(name: str, shape: torch.Size, config: MegalodonConfig) -> Recipe:
    dim, ndim = config.model_dim, config.cema_ndim
    theirs = _rename(name, _HF_NAMES)
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


def _rename(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in pairs:
        name = name.replace(ours, theirs)
    return name


def _convert(
    src: Path,
    dst: Path,
    config: MegalodonConfig,
    tensors: Mapping[str, Any],
    layout: Layout,
    dtype: torch.dtype | None,
) -> MegalodonConfig:
    with torch.device("meta"):
        model = MegalodonForCausalLM(config)
    recipes = {name: layout.recipe(name, t.shape, config) for name, t in model.state_dict().items()}
    optional = recipes.pop(_HEAD).names if config.share_emb else ()
    _check_tensors(src, recipes, tensors, layout.inert, optional)
    if optional and optional[0] in tensors:
        _check_tied(src, tensors, optional[0], recipes[_EMBEDDING].names[0])
    used = [tensors[source] for recipe in recipes.values() for source in recipe.names]
    dtype = dtype or _common_dtype(src, used)
    state = {
        name: recipe.build(*(tensors[source] for source in recipe.names)).to(_storage_dtype(name, dtype)).contiguous()
        for name, recipe in recipes.items()
    }
    if config.share_emb:
        state[_HEAD] = state[_EMBEDDING]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    _write(src, dst, model)
    return config


def _check_tensors(
    src: Path,
    recipes: Mapping[str, Recipe],
    tensors: Mapping[str, Any],
    inert: re.Pattern[str],
    optional: tuple[str, ...],
) -> None:
    """One ConversionError with every missing, misshapen and unknown tensor of the source."""
    expected = {n: s for recipe in recipes.values() for n, s in zip(recipe.names, recipe.shapes, strict=True)}
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(
        name for name in tensors.keys() - expected.keys() if name not in optional and not inert.fullmatch(name)
    )
    misshapen = []
    for name, shape in sorted(expected.items()):
        tensor = tensors.get(name)
        if name in tensors and not isinstance(tensor, Tensor):
            misshapen.append(f"{name} is a {type(tensor).__name__}, expected a tensor")
        elif isinstance(tensor, Tensor) and (tuple(tensor.shape) != shape or not tensor.is_floating_point()):
            kind = str(tensor.dtype).removeprefix("torch.")
            misshapen.append(f"{name} is {kind} {tuple(tensor.shape)}, expected floating point {shape}")
    found = {"missing": missing, "misshapen": misshapen, "unknown": unknown}
    parts = [f"{len(names)} {kind}: {_listing(names)}" for kind, names in found.items() if names]
    if parts:
        raise ConversionError(
            f"the tensors of {src} are not those of its config. {'. '.join(parts)}. Nothing was written; check that "
            "config.json belongs to these weights"
        )


def _check_tied(src: Path, tensors: Mapping[str, Any], head: str, embedding: str) -> None:
    if not isinstance(tensors[head], Tensor) or not torch.equal(tensors[head], tensors[embedding]):
        raise ConversionError(
            f"{src} ties its head to the embedding, but {head} and {embedding} differ, and one of them would be lost; "
            "set share_emb (megalodon-hf: output_size) as the model was trained, or drop the unused tensor"
        )


def _listing(names: list[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _common_dtype(src: Path, tensors: list[Tensor]) -> torch.dtype:
    dtypes = {t.dtype for t in tensors}
    unsupported = sorted(str(d).removeprefix("torch.") for d in dtypes - set(OUTPUT_DTYPES))
    if unsupported:
        raise ConversionError(
            f"{src} holds {', '.join(unsupported)} tensors, in which Megalodon does not run; choose what to convert "
            "them to: --dtype bfloat16 or --dtype float32"
        )
    return torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32


def _storage_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    kept = MegalodonForCausalLM._keep_in_fp32_modules_strict or ()
    return torch.float32 if any(module in name.split(".") for module in kept) else dtype


def _make_config(src: Path, settings: dict[str, Any], **fixed: Any) -> MegalodonConfig:
    try:
        return MegalodonConfig(**settings, **fixed)
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{src / 'config.json'}: {error}") from error


def _check_free(dst: Path) -> None:
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ConversionError(f"{dst} exists and is not an empty folder; name another one or remove it")


def _check_output(dst: Path, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise ConversionError(f"cannot convert to {str(dtype).removeprefix('torch.')}; choose bfloat16 or float32")
    _check_free(dst)


def _read_config(src: Path, kind: str) -> dict[str, Any]:
    """config.json of a checkpoint of this kind; ConversionError that names the right command for another kind."""
    config = _read_json(src / "config.json")
    if isinstance(config.get("model"), dict):
        actual = "upstream"
    elif config.get("model_type") != "megalodon":
        raise ConversionError(
            f"{src / 'config.json'} is of no Megalodon: it has no section model (the original) and its model_type is "
            f"{config.get('model_type')!r}, not 'megalodon' (megalodon-hf)"
        )
    elif "norm_statistics" in config:
        raise ConversionError(f"{src} is already converted: AutoModelForCausalLM.from_pretrained loads it as it is")
    else:
        actual = "megalodon-hf"
    if actual != kind:
        raise ConversionError(f"{src} is a checkpoint of kind {actual}, not {kind}; use: {_COMMAND} {actual} SRC DST")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(
            f"{path} does not exist; expected a checkpoint folder: config.json, consolidate_config.json and "
            "consolidated.pth (the original), or config.json and model.safetensors (megalodon-hf)"
        ) from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _read_parts(src: Path, count: Any) -> dict[str, Any]:
    """The state dict of a consolidated checkpoint, its model-parallel parts put together."""
    if count == 1:
        return _read_pth(src / "consolidated.pth")
    if not isinstance(count, int) or count < 1:
        raise ConversionError(
            f"{src / 'consolidate_config.json'}: model_parallel_size is {count!r}, expected a whole number from 1 on"
        )
    try:
        return merge_parts([_read_pth(src / f"consolidated.{part:02d}.pth") for part in range(count)])
    except ValueError as error:
        raise ConversionError(f"{src}: {error}") from error


def _read_pth(path: Path) -> dict[str, Any]:
    """The state dict of a .pth file, memory-mapped; nothing but tensors is unpickled."""
    if not path.is_file():
        raise ConversionError(f"{path} does not exist; consolidate_config.json promises weights there")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConversionError(
            f"{path} is damaged, or holds more than tensors and is refused (a pickle can run any code): {reason}"
        ) from error
    for key in ("model", "state_dict"):  # the original saves the bare state dict; training scripts often wrap it
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, expected a state dict")
    return {str(name): value for name, value in content.items()}


def _read_safetensors(src: Path) -> dict[str, Any]:
    """The tensors of model.safetensors, or of the shards that its index names."""
    files = ["model.safetensors"]
    if (src / "model.safetensors.index.json").is_file():
        weight_map = _read_json(src / "model.safetensors.index.json").get("weight_map")
        if not isinstance(weight_map, dict) or any(Path(str(f)).name != f for f in weight_map.values()):
            raise ConversionError(f"{src / 'model.safetensors.index.json'}: no weight_map to files of its own folder")
        files = sorted(set(weight_map.values()))
    tensors: dict[str, Any] = {}
    for file in files:
        try:
            tensors.update(load_file(src / file))
        except FileNotFoundError:
            raise ConversionError(f"{src / file} does not exist; expected the weights as safetensors") from None
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{src / file} is damaged: {error}") from error
    return tensors


def _write(src: Path, dst: Path, model: MegalodonForCausalLM) -> None:
    """Write the folder whole, or not at all."""
    try:
        with staged_folder(dst, _check_free) as staging:
            model.save_pretrained(staging)
            if (src / "generation_config.json").is_file():
                shutil.copyfile(src / "generation_config.json", staging / "generation_config.json")
            else:
                config = model.config
                ids = {key: getattr(config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
                GenerationConfig(**ids).save_pretrained(staging)
            for name in _TOKENIZER_FILES:
                if (src / name).is_file():
                    shutil.copyfile(src / name, staging / name)
    except (OSError, StagingError) as error:
        raise ConversionError(f"cannot write {dst}: {error}") from error
