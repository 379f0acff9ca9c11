"""From the tensors of another implementation to ours: recipes, the checks of every tensor, and the converted folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..disk import cannot_be_written
from ..transformers_api.config import MegalodonConfig
from ..transformers_api.modeling import MegalodonForCausalLM
from .reading import ConversionError
from .staged_folder import StagingError, staged_folder

OUTPUT_DTYPES = (torch.float32, torch.bfloat16)

_LISTED = 20  # names of a kind in an error
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed.weight"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)


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


def convert(
    src: Path,
    dst: Path,
    config: MegalodonConfig,
    tensors: Mapping[str, Any],
    layout: Layout,
    dtype: torch.dtype | None,
) -> MegalodonConfig:
    """Check all tensors of a source, then make ours and write the folder dst; returns `config`.

    `dtype` is that of the weights, by default the source's; the complex EMA's parameters stay float32.
    """
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


def make_config(src: Path, settings: dict[str, Any], **fixed: Any) -> MegalodonConfig:
    """A config from the source's settings."""
    try:
        return MegalodonConfig(**settings, **fixed)
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{src / 'config.json'}: {error}") from error


def _check_free(dst: Path) -> None:
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ConversionError(f"{dst} exists and is not an empty folder; name another one or remove it")


def check_output(dst: Path, dtype: torch.dtype | None) -> None:
    """ConversionError unless dst may be written and dtype is one that weights are stored in."""
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise ConversionError(f"cannot convert to {str(dtype).removeprefix('torch.')}; choose bfloat16 or float32")
    _check_free(dst)


def rename(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    """A tensor's name with every (ours, theirs) replaced, in order."""
    for ours, theirs in pairs:
        name = name.replace(ours, theirs)
    return name


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
    except StagingError as error:
        raise ConversionError(str(error)) from error
    except OSError as error:
        raise ConversionError(cannot_be_written(dst, error)) from error
