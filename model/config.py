"""Configuration of a Megalodon model: one validated, serialisable object, and the presets of the original."""

from __future__ import annotations

import math
from typing import Any, Literal

from transformers import PreTrainedConfig

EMAForm = Literal["blocked", "fft"]
NormStatistics = Literal["megalodon", "megalodon-hf"]
WeightFormat = Literal["float", "int8", "int4"]
QUANTIZED_FORMATS: tuple[WeightFormat, ...] = ("int8", "int4")

# Keys that only megalodon-hf writes into a config.json with the same model_type.
_MEGALODON_HF_KEYS = ("max_positions", "efficient_attn")


class MegalodonConfig(PreTrainedConfig):
    """Sizes and switches of a Megalodon model; letters as in the comments of `model/`.

    Sizes: `model_dim` D, `num_heads` H, `z_dim` Z (queries and keys, all heads), `value_dim` E (values, all heads),
    `ffn_hidden_dim` F, `cema_ndim` N, `norm_num_groups` G, `chunk_size` C (tokens), `vocab_size` V;
    `output_size` is the head's width, -1 for V. `rope_base` None means 10000.
    `norm_statistics` "megalodon" is the original's running variance, "megalodon-hf" that port's (group means alone,
    prior m2 = 1, floor 1e-6). `projection_bias` adds biases to wh2, fc1, fc2, fc3, as megalodon-hf has them.
    `dropout` is of the embedding and of what a block adds, `hidden_dropout` of what is inside a block,
    `attention_dropout` of attention weights, or with `drop_key` of keys (the original's fused attention).
    `max_cache_len` M (tokens, at least C) and `cache_unbounded` let cached calls attend beyond the chunk, as that port
    can (`model/compat/horizon.py`): to the last M keys, to all.
    `ema_prefill` picks how prefill evaluates the complex EMA: "blocked" (Toeplitz blocks) or "fft"; same numbers.
    `weight_format` is what linear layers hold: "float" (the model's dtype), or "int8" or "int4", the latter with one
    scale for `group_size` features of a row (`model/quantized.py`).
    Raises ValueError naming every invalid value. Source: arXiv 2404.08801.
    """

    model_type = "megalodon"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012 - the type that transformers declares
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "ffn_hidden_dim",
    }

    def __init__(
        self,
        vocab_size: int = 32_000,
        model_dim: int = 1024,
        num_layers: int = 12,
        num_heads: int = 1,
        z_dim: int = 256,
        value_dim: int = 2048,
        ffn_hidden_dim: int = 2560,
        cema_ndim: int = 16,
        chunk_size: int = 2048,
        norm_num_groups: int = 32,
        norm_affine: bool = True,
        norm_eps: float = 1e-5,
        norm_statistics: NormStatistics = "megalodon",
        rope_base: float | None = None,
        swiglu: bool = False,
        rescale_nffn: bool = False,
        scale_emb: bool = False,
        share_emb: bool = False,
        output_size: int = -1,
        projection_bias: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        drop_key: bool = False,
        init_mode: str = "he",
        ema_prefill: EMAForm = "blocked",
        use_cache: bool = True,
        max_cache_len: int | None = None,
        cache_unbounded: bool = False,
        weight_format: WeightFormat = "float",
        group_size: int = 32,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        foreign = [key for key in _MEGALODON_HF_KEYS if key in kwargs]
        if foreign:
            raise ValueError(
                f"this config is megalodon-hf's (it has {', '.join(foreign)}), which computes other statistics under "
                "other names; convert the checkpoint first: python -m megalodon_export convert megalodon-hf SRC DST"
            )
        self.vocab_size = vocab_size
        self.model_dim = model_dim
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.z_dim = z_dim
        self.value_dim = value_dim
        self.ffn_hidden_dim = ffn_hidden_dim
        self.cema_ndim = cema_ndim
        self.chunk_size = chunk_size
        self.norm_num_groups = norm_num_groups
        self.norm_affine = norm_affine
        self.norm_eps = norm_eps
        self.norm_statistics = norm_statistics
        self.rope_base = rope_base
        self.swiglu = swiglu
        self.rescale_nffn = rescale_nffn
        self.scale_emb = scale_emb
        self.share_emb = share_emb
        self.output_size = output_size
        self.projection_bias = projection_bias
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.hidden_dropout = hidden_dropout
        self.drop_key = drop_key
        self.init_mode = init_mode
        self.ema_prefill = ema_prefill
        self.use_cache = use_cache
        self.max_cache_len = None if max_cache_len == chunk_size else max_cache_len
        self.cache_unbounded = cache_unbounded
        self.weight_format = weight_format
        self.group_size = group_size
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self._check()
        kwargs["tie_word_embeddings"] = share_emb and weight_format == "float"
        super().__init__(**kwargs)

    @property
    def z_head_dim(self) -> int:
        """dz, the size of one head's query and key."""
        return self.z_dim // self.num_heads

    @property
    def value_head_dim(self) -> int:
        """dv, the size of one head's value."""
        return self.value_dim // self.num_heads

    @property
    def kv_horizon(self) -> float | None:
        """How many keys a cached call reaches back; None inside its chunk, as the original, infinity with no bound."""
        return math.inf if self.cache_unbounded else self.max_cache_len

    @property
    def logits_size(self) -> int:
        """Width of the head: output_size, or the vocabulary's size."""
        return self.vocab_size if self.output_size == -1 else self.output_size

    def _check(self) -> None:
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


_7B = {"num_layers": 32, "model_dim": 4096, "num_heads": 4, "z_dim": 1024, "value_dim": 8192, "norm_num_groups": 64}
_1B = {"num_layers": 24, "model_dim": 2048, "num_heads": 2, "z_dim": 512, "value_dim": 4096, "norm_num_groups": 64}

# The original's model store. Everything else is MegalodonConfig's default (chunk_size 2048, cema_ndim 16).
PRESETS: dict[str, dict[str, Any]] = {
    "200M": {},
    "1.3B": {**_1B, "ffn_hidden_dim": 4864},
    "1.3B-pg19": {**_1B, "ffn_hidden_dim": 3584, "swiglu": True, "scale_emb": True, "share_emb": True},
    "7.1B": {**_7B, "ffn_hidden_dim": 11264},
    "7.3B": {**_7B, "ffn_hidden_dim": 8192, "swiglu": True},
}


def preset(name: str, **overrides: Any) -> MegalodonConfig:
    """The config of a preset of the original, with overrides; KeyError names the presets there are."""
    if name not in PRESETS:
        raise KeyError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return MegalodonConfig(**{**PRESETS[name], **overrides})
