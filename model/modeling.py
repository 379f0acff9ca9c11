"""The language model: an embedding, blocks, a final norm and a head, in two passes.

    prefill   new tokens of each row, any number of them      token_ids (B, L), lengths (B), cache
    decode    one token of each row                           token_ids (B), cache

Both update the cache in place. Source: arXiv 2404.08801, and XuezheMax/megalodon where the two differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backend import Backend
from .blocking import first, padding_to
from .blocks import MegalodonBlock
from .cache import FinalCache, ModelCache
from .compiled import CompiledBackend
from .config import BLOCK, ModelConfig
from .constants import unfreeze_constants
from .norm import TimestepNorm
from .plan import PrefillPlan
from .quantized import use_quantized_layers
from .rotary import Rotary, RotaryTable

Observer = Callable[[Tensor], Tensor]
SUPPORTED_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float64)


def check_dtype(dtype: torch.dtype, supported: tuple[torch.dtype, ...] = SUPPORTED_DTYPES) -> None:
    """TypeError unless the model can run in `dtype`."""
    if dtype not in supported:
        raise TypeError(
            f"Megalodon does not run in {str(dtype).removeprefix('torch.')}: its running statistics and products "
            "overflow or lose precision there; load it with dtype=torch.bfloat16 or torch.float32 (float64 for tests)"
        )


class Megalodon(nn.Module):
    """Embedding, blocks and final TimestepNorm: token ids in, hidden states out."""

    block_class: type[MegalodonBlock] = MegalodonBlock
    rotary_class: type[RotaryTable] = RotaryTable
    cache_class: type[ModelCache] = ModelCache
    config: Any  # a ModelConfig
    layers: Sequence[MegalodonBlock]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.build(config)

    def build(self, config: ModelConfig) -> None:
        """Make the submodules.

        This is apart from `__init__` because transformers' subclass runs `PreTrainedModel.__init__` first.
        """
        self.config = config
        self.backend = Backend()
        self.supported_dtypes = SUPPORTED_DTYPES  # an exporter whose runtime keeps statistics in float32 may add to it
        self.embed = nn.Embedding(config.vocab_size, config.model_dim)
        self.rotary = self.rotary_class(config.z_head_dim, config.chunk_size, config.rope_base)
        blocks = (self.block_class(config, i) for i in range(config.num_layers))
        self.layers = nn.ModuleList(blocks)  # type: ignore[assignment]  # which is no Sequence to a type checker
        self.norm = TimestepNorm(config.model_dim, config.norm_num_groups, config.norm_eps, config.norm_statistics)
        use_quantized_layers(self, config)

    def prefill(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        cache: ModelCache | None = None,
        max_length: int | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """Run `lengths` (B) tokens of each row of token_ids (B, L) -> hidden states (B, L, D).

        With a cache, the rows go on from it; without one they start fresh. Hidden states at and after a row's length
        are 0. A length of 0 leaves the row's cache as it is. `max_length` bounds L where L is symbolic (torch.compile,
        torch.export): it decides what is static in the graph.

        token_ids may be rows of the embedding instead, (B, L, D). `observe` is called with what each layer takes,
        (B, L rounded up to whole blocks, D), and the layer takes what it returns.
        """
        position, ring = (None, None) if cache is None else (cache.position, cache.slots)
        x, plan, rotary = self.begin_prefill(token_ids, lengths, position, ring, max_length)
        for i, layer in enumerate(self.layers):
            x = x if observe is None else observe(x)
            x = self.backend.prefill_layer(layer, x, plan, rotary, None if cache is None else cache.layers[i])
        x = self.end_prefill(x, plan, None if cache is None else cache.final)
        return first(x, 1, token_ids.shape[1])

    def decode(self, token_ids: Tensor, cache: ModelCache, observe: Observer | None = None) -> Tensor:
        """Run one token of each row, token_ids (B) -> hidden states (B, D). `observe` is as in `prefill`."""
        x, rotary = self.begin_decode(token_ids, cache.position)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = x if observe is None else observe(x)
            x = self.backend.step_layer(layer, x, cache.position, rotary, layer_cache)
        return self.end_decode(x, cache.final)

    # Both passes in three stages, which exporters compile one by one: begin, every layer alike, end.

    def begin_prefill(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        position: Tensor | None = None,
        ring: int | None = None,
        max_length: int | None = None,
    ) -> tuple[Tensor, PrefillPlan, Rotary]:
        """What the first layer takes, x (B, L, D) with L rounded up to whole blocks, and what all layers share.

        `position` (B) and `ring`, the number of slots, are the cache's; None without a cache.
        """
        check_dtype(self.dtype_of_weights, self.supported_dtypes)
        ring, start = ring or self.config.chunk_size, torch.zeros_like(lengths) if position is None else position
        length, bound = self.backend.prefill_sizes(token_ids.shape[1], ring)
        max_length = bound if max_length is None else max_length + padding_to(max_length, BLOCK)
        features = (0, 0) * (token_ids.dim() - 2)  # of rows of the embedding
        token_ids = F.pad(token_ids, (*features, 0, length - token_ids.shape[1]))  # once, so that no layer has to
        rotary = self.rotary(start[:, None] + torch.arange(length, device=token_ids.device))
        plan = PrefillPlan.of(lengths, start, length, ring, max_length, cached=position is not None)
        return self.embed_tokens(token_ids), plan, rotary

    def end_prefill(self, x: Tensor, plan: PrefillPlan, cache: FinalCache | None) -> Tensor:
        """The last layer's x (B, L, D) -> hidden states (B, L, D). The cache's statistics and position move on."""
        x = self.backend.prefill_norm(self.norm, x, plan, cache)
        if cache is not None:
            cache.position.copy_(plan.tokens.position + plan.tokens.lengths)
        return x

    def begin_decode(self, token_ids: Tensor, position: Tensor) -> tuple[Tensor, Rotary]:
        """What the first layer takes, x (B, D), and the rotary angles that all layers share."""
        check_dtype(self.dtype_of_weights, self.supported_dtypes)
        return self.backend.begin_step(self, token_ids, position)

    def end_decode(self, x: Tensor, cache: FinalCache) -> Tensor:
        """The last layer's x (B, D) -> hidden states (B, D). The cache's statistics and position move on."""
        return self.backend.step_norm(self.norm, x, cache)

    @property
    def embedding_scale(self) -> float:
        """What rows of the embedding are multiplied by: sqrt(D) with `scale_emb`."""
        return math.sqrt(self.config.model_dim) if self.config.scale_emb else 1.0

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Scaled rows of the embedding, with dropout in training: token_ids (...), or rows of it -> (..., D)."""
        x: Tensor = token_ids if token_ids.is_floating_point() else self.embed(token_ids)
        if self.config.scale_emb:
            x = x * self.embedding_scale
        return F.dropout(x, self.config.dropout) if self.training else x

    @property
    def dtype_of_weights(self) -> torch.dtype:
        """The dtype of everything but the complex EMA's parameters, which stay in float32, and quantised weights."""
        return self.embed.weight.dtype

    def new_cache(self, batch: int) -> ModelCache:
        """A fresh cache for `batch` streams, in the model's dtype and on its device."""
        return self.cache_class.allocate(self.config, batch, self.dtype_of_weights, self.embed.weight.device)

    def compile(self, **options: Any) -> None:  # type: ignore[override]  # nn.Module's compiles all layers as one graph
        """Compile the layers in place, with torch.compile's `options`: the first call of each kind compiles one layer.

        It serves all layers, lengths and batches: see `CompiledBackend`.
        """
        self.backend = CompiledBackend(getattr(self.backend, "inner", self.backend), **options)

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train. Training changes the weights, so constants frozen from them are dropped first."""
        if mode:
            unfreeze_constants(self)
        return super().train(mode)


class MegalodonLM(nn.Module):
    """Megalodon with a language-model head: bias-free, and the embedding itself with `share_emb`."""

    model_class: type[Megalodon] = Megalodon

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.build(config)
        if config.head_is_embedding:
            self.lm_head.weight = self.model.embed.weight

    def build(self, config: ModelConfig) -> None:
        """Make the submodules; apart from `__init__` for the reason that `Megalodon.build` gives."""
        self.config: Any = config
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.model_dim, config.logits_size, bias=False)
        use_quantized_layers(self, config)

    def prefill(
        self, token_ids: Tensor, lengths: Tensor, cache: ModelCache | None = None, max_length: int | None = None
    ) -> Tensor:
        """`Megalodon.prefill`, then logits (B, V) of each row's last valid token, in float32."""
        return self.logits(last_valid(self.model.prefill(token_ids, lengths, cache, max_length), lengths))

    def score(
        self, token_ids: Tensor, lengths: Tensor, cache: ModelCache | None = None, max_length: int | None = None
    ) -> Tensor:
        """`Megalodon.prefill`, then logits (B, L, V) of every token, in float32."""
        return self.logits(self.model.prefill(token_ids, lengths, cache, max_length))

    def decode(self, token_ids: Tensor, cache: ModelCache) -> Tensor:
        """`Megalodon.decode`, then logits (B, V) in float32."""
        return self.logits(self.model.decode(token_ids, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: hidden states (..., D) -> logits (..., V) in float32, or in float64 for a float64 model."""
        return self.model.backend.head(self.lm_head, hidden)

    def compile(self, **options: Any) -> None:  # type: ignore[override]
        """As `Megalodon.compile`."""
        self.model.compile(**options)

    @property
    def dtype_of_weights(self) -> torch.dtype:
        """The dtype of everything but the complex EMA's parameters, which stay in float32, and quantised weights."""
        return self.model.dtype_of_weights

    def new_cache(self, batch: int) -> ModelCache:
        """A fresh cache for `batch` streams, in the model's dtype and on its device."""
        return self.model.new_cache(batch)


def last_valid(values: Tensor, lengths: Tensor) -> Tensor:
    """What each row's last valid token has (B, D), from what all tokens have (B, L, D): hidden states, or logits."""
    rows = torch.arange(values.shape[0], device=values.device)
    return values[rows, (lengths - 1).clamp(min=0)]
