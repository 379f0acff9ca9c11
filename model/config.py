"""Sizes and switches of a Megalodon model: one validated object, and the presets of the original."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

EMAForm = Literal["blocked", "fft"]
NormStatistics = Literal["megalodon", "megalodon-hf"]
WeightFormat = Literal["float", "int8", "int4"]
QUANTIZED_FORMATS: tuple[WeightFormat, ...] = ("int8", "int4")

BLOCK = 32  # T, tokens per block of the EMA and of prefix sums: prefill pads its tokens to whole blocks

# Keys that only megalodon-hf writes into a config.json with the same model_type.
_MEGALODON_HF_KEYS = ("max_positions", "efficient_attn")


@dataclass
class ModelConfig:
    """What the modules of `model/` are built from; the letters are those of the comments there.

    | field | letter | |
    |---|---|---|
    | `vocab_size` | | rows of the embedding |
    | `output_size` | V | width of the logits; -1 is `vocab_size` |
    | `model_dim` | D | features of a token |
    | `num_heads` | H | attention heads |
    | `z_dim` | Z | features of queries and keys, all heads |
    | `value_dim` | E | features of values, all heads |
    | `ffn_hidden_dim` | F | hidden features of the feed-forward network |
    | `cema_ndim` | N | modes of the complex EMA in each channel |
    | `chunk_size` | C | tokens that attend to each other |
    | `norm_num_groups` | G | groups of features in TimestepNorm |

    `rope_base` None is 10000. `norm_statistics` "megalodon" is the original's running variance; "megalodon-hf" is that
    port's variance of the group means alone, at least 1e-6, whose sum of squared deviations starts at 1. `norm_affine`
    gives RMSNorm and LayerNorm weights. `swiglu` multiplies the feed-forward network's hidden features by a third
    product, fc3. `rescale_nffn` scales its output by a learned alpha. `scale_emb` multiplies embeddings by sqrt(D).
    `share_emb` makes the head the embedding. `init_mode` is how weights of linear layers are initialised: "he", "bert",
    "gaussian", "xavier" or "none". `projection_bias` adds biases to wh2, fc1, fc2 and fc3, as megalodon-hf has them.

    `dropout` applies to the embedding and to what a block adds,
    `hidden_dropout` to what is inside a block, `attention_dropout` to attention weights, or to keys with `drop_key`.
    `max_cache_len` (tokens, at least C) and `cache_unbounded` let cached calls attend beyond the chunk, as megalodon-hf
    can: to the last `max_cache_len` keys, or to all. `ema_prefill` picks how prefill evaluates the complex EMA,
    "blocked" (Toeplitz blocks) or "fft"; both give the same numbers. `weight_format` is what linear layers hold:
    "float" (the model's dtype), "int8", or "int4" with one scale for `group_size` features of an output feature.

    Raises ValueError that names every invalid value. Source: arXiv 2404.08801.
    """

    vocab_size: int = 32_000
    model_dim: int = 1024
    num_layers: int = 12
    num_heads: int = 1
    z_dim: int = 256
    value_dim: int = 2048
    ffn_hidden_dim: int = 2560
    cema_ndim: int = 16
    chunk_size: int = 2048
    norm_num_groups: int = 32
    norm_affine: bool = True
    norm_eps: float = 1e-5
    norm_statistics: NormStatistics = "megalodon"
    rope_base: float | None = None
    swiglu: bool = False
    rescale_nffn: bool = False
    scale_emb: bool = False
    share_emb: bool = False
    output_size: int = -1
    projection_bias: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    drop_key: bool = False
    init_mode: str = "he"
    ema_prefill: EMAForm = "blocked"
    use_cache: bool = True
    max_cache_len: int | None = None
    cache_unbounded: bool = False
    weight_format: WeightFormat = "float"
    group_size: int = 32
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.max_cache_len == self.chunk_size:
            self.max_cache_len = None
        self.check()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The config in a config.json or a manifest; what other libraries write beside its fields is left out.

        ValueError for invalid values, and for a config of megalodon-hf, which computes other statistics.
        """
        refuse_megalodon_hf(values)
        return cls(**{f.name: values[f.name] for f in fields(ModelConfig) if f.name in values})

    @property
    def z_head_dim(self) -> int:
        """dz, the size of one head's query and key."""
        return self.z_dim // self.num_heads

    @property
    def value_head_dim(self) -> int:
        """dv, the size of one head's value."""
        return self.value_dim // self.num_heads

    @property
    def attention_window(self) -> float | None:
        """Keys that a query of a cached call sees: None for those of its chunk, infinity for all that came before."""
        return math.inf if self.cache_unbounded else self.max_cache_len

    @property
    def head_is_embedding(self) -> bool:
        """Whether the head and the embedding are one tensor; a quantised head is always a tensor of its own."""
        return self.share_emb and self.weight_format == "float"

    @property
    def logits_size(self) -> int:
        """Width of the head: output_size, or the vocabulary's size."""
        return self.vocab_size if self.output_size == -1 else self.output_size

    def check(self) -> None:
        """ValueError that names every invalid value."""
        problems = []
        for name in (
            *("vocab_size", "model_dim", "num_layers", "num_heads", "z_dim", "value_dim", "ffn_hidden_dim"),
            *("cema_ndim", "chunk_size", "norm_num_groups", "group_size"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                problems.append(f"{name} is {value!r}, expected a whole number of at least 1")
        if not problems:
            problems += self._shape_problems()
            if self.max_cache_len is not None and (self.cache_unbounded or self.max_cache_len < self.chunk_size):
                problems.append(
                    f"max_cache_len is {self.max_cache_len}, expected at least chunk_size {self.chunk_size} (with "
                    "fewer, megalodon-hf's queries see later tokens), and None with cache_unbounded"
                )
        for name in ("dropout", "attention_dropout", "hidden_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                problems.append(f"{name} is {getattr(self, name)!r}, expected 0 <= {name} < 1")
        if not self.norm_eps > 0:
            problems.append(f"norm_eps is {self.norm_eps!r}, expected a positive number")
        if self.rope_base is not None and not self.rope_base > 0:
            problems.append(f"rope_base is {self.rope_base!r}, expected None (10000) or a positive number")
        choices = {
            "norm_statistics": ("megalodon", "megalodon-hf"),
            "ema_prefill": ("blocked", "fft"),
            "init_mode": ("he", "bert", "gaussian", "xavier", "none"),
            "weight_format": ("float", *QUANTIZED_FORMATS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                problems.append(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        if problems:
            raise ValueError("invalid Megalodon config: " + "; ".join(problems))

    def _shape_problems(self) -> list[str]:
        problems = []
        if self.z_dim % (2 * self.num_heads):
            problems.append(
                f"z_dim {self.z_dim} over num_heads {self.num_heads} must be a whole even number (rotary pairs)"
            )
        if self.value_dim % self.num_heads:
            problems.append(f"value_dim {self.value_dim} must be divisible by num_heads {self.num_heads}")
        if self.model_dim % self.norm_num_groups:
            problems.append(f"model_dim {self.model_dim} must be divisible by norm_num_groups {self.norm_num_groups}")
        if self.output_size != -1 and self.output_size < 1:
            problems.append(f"output_size is {self.output_size}, expected -1 (the vocabulary's) or at least 1")
        if self.share_emb and self.logits_size != self.vocab_size:
            problems.append(
                f"share_emb ties the head to the embedding, so output_size must be -1 or vocab_size {self.vocab_size}, "
                f"not {self.output_size}"
            )
        if self.weight_format == "int4":
            for name in ("model_dim", "value_dim", "ffn_hidden_dim"):
                if getattr(self, name) % (2 * self.group_size):
                    problems.append(
                        f"{name} is {getattr(self, name)}, expected a multiple of twice group_size {self.group_size}: "
                        "int4 packs the halves of a row into the same bytes; choose a smaller group_size, or int8"
                    )
        return problems


def refuse_megalodon_hf(values: Mapping[str, Any]) -> None:
    """ValueError if the values are a config of megalodon-hf, which has the same model_type."""
    foreign = [key for key in _MEGALODON_HF_KEYS if key in values]
    if foreign:
        raise ValueError(
            f"this config is megalodon-hf's (it has {', '.join(foreign)}), which computes other statistics under "
            "other names; convert the checkpoint first: python -m megalodon_export convert megalodon-hf SRC DST"
        )


_7B = {"num_layers": 32, "model_dim": 4096, "num_heads": 4, "z_dim": 1024, "value_dim": 8192, "norm_num_groups": 64}
_1B = {"num_layers": 24, "model_dim": 2048, "num_heads": 2, "z_dim": 512, "value_dim": 4096, "norm_num_groups": 64}

# The sizes of the original's models. Everything else is ModelConfig's default (chunk_size 2048, cema_ndim 16).
PRESETS: dict[str, dict[str, Any]] = {
    "200M": {},
    "1.3B": {**_1B, "ffn_hidden_dim": 4864},
    "1.3B-pg19": {**_1B, "ffn_hidden_dim": 3584, "swiglu": True, "scale_emb": True, "share_emb": True},
    "7.1B": {**_7B, "ffn_hidden_dim": 11264},
    "7.3B": {**_7B, "ffn_hidden_dim": 8192, "swiglu": True},
}
