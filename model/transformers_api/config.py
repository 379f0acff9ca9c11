"""The config of a model as transformers reads and writes it."""

from __future__ import annotations

from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..config import PRESETS, ModelConfig, refuse_megalodon_hf
from .remote_code import RegisteredClass, with_own_classes, write_file


class MegalodonConfig(RegisteredClass, PreTrainedConfig, ModelConfig):  # type: ignore[misc]  # both have `from_dict`
    """`ModelConfig` as a PreTrainedConfig: the same fields, by keyword, and those of transformers.

    Raises ValueError that names every invalid value.
    """

    model_type = "megalodon"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012 - the type that transformers declares
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "ffn_hidden_dim",
    }

    def __init__(self, **kwargs: Any) -> None:
        refuse_megalodon_hf(kwargs)
        self._take_aliases(kwargs)
        own = {f.name: kwargs.pop(f.name) for f in fields(ModelConfig) if f.name in kwargs}
        for name, value in vars(ModelConfig(**own)).items():
            setattr(self, name, value)
        kwargs["tie_word_embeddings"] = self.head_is_embedding
        kwargs["auto_map"] = with_own_classes(kwargs.get("auto_map"))
        super().__init__(**kwargs)

    def _take_aliases(self, values: dict[str, Any]) -> None:
        """Put what other libraries call `hidden_size` under its name here; ValueError if it has two values."""
        for alias, name in self.attribute_map.items():
            if alias in values:
                value = values.pop(alias)
                if values.setdefault(name, value) != value:
                    raise ValueError(f"{alias} is {value} and {name} is {values[name]}; they are one size: give one")

    def to_dict(self) -> dict[str, Any]:
        """All fields, and the names by which other libraries look for sizes, such as `hidden_size`."""
        return {**super().to_dict(), **{alias: getattr(self, name) for alias, name in self.attribute_map.items()}}

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that differ from the defaults, each size under one name. config.json holds them."""
        return {name: value for name, value in super().to_diff_dict().items() if name not in self.attribute_map}

    def save_pretrained(self, save_directory: str | PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """As upstream, with the file that `auto_map` names beside config.json."""
        if not Path(save_directory).is_file():  # which upstream refuses
            write_file(Path(save_directory))
        super().save_pretrained(save_directory, push_to_hub, **kwargs)


def preset(name: str, **overrides: Any) -> MegalodonConfig:
    """The config of a preset of the original, with overrides; KeyError names the presets there are."""
    if name not in PRESETS:
        raise KeyError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return MegalodonConfig(**{**PRESETS[name], **overrides})
